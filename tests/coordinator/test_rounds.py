"""A run goes on whatever its devices do, and counts every update once."""

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.rounds import (
    Arrived,
    CloseRound,
    DeviceLost,
    DeviceReady,
    Effect,
    Event,
    Failed,
    FinishRun,
    Merged,
    PlanRound,
    RefuseLate,
    RoundPlanned,
    RoundPolicy,
    RunState,
    Tick,
    advance,
    extended,
    late_discount,
)

POLICY = RoundPolicy(rounds=2, min_devices=2, quorum=0.5, grace=0.0, late_rounds=1, retry_s=10)


class Run:
    """A state and everything it ever asked for."""

    def __init__(self, policy: RoundPolicy = POLICY, state: RunState | None = None) -> None:
        self.policy, self.state = policy, state or RunState()
        self.effects: list[Effect] = []

    def __call__(self, *events: Event) -> list[Effect]:
        found: list[Effect] = []
        for event in events:
            self.state, effects = advance(self.state, event, self.policy)
            found += effects
        self.effects += found
        return found


def opened(*devices: str, policy: RoundPolicy = POLICY, number: int = 0) -> Run:
    run = Run(policy, RunState(round=number))
    run(*(DeviceReady(0, d) for d in devices), RoundPlanned(0, number, devices, 100))
    assert run.state.phase == "open"
    return run


def test_gathering_waits_for_enough_devices_and_then_for_more() -> None:
    run = Run(replace(POLICY, gather_s=5))
    assert run(DeviceReady(0, "a"), Tick(50), DeviceReady(60, "b"), Tick(64)) == []
    assert run(DeviceReady(64.5, "c"), Tick(65)) == [PlanRound(0, ("a", "b", "c"), False)]
    assert run(Tick(66)) == []


def test_gathering_begins_anew_when_devices_leave() -> None:
    run = Run(replace(POLICY, gather_s=5))
    run(DeviceReady(0, "a"), DeviceReady(0, "b"), DeviceLost(3, "b"), DeviceReady(4, "b"))
    assert run(Tick(8)) == []
    assert run(Tick(9)) == [PlanRound(0, ("a", "b"), False)]


def test_plan_is_asked_for_again_when_unanswered_or_when_the_fleet_changes() -> None:
    run = Run()
    ask = PlanRound(0, ("a", "b"), False)
    assert run(DeviceReady(0, "a"), DeviceReady(0, "b")) == [ask]
    assert run(RoundPlanned(0, 0, (), 0), DeviceReady(1, "a"), Tick(9)) == []
    assert run(Tick(10)) == [ask]
    assert run(DeviceReady(11, "c")) == [PlanRound(0, ("a", "b", "c"), False)]


def test_round_closes_at_once_when_everybody_is_in() -> None:
    run = opened("a", "b", "c")
    assert run(Arrived(1, 0, "c"), Failed(2, 0, "b", "crashed")) == []
    assert run(Arrived(3, 0, "a")) == [CloseRound(0, ("a", "c"), ())]
    assert run(Tick(4), Arrived(5, 0, "a"), Tick(200)) == []


def test_round_closes_at_its_deadline_with_quorum() -> None:
    run = opened("a", "b", "c")
    assert run(Arrived(1, 0, "a"), Arrived(2, 0, "b"), Tick(99)) == []
    assert run(Tick(100)) == [CloseRound(0, ("a", "b"), ())]


def test_grace_extends_the_deadline() -> None:
    run = opened("a", "b", policy=replace(POLICY, grace=0.25))
    assert run(Arrived(1, 0, "a"), Tick(124)) == []
    assert run(Tick(125)) == [CloseRound(0, ("a",), ())]


def test_without_quorum_the_round_stays_open_until_it_is_met() -> None:
    run = opened("a", "b", "c")
    assert run(Arrived(1, 0, "a"), Tick(100), Tick(199)) == []
    assert run(Arrived(199.5, 0, "c")) == [CloseRound(0, ("a", "c"), ())]


