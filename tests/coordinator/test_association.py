"""Rank correlations agree with their definitions; p-value and interval hold their level."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.association import associate, kendall, permutation_p, ranks, spearman
from coordinator.inequality import FairnessError

tied = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=2, max_size=12)


def by_definition_kendall(x, y):
    pairs = list(itertools.combinations(range(len(x)), 2))
    sign = lambda a, b: (a > b) - (a < b)  # noqa: E731
    both = sum(sign(x[i], x[j]) * sign(y[i], y[j]) for i, j in pairs)
    one = sum(x[i] != x[j] for i, j in pairs)
    other = sum(y[i] != y[j] for i, j in pairs)
    return both / math.sqrt(one * other) if one and other else None


@given(tied)
def test_kendall_is_its_definition_over_pairs(pairs) -> None:
    x, y = zip(*pairs, strict=True)
    found, want = kendall(x, y), by_definition_kendall(x, y)
    assert found == (None if want is None else pytest.approx(want))


@given(tied)
def test_spearman_is_pearsons_correlation_of_the_ranks(pairs) -> None:
    x, y = zip(*pairs, strict=True)
    found = spearman(x, y)
    if len(set(x)) == 1 or len(set(y)) == 1:
        assert found is None
        return
    place = lambda v: [sum(w < u for w in v) + (v.count(u) + 1) / 2 for u in v]  # noqa: E731
    assert found == pytest.approx(np.corrcoef(place(x), place(y))[0, 1])
    assert list(ranks(x)) == place(x)


@pytest.mark.slow  # SciPy alone takes seconds to import, and is no dependency
@given(tied)
@settings(deadline=None)
def test_scipy_gives_the_same(pairs) -> None:
    stats = pytest.importorskip("scipy.stats")
    x, y = zip(*pairs, strict=True)
    if len(set(x)) > 1 and len(set(y)) > 1:
        assert spearman(x, y) == pytest.approx(stats.spearmanr(x, y).statistic)
        assert kendall(x, y) == pytest.approx(stats.kendalltau(x, y).statistic)


def test_known_pairs() -> None:
    assert spearman([1, 2, 3, 4], [10, 20, 30, 31]) == pytest.approx(1)
    assert spearman([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    assert spearman([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(0.9486832980505138)  # SciPy
    assert spearman([1, 1, 1], [1, 2, 3]) is None and spearman([1], [1]) is None


def test_the_p_value_of_few_devices_counts_every_order() -> None:
    assert permutation_p([1, 2, 3, 4], [1, 2, 3, 4]) == pytest.approx(2 / 24)
    assert permutation_p(range(6), range(6)) == pytest.approx(2 / 720)
    assert permutation_p([1, 1, 1, 1], [1, 2, 3, 4]) is None


def test_the_p_value_of_many_devices_is_drawn_and_near_the_exact_one() -> None:
    rng = np.random.default_rng(5)
    x, y = rng.normal(size=9), rng.normal(size=9)
    orders = np.array(list(itertools.permutations(range(8))))
    assert len(orders) == math.factorial(8)
    exact8 = permutation_p(x[:8], y[:8])
    centre = np.arange(1, 9) - 4.5
    a, b = centre[np.argsort(np.argsort(x[:8]))], centre[np.argsort(np.argsort(y[:8]))]
    assert exact8 == pytest.approx((np.abs(b[orders] @ a) >= abs(a @ b) - 1e-9).mean())
    assert permutation_p(x, y, seed=1) == pytest.approx(permutation_p(x, y, seed=2), abs=0.02)
    assert permutation_p(x, y, seed=1) == permutation_p(x, y, seed=1)


def test_no_association_is_called_one_no_more_often_than_the_level() -> None:
    rng = np.random.default_rng(0)
    said = [associate(rng.normal(size=7), rng.normal(size=7)) for _ in range(150)]
    assert sum(a.p_value <= 0.05 for a in said) <= 15  # 7.5 expected; P(> 15) = 0.3 %
    assert sum(a.low > 0 or a.high < 0 for a in said) <= 15


def test_a_planted_association_is_found() -> None:
    rng = np.random.default_rng(1)
    x = rng.normal(size=20)
    found = associate(x, 2 * x + rng.normal(scale=0.5, size=20))
    assert found.p_value < 0.001 and found.low > 0.4 and found.kendall > 0.5


def test_four_devices_leave_almost_everything_open() -> None:
    found = associate([1, 2, 3, 4], [1, 3, 2, 4])
    assert found.spearman == pytest.approx(0.8) and found.low < 0 < found.high
    assert found.p_value > 0.3
    whole = associate([1, 2, 3, 4], [1, 2, 3, 4])
    assert whole.spearman == whole.high == 1 and whole.low < 0


def test_three_devices_and_no_spread_say_nothing() -> None:
    assert associate([1, 2, 3], [1, 2, 3]).p_value is None
    assert associate([1, 1, 1, 1], [1, 2, 3, 4]).spearman is None


def test_what_cannot_be_paired_is_refused() -> None:
    with pytest.raises(FairnessError, match="2 values cannot be paired with 1"):
        spearman([1, 2], [1])
    with pytest.raises(FairnessError, match="no rank"):
        kendall([1, math.nan], [1, 2])
