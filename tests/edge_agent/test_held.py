"""Whoever reads what the agent holds of the fleet's model gets a whole one, at any moment."""

from __future__ import annotations

import threading
from dataclasses import replace

import numpy as np
import pytest

from edge_agent import held
from edge_agent.adapters import newest_adapter
from edge_agent.held import HeldError, keep, read_held
from protos.contract import BlobRef, Payload
from protos.packing import pack
from protos.transfer import sha256_of
from tests.coordinator.test_downlink import RANK, SPEC, Ends, a_task, first_model, moved


@pytest.fixture
def state(tmp_path):
    folder = tmp_path / "state"
    (folder / "blobs").mkdir(parents=True)
    return folder


def stored(state, model, rank=RANK, parts=("up", "down")):
    """Some parts of a model as a fetched blob."""
    payload = Payload(rank, "float32", parts)
    some = {name: {p: values[p] for p in parts} for name, values in model.items()}
    path = state / "blobs" / "new"
    path.write_bytes(pack(SPEC, payload, some))
    blob = BlobRef(sha256_of(path), path.stat().st_size, payload)
    path.rename(state / "blobs" / blob.digest)
    return blob


SCALE = SPEC.scale(RANK)


def product(model, name, scale=SCALE):
    return scale * model[name]["up"].T.astype(np.float64) @ model[name]["down"]


def products(adapter):
    return {n: adapter.scale * up.T.astype(np.float64) @ d for n, (up, d) in
            adapter.factors.items()}  # fmt: skip


def test_a_step_of_the_mirror_that_brings_all_rows_is_kept_without_a_copy(tmp_path, state) -> None:
    ends, rng = Ends(tmp_path / "ends"), np.random.default_rng(1)
    model = moved(first_model(), rng, 0.1)
    task, _ = ends.deliver(model, a_task(3, evaluates_global=True))
    keep(state, SPEC, task, ends.device.path)
    found = read_held(state)
    assert found is not None and found.round == 3
    assert (state / "held" / ends.device.digest).samefile(ends.device.path)
    ends.device.clear()  # as at the end of a run
    for name, got in products(found.whole()).items():
        want = product(model, name)
        assert np.linalg.norm(got - want) < 0.01 * np.linalg.norm(want)


def test_a_step_that_leaves_rows_as_they_were_is_not(tmp_path, state) -> None:
    ends, rng = Ends(tmp_path / "ends"), np.random.default_rng(1)
    first, second = moved(first_model(), rng, 0.1), moved(first_model(), rng, 0.1)
    task, _ = ends.deliver(first, a_task(0, evaluates_global=True))
    keep(state, SPEC, task, ends.device.path)
    part, _ = ends.deliver(second, a_task(1, k=RANK // 2))
    keep(state, SPEC, part, ends.device.path)
    assert read_held(state).round == 0 and len(list((state / "held").iterdir())) == 2
    whole, _ = ends.deliver(second, a_task(2, k=RANK))
    keep(state, SPEC, whole, ends.device.path)
    assert read_held(state).round == 2, "all rows, though nothing was to be measured"
    assert {p.name for p in (state / "held").iterdir()} == {ends.device.digest, "held.json"}


def test_files_of_single_parts_and_a_branch_make_one_adapter(state) -> None:
    rng = np.random.default_rng(2)
    model, side = moved(first_model(), rng, 0.1), moved(first_model(), rng, 0.1)
    side = {n: {p: v[:3] for p, v in parts.items()} for n, parts in side.items()}
    files = tuple(stored(state, model, parts=(part,)) for part in ("up", "down"))
    branch = stored(state, side, rank=3)
    task = a_task(4, evaluates_global=True, global_adapter=files, global_side=branch)
    keep(state, SPEC, task, None)
    found = newest_adapter(state)
    assert found is not None and found.whose == "fleet" and found.adapter.rank == RANK + 3
    for name, got in products(found.adapter).items():
        want = product(model, name) + product(side, name, 1.0)
        np.testing.assert_allclose(got, want, atol=1e-4)


def test_a_branch_alone_is_the_model_where_adapters_start_anew(state) -> None:
    side = moved(first_model(), np.random.default_rng(3), 0.1)
    task = a_task(1, evaluates_global=True, global_side=stored(state, side), fresh=True)
    keep(state, SPEC, task, None)
    for name, got in products(read_held(state).whole()).items():
        np.testing.assert_allclose(got, product(side, name, 1.0), atol=1e-4)


def test_what_cannot_be_used_is_told(state) -> None:
    assert read_held(state) is None and newest_adapter(state) is None
    blob = stored(state, first_model(), parts=("down",))
    facts = {"evaluates_global": True, "global_adapter": (blob,)}
    keep(state, SPEC, a_task(1, personal=("up",), **facts), None)
    with pytest.raises(HeldError, match=r"keeps up on each device.*own"):
        newest_adapter(state, whose="fleet")
    keep(state, SPEC, a_task(2, **facts), None)
    path = state / "held" / blob.digest
    data = bytearray(path.read_bytes())
    data[200] ^= 1
    path.write_bytes(data)
    with pytest.raises(HeldError, match="is damaged; the next round mends it"):
        newest_adapter(state)
    (state / "held/held.json").write_text('{"version": 9}')
    with pytest.raises(HeldError, match="another release's"):
        newest_adapter(state)
    (state / "held/held.json").write_text("{")
    with pytest.raises(HeldError, match=r"held\.json cannot be read"):
        newest_adapter(state)


def test_where_there_are_no_hard_links_it_is_copied(state, monkeypatch) -> None:
    def no_links(*_):
        raise OSError(95, "not supported")

    monkeypatch.setattr(held.os, "link", no_links)
    blob = stored(state, first_model())
    keep(state, SPEC, a_task(1, evaluates_global=True, global_adapter=(blob,)), None)
    assert read_held(state).whole().round == 1
    assert not (state / "held" / blob.digest).samefile(state / "blobs" / blob.digest)


def test_a_reader_meets_a_whole_adapter_however_often_it_is_replaced(state) -> None:
    rng = np.random.default_rng(4)
    models = [moved(first_model(), rng, 0.1) for _ in range(3)]
    files = [stored(state, model) for model in models]
    tasks = [a_task(r, evaluates_global=True, global_adapter=(f,)) for r, f in enumerate(files)]
    keep(state, SPEC, tasks[0], None)
    ended = threading.Event()

    def replace_all_the_time() -> None:
        while not ended.is_set():
            for task in tasks:
                keep(state, SPEC, task, None)

    agent = threading.Thread(target=replace_all_the_time)
    agent.start()
    try:
        for _ in range(30):
            found = newest_adapter(state)
            name = SPEC.modules[0].name
            want = product(models[found.adapter.round], name)
            np.testing.assert_allclose(products(found.adapter)[name], want, atol=1e-4)
    finally:
        ended.set()
        agent.join()


def test_keeping_again_what_is_kept_leaves_no_part_files(state) -> None:
    blob = stored(state, first_model())
    task = a_task(1, evaluates_global=True, global_adapter=(blob,))
    keep(state, SPEC, task, None)
    keep(state, SPEC, replace(task, round=2), None)
    assert {p.name for p in (state / "held").iterdir()} == {blob.digest, "held.json"}
    assert read_held(state).round == 2
