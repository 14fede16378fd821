"""Told to stop, a coordinator sends everybody away, ends what is under way, and begins nothing."""

from __future__ import annotations

import asyncio
import time

from protos.sketchfleet.v1 import fleet_pb2 as pb


async def test_who_waits_is_sent_away_at_once_and_nothing_is_handed_out(harness, tmp_path):
    async with harness.fleet(tmp_path) as fleet:
        taken = await fleet.take()
        await fleet["ash"].deliver(*taken["ash"])
        waiting = asyncio.create_task(fleet["ash"].poll(wait_s=9.0))
        await asyncio.sleep(0.1)
        began = time.monotonic()
        await fleet.coordinator.engine.drain(1.0)
        answer = await waiting
        assert (answer.kind, answer.message) == (
            pb.NextTaskResponse.KIND_WAIT, "the coordinator restarts; it comes back"
        )  # fmt: skip
        assert time.monotonic() - began < 2.0
        assert (await fleet["birch"].poll()).kind == pb.NextTaskResponse.KIND_WAIT


async def test_what_arrives_meanwhile_is_merged_and_the_next_process_goes_on(
    harness, tmp_path, impatient
):
    async with harness.fleet(tmp_path) as fleet:
        taken = await fleet.take()
        for name in ("ash", "birch"):
            await fleet[name].deliver(*taken[name])
        await fleet.coordinator.engine.drain(0.0)
        await fleet["cedar"].deliver(*taken["cedar"])  # its upload was under way
        await fleet.coordinator.engine.drain(5.0)
        assert fleet.coordinator.model(1) is not None, "the merge was to come to its end"
        await asyncio.sleep(0.7)  # ticks
        assert len(fleet.coordinator.records.all_rounds("run")) == 1, "another round was begun"
        await fleet.restart()
        await fleet.finish()
