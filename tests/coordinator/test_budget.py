"""A run under a byte budget: planned by the least error, kept to by devices, breaches refused."""

from __future__ import annotations

from dataclasses import replace

import pytest

from coordinator.allowance import DAY_S, allowances, curves_of, rounds_within
from coordinator.config import ConfigError, load_config
from coordinator.plan_types import UpdateTerms
from coordinator.planner import PlanError, plan_round
from edge_agent.link import RefusedError
from profiles.link import LinkProfile
from protos.contract import ErrorCurve, LocalReport, Payload, Reason, from_plain, to_plain
from protos.packing import pack
from protos.unpacking import open_update
from tests.coordinator.test_planner import SMALL, SPEC, device, policy

MOST = 1500
BUDGET = {
    "plan": {"bytes_per_round": MOST}, "wire": {"update": "auto", "error_feedback": True},
}  # fmt: skip
KB = 1000


def planned(size_bytes, *, curves=(), profile=None, **changes):
    """The plan of one device whose update may have so many bytes."""
    changes = {"update_encoding": "auto", "round_s": 600.0, **changes}
    terms = {"a": UpdateTerms(size_bytes, curves)}
    found = plan_round(SMALL, SPEC, policy(**changes), {"a": profile or device()}, terms=terms)
    return found.devices[0]


# --- planning -----------------------------------------------------------------------------------


@pytest.mark.parametrize("feeds_back", [False, True])
def test_plans_keep_to_the_bytes_and_more_bytes_never_err_more(feeds_back):
    sizes = [100 * KB, 150 * KB, 400 * KB, 1000 * KB, 3000 * KB, 9000 * KB]
    plans = [planned(size, feeds_back=feeds_back) for size in sizes]
    for size, plan in zip(sizes, plans, strict=True):
        assert plan.predicted.up_bytes <= plan.budget.size_bytes <= size
    errors = [plan.expected_error for plan in plans]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 0.5 and errors[-1] < 0.1


def test_without_error_feedback_no_value_is_left_out_and_no_sign_sent():
    for size in (100 * KB, 400 * KB, 3000 * KB):
        plan = planned(size, feeds_back=False)
        assert plan.update.density == 1
        assert not plan.budget.sparse and "sign" not in plan.budget.encodings


def test_error_feedback_makes_more_of_the_same_bytes():
    assert planned(400 * KB, feeds_back=True).expected_error < 0.9 * (
        planned(400 * KB, feeds_back=False).expected_error
    )


def test_a_named_encoding_stays():
    plan = planned(400 * KB, feeds_back=True, update_encoding="int8")
    assert plan.update.encoding == "int8" and plan.budget.encodings == ("int8",)
    assert plan.update.density < 1


def test_the_sentence_names_the_choice_in_numbers():
    plan = planned(400 * KB, feeds_back=True)
    sizes = f"{plan.predicted.up_bytes / KB:.3g} kB of 400 kB"
    assert f"update as {plan.update.encoding}" in plan.reason
    assert f"the largest {plan.update.density:.2g} of its values: {sizes}" in plan.reason
    assert f"expected error {plan.expected_error:.2f}" in plan.reason
    bound = planned(100 * KB, feeds_back=False)
    assert "an update may have 100 kB" in bound.reason and "at least" in bound.reason
    finer = planned(1000 * KB, feeds_back=False)
    assert f"k={finer.rank + 1} in the same bytes would lose more" in finer.reason


def test_a_budget_too_small_for_any_update_says_what_the_least_takes():
    with pytest.raises(PlanError, match=r"may send 500 bytes in this round, the least update of 1"):
        planned(500, feeds_back=True)


def test_a_slow_link_in_a_short_round_sends_less_than_the_budget():
    slow = device(link=LinkProfile(up_bps=0.4e6, down_bps=50e6, rtt_s=0.02))
    roomy = planned(4000 * KB, feeds_back=True, profile=slow, round_s=600.0)
    hurried = planned(4000 * KB, feeds_back=True, profile=slow, round_s=45.0)
    assert hurried.predicted.up_bytes < roomy.predicted.up_bytes
    assert hurried.budget.size_bytes < 4000 * KB, "the device must not send more than was timed"


def test_what_a_device_told_of_its_values_changes_the_choice():
    heavy = tuple(
        ErrorCurve(encoding, 0, (error, *(error + 0.01 * i for i in range(1, 12))))
        for encoding, error in (("int8", 0.0), ("int4", 0.02), ("int2", 0.3), ("sign", 0.6))
    )
    assert planned(100 * KB, feeds_back=True, curves=heavy).update.density < 0.2
    told = planned(100 * KB, feeds_back=True, curves=heavy).expected_error
    assert told < planned(100 * KB, feeds_back=True).expected_error


def test_an_owners_budget_is_spent_on_the_least_error_too():
    tight = device(link=LinkProfile(50e6, 100e6, 0.02, budget_bytes=3_000_000))
    wide = {"round_s": 600.0, "rounds_left": 1, "update_encoding": "auto"}
    plan = plan_round(SMALL, SPEC, policy(feeds_back=True, **wide), {"a": tight}).devices[0]
    moved = plan.predicted.up_bytes + plan.predicted.down_bytes
    assert moved <= 3_000_000
    assert plan.budget is not None and plan.expected_error < 1


def test_plans_with_a_budget_survive_the_database():
    plan = planned(400 * KB, feeds_back=True)
    assert from_plain(type(plan), to_plain(plan)) == plan