def test_connected_device_that_never_delivers_is_given_the_length_of_the_round_once_more() -> None:
    run = opened("a", "b", "c")
    assert run(Arrived(1, 0, "a"), Tick(199)) == []
    assert run(Tick(200)) == [CloseRound(0, ("a",), ())]
    short = opened("a", "b", "c", policy=replace(POLICY, retry_s=300))
    assert short(Arrived(1, 0, "a"), Tick(399)) == [], "no less than the patience of the run"
    assert short(Tick(400)) == [CloseRound(0, ("a",), ())]


def test_round_in_which_connected_devices_never_deliver_is_planned_again_and_counted() -> None:
    run = opened("a", "b")
    assert run(Tick(199)) == [] and run.state.attempts == 0
    assert run(Tick(200)) == [PlanRound(0, ("a", "b"), False)]
    run(RoundPlanned(201, 0, ("a", "b"), 100))
    assert run(Tick(401)) == [PlanRound(0, ("a", "b"), False)]
    assert run.state.attempts == 2, "two attempts came to nothing"
    run(RoundPlanned(402, 0, ("a", "b"), 100), Arrived(403, 0, "a"), Arrived(404, 0, "b"))
    assert run.effects[-1] == CloseRound(0, ("a", "b"), ())
    assert run.state.attempts == 0, "another round begins at nought"


def test_when_the_rest_is_gone_for_good_it_closes_with_what_arrived() -> None:
    run = opened("a", "b", "c")
    run(Arrived(1, 0, "a"), Failed(2, 0, "b", "crashed"), DeviceLost(50, "c"))
    assert run(Tick(99)) == []
    assert run(Tick(100)) == [CloseRound(0, ("a",), ())]


def test_lost_device_may_come_back_and_deliver() -> None:
    run = opened("a", "b")
    run(DeviceLost(1, "b"), Arrived(2, 0, "a"), DeviceReady(99, "b"), Arrived(99, 0, "b"))
    assert run.effects[-1] == CloseRound(0, ("a", "b"), ())


def test_failed_device_that_delivers_after_all_counts() -> None:
    run = opened("a", "b")
    run(Failed(1, 0, "b", "crashed"), Arrived(2, 0, "b"), Arrived(3, 0, "a"))
    assert run.effects[-1] == CloseRound(0, ("a", "b"), ())


def test_round_in_which_all_failed_is_planned_again_but_not_in_a_tight_loop() -> None:
    run = opened("a", "b")
    assert run(Failed(1, 0, "a", "crashed"), Failed(2, 0, "b", "no_data"), Tick(9)) == []
    assert run(Tick(10)) == [PlanRound(0, ("a", "b"), False)]
    run(RoundPlanned(11, 0, ("a",), 100))
    assert run.state.failed == ()
    assert run(Arrived(12, 0, "a")) == [CloseRound(0, ("a",), ())]


def test_late_update_is_merged_at_the_next_close() -> None:
    run = opened("a", "b")
    run(Arrived(1, 0, "a"), Tick(100), Merged(101, 0), RoundPlanned(102, 1, ("a", "b"), 100))
    assert run(Arrived(103, 0, "b"), Arrived(104, 0, "b"), Arrived(105, 1, "a")) == []
    assert run(Arrived(106, 1, "b")) == [CloseRound(1, ("a", "b"), (("b", 0),))]


def test_late_update_during_the_merge_waits_for_the_next() -> None:
    run = opened("a", "b")
    run(Arrived(1, 0, "a"), Tick(100), Arrived(100.5, 0, "b"), Merged(101, 0))
    run(RoundPlanned(102, 1, ("a",), 100), Arrived(105, 1, "a"))
    assert run.effects[-1] == CloseRound(1, ("a",), (("b", 0),))


