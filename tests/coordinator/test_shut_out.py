"""A device that an operator revokes while a run is served: rounds go on without it."""

from __future__ import annotations

import asyncio

from coordinator.store.members import Members


async def test_no_round_is_planned_with_a_device_that_was_revoked(harness, tmp_path):
    clock = harness.Clock()
    async with harness.fleet(tmp_path, clock=clock, round={"min_devices": 2}) as fleet:
        run, staying = fleet.coordinator, [fleet["ash"], fleet["birch"]]
        taken = await asyncio.gather(*(device.take() for device in staying))
        await fleet["cedar"].poll(profile=fleet["cedar"].profile)  # it would be in the next round
        members = Members(run.records)  # as `revoke` does, from another process
        members.put_member("cedar", "revoked", "", "", clock())
        members.close()
        clock.now += 6
        for device, given in zip(staying, taken, strict=True):
            await device.deliver(*given)
        (_, next_one), _ = await asyncio.gather(*(device.take() for device in staying))
        assert next_one.round == 1
        planned = {r.assignment.device_id for r in run.records.assignments("run", 1)}
        assert planned == {"ash", "birch"}
