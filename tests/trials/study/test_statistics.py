"""The studies' statistics against scipy, and against made-up studies with known effects."""

import numpy as np
import pytest
from scipy import stats

from trials.study.planted import plant
from trials.study.statistics import (
    benjamini_hochberg,
    detectable,
    draws,
    highest_spearman,
    holm,
    interval,
    kendall,
    partial_p,
    partial_spearman,
    permutation_p,
    shuffled,
    slope,
    spearman,
)


def tied(seed, size=8):
    draw = np.random.default_rng(seed)
    return draw.integers(0, 4, size).astype(float), draw.normal(size=size).round(1)


@pytest.mark.parametrize("seed", range(8))
def test_correlations_of_one_run_are_scipys_with_ties(seed):
    x, y = tied(seed)
    assert spearman(x[None], y[None]) == pytest.approx(stats.spearmanr(x, y).statistic)
    assert kendall(x[None], y[None]) == pytest.approx(stats.kendalltau(x, y).statistic)


def test_runs_are_averaged_not_pooled_and_those_without_spread_are_left_out():
    x = np.array([[0, 1, 2, 3], [0, 1, 2, 3], [1, 1, 1, 1]], float)
    y = np.array([[0, 1, 2, 3], [9, 8, 7, 6], [0, 1, 2, 3]], float)
    assert spearman(x, y) == pytest.approx(0)
    assert np.isnan(spearman(x[2:], y[2:]))
    assert np.isnan(permutation_p(lambda v: spearman(v, y[2:]), x[2:], 99, 0)[0])


def test_the_slope_is_that_of_a_regression_with_an_intercept_for_each_run():
    draw = np.random.default_rng(1)
    x, y = draw.normal(size=(2, 3, 6))
    design = np.kron(np.eye(3), np.ones((6, 1)))
    wanted = np.linalg.lstsq(np.column_stack([x.ravel(), design]), y.ravel(), rcond=None)[0][0]
    assert slope(x, y) == pytest.approx(wanted)


def test_a_control_takes_out_what_it_explains_and_one_without_spread_nothing():
    draw = np.random.default_rng(2)
    z = draw.normal(size=(5, 8))
    x, y = z + 0.3 * draw.normal(size=(5, 8)), z + 0.3 * draw.normal(size=(5, 8))
    assert spearman(x, y) > 0.7
    assert abs(partial_spearman(x, y, [z])) < 0.4
    flat = np.ones((5, 8))
    assert partial_spearman(x, y, [flat]) == pytest.approx(partial_spearman(x, y, []))
    assert np.isnan(partial_spearman(x, y, [x]))  # nothing is left of x


def test_a_partial_correlation_of_one_run_is_that_of_residuals():
    draw = np.random.default_rng(3)
    x, y, z = (stats.rankdata(v) for v in draw.normal(size=(3, 12)))
    r = {k: stats.pearsonr(*v)[0] for k, v in {"xy": (x, y), "xz": (x, z), "yz": (y, z)}.items()}
    wanted = (r["xy"] - r["xz"] * r["yz"]) / np.sqrt((1 - r["xz"] ** 2) * (1 - r["yz"] ** 2))
    assert partial_spearman(x[None], y[None], [z[None]]) == pytest.approx(wanted)


def test_values_are_shuffled_only_within_their_run():
    x = np.arange(12.0).reshape(3, 4)
    drawn = shuffled(x, 50, 0)
    assert (np.sort(drawn, -1) == x).all()
    assert len({tuple(d.ravel()) for d in drawn}) > 40


def test_permutation_p_is_near_the_exact_one_of_a_single_run():
    x, y = np.arange(6.0), np.array([0.0, 2, 1, 3, 5, 4])
    exact = stats.permutation_test(
        (x,), lambda v: stats.spearmanr(v, y).statistic, permutation_type="pairings",
        n_resamples=np.inf,
    ).pvalue  # fmt: skip
    p, sd = permutation_p(lambda v: spearman(v, y[None]), x[None], 4999, 0)
    assert p == pytest.approx(exact, abs=0.01)
    assert sd == pytest.approx(1 / np.sqrt(5), abs=0.02)


def test_levels_in_pairs_cannot_reach_a_rho_of_one():
    x = np.repeat(np.arange(4.0), 2)
    assert highest_spearman(x[None]) == pytest.approx(stats.spearmanr(x, np.arange(8)).statistic)


