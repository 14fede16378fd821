"""Every index has the value of its definition, in any direction, on degenerate rows too."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator import inequality as q
from coordinator.inequality import FairnessError

scores = st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=30)
with_zeros = st.lists(st.floats(0, 100).map(lambda v: round(v, 3)), min_size=1, max_size=30)
SCALE_FREE = [
    q.jain, q.cosine_to_one, q.gini, q.entropy, q.theil, q.cv,
    lambda v: q.atkinson(v, 0.5), lambda v: q.atkinson(v, 1), lambda v: q.atkinson(v, 2),
]  # fmt: skip


def by_pairs(values):
    """Gini, by its definition over all pairs, in exact arithmetic."""
    exact = [Fraction(v) for v in values]
    pairs = sum(abs(a - b) for a in exact for b in exact)
    return float(pairs / (2 * len(exact) * sum(exact))) if sum(exact) else 0.0


def shares(values):
    return [v / math.fsum(values) for v in values]


@given(scores)
def test_jain_is_the_squared_cosine_and_one_over_one_plus_cv_squared(values) -> None:
    assert q.jain(values) == pytest.approx(1 / (1 + q.cv(values) ** 2), rel=1e-9)
    assert q.jain(values) == pytest.approx(q.cosine_to_one(values) ** 2, rel=1e-12)
    ones = np.ones(len(values))
    cosine = np.dot(values, ones) / (np.linalg.norm(values) * np.linalg.norm(ones))
    assert q.cosine_to_one(values) == pytest.approx(cosine, rel=1e-9)
    assert 1 / len(values) - 1e-9 <= q.jain(values) <= 1 + 1e-9


@given(with_zeros)
def test_gini_is_its_pairwise_definition(values) -> None:
    assert q.gini(values) == pytest.approx(by_pairs(values), abs=1e-9)


@given(scores)
def test_theil_is_ln_n_less_entropy_and_the_divergence_from_equal_shares(values) -> None:
    n, p = len(values), shares(values)
    entropy = -math.fsum(s * math.log(s) for s in p)
    divergence = math.fsum(s * math.log(s * n) for s in p)
    assert q.entropy(values) == pytest.approx(entropy, abs=1e-8)
    assert q.theil(values) == pytest.approx(math.log(n) - entropy, abs=1e-8)
    assert q.theil(values) == pytest.approx(divergence, abs=1e-8)


@given(scores, st.sampled_from([0.25, 0.5, 1.0, 1.5, 2.0, 5.0]))
def test_atkinson_is_one_less_a_power_mean_over_the_mean(values, epsilon) -> None:
    mean = math.fsum(values) / len(values)
    if epsilon == 1:
        inner = math.exp(math.fsum(map(math.log, values)) / len(values))
    else:
        power = math.fsum((v / mean) ** (1 - epsilon) for v in values) / len(values)
        inner = mean * power ** (1 / (1 - epsilon))
    assert q.atkinson(values, epsilon) == pytest.approx(1 - inner / mean, abs=1e-9)


def test_atkinson_at_one_is_the_limit_of_its_neighbours() -> None:
    values = [0.2, 1.0, 3.0, 9.0]
    near = [float(q.atkinson(values, 1 + d)) for d in (-1e-6, 1e-6)]
    assert near[0] < q.atkinson(values, 1) < near[1] and near[1] - near[0] < 1e-5


@given(with_zeros, st.floats(1e-3, 1e3))
def test_scale_free_indices_know_no_unit_and_no_order(values, unit) -> None:
    for index in SCALE_FREE:
        assert index([unit * v for v in values]) == pytest.approx(float(index(values)), abs=1e-6)
        assert index(values[::-1]) == pytest.approx(float(index(values)), abs=1e-12)


@given(scores, st.floats(0.01, 1.0))
def test_tails_are_right_for_losses_and_for_accuracies(values, share) -> None:
    size = max(1, math.ceil(share * len(values) - 1e-9))
    low, high = sorted(values)[:size], sorted(values)[-size:]
    low, high = math.fsum(low) / size, math.fsum(high) / size
    near = lambda v: pytest.approx(v, rel=1e-12)  # noqa: E731
    assert q.worst_mean(values, share, "lower") == near(high)  # losses: the worst are high
    assert q.worst_mean(values, share, "higher") == near(low)  # accuracies: the worst are low
    assert q.best_mean(values, share, "lower") == near(low)
    assert q.best_mean(values, share, "higher") == near(high)


@pytest.mark.parametrize("n, tail", [(1, 1), (2, 1), (9, 1), (10, 1), (11, 2), (20, 2), (30, 3)])
def test_a_tenth_of_few_devices_is_one_device(n, tail) -> None:
    values = [float(i) for i in range(n)]
    assert q.worst_mean(values, 0.1) == pytest.approx(sum(values[-tail:]) / tail)
    assert q.tail_size(n, 0.1) == tail


@given(scores, st.floats(0, 0.99))
def test_cvar_is_the_least_of_rockafellar_and_uryasevs_objective(values, level) -> None:
    # Their definition: min over c of c + mean (a - c)+ / (1 - level), reached at some value.
    n = len(values)
    least = min(c + math.fsum(max(0, v - c) for v in values) / (n * (1 - level)) for c in values)
    assert q.cvar(values, level) == pytest.approx(least, rel=1e-6)


def test_cvar_is_the_worst_tail_where_it_holds_whole_devices() -> None:
    values = [3.0, 1.0, 4.0, 1.5, 9.0, 2.0, 6.0, 5.0, 3.5, 5.5]
    assert q.cvar(values, 0.8) == pytest.approx(float(q.worst_mean(values, 0.2)))
    assert q.cvar(values, 0.8, "higher") == pytest.approx(float(q.best_mean(values, 0.2)))


@pytest.mark.parametrize("row", [[5.0], [2.0, 2.0, 2.0], [0.0, 0.0], [1e-300] * 3, [1e300] * 3])
def test_equal_values_are_perfectly_even_zeros_and_extremes_too(row) -> None:
    assert q.jain(row) == pytest.approx(1) and q.entropy(row) == pytest.approx(math.log(len(row)))
    for index in (q.gini, q.theil, q.cv, *SCALE_FREE[-3:]):
        assert index(row) == pytest.approx(0, abs=1e-12)


def test_one_who_has_everything_is_the_other_end() -> None:
    row = [0.0, 0.0, 0.0, 8.0]
    assert (q.jain(row), q.gini(row)) == (pytest.approx(1 / 4), pytest.approx(3 / 4))
    assert (q.theil(row), q.entropy(row)) == (pytest.approx(math.log(4)), pytest.approx(0))
    assert q.atkinson(row, 1) == q.atkinson(row, 2) == 1
    assert q.atkinson(row, 0.5) == pytest.approx(1 - (8**0.5 / 4) ** 2 / 2)


def test_a_stack_of_rows_gives_the_figures_of_each() -> None:
    rows = np.random.default_rng(0).exponential(size=(5, 3, 7))
    rows[0, 0, 2] = 0.0
    for index in (*SCALE_FREE, q.mean, q.variance, q.value_range,
                  lambda v: q.worst_mean(v, 0.3), lambda v: q.cvar(v, 0.75)):  # fmt: skip
        found = index(rows)
        assert found.shape == (5, 3)
        assert found[3, 1] == pytest.approx(float(index(rows[3, 1])), rel=1e-12)


@pytest.mark.parametrize("index", SCALE_FREE)
def test_scale_free_indices_refuse_values_below_zero_by_place(index) -> None:
    with pytest.raises(FairnessError, match="value 1 is below 0"):
        index([1.0, -1.0])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused_by_place(bad) -> None:
    for index in (*SCALE_FREE, q.mean, q.variance, lambda v: q.worst_mean(v, 0.1)):
        with pytest.raises(FairnessError, match="value 2 is not finite"):
            index([1.0, 2.0, bad])
    with pytest.raises(FairnessError, match="no values"):
        q.mean([])


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: q.worst_mean([1.0], 0), "tail of 0"),
        (lambda: q.worst_mean([1.0], 1.5), "tail of 1.5"),
        (lambda: q.cvar([1.0], 1), "no tail"),
        (lambda: q.atkinson([1.0], 0), "epsilon"),
        (lambda: q.atkinson([1.0], math.nan), "epsilon"),
    ],
)
def test_settings_out_of_range_are_refused(call, words) -> None:
    with pytest.raises(FairnessError, match=words):
        call()


def test_figures_agree_with_federatedscope_where_its_definitions_are_sound() -> None:
    # federatedscope/core/monitors/metric_calculator and its `cos1`, `entropy`, `bottom10%`: the
    # last uses N // 10 and so is undefined below ten clients.
    values = sorted(np.random.default_rng(3).uniform(0.2, 0.9, 40))
    assert q.best_mean(values, 0.1, "higher") == pytest.approx(np.mean(values[-(40 // 10) :]))
    assert q.worst_mean(values, 0.1, "higher") == pytest.approx(np.mean(values[: 40 // 10]))
    p = np.array(values) / np.sum(values)
    assert q.entropy(values) == pytest.approx(-np.sum(p * np.log(p)))
    cosine = np.dot(values, np.ones(40)) / (np.linalg.norm(values) * np.linalg.norm(np.ones(40)))
    assert q.cosine_to_one(values) == pytest.approx(cosine)
