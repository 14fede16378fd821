"""Reports correct predictions; what went wrong lowers the next task and is forgiven later."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest

from coordinator.corrections import learnt, length_before, plans_before
from coordinator.store.rows import AssignmentRecord
from profiles.cost import Correction
from protos.contract import Assignment, LocalReport
from tests.edge_agent.training.rounds import make_assignment


def record(
    round_: int, outcome: str | None = "done", device: str = "a", **changes: Any
) -> AssignmentRecord:
    """A round of 100 MB and 10 s as predicted; `changes` are of the report or the prediction."""
    task: Assignment = make_assignment(
        assignment_id=f"run.{round_}.{device}", round=round_, device_id=device, deadline_s=60.0
    )
    predicted: dict[str, Any] = {
        "uncorrected_peak_bytes": 100_000_000, "time_factor": changes.pop("time_factor", 1.0),
        "predicted": {"train_s": changes.pop("expected_s", 8.0), "evaluate_s": 2.0},
    }  # fmt: skip
    report = None
    if outcome is not None:
        facts = {"peak_bytes": 100_000_000, "train_s": 8.0, "evaluate_s": 2.0} | changes
        report = LocalReport(task.assignment_id, outcome, **facts)  # type: ignore[arg-type]
    return AssignmentRecord(task, predicted, "arrived", report, None, None, None, None)


def of(history: list[AssignmentRecord], closed: int = 100) -> Correction:
    return learnt(history, range(closed))["a"]


def test_as_predicted_corrects_nothing() -> None:
    found = of([record(i) for i in range(5)])
    assert (found.memory, found.time) == pytest.approx((1.0, 1.0))
    assert (found.memory_share, found.work_share, found.note) == (1.0, 1.0, "")


def test_measured_over_predicted_is_approached_and_a_correction_does_not_correct_itself() -> None:
    history: list[AssignmentRecord] = []
    factor = 1.0
    for i in range(12):
        # The prediction holds the factor known by then; the device takes twice as long as 10 s.
        history.append(record(i, train_s=16.0, evaluate_s=4.0, peak_bytes=130_000_000,
                              time_factor=factor, expected_s=10.0 * factor - 2.0))  # fmt: skip
        factor = of(history).time
    assert factor == pytest.approx(2.0, rel=1e-6)
    assert of(history).memory == pytest.approx(1.3, rel=1e-6)


def test_one_odd_round_moves_it_by_a_third_and_widens_the_variation() -> None:
    calm = [record(i) for i in range(6)]
    odd = of([*calm, record(6, train_s=16.0, evaluate_s=4.0)])
    assert odd.time == pytest.approx(2**0.3)
    assert odd.variation > of(calm).variation


def test_what_a_round_did_not_measure_teaches_nothing() -> None:
    resumed = of([record(0, train_s=1.0, evaluate_s=2.0, resumed_step=5)])
    assert resumed.time == 1.0
    old = replace(record(0), predicted={})
    assert (of([old]).time, of([old]).memory) == (1.0, 1.0)


def test_running_out_of_memory_lasts_and_is_forgiven_slower_each_time() -> None:
    history = [record(0, "out_of_memory")]
    assert of(history).memory_share == 0.8
    assert of(history).note == "80% of its memory since it ran out once, more after 2 good rounds"
    history += [record(1)]
    assert of(history).memory_share == 0.8
    history += [record(2)]
    assert of(history).memory_share == 1.0
    history += [record(3, "out_of_memory")]
    for i in range(4, 7):
        history.append(record(i))
        assert of(history).memory_share == 0.8
    history.append(record(7))
    assert of(history).memory_share == 1.0
    twice = of([record(0, "out_of_memory"), record(1, "out_of_memory")])
    assert twice.memory_share == pytest.approx(0.64)


def test_a_crash_or_silence_halves_the_steps_but_lack_of_data_does_not() -> None:
    assert of([record(0, "crashed")]).work_share == 0.5
    assert of([record(0, None)]).work_share == 0.5
    assert of([record(0, None)], closed=0).work_share == 1.0, "the round is still open"
    assert of([record(0, "no_data")]).work_share == 1.0
    assert of([record(i, "crashed") for i in range(20)]).work_share == 0.5**4
    back = [record(0, "crashed"), record(1), record(2)]
    assert of(back).work_share == 1.0


def test_the_order_of_records_does_not_matter_and_devices_do_not_mix() -> None:
    history = [record(i, device=d, train_s=6.0 + i + (d == "b")) for i in range(6) for d in "ab"]
    mixed = list(history)
    random.Random(1).shuffle(mixed)
    assert learnt(history, range(9)) == learnt(mixed, range(9))
    assert learnt(history, range(9))["a"] == of([r for r in history
                                                 if r.assignment.device_id == "a"])  # fmt: skip


def test_what_a_device_did_last_and_how_long_the_last_such_round_was() -> None:
    first, second = record(0), record(1)
    second.predicted["rank"] = 7
    assert plans_before([second, first], measuring=False)["a"]["rank"] == 7
    measuring = replace(second.assignment, evaluates_global=True, deadline_s=90.0)
    history = [first, replace(second, assignment=measuring)]
    assert "rank" not in plans_before(history, measuring=False)["a"]
    assert plans_before(history, measuring=True)["a"]["rank"] == 7
    assert length_before(history, measuring=True) == 90.0
    assert length_before(history, measuring=False) == 60.0
    assert length_before([], measuring=False) is None
