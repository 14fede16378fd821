"""Classes dealt to devices: every example once, sizes as asked, skew as drawn."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trials.shift import ShiftError, deal, mixtures, shares_of, skew

CLASSES = np.repeat([0, 1, 2], [300, 200, 100])
PRIOR = [300, 200, 100]


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    alpha=st.floats(0.01, 1e4),
    sizes=st.lists(st.integers(0, 100), min_size=1, max_size=6),
)
def test_devices_have_as_many_as_asked_and_no_example_twice(seed, alpha, sizes):
    wanted = mixtures(PRIOR, len(sizes), alpha, seed)
    np.testing.assert_allclose(wanted.sum(1), 1)
    dealt = deal(CLASSES, wanted, sizes, seed)
    assert [len(found) for found in dealt] == sizes
    everything = np.concatenate(dealt)
    assert len(np.unique(everything)) == len(everything)


def test_the_same_seed_deals_the_same_and_another_does_not():
    first, again, other = (
        deal(CLASSES, mixtures(PRIOR, 4, 0.5, seed), [50] * 4, seed) for seed in (3, 3, 4)
    )
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(first, other, strict=True))


def test_everything_can_be_dealt_when_a_class_is_used_up():
    dealt = deal(CLASSES, mixtures(PRIOR, 6, 0.05, 1), [100] * 6, 1)
    np.testing.assert_array_equal(np.sort(np.concatenate(dealt)), np.arange(600))


def test_more_than_there_is_is_refused():
    with pytest.raises(ShiftError, match="ask for 601 examples of 600"):
        deal(CLASSES, mixtures(PRIOR, 2, 1, 1), [300, 301], 1)


def test_mixtures_have_the_mean_and_spread_of_their_distribution():
    drawn = mixtures(PRIOR, 20000, 2.0, 7)
    p = np.array(PRIOR) / 600
    np.testing.assert_allclose(drawn.mean(0), p, atol=0.01)
    # Var of a Dirichlet's share: p (1 - p) / (total + 1), its total here 2 * 3.
    np.testing.assert_allclose(drawn.var(0), p * (1 - p) / 7, atol=0.003)


def test_skew_falls_with_alpha_and_is_total_variation():
    found = []
    for alpha in (0.05, 0.5, 5, 500):
        dealt = deal(CLASSES, mixtures(PRIOR, 4, alpha, 2), [100] * 4, 2)
        found.append(skew(shares_of(CLASSES, dealt, 3)))
    assert found == sorted(found, reverse=True)
    assert found[-1] < 0.1 and found[0] > 0.4
    assert skew(np.array([[1.0, 0.0], [0.0, 1.0]])) == 0.5
    assert skew(np.array([[1.0, 0.0], [0.0, 1.0]]), [3, 1]) == 0.5 * (0.25 + 0.75)
    assert skew(np.array([[0.3, 0.7]] * 5)) == 0


def test_a_tiny_alpha_is_still_a_mixture():
    assert np.isfinite(mixtures(PRIOR, 50, 1e-6, 1)).all()
