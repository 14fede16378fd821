"""Files that rot on the coordinator's disk are found by their digest and made anew, bit for bit."""

from __future__ import annotations

import asyncio

import pytest

from coordinator.audit import Audit
from coordinator.mending import DamagedError


@pytest.fixture(scope="module")
def undisturbed(harness, tmp_path_factory):
    """Digests of the models of a run in which nothing happens."""

    async def run():
        async with harness.fleet(tmp_path_factory.mktemp("undisturbed")) as fleet:
            await fleet.finish()
            return fleet.coordinator.digests()

    return asyncio.run(run())


def flip(fleet, digest):
    """One bit, as a disk would."""
    path = fleet.coordinator.blobs.path(digest)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(data)


def mended(fleet):
    return [e.facts["what"] for e in Audit(fleet.coordinator.records).entries("run")
            if e.event == "mended"]  # fmt: skip


async def test_what_a_device_is_to_fetch_is_cut_again(harness, tmp_path, undisturbed, impatient):
    async with harness.fleet(tmp_path) as fleet:
        await fleet.round()
        taken = await fleet.take()
        task = taken["birch"][1]
        named = task.blobs[0].digest
        flip(fleet, named)
        await fleet.restart()
        assert fleet.coordinator.blobs.is_sound(named)
        assert mended(fleet) == ["what a device is to fetch was damaged and is cut again"]
        await fleet.finish()
        assert fleet.coordinator.digests() == undisturbed


async def test_the_newest_model_is_merged_again(harness, tmp_path, undisturbed, impatient):
    async with harness.fleet(tmp_path) as fleet:
        await fleet.round()
        await fleet.take()
        flip(fleet, fleet.coordinator.model(1)["adapter"].digest)
        await fleet.restart()
        assert mended(fleet) == ["the newest model was damaged and is merged again"]
        assert fleet.coordinator.blobs.is_sound(fleet.coordinator.model(1)["adapter"].digest)
        await fleet.finish()
        assert fleet.coordinator.digests() == undisturbed


async def test_a_device_is_asked_again_for_an_update_that_rotted(
    harness, tmp_path, undisturbed, impatient
):
    async with harness.fleet(tmp_path) as fleet:
        await fleet.round()
        taken = await fleet.take()
        await fleet["ash"].deliver(*taken["ash"])
        flip(fleet, fleet.coordinator.assignment(1, "ash").update_digest)
        await fleet.restart()
        assert fleet.coordinator.assignment(1, "ash").update_digest is None
        assert (await fleet["ash"].take())[1] == taken["ash"][1]
        await fleet.finish()
        assert fleet.coordinator.digests() == undisturbed


async def test_a_rotten_update_is_found_before_its_merge_counts(
    harness, tmp_path, undisturbed, impatient
):
    async with harness.fleet(tmp_path) as fleet:
        await fleet.round()
        taken = await fleet.take()
        for name in ("ash", "birch"):
            await fleet[name].deliver(*taken[name])
        flip(fleet, fleet.coordinator.assignment(1, "birch").update_digest)
        await fleet["cedar"].deliver(*taken["cedar"])
        with pytest.raises(DamagedError, match="is damaged; start again"):
            await asyncio.wait_for(asyncio.shield(fleet.coordinator.driving), 10)
        await fleet.restart()
        assert fleet.coordinator.model(2) is None and fleet.coordinator.state.phase == "open"
        assert fleet.coordinator.state.arrived == {"ash", "cedar"}
        await fleet.finish()
        assert fleet.coordinator.digests() == undisturbed


async def test_a_model_that_cannot_be_made_anew_is_told_in_one_sentence(harness, tmp_path):
    async with harness.fleet(tmp_path) as fleet:
        await fleet.round()
        await fleet.take()
        flip(fleet, fleet.coordinator.model(1)["adapter"].digest)
        flip(fleet, fleet.coordinator.model(0)["adapter"].digest)
        await fleet.coordinator.kill()
        with pytest.raises(DamagedError, match=r"after 1 rounds is damaged.*restore a backup"):
            await fleet.coordinator.start()
        fleet.coordinator.records.close()
