"""The device's copy of the adapter: never silently another, and whole again after anything."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from edge_agent.mirror import Mirror
from protos.mirror import MirrorError, whole_of
from protos.unpacking import unpack
from tests.coordinator.test_downlink import Ends, a_task, first_model, moved


@pytest.fixture
def on(tmp_path):
    return Ends(tmp_path / "ends")


@pytest.fixture
def models():
    rng = np.random.default_rng(5)
    found = [moved(first_model(), rng, 0.05)]
    for _ in range(3):
        found.append(moved(found[-1], rng, 0.003))
    return found


def names(mirror):
    return sorted(path.name for path in mirror._folder.iterdir())


def test_a_mirror_outlives_its_process_and_there_is_one(on, models):
    for round_, model in enumerate(models):
        on.deliver(model, a_task(round_))
        assert names(on.device) == [on.held.digest]
    assert Mirror(on.device._folder).digest == on.held.digest


def test_a_kill_between_fetch_and_step_costs_nothing_and_one_after_it_neither(on, models):
    on.deliver(models[0], a_task(0))
    task = on.sent(models[1], a_task(1))
    on.fetch(on.device.wanted(task.mirror))
    (on.device._folder / "next").write_bytes(b"half a mirror")
    again = Mirror(on.device._folder)
    assert again.digest == task.mirror.base.digest and names(again) == [again.digest]
    assert again.wanted(task.mirror) == tuple(file.blob for file in task.mirror.files)
    assert again.take(on.spec, task, on.folder).name == on.held.digest
    once_more = Mirror(on.device._folder)
    assert once_more.wanted(task.mirror) == (), "the step was taken before the kill"
    assert once_more.take(on.spec, task, on.folder) == once_more.path


def test_of_two_mirrors_that_a_kill_left_the_newer_one_stays(on, models):
    on.deliver(models[0], a_task(0))
    old = on.device.path.read_bytes(), on.device.digest
    on.deliver(models[1], a_task(1))
    (on.device._folder / old[1]).write_bytes(old[0])
    import os

    os.utime(on.device._folder / old[1], (1, 1))
    assert Mirror(on.device._folder).digest == on.held.digest
    assert names(on.device) == [on.held.digest]


@pytest.mark.parametrize("loss", ["wiped", "other", "missed"])
def test_who_lacks_the_base_fetches_the_result_and_has_the_same_bits(on, models, loss, tmp_path):
    on.deliver(models[0], a_task(0))
    if loss == "wiped":
        on.device.clear()
    elif loss == "other":
        (on.device.path).rename(on.device._folder / ("0" * 64))
        on.device = Mirror(on.device._folder)
    else:
        on.sent(models[1], a_task(1))  # and never fetched
    task = on.sent(models[2], a_task(2))
    assert task.mirror.base is not None
    assert on.device.wanted(task.mirror) == (task.mirror.result,)
    on.fetch(on.device.wanted(task.mirror))
    on.device.take(on.spec, task, on.folder)
    assert names(on.device) == [on.held.digest]
    held = unpack(on.blobs.path(on.held.digest).read_bytes(), on.spec, on.held.payload)
    got = whole_of(on.spec, task, on.device.path)
    for name, parts in held.items():
        for part, values in parts.items():
            np.testing.assert_array_equal(got[name][part], values)


def test_a_base_that_rotted_on_disk_is_found_out(on, models):
    on.deliver(models[0], a_task(0))
    data = bytearray(on.device.path.read_bytes())
    data[-3] ^= 1
    on.device.path.write_bytes(data)
    task = on.sent(models[1], a_task(1))
    on.fetch(on.device.wanted(task.mirror))
    with pytest.raises(MirrorError, match="fetch it whole"):
        on.device.take(on.spec, task, on.folder)
    assert on.device.digest == task.mirror.base.digest, "nothing took its place"


def test_a_result_that_rotted_on_disk_is_fetched_again(on, models):
    task, _ = on.deliver(models[0], a_task(0))
    on.device.path.write_bytes(b"rotten")
    assert on.device.wanted(task.mirror) == tuple(f.blob for f in task.mirror.files)


def test_files_of_another_step_are_found_out(on, models):
    on.deliver(models[0], a_task(0))
    task = on.sent(models[1], a_task(1))
    on.fetch(on.device.wanted(task.mirror))
    swapped = dataclasses.replace(task.mirror, files=task.mirror.files[:1])
    with pytest.raises(MirrorError):
        on.device.take(on.spec, dataclasses.replace(task, mirror=swapped), on.folder)
