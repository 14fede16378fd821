"""The trial of capped boards: what its second run is given, and how both are compared."""

from __future__ import annotations

import pytest

from trials.capped import RANK, CappedOutcome, at_rank, loss_at


def plan(round_, device, rank, steps=10):
    return {
        "round": round_, "round_s": 60.0,
        "plan": {"device_id": device, "rank": rank, "sketch_offset": 0, "local_steps": steps},
    }  # fmt: skip


def test_the_second_run_gives_everybody_the_smallest_rank_and_all_else_as_planned():
    plans = [plan(0, "a", 64), plan(0, "b", 8), plan(1, "a", 128), plan(1, "b", 16),
             plan(2, "a", RANK, steps=0), plan(2, "b", RANK, steps=0)]  # fmt: skip
    found = at_rank(plans, 8, rounds=2, more=3)
    assert [(p["round"], p["plan"]["device_id"]) for p in found] == [
        (0, "a"), (0, "b"), (1, "a"), (1, "b"), (2, "a"), (2, "b"), (3, "a"), (3, "b"),
    ]  # fmt: skip
    assert {p["plan"]["rank"] for p in found} == {8}
    assert [p["plan"]["local_steps"] for p in found] == [10] * 6 + [0, 0]
    assert [p["plan"]["sketch_offset"] for p in found] == [0, 8] * 4
    assert plans[0]["plan"]["rank"] == 64, "the plans of the first run stay as they were"


@pytest.mark.parametrize(("at", "loss"), [(0, 3.0), (5, 2.5), (10, 2.0), (15, 1.75), (99, 1.5)])
def test_losses_lie_on_lines_between_evaluations(at, loss):
    assert loss_at([(0, 3.0), (10, 2.0), (20, 1.5)], at) == loss


def test_runs_are_compared_where_the_shorter_one_ends():
    found = CappedOutcome((), "cgroup v1", 8, ((0, 3.0), (40, 2.0)), ((0, 3.0), (30, 2.5)))
    assert found.equal_s == 30
    assert loss_at(found.planned, found.equal_s) == 2.25