def test_too_late_update_is_refused_once_with_a_reason() -> None:
    run = opened("a", "b", policy=replace(POLICY, rounds=5, late_rounds=0))
    run(Arrived(1, 0, "a"), Tick(100), Merged(101, 0), RoundPlanned(102, 1, ("a",), 100))
    (refused,) = run(Arrived(103, 0, "b"), Arrived(104, 0, "b"))
    assert isinstance(refused, RefuseLate)
    assert (refused.device_id, refused.round) == ("b", 0)
    assert "1 rounds late, this run accepts 0" in refused.reason


def test_update_after_the_last_merge_is_refused() -> None:
    run = opened("a", "b", number=1)
    run(Arrived(1, 1, "a"), Tick(100), Merged(101, 1))
    (refused,) = run(Arrived(103, 1, "b"))
    assert isinstance(refused, RefuseLate) and "last training round" in refused.reason


def test_update_of_a_device_that_was_not_asked_changes_nothing() -> None:
    run = opened("a", "b")
    before = run.state
    assert run(Arrived(1, 0, "z"), Arrived(1, 7, "a"), Failed(1, 0, "z", "crashed")) == []
    assert run.state == before


def test_run_ends_with_an_evaluate_only_round() -> None:
    run = opened("a", "b", number=1)
    run(Arrived(1, 1, "a"), Arrived(2, 1, "b"))
    assert run(Merged(3, 1)) == [PlanRound(2, ("a", "b"), True)]
    run(RoundPlanned(4, 2, ("a", "b"), 50))
    assert run.state.evaluating
    assert run(Arrived(5, 2, "a"), Tick(53)) == []
    assert run(Tick(54)) == [CloseRound(2, ("a",), (), evaluate_only=True)]
    assert run(Merged(55, 2)) == [FinishRun()]
    assert run(Tick(56), DeviceReady(57, "c"), Arrived(58, 2, "b")) == []


def test_evaluate_only_round_closes_with_nobody() -> None:
    run = opened("a", "b", number=2)
    assert run(Tick(100)) == [CloseRound(2, (), (), evaluate_only=True)]


def test_run_does_not_wait_for_ever_to_evaluate() -> None:
    run = Run(state=RunState(round=2))
    assert run(Tick(5)) == []
    assert run(Tick(10)) == [FinishRun()]
    few = Run(state=RunState(round=2))
    assert few(DeviceReady(1, "a"), Tick(9)) == []
    assert few(Tick(10)) == [PlanRound(2, ("a",), True)]


def test_restart_keeps_an_open_round_open_until_devices_had_time_to_return() -> None:
    stored = RunState(
        phase="open", round=0, assigned=frozenset("abc"), arrived=frozenset("a"),
        opened_at_s=0, deadline_at_s=100,
    )  # fmt: skip
    run = Run(state=extended(stored, 30))
    assert run.state.deadline_at_s == 130
    assert run(Tick(150), DeviceReady(155, "b"), Tick(200)) == []
    assert run(Arrived(201, 0, "b")) == [CloseRound(0, ("a", "b"), ())]
    alone = Run(state=stored)
    assert alone(Tick(150)) == []
    assert alone(Tick(160)) == [CloseRound(0, ("a",), ())]


def test_restart_repeats_the_unanswered_question() -> None:
    gathering = Run(state=RunState(round=1))
    ask = PlanRound(1, ("a", "b"), False)
    assert gathering(Tick(0), DeviceReady(1, "a"), DeviceReady(1, "b")) == [ask]
    close = CloseRound(0, ("a",), (("b", 3),))
    merging = Run(state=RunState(phase="merging", round=0, closing=close))
    assert merging(Tick(0), Tick(1)) == [close]
    by_caller = Run(state=RunState(phase="merging", round=2, evaluating=True))
    assert by_caller(Tick(0)) == []
    assert by_caller(Merged(1, 2)) == [FinishRun()]


def test_late_weight_falls_with_the_square_root() -> None:
    assert late_discount(0) == 1
    assert late_discount(3) == pytest.approx(0.5)


