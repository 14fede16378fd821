"""A served run keeps hostile devices apart, tells them why, and lets them back."""

from __future__ import annotations

import dataclasses
import time

import numpy as np
import pytest

from coordinator.audit import Audit
from coordinator.cli import main
from coordinator.screening_types import Outcome, Quarantine, Screened
from coordinator.store.records import Records
from coordinator.store.screenings import Screenings
from coordinator.web.facts import FactReader
from coordinator.web.pages.screening import screening_view
from edge_agent.link import RefusedError
from protos.contract import Evaluation, LocalReport, Reason
from protos.sketchfleet.v1 import fleet_pb2 as pb


async def lie(device, spec, a):
    """Delivers an update with a report of far more tokens than were asked for."""
    await device.push(a, await device.train(spec, a))
    await device.link.report(
        LocalReport(
            a.assignment_id, "done", evaluations=(Evaluation("slice", "received", 1.0, 0.5, 9),),
            train_examples=10, train_tokens=10**9,
        ),
        10.0,
    )  # fmt: skip


async def play(fleet, liars=()):
    """A round in which these devices lie."""
    taken = await fleet.take()
    number = fleet.coordinator.state.round
    for name, (spec, a) in taken.items():
        await (lie(fleet[name], spec, a) if name in liars else fleet[name].deliver(spec, a))
    await fleet.coordinator.until(
        lambda: fleet.coordinator.state.round > number, f"round {number} merging"
    )
    return number


def merged(fleet, number):
    return {r.assignment.device_id for r in fleet.coordinator.records.assignments("run", number)
            if r.merged_in is not None}  # fmt: skip


async def test_a_device_that_lies_twice_is_kept_apart_told_why_and_released(
    harness, tmp_path, capsys
):
    run = {"name": "run", "seed": 3, "rounds": 8}
    async with harness.fleet(tmp_path, run=run) as fleet:
        first = await play(fleet, ["ash"])
        assert merged(fleet, first) == {"birch", "cedar"}
        detail = fleet.coordinator.records.all_rounds("run")[first].detail
        (why,) = detail["dropped"].values()
        assert "1,000,000,000 trained tokens" in why
        await play(fleet, ["ash"])
        answer = await fleet["ash"].poll(wait_s=5.0)
        assert answer.kind == pb.NextTaskResponse.KIND_ASSIGNMENT
        assert "in quarantine since round 1" in answer.message and "tokens" in answer.message
        assert not (await fleet["birch"].poll(wait_s=5.0)).message
        await fleet.restart()  # it is kept
        await fleet.coordinator.until(lambda: fleet.coordinator.state.phase == "open", "the round")
        shadow = await play(fleet)
        assert merged(fleet, shadow) == {"birch", "cedar"}
        records = fleet.coordinator.records
        facts = FactReader(records, "run")()
        assert [q.quarantine.clean for q in facts.quarantines] == [1]
        page = screening_view(facts)
        assert page.figures[0].value == "1" and page.quarantines.rows[0][0].text == "ash"
        state = str(fleet.coordinator.config.server.state)
        assert main(["quarantine", "--state", state]) == 0
        assert "ash" in capsys.readouterr().out
        assert main(["release", "ash", "--state", state]) == 0
        back = await play(fleet)
        assert "ash" in merged(fleet, back)
        assert main(["release", "ash", "--state", state]) == 1
        assert "not in quarantine" in capsys.readouterr().err
        events = [e.event for e in Audit(records).entries("run")]
        assert events.count("screened out") == 2 and events.count("quarantined") == 1


async def test_two_updates_for_one_assignment_keep_the_first_and_quarantine(harness, tmp_path):
    async with harness.fleet(tmp_path) as fleet:
        taken = await fleet.take()
        spec, a = taken["ash"]
        device = fleet["ash"]
        first = await device.train(spec, a)
        kept = first.read_bytes()
        await device.push(a, first)
        other = device.write_update(spec, a, harness.make_delta(await device.start(spec, a), 99))
        assert other.read_bytes() != kept
        for _ in range(2):  # asking again changes nothing
            with pytest.raises(RefusedError) as told:
                await device.push(a, other)
            assert told.value.reason is Reason.EQUIVOCATION
        await device.report(spec, a)
        for name in ("birch", "cedar"):
            await fleet[name].deliver(*taken[name])
        await fleet.coordinator.until(lambda: fleet.coordinator.state.round == 1, "the merge")
        records = fleet.coordinator.records
        assert {
            r.assignment.device_id for r in records.assignments(a.run_id, 0)
            if r.merged_in is not None
        } == {"birch", "cedar"}  # fmt: skip
        (held,) = Screenings(records).quarantines()
        assert "two different updates for round 0" in held.quarantine.reason
        (entry,) = [e for e in Audit(records).entries() if e.event == "second update"]
        assert entry.facts["first"] == records.assignment(a.assignment_id).update_digest
        assert entry.facts["second"] != entry.facts["first"]


def test_what_is_kept_is_what_was_found(tmp_path):
    records = Records(tmp_path / "db")
    store = Screenings(records)
    mark = np.array([0.5, -0.25, 0.0, 1.0], np.float32)
    said = Screened("run.0.a", "a", 0, False, False, ("why",), 0.1, None, 7, mark)
    held = Quarantine("a", 0, "why", 3)
    store.keep("run", Outcome((said,), (held,), (), ()), time.time())
    store.keep("run", Outcome((said,), (), (), (dataclasses.replace(held, clean=1),)), time.time())
    memory = store.memory("run", 1)
    (back,) = memory.past
    for name in (f.name for f in dataclasses.fields(Screened) if f.name != "signature"):
        assert getattr(back, name) == getattr(said, name)
    np.testing.assert_array_equal(back.signature, mark)
    assert memory.quarantined["a"].clean == 1 and memory.offences == {"a": 1}
    assert not store.memory("run", 0).past  # nothing of the round itself, should it be done again
    assert not store.impose("run", held, 0.0), "one at a time"
    store.keep("run", Outcome((), (), ("a",), ()), time.time())
    assert not store.standing() and store.memory("run", 1).offences == {"a": 1}
    assert store.key("run") == store.key("run") != store.key("other")
    records.close()