def test_without_a_budget_nothing_is_chosen():
    plan = plan_round(SMALL, SPEC, policy(), {"a": device()}).devices[0]
    assert plan.budget is None and plan.update is None and plan.expected_error is None
    assert "expected error" not in plan.reason


def test_a_device_stays_with_its_rows_while_its_budget_does():
    first = planned(400 * KB, feeds_back=True)
    again = plan_round(
        SMALL, SPEC, policy(update_encoding="auto", feeds_back=True, round_s=600.0),
        {"a": device(up_mbps=49)}, terms={"a": UpdateTerms(400 * KB)}, before={"a": first},
    ).devices[0]  # fmt: skip
    assert (again.rank, again.update) == (first.rank, first.update)
    less = plan_round(
        SMALL, SPEC, policy(update_encoding="auto", feeds_back=True, round_s=600.0),
        {"a": device()}, terms={"a": UpdateTerms(200 * KB)}, before={"a": first},
    ).devices[0]  # fmt: skip
    assert less.predicted.up_bytes <= 200 * KB


# --- bytes of a day -----------------------------------------------------------------------------


def record(assignment, *, sent=0, at=0.0, curves=()):
    from coordinator.store.rows import AssignmentRecord

    report = LocalReport(assignment.assignment_id, "done", error_curves=curves)
    return AssignmentRecord(assignment, {}, "arrived", report, "d", sent, at, None)


def make_assignment(name, round_):
    from tests.edge_agent.training.test_feedback import make_task

    return replace(make_task(round_, Payload(5, "int8")), device_id=name)


def test_a_days_bytes_are_spread_over_its_rounds_and_never_exceeded():
    now, history, spent = 10 * DAY_S + 3600.0, [], 0
    for round_ in range(200):
        found = allowances(
            history, ["a", "b"], now, per_round=0, per_day=100_000, length_s=600.0,
            rounds_left=1000 - round_,
        )  # fmt: skip
        assert found["b"] >= found["a"], "b sent nothing yet"
        history.append(record(make_assignment("a", round_), sent=found["a"], at=now))
        spent += found["a"]
        now += 605.0
        if now >= 11 * DAY_S:
            break
    assert 99_000 <= spent <= 100_000
    assert max(r.update_bytes for r in history) <= 1.1 * min(r.update_bytes for r in history)


def test_yesterdays_bytes_do_not_count_and_the_smaller_limit_does():
    history = [record(make_assignment("a", 0), sent=90_000, at=10 * DAY_S - 1)]
    common = {"length_s": 600.0, "rounds_left": 4}
    found = allowances(history, ["a"], 10 * DAY_S, per_round=0, per_day=100_000, **common)
    assert found == {"a": 25_000}
    found = allowances(history, ["a"], 10 * DAY_S, per_round=9000, per_day=100_000, **common)
    assert found == {"a": 9000}
    assert allowances(history, ["a"], 0.0, per_round=0, per_day=0, **common) == {}
    assert rounds_within(100.0, 600.0, 9) == 1


def test_the_newest_curves_count():
    old, new = (ErrorCurve("int8", 0, (e,)) for e in (0.1, 0.2))
    history = [
        record(make_assignment("a", 1), curves=(new,)),
        record(make_assignment("a", 0), curves=(old,)),
        record(make_assignment("a", 2)),
    ]
    assert curves_of(history) == {"a": (new,)}


def test_negative_bytes_are_refused(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text('[run]\nname = "x"\n[model]\nbase = "b"\n[plan]\nbytes_per_round = -1\n')
    with pytest.raises(ConfigError, match="bytes_per_round"):
        load_config(path)


# --- a run --------------------------------------------------------------------------------------


async def test_a_run_under_a_budget_finishes_and_no_update_exceeds_it(harness, tmp_path):
    async with harness.fleet(tmp_path, **BUDGET) as fleet:
        await fleet.finish()
        run = fleet.coordinator
        assert run.state.phase == "finished"
        assert len(set(run.digests())) == 4, "every round was to change the adapter"
        trained = [r for r in run.records.assignments("run") if r.assignment.trains]
        assert len(trained) == 9
        for r in trained:
            assert r.assignment.budget.size_bytes <= MOST
            assert r.update_bytes <= r.assignment.budget.size_bytes
        kept = [r for r in trained if run.blobs.holds(r.update_digest)]
        for r in kept:
            path = run.blobs.path(r.update_digest)
            found = open_update(path, run.engine.spec, r.assignment).payload
            assert found.encoding in r.assignment.budget.encodings
        assert kept


async def test_a_device_that_breaks_its_budget_is_refused_and_the_round_goes_on(harness, tmp_path):
    async with harness.fleet(tmp_path, **BUDGET) as fleet:
        tasks = await fleet.take()
        name, (spec, task) = next(iter(tasks.items()))
        dev = fleet[name]
        reader = open_update(await dev.train(spec, task), spec, task)
        delta = {name: reader.module(name) for name in reader.names}
        forged = {
            "too large": Payload(task.rank, "float32", task.update.parts),
            "another encoding": Payload(task.rank, "float32", task.update.parts, density=0.05),
        }
        refused = {}
        for what, payload in forged.items():
            path = tmp_path / "forged"
            path.write_bytes(
                pack(spec, payload, delta, assignment_digest=task.digest, seed=task.seed)
            )
            with pytest.raises(RefusedError) as caught:
                await dev.push(task, path)
            refused[what] = caught.value.reason
        assert refused == {
            "too large": Reason.WRONG_SIZE, "another encoding": Reason.BAD_UPDATE,
        }  # fmt: skip