DEVICES = ("a", "b", "c")
device_ids = st.sampled_from(DEVICES)
rounds = st.integers(0, 4)
steps = st.one_of(
    st.tuples(st.just("ready"), device_ids),
    st.tuples(st.just("lost"), device_ids),
    st.tuples(st.just("arrived"), device_ids, rounds),
    st.tuples(st.just("arrived now"), device_ids),
    st.tuples(st.just("failed"), device_ids, rounds),
    st.tuples(st.just("planned"), st.sets(device_ids)),
    st.tuples(st.just("merged"), rounds),
    st.tuples(st.just("merged now")),
    st.tuples(st.just("tick")),
)
policies = st.builds(
    RoundPolicy,
    rounds=st.integers(0, 3),
    min_devices=st.integers(1, 2),
    gather_s=st.sampled_from([0.0, 3.0]),
    quorum=st.sampled_from([0.0, 0.5, 1.0]),
    grace=st.just(0.0),
    late_rounds=st.integers(0, 2),
    retry_s=st.just(4.0),
)


def event_of(step: tuple, at_s: float, state: RunState) -> Event:  # type: ignore[type-arg]
    match step:
        case ("ready", device):
            return DeviceReady(at_s, device)
        case ("lost", device):
            return DeviceLost(at_s, device)
        case ("arrived", device, number):
            return Arrived(at_s, number, device)
        case ("arrived now", device):
            return Arrived(at_s, state.round, device)
        case ("failed", device, number):
            return Failed(at_s, number, device, "crashed")
        case ("planned", devices):
            return RoundPlanned(at_s, state.round, tuple(devices), 5.0)
        case ("merged", number):
            return Merged(at_s, number)
        case ("merged now",):
            return Merged(at_s, state.round)
    return Tick(at_s)


def finish(run: Run, at_s: float) -> None:
    """Fair events: everybody connects, every question is answered, everybody delivers."""
    for _ in range(40 * (run.policy.rounds + 2)):
        if run.state.phase == "finished":
            return
        at_s += 1
        run(*(DeviceReady(at_s, d) for d in DEVICES), Tick(at_s))
        if run.state.phase == "gathering" and run.state.asked_at_s is not None:
            run(RoundPlanned(at_s, run.state.round, DEVICES, 5.0))
        run(*(Arrived(at_s, run.state.round, d) for d in sorted(run.state.waiting)))
        if run.state.phase == "merging":
            run(Merged(at_s, run.state.round))
    raise AssertionError(f"the run hangs in {run.state}")


@settings(max_examples=400, deadline=None)
@given(policies, st.lists(st.tuples(steps, st.sampled_from([0.0, 1.0, 6.0])), max_size=60))
def test_any_interleaving_counts_each_update_once_and_ends(
    policy: RoundPolicy,
    script: list[tuple[tuple, float]],  # type: ignore[type-arg]
) -> None:
    run, at_s = Run(policy), 0.0
    for step, wait_s in script:
        at_s += wait_s
        before = run.state
        run(event_of(step, at_s, before))
        assert run.state.round >= before.round
        assert run.state.arrived <= run.state.assigned
        assert not run.state.arrived & {device for device, _ in run.state.failed}
    finish(run, at_s)
    closes = [e for e in run.effects if isinstance(e, CloseRound)]
    numbers = [c.round for c in closes]
    assert numbers == sorted(set(numbers)), "a round closed twice"
    merged = [(d, c.round) for c in closes for d in c.on_time]
    merged += [pair for c in closes for pair in c.late]
    assert len(merged) == len(set(merged)), "an update was merged twice"
    refused = [(e.device_id, e.round) for e in run.effects if isinstance(e, RefuseLate)]
    assert len(refused) == len(set(refused))
    assert not set(refused) & set(merged)
    for close in closes:
        assert close.evaluate_only == (close.round >= policy.rounds)
        assert close.on_time or close.evaluate_only
        assert all(0 < close.round - of <= policy.late_rounds for _, of in close.late)
    assert run.effects.count(FinishRun()) == 1
    assert math.isinf(run.state.deadline_at_s)