def test_replicates_keep_pairs_together_and_resample_seeds_devices_and_sequences():
    tokens = np.full((3, 4, 5), 2.0)
    nats = np.arange(60.0).reshape(3, 4, 5)
    (draw,) = draws((3, 4, 5), 50, 0)
    names = np.arange(12.0).reshape(3, 4)
    got = draw.losses(nats, tokens)
    assert got.shape == (50, 3, 4)
    own = nats.mean(-1).ravel()[draw.of(names).astype(int)] / 2
    assert np.abs(got - own).max() <= 1.0  # of the device that the name says, other sequences
    assert draw.losses(np.stack([nats, nats + 2]), tokens)[1] - got == pytest.approx(1.0)
    (whole,) = draws((3, 4, 5), 10, 0, devices=False)
    assert (np.diff(whole.of(names), axis=-1) == 1).all()


def losses_of(planted):
    return planted.nats.sum(-1) / planted.tokens.sum(-1)


def study(effect, seed, replicates=200, permutations=199, statistic=spearman, **how):
    """(p, slope with its interval) of one made-up study."""
    made = plant(effect, seed, **how)
    dense, run = losses_of(made)
    p, _ = permutation_p(lambda x: statistic(x, run - dense), made.x, permutations, seed)
    found = []
    for draw in draws(made.nats.shape[1:], replicates, seed):
        a, b = draw.losses(made.nats, made.tokens)
        found.append(slope(draw.of(made.x), b - a))
    value = float(slope(made.x, run - dense))
    return p, interval(value, np.concatenate(found), len(made.x), nested=True)


def rates(effect, studies, **how):
    found = [study(effect, i, **how) for i in range(studies)]
    covered = np.mean([e.low <= effect <= e.high for _, e in found])
    return np.mean([p <= 0.05 for p, _ in found]), covered


def within_binomial(rate, truth, trials):
    return abs(rate - truth) <= 3 * np.sqrt(truth * (1 - truth) / trials)


def test_without_an_effect_one_study_in_twenty_reports_one():
    rejected, covered = rates(0.0, 150, replicates=100)
    assert within_binomial(rejected, 0.05, 150)
    assert covered >= 0.95 - 3 * np.sqrt(0.05 * 0.95 / 150)


def test_a_planted_effect_is_found_and_its_size_lies_in_the_interval():
    found, covered = rates(0.02, 60)
    assert found > 0.9
    assert covered >= 0.95 - 3 * np.sqrt(0.05 * 0.95 / 60)


@pytest.mark.slow
@pytest.mark.parametrize("how", [{}, {"varies": 0.01}, {"example_sd": 1.0}, {"devices": 12}])
def test_coverage_and_false_positives_over_many_studies(how):
    rejected, covered = rates(0.0, 600, replicates=400, permutations=399, **how)
    if not how.get("varies"):  # where domains differ in the effect, there is one
        assert within_binomial(rejected, 0.05, 600)
    assert covered >= 0.95 - 3 * np.sqrt(0.05 * 0.95 / 600)


def partials(strength, studies, seed, tie_to_x):
    """(p, partial) of studies without effect; the control moves y, and x too where tied to it."""
    draw, found = np.random.default_rng(seed), []
    for i in range(studies):
        z = draw.normal(size=(5, 8))
        x = np.round(z * tie_to_x + strength * draw.normal(size=(5, 8)), 1)
        y = z + strength * draw.normal(size=(5, 8))
        found.append((partial_p(x, y, [z], 199, i), float(partial_spearman(x, y, [z]))))
    return np.array(found)


def test_the_permuted_partial_keeps_its_level_where_ratios_were_drawn():
    p, _ = partials(0.5, 150, 5, tie_to_x=0).T
    assert within_binomial(np.mean(p <= 0.05), 0.05, 150)


def test_a_partial_of_ranks_leaves_a_little_of_a_strong_confounder():
    """Known of ranks, and said in the report: it takes out what is linear in them."""
    _, left = partials(0.5, 150, 6, tie_to_x=1).T
    assert 0 < left.mean() < 0.2


def test_the_detectable_effect_is_found_in_four_of_five_studies():
    made = plant(0.0, 0)
    dense, run = losses_of(made)
    _, sd = permutation_p(lambda x: slope(x, run - dense), made.x, 999, 0)
    effect = detectable(sd)
    p = [study(effect, 100 + i, replicates=1, statistic=slope)[0] for i in range(100)]
    assert 0.6 < np.mean(np.array(p) <= 0.05) < 0.95


def test_many_tests_are_adjusted_as_published():
    p = [0.01, 0.04, 0.03, 0.005]
    assert holm(p) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert benjamini_hochberg(p) == pytest.approx([0.02, 0.04, 0.04, 0.02])
    assert len(holm([])) == 0 and len(benjamini_hochberg([])) == 0


def test_one_seed_has_no_interval():
    assert np.isnan(interval(1.0, [0.9, 1.1], 1).low)
