"""One run from the first poll to the last, whatever comes late, twice, wrong, or not at all."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
import math
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from coordinator.audit import Audit
from coordinator.engine import Engine
from coordinator.issuing import recorded_plans
from coordinator.merge import Merger, StoredUpdate
from coordinator.report import build_report
from coordinator.serve import build_spec, load_recorded, open_state
from edge_agent.link import RefusedError
from protos.contract import LocalReport, Progress, Reason, RefusalError
from protos.layout import packed_bytes
from protos.sketchfleet.v1 import fleet_pb2 as pb
from protos.transfer import crc32
from protos.unpacking import unpack

LATE_FLEET = {"round": {"quorum": 0.6}, "run": {"rounds": 4}}
AFTER_DEADLINE_S = 13.0  # a round of 10 s and its grace


@pytest.fixture(scope="session")
def undisturbed(harness, tmp_path_factory):
    """Digests of the models of a run in which nothing happens."""

    async def run():
        async with harness.fleet(tmp_path_factory.mktemp("undisturbed")) as fleet:
            await fleet.finish()
            return fleet.coordinator.digests()

    return asyncio.run(run())


async def test_three_unequal_devices_finish_a_run(harness, tmp_path):
    async with harness.fleet(tmp_path) as fleet:
        done = await fleet.finish()
        run = fleet.coordinator
        ks = {name: done[name][0].rank for name in done}
        assert ks["ash"] == harness.RANK and len(set(ks.values())) > 1, (
            f"unequal devices were to get unequal sketches, got {ks}"
        )
        for name, given in done.items():
            assert [a.round for a in given] == [0, 1, 2, 3]
            assert [a.trains for a in given] == [True, True, True, False]
            measured = [a.evaluates_global and bool(a.global_adapter) for a in given]
            assert measured == [True, False, True, True], f"{name} measured in {measured}"
        assert run.state.phase == "finished" and run.engine.told_finished()
        assert len(set(run.digests())) == 4, "every round was to change the adapter"
        for record in run.records.assignments("run"):
            expected = record.assignment.round if record.assignment.trains else None
            assert record.merged_in == expected and record.complete
        report = build_report(run.records, "run")
        assert report.rounds_merged == 3 and report.plain()["finished"]
        assert [r.device_id for r in report.rows] == list(harness.NAMES)
        assert report.before is not None and report.after is not None


async def test_a_device_that_is_not_measured_is_asked_to_measure_itself(harness, tmp_path):
    async with harness.fleet(tmp_path, names=("ash",)) as fleet:
        answer = await fleet["ash"].poll()
        assert answer.kind == pb.NextTaskResponse.KIND_PROFILE
        assert answer.profile_request.rank == harness.RANK // 4
        stale = replace(fleet["ash"].profile.compute, base_digest="0" * 64)
        answer = await fleet["ash"].poll(profile=replace(fleet["ash"].profile, compute=stale))
        assert answer.kind == pb.NextTaskResponse.KIND_PROFILE, "measured with another base"


@pytest.mark.parametrize("order", list(itertools.permutations(("ash", "birch", "cedar")))[1:])
async def test_the_adapter_is_the_same_whatever_the_order_of_arrival(
    harness, tmp_path, undisturbed, order
):
    async with harness.fleet(tmp_path) as fleet:
        for number in range(3):
            turn = number % len(order)
            await fleet.round(order[turn:] + order[:turn])
        await fleet.coordinator.until(
            lambda: fleet.coordinator.digests()[-1] is not None, "the last merge"
        )
        assert fleet.coordinator.digests() == undisturbed


async def test_a_run_replayed_from_its_plans_gives_the_same_adapter(harness, tmp_path, undisturbed):
    async with harness.fleet(tmp_path / "first") as first:
        await first.finish()
        plans = recorded_plans(first.coordinator.records.assignments("run"))
    (tmp_path / "plans.json").write_text(json.dumps(plans))
    recorded = load_recorded(tmp_path / "plans.json")
    # Fresh measurements would plan otherwise: here the fast and the slow have changed places.
    others = {"ash": {"up_bps": 6000.0}, "cedar": {}}
    async with harness.fleet(tmp_path / "again", recorded=recorded, profiles=others) as again:
        done = await again.finish()
        assert {name: given[0].rank for name, given in done.items()} == {
            p["plan"]["device_id"]: p["plan"]["rank"] for p in plans if p["round"] == 0
        }
        assert again.coordinator.digests() == undisturbed


async def test_a_replay_waits_for_the_devices_it_was_recorded_with(harness, tmp_path):
    async with harness.fleet(tmp_path / "first", names=("ash", "birch"),
                             round={"min_devices": 2}) as first:  # fmt: skip
        await first.round()
        plans = recorded_plans(first.coordinator.records.assignments("run"))
    (tmp_path / "plans.json").write_text(json.dumps(plans))
    recorded = load_recorded(tmp_path / "plans.json")
    async with harness.fleet(tmp_path / "again", names=("ash", "birch"), recorded=recorded,
                             round={"min_devices": 1}) as again:  # fmt: skip
        ash, birch = again["ash"], again["birch"]
        answer = await ash.poll(profile=ash.profile)
        assert answer.kind == pb.NextTaskResponse.KIND_WAIT, "planned without a recorded device"
        await birch.poll(profile=birch.profile)
        assert (await ash.take())[1].round == 0


async def test_fedit_gives_everybody_the_whole_rank(harness, tmp_path):
    method = {"name": "fedit"}
    async with harness.fleet(tmp_path, method=method, profiles={}, run={"rounds": 2}) as fleet:
        done = await fleet.finish()
        assert {a.rank for given in done.values() for a in given if a.trains} == {harness.RANK}
        assert len(set(fleet.coordinator.digests())) == 3, "every round was to change the adapter"


async def test_fedit_equals_fslora_bit_for_bit_when_every_ratio_is_one(harness, tmp_path):
    digests = {}
    for method in ("fedit", "fslora"):
        async with harness.fleet(
            tmp_path / method, method={"name": method}, profiles={},
            wire={"update": "float32"}, run={"rounds": 2},
        ) as fleet:  # fmt: skip
            await fleet.finish()
            digests[method] = fleet.coordinator.digests()
    assert digests["fedit"] == digests["fslora"]


# --- restarts -----------------------------------------------------------------------------------


async def test_a_restart_in_an_open_round_loses_nothing(harness, tmp_path, undisturbed, impatient):
    async with harness.fleet(tmp_path) as fleet:
        await fleet.round()
        taken = await fleet.take()
        ash, birch, cedar = (fleet[name] for name in harness.NAMES)
        await ash.deliver(*taken["ash"])
        spec, a = taken["birch"]
        await birch.push(a, await birch.train(spec, a))  # its report is still to come
        await fleet.restart()
        assert fleet.coordinator.state.phase == "open"
        assert fleet.coordinator.state.arrived == {"ash"}
        again = await cedar.take()
        assert again[1] == taken["cedar"][1], "the same round was to ask for the same again"
        await birch.report(spec, a)
        await cedar.deliver(*taken["cedar"])
        await fleet.finish()
        assert fleet.coordinator.digests() == undisturbed


@pytest.mark.parametrize("before", [True, False], ids=["before-publishing", "after-publishing"])
async def test_a_restart_around_a_merge_gives_the_same_adapter(
    harness, tmp_path, undisturbed, impatient, before
):
    async with harness.fleet(tmp_path) as fleet:
        await fleet.round()
        taken = await fleet.take()
        # After it: the first thing that is read once it is committed.
        fleet.coordinator.cut_power("publish_round" if before else "model_digests", before=True)
        for name in harness.NAMES:
            await fleet[name].deliver(*taken[name])
        await fleet.coordinator.died()
        await fleet.coordinator.start()
        assert fleet.coordinator.state.phase == ("merging" if before else "gathering")
        await fleet.finish()
        assert fleet.coordinator.digests() == undisturbed


async def test_a_restart_before_the_round_is_stored_plans_it_again(
    harness, tmp_path, undisturbed, impatient
):
    async with harness.fleet(tmp_path) as fleet:
        taken = await fleet.take()
        fleet.coordinator.cut_power("open_round", before=True)
        for name in harness.NAMES:
            await fleet[name].deliver(*taken[name])
        await fleet.coordinator.died()
        await fleet.coordinator.start()
        await fleet.finish()
        assert fleet.coordinator.digests() == undisturbed


async def test_a_restart_clears_what_was_half_written(harness, tmp_path, impatient):
    async with harness.fleet(tmp_path) as fleet:
        await fleet.round()
        drafts = fleet.coordinator.blobs.root / "drafts"
        await fleet.coordinator.kill()
        (drafts / "half").write_bytes(b"a model that was being merged")
        await fleet.coordinator.start()
        assert not (drafts / "half").exists()
        await fleet.finish()
        assert not list(drafts.iterdir()), "merges and slices were to leave none"


async def test_an_outage_does_not_count_against_a_round(harness, tmp_path, impatient):
    clock = harness.Clock()
    async with harness.fleet(tmp_path, clock=clock) as fleet:
        await fleet.take()
        deadline = fleet.coordinator.state.deadline_at_s
        await fleet.coordinator.kill()
        clock.now += 3600
        await fleet.coordinator.start()
        assert fleet.coordinator.state.deadline_at_s >= deadline + 3590


async def test_a_restart_of_a_finished_run_says_so(harness, tmp_path, impatient):
    async with harness.fleet(tmp_path, names=("ash",), run={"rounds": 1},
                             round={"min_devices": 1}) as fleet:  # fmt: skip
        await fleet.finish()
        digests = fleet.coordinator.digests()
        await fleet.restart()
        answer = await fleet["ash"].poll(wait_s=5.0)
        assert answer.kind == pb.NextTaskResponse.KIND_RUN_FINISHED
        assert fleet.coordinator.digests() == digests


async def test_a_run_is_not_continued_with_another_adapter(harness, tmp_path):
    async with harness.fleet(tmp_path, names=()) as fleet:
        kept = fleet.coordinator.config
    spec, shape = build_spec(kept, Path(kept.model.base))
    records, blobs = open_state(kept.server.state)
    try:
        with pytest.raises(RefusalError, match=r"another base, adapter or seed; restore run\.toml"):
            Engine(kept, replace(spec, rank=4), shape, records, blobs)
    finally:
        records.close()


# --- late updates -------------------------------------------------------------------------------


async def close_without_cedar(fleet, clock):
    """Round 0 with ash and birch only; returns what cedar was to do and its trained update."""
    taken = await fleet.take()
    spec, a = taken["cedar"]
    update = await fleet["cedar"].train(spec, a)
    await fleet["ash"].deliver(*taken["ash"])
    await fleet["birch"].deliver(*taken["birch"])
    clock.now += AFTER_DEADLINE_S
    return spec, a, update


async def round_opened(fleet, number):
    """Until that round is open."""
    state = fleet.coordinator
    await state.until(lambda: (state.state.round, state.state.phase) == (number, "open"),
                      f"round {number}")  # fmt: skip


async def test_a_late_update_counts_in_the_next_round_at_a_discount(harness, tmp_path):
    clock = harness.Clock()
    async with harness.fleet(tmp_path, clock=clock, **LATE_FLEET) as fleet:
        run, cedar = fleet.coordinator, fleet["cedar"]
        spec, a, update = await close_without_cedar(fleet, clock)
        await round_opened(fleet, 1)
        receipt, outcome = await cedar.push(a, update)
        assert outcome == "late" and receipt.startswith("run.0.cedar:")
        await cedar.report(spec, a)
        await fleet.round()
        await round_opened(fleet, 2)
        assert run.assignment(0, "cedar").merged_in == 1

        def stored(round_, name, discount):
            record = run.assignment(round_, name)
            return StoredUpdate(name, record.assignment, run.blobs.path(record.update_digest),
                                record.report.train_examples * discount)  # fmt: skip

        fresh = [stored(1, name, 1.0) for name in harness.NAMES]
        late = stored(0, "cedar", 1 / math.sqrt(2))
        merger = Merger(spec, run.config.make_method(), run.config.make_server_optimizer(),
                        run.reader, lambda role: tmp_path / role)  # fmt: skip
        expected = merger.merge(1, 2, run.reader(1), [*fresh, late]).files
        assert [(role, sha256(f.path.read_bytes())) for role, f in expected.items()] == list(
            run.digests()[2]
        )


async def test_an_update_older_than_the_run_accepts_is_refused(harness, tmp_path):
    clock = harness.Clock()
    async with harness.fleet(tmp_path, clock=clock, **LATE_FLEET) as fleet:
        _, a, update = await close_without_cedar(fleet, clock)
        await round_opened(fleet, 1)
        await fleet.round()
        await round_opened(fleet, 2)
        with pytest.raises(RefusedError, match="comes 2 rounds late, this run accepts 1") as told:
            await fleet["cedar"].push(a, update)
        assert told.value.reason is Reason.TOO_LATE
        assert fleet.coordinator.assignment(0, "cedar").merged_in is None


@pytest.mark.parametrize("when", ["while-merging", "after-the-restart"])
async def test_a_late_update_counts_even_if_the_coordinator_died_while_merging(
    harness, tmp_path, impatient, when
):
    clock = harness.Clock()
    async with harness.fleet(tmp_path, clock=clock, **LATE_FLEET) as fleet:
        run, cedar = fleet.coordinator, fleet["cedar"]
        merging = asyncio.Event()

        async def never_ends(effect):
            merging.set()
            await asyncio.Event().wait()

        run.engine._close = never_ends
        spec, a, update = await close_without_cedar(fleet, clock)
        await asyncio.wait_for(merging.wait(), 10)
        if when == "after-the-restart":
            await fleet.restart()
        assert run.state.phase == "merging"
        await cedar.push(a, update)
        await cedar.report(spec, a)
        if when == "while-merging":
            await fleet.restart()
        await fleet.round()
        await round_opened(fleet, 2)
        assert run.assignment(0, "cedar").merged_in == 1


async def test_what_was_refused_as_too_late_stays_out_after_a_restart(harness, tmp_path, impatient):
    clock = harness.Clock()
    async with harness.fleet(tmp_path, clock=clock, **LATE_FLEET) as fleet:
        run, cedar = fleet.coordinator, fleet["cedar"]
        spec, a, update = await close_without_cedar(fleet, clock)
        await round_opened(fleet, 1)
        await cedar.push(a, update)  # in time, but its report comes two rounds later
        await fleet.round()
        await round_opened(fleet, 2)
        await cedar.report(spec, a)
        assert run.state.late == ()
        await fleet.restart()
        assert run.state.late == (), "a restart was to change nothing"


# --- weights ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fairness", "power"), [({"weights": "samples"}, 0), ({"weights": "q-ffl", "q": 2.0}, 2)]
)
async def test_updates_weigh_what_their_reports_say(harness, tmp_path, fairness, power):
    async with harness.fleet(tmp_path, fairness=fairness, run={"rounds": 1}) as fleet:
        await fleet.finish()
        run = fleet.coordinator
        given = [a for a in run.records.assignments("run", 0) if a.assignment.trains]
        losses = [a.report.evaluation("slice", "received").loss for a in given]
        expected = [a.report.train_examples * (loss / max(losses)) ** power
                    for a, loss in zip(given, losses, strict=True)]  # fmt: skip
        detail = run.records.all_rounds("run")[0].detail
        assert list(detail["weights"]) == [a.assignment.assignment_id for a in given]
        assert list(detail["weights"].values()) == pytest.approx(expected, rel=1e-6)


async def test_a_late_updates_weight_is_discounted_before_the_rule(harness, tmp_path):
    clock = harness.Clock()
    async with harness.fleet(tmp_path, clock=clock, fairness={"weights": "q-ffl", "q": 1.0},
                             **LATE_FLEET) as fleet:  # fmt: skip
        run, cedar = fleet.coordinator, fleet["cedar"]
        spec, a, update = await close_without_cedar(fleet, clock)
        await round_opened(fleet, 1)
        await cedar.push(a, update)
        await cedar.report(spec, a)
        await fleet.round()
        await round_opened(fleet, 2)
        weights = run.records.all_rounds("run")[1].detail["weights"]
        voices = {n: run.assignment(*n).report for n in [(0, "cedar"), (1, "ash"), (1, "cedar")]}
        plain = {n: r.train_examples * r.evaluation("slice", "received").loss
                 for n, r in voices.items()}  # fmt: skip
        ratio = weights["run.0.cedar"] / weights["run.1.ash"]
        assert ratio == pytest.approx(plain[0, "cedar"] / plain[1, "ash"] / math.sqrt(2))
        ratio = weights["run.1.cedar"] / weights["run.1.ash"]
        assert ratio == pytest.approx(plain[1, "cedar"] / plain[1, "ash"])


# --- what is refused ----------------------------------------------------------------------------

ONE = {"names": ("ash",), "round": {"min_devices": 1}}


async def one_device(fleet, name="ash"):
    """(device, spec, assignment, packed update) of the first round."""
    device = fleet[name]
    spec, a = await device.take()
    return device, spec, a, await device.train(spec, a)


async def put_all(device, update, data):
    """Every chunk of an update that fits one chunk."""
    await device.put(update, 0, data, crc32(data))


def sha256(data):
    return hashlib.sha256(data).hexdigest()


async def test_an_update_of_the_wrong_size_is_refused_before_a_byte_is_taken(harness, tmp_path):
    async with harness.fleet(tmp_path, **ONE) as fleet:
        device, spec, a, update = await one_device(fleet)
        expected = packed_bytes(spec, a.update)
        assert update.stat().st_size == expected
        update.write_bytes(update.read_bytes() + b"x")
        with pytest.raises(RefusedError, match=f"update of {expected + 1:,} bytes") as told:
            await device.push(a, update)
        assert told.value.reason is Reason.WRONG_SIZE
        assert not list((tmp_path / "state" / "blobs" / "uploads").iterdir())


async def test_an_update_with_nan_is_refused_and_forgotten(harness, tmp_path):
    async with harness.fleet(tmp_path, wire={"update": "float32"}, **ONE) as fleet:
        device, _, a, update = await one_device(fleet)
        good = update.read_bytes()
        bad = good[:-4] + np.float32(np.nan).tobytes()
        update.write_bytes(bad)
        with pytest.raises(RefusedError, match="holds NaN or infinite values") as told:
            await device.push(a, update)
        assert told.value.reason is Reason.BAD_UPDATE
        assert not fleet.coordinator.blobs._place(sha256(bad)).exists()
        log = Audit(fleet.coordinator.records).entries("run")
        assert [e.facts["device_id"] for e in log if e.event == "update refused"] == [device.name]
        update.write_bytes(good)
        assert (await device.push(a, update))[1] == "accepted", "the good one was still to come"


async def test_a_bad_update_does_not_take_a_kept_blob_with_it(harness, tmp_path):
    """A whole float32 slice is the adapter itself: pushed back as an update, it must survive."""
    exact = {"update": "float32", "slice": "float32"}
    async with harness.fleet(tmp_path, wire=exact, **ONE) as fleet:
        device, _, a, _ = await one_device(fleet)
        (blob,) = a.slice
        assert (("adapter", blob.digest),) == fleet.coordinator.digests()[0]
        slice_ = await device.link.fetch(blob, tmp_path)
        with pytest.raises(RefusedError) as told:
            await device.push(a, slice_)
        assert told.value.reason is Reason.UNKNOWN_ASSIGNMENT
        assert sha256(fleet.coordinator.blobs.path(blob.digest).read_bytes()) == blob.digest
        await fleet.finish()


async def test_an_update_trained_for_another_assignment_is_refused(harness, tmp_path):
    async with harness.fleet(tmp_path, **ONE) as fleet:
        device, spec, a, update = await one_device(fleet)
        other = replace(a, reason="another")
        received = unpack(update.read_bytes(), spec, a.update, assignment_digest=a.digest)
        with pytest.raises(RefusedError, match="answers an earlier attempt") as told:
            await device.push(a, device.write_update(spec, other, received))
        assert told.value.reason is Reason.UNKNOWN_ASSIGNMENT


async def test_a_second_update_for_an_assignment_is_refused(harness, tmp_path):
    async with harness.fleet(tmp_path, **ONE) as fleet:
        device, spec, a, update = await one_device(fleet)
        await device.push(a, update)
        first = sha256(update.read_bytes())
        await device.push(a, update)  # the same again is no second one
        received = unpack(update.read_bytes(), spec, a.update, assignment_digest=a.digest)
        second = device.write_update(spec, a, harness.make_delta(received, 99))
        with pytest.raises(RefusedError, match="the first one stands") as told:
            await device.push(a, second)
        assert told.value.reason is Reason.EQUIVOCATION
        assert fleet.coordinator.assignment(0, "ash").update_digest == first


async def test_of_two_updates_begun_side_by_side_only_one_gets_a_receipt(harness, tmp_path):
    async with harness.fleet(tmp_path, **ONE) as fleet:
        device, spec, a, update = await one_device(fleet)
        first = update.read_bytes()
        received = unpack(first, spec, a.update, assignment_digest=a.digest)
        second = device.write_update(spec, a, harness.make_delta(received, 99)).read_bytes()
        updates = [
            pb.PushedUpdate(
                assignment_id=a.assignment_id, digest=sha256(data), size_bytes=len(data)
            )
            for data in (first, second)
        ]
        # A device has one open upload an assignment: the later one took the earlier one's place.
        async with device.pushing(updates[0]) as (overtaken, _):
            await put_all(device, updates[1], second)
            await overtaken.done_writing()
            assert await harness.reason_for(overtaken.read()) is Reason.UNKNOWN_UPLOAD
        assert (await device.commit(updates[1])).endswith(sha256(second))
        again = device.begin(a.assignment_id, sha256(first), len(first))
        assert await harness.reason_for(again) is Reason.EQUIVOCATION
        assert fleet.coordinator.assignment(0, "ash").update_digest == sha256(second)


async def test_an_upload_whose_place_was_taken_after_a_restart_leaves_no_file(
    harness, tmp_path, impatient
):
    async with harness.fleet(tmp_path, **ONE) as fleet:
        device, spec, a, _ = await one_device(fleet)
        size = packed_bytes(spec, a.update)
        first = await device.begin(a.assignment_id, "1" * 64, size)
        assert await device.put(first.update, 0, b"x" * 100, crc32(b"x" * 100)) == 100
        await fleet.restart()
        assert (await device.begin(a.assignment_id, "1" * 64, size)).durable_bytes == 100
        await fleet.restart()
        assert (await device.begin(a.assignment_id, "2" * 64, size)).durable_bytes == 0
        assert len(fleet.coordinator.blobs.parts()) == 1


async def test_of_two_updates_committed_at_once_only_one_gets_a_receipt(harness, tmp_path):
    async with harness.fleet(tmp_path, **ONE) as fleet:
        device, spec, a, update = await one_device(fleet)
        first = update.read_bytes()
        received = unpack(first, spec, a.update, assignment_digest=a.digest)
        second = device.write_update(spec, a, harness.make_delta(received, 99)).read_bytes()
        pushes = [device.push(a, path) for path in (tmp_path / "first", tmp_path / "second")]
        for path, data in zip(
            (tmp_path / "first", tmp_path / "second"), (first, second), strict=True
        ):
            path.write_bytes(data)
        answers = await asyncio.gather(*pushes, return_exceptions=True)
        receipts = [answer[0] for answer in answers if isinstance(answer, tuple)]
        assert all(
            isinstance(answer, tuple) or answer.reason is Reason.EQUIVOCATION for answer in answers
        )
        standing = fleet.coordinator.assignment(0, "ash").update_digest
        assert receipts == [f"{a.assignment_id}:{standing}"]


async def test_a_push_asked_for_again_while_it_is_accepted_gets_the_same_receipt(harness, tmp_path):
    """As after a break just before the receipt: the first acceptance goes on without a listener."""
    async with harness.fleet(tmp_path, **ONE) as fleet:
        device, _, a, update = await one_device(fleet)
        receipts = await asyncio.gather(*(device.push(a, update) for _ in range(5)))
        assert len(set(receipts)) == 1
        assert device.link.resumes == 0, "one of them failed and was repeated"


async def test_an_assignment_of_another_device_cannot_be_answered(harness, tmp_path):
    async with harness.fleet(tmp_path, names=("ash", "birch"), round={"min_devices": 2}) as fleet:
        taken = await fleet.take()
        spec, a = taken["birch"]
        ash = fleet["ash"]
        for call in (
            ash.push(a, await fleet["birch"].train(spec, a)),
            ash.link.report(LocalReport(a.assignment_id, "done", train_examples=1), 1.0),
        ):
            with pytest.raises(RefusedError, match="not this device's") as told:
                await call
            assert told.value.reason is Reason.UNKNOWN_ASSIGNMENT
        size = packed_bytes(spec, a.update)
        begun = await fleet["birch"].begin(a.assignment_id, "0" * 64, size)
        stolen = ash.put(begun.update, 0, b"x", crc32(b"x"))
        assert await harness.reason_for(stolen) is Reason.UNKNOWN_ASSIGNMENT


async def test_committing_twice_gives_the_same_receipt_even_after_the_round(harness, tmp_path):
    async with harness.fleet(tmp_path, **ONE) as fleet:
        device, spec, a, update = await one_device(fleet)
        data = update.read_bytes()
        begun = await device.begin(a.assignment_id, sha256(data), len(data))
        await put_all(device, begun.update, data)
        first = await device.commit(begun.update)
        assert await device.commit(begun.update) == first
        await device.report(spec, a)
        await round_opened(fleet, 1)
        assert (await device.commit(begun.update)) == first


async def test_the_first_report_stands(harness, tmp_path):
    async with harness.fleet(tmp_path, **ONE) as fleet:
        device, _, a, _ = await one_device(fleet)
        await device.link.report(LocalReport(a.assignment_id, "out_of_memory"), 5.0)
        await device.link.report(LocalReport(a.assignment_id, "done", train_examples=5), 5.0)
        record = fleet.coordinator.assignment(0, "ash")
        assert (record.state, record.report.outcome) == ("failed", "out_of_memory")


async def test_the_newest_progress_of_a_device_is_known_while_it_works(harness, tmp_path):
    async with harness.fleet(tmp_path, **ONE) as fleet:
        _, _, a, _ = await one_device(fleet)
        engine = fleet.coordinator.engine
        for step in (1, 2):
            told = Progress(step, 4, 100.0, 10**9)
            await engine.next_task("ash", None, a.assignment_id, 0.0, told)
            assert engine.progress == {"ash": told}
        await engine.next_task("ash", None, "", 0.0)
        assert engine.progress == {}


async def test_a_report_of_training_on_nothing_is_refused(harness, tmp_path):
    async with harness.fleet(tmp_path, **ONE) as fleet:
        device, _, a, _ = await one_device(fleet)
        with pytest.raises(RefusedError, match="names no examples") as told:
            await device.link.report(LocalReport(a.assignment_id, "done"), 5.0)
        assert told.value.reason is Reason.BAD_REQUEST


async def test_a_device_that_cannot_fit_is_told_why(harness, tmp_path):
    small = {"ash": {"memory_bytes": 6 * 10**8}}
    async with harness.fleet(tmp_path, profiles=small, **ONE) as fleet:
        device = fleet["ash"]
        with pytest.raises(RefusedError, match=r"ash does not fit: needs .* use a smaller") as told:
            await device.poll(5.0, profile=device.profile)
        assert told.value.reason is Reason.DOES_NOT_FIT


# --- the long poll ------------------------------------------------------------------------------


async def test_a_long_poll_returns_as_soon_as_there_is_work(harness, tmp_path):
    async with harness.fleet(tmp_path, names=("ash", "birch"), round={"min_devices": 2}) as fleet:
        ash, birch = fleet["ash"], fleet["birch"]
        begun = time.monotonic()
        waiting = asyncio.create_task(ash.poll(wait_s=30.0, profile=ash.profile))
        await asyncio.sleep(0.1)
        assert not waiting.done(), "there was nothing to do yet"
        await birch.poll(profile=birch.profile)
        assert (await waiting).kind == pb.NextTaskResponse.KIND_ASSIGNMENT
        assert time.monotonic() - begun < 5


async def test_a_heartbeat_is_answered_at_once(harness, tmp_path):
    async with harness.fleet(tmp_path, **ONE) as fleet:
        device, _, a, _ = await one_device(fleet)
        begun = time.monotonic()
        answer = await device.poll(wait_s=30.0, working_on=a.assignment_id)
        assert answer.kind == pb.NextTaskResponse.KIND_WAIT
        assert time.monotonic() - begun < 5


async def test_a_wait_that_is_no_number_of_seconds_is_no_wait(harness, tmp_path):
    async with harness.fleet(tmp_path, names=("ash",)) as fleet:
        device = fleet["ash"]
        for wait_s in (math.nan, -1.0, -math.inf):
            request = pb.NextTaskRequest(wait_s=wait_s)
            await device.poll(profile=device.profile)
            answer = await device.link._fleet.NextTask(
                request, timeout=5, metadata=device.link._metadata
            )
            assert answer.kind == pb.NextTaskResponse.KIND_WAIT


async def test_numbers_that_are_none_are_refused_in_reports(harness, tmp_path):
    async with harness.fleet(tmp_path, **ONE) as fleet:
        device, _, a, _ = await one_device(fleet)
        told = pb.LocalReport(assignment_id=a.assignment_id, outcome="done", train_examples=1,
                              train_loss=math.nan)  # fmt: skip
        call = device.link._fleet.Report(
            pb.ReportRequest(report=told), timeout=5, metadata=device.link._metadata
        )
        assert await harness.reason_for(call) is Reason.BAD_REQUEST
        assert fleet.coordinator.assignment(0, "ash").report is None


# --- what one device must not be able to do to the run -------------------------------------------


async def test_an_update_that_moves_weights_beyond_reason_is_refused(harness, tmp_path):
    async with harness.fleet(tmp_path, **ONE) as fleet:
        device, spec, a, update = await one_device(fleet)
        received = unpack(update.read_bytes(), spec, a.update, assignment_digest=a.digest)
        huge = {n: {**f, "up": f["up"] + np.float32(1e30)} for n, f in received.items()}
        with pytest.raises(RefusedError, match="training diverged") as told:
            await device.push(a, device.write_update(spec, a, huge))
        assert told.value.reason is Reason.BAD_UPDATE


async def test_what_is_over_leaves_neither_parts_nor_slices_behind(harness, tmp_path):
    async with harness.fleet(tmp_path, names=("ash",), run={"rounds": 4},
                             round={"min_devices": 1, "late_rounds": 0}) as fleet:  # fmt: skip
        spec, a = await fleet["ash"].take()
        size = packed_bytes(spec, a.update)
        for number in range(5):
            await fleet["ash"].begin(a.assignment_id, sha256(bytes([number])), size)
        assert len(fleet.coordinator.blobs.parts()) == 1
        await fleet.finish()
        blobs, records = fleet.coordinator.blobs, fleet.coordinator.records
        assert blobs.parts() == []
        assert not any(blobs.holds(blob.digest) for blob in a.slice)
        assert all(blobs.holds(d) for d in records.model_digests(spec.run_id))


async def test_a_restarted_agent_need_not_measure_again(harness, tmp_path):
    async with harness.fleet(tmp_path, names=("ash",), round={"min_devices": 2}) as fleet:
        ash = fleet["ash"]
        await ash.poll(profile=ash.profile)
        fresh = replace(ash.profile, compute=None, link=None, memory_available_bytes=10**9)
        answer = await ash.poll(profile=fresh)
        assert answer.kind == pb.NextTaskResponse.KIND_WAIT
        (known,) = fleet.coordinator.records.all_devices()
        assert known.profile == replace(ash.profile, memory_available_bytes=10**9)
        moved = await ash.poll(profile=replace(fresh, cpu="another machine"))
        assert moved.kind == pb.NextTaskResponse.KIND_PROFILE
