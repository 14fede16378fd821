"""Fairness figures have the values they have on paper."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.fairness import (
    DeviceRound,
    FairnessError,
    gini,
    jain,
    ledger,
    spearman,
    summarise,
    worst_mean,
)
from protos.contract import Evaluation, LocalReport

positive = st.lists(st.floats(0.01, 100), min_size=1, max_size=40)


def test_summary_of_known_losses() -> None:
    found = summarise({"a": 1.0, "b": 2.0, "c": 3.0}, {"a": 1.0, "b": 1.0, "c": 2.0})
    assert (found.devices, found.best, found.worst, found.range) == (3, 1.0, 3.0, 2.0)
    assert found.mean == pytest.approx(2.0)
    assert found.weighted_mean == pytest.approx(9 / 4)
    assert found.std == pytest.approx(math.sqrt(2 / 3))
    assert found.jain == pytest.approx(36 / (3 * 14))
    assert found.gini == pytest.approx(8 / (2 * 9 * 2))
    assert found.worst_decile_mean == 3.0


@given(positive)
def test_jain_is_one_over_one_plus_cv_squared(values: list[float]) -> None:
    mean = sum(values) / len(values)
    cv2 = sum((v - mean) ** 2 for v in values) / len(values) / mean**2
    assert jain(values) == pytest.approx(1 / (1 + cv2), rel=1e-9)
    assert 1 / len(values) - 1e-9 <= jain(values) <= 1 + 1e-9


@given(positive)
def test_gini_agrees_with_its_pairwise_definition(values: list[float]) -> None:
    n, total = len(values), sum(values)
    pairs = sum(abs(a - b) for a in values for b in values)
    assert gini(values) == pytest.approx(pairs / (2 * n * total), abs=1e-9)


def test_jain_of_one_taker_is_one_over_n() -> None:
    assert jain([0, 0, 0, 8]) == pytest.approx(1 / 4)
    assert jain([0, 0]) == 1.0


@pytest.mark.parametrize("n, tail", [(1, 1), (2, 1), (9, 1), (10, 1), (11, 2), (20, 2), (30, 3)])
def test_worst_tail_is_never_empty(n: int, tail: int) -> None:
    values = [float(i) for i in range(n)]
    assert worst_mean(values, 0.1) == pytest.approx(sum(values[-tail:]) / tail)


def test_spearman_of_known_pairs() -> None:
    assert spearman([1, 2, 3, 4], [10, 20, 30, 31]) == pytest.approx(1)
    assert spearman([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    assert spearman([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(0.9486832980505138)  # SciPy
    assert spearman([1, 1, 1], [1, 2, 3]) is None
    assert spearman([1], [1]) is None


def test_summary_says_what_it_lacks() -> None:
    with pytest.raises(FairnessError, match="no device"):
        summarise({}, {})
    with pytest.raises(FairnessError, match="no weight for b"):
        summarise({"a": 1.0, "b": 1.0}, {"a": 1.0})
    with pytest.raises(FairnessError, match="b is not finite"):
        summarise({"a": 1.0, "b": math.nan}, {"a": 1.0, "b": 1.0})


def fact(device: str, round_: int, received: float | None = None, **changes: object) -> DeviceRound:
    seen = [Evaluation("slice", "received", 9.0, 0.0, 10)]
    if received is not None:
        seen.append(Evaluation("global", "received", received, 0.0, 10))
    report = LocalReport(
        f"{device}-{round_}", "done", evaluations=tuple(seen), fetch_s=1, train_s=2, evaluate_s=3,
        push_s=4, main_language="go",
    )  # fmt: skip
    plain = {
        "board": "pi", "rank": 4, "global_rank": 16, "reason": "why", "up_bytes": 10,
        "dense_bytes": 100, "report": report, "merged_share": 0.5,
    }  # fmt: skip
    return DeviceRound(round=round_, device_id=device, **(plain | changes))  # type: ignore[arg-type]


def test_ledger_counts_the_whole_adapter_and_never_the_slice() -> None:
    end = {"merged_share": 0.0, "up_bytes": 0, "dense_bytes": 0}
    facts = [
        fact("b", 0, 3.0), fact("b", 1), fact("b", 2, 2.0, **end),
        fact("a", 0, 2.0), fact("a", 2, 1.0, rank=16, **end),
        fact("c", 1),
    ]  # fmt: skip
    a, b, c = ledger(facts, rounds=2)
    assert (a.device_id, b.device_id, c.device_id) == ("a", "b", "c")
    assert (b.loss_before, b.loss_after, b.gap) == (3.0, 2.0, 0.5)
    assert (a.loss_before, a.loss_after, a.gap) == (2.0, 1.0, -0.5)
    assert (c.loss_before, c.loss_after, c.gap) == (None, None, None)
    assert (b.rounds_joined, a.rounds_joined) == (2, 1)
    assert (b.update_share, a.update_share) == (0.5, 0.25)
    assert (a.k, a.ratio, a.language) == (4, 0.25, "go")
    assert (b.up_bytes, b.dense_bytes, b.compression, b.seconds) == (20, 200, 10.0, 30.0)


def test_ledger_has_no_loss_after_when_measured_once() -> None:
    (row,) = ledger([fact("a", 0, 2.0)], rounds=1)
    assert (row.loss_before, row.loss_after) == (2.0, None)


def test_ledger_does_not_count_a_failed_round_as_joined() -> None:
    failed = LocalReport("x", "out_of_memory")
    (row,) = ledger([fact("a", 0), fact("a", 1, report=failed)], rounds=2)
    assert row.rounds_joined == 1
