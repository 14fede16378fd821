"""Fairness figures have the values they have on paper."""

import math

import numpy as np
import pytest

from coordinator.fairness import (
    Evenness,
    FairnessError,
    LocalGap,
    evenness,
    local_gap,
    summarise,
    tier_spread,
)


def test_summary_of_known_losses() -> None:
    found = summarise({"a": 1.0, "b": 2.0, "c": 3.0}, {"a": 1.0, "b": 1.0, "c": 2.0})
    assert (found.devices, found.best, found.worst, found.range) == (3, 1.0, 3.0, 2.0)
    assert found.mean == pytest.approx(2.0)
    assert found.weighted_mean == pytest.approx(9 / 4)
    assert found.std == pytest.approx(math.sqrt(2 / 3))
    assert found.jain == pytest.approx(36 / (3 * 14))
    assert found.gini == pytest.approx(8 / (2 * 9 * 2))
    assert found.worst_decile_mean == 3.0


def test_a_summary_of_accuracies_has_its_worst_tail_at_the_low_end() -> None:
    accuracies = {str(i): 0.1 * i for i in range(1, 10)}  # nine devices: a tenth is one of them
    ones = dict.fromkeys(accuracies, 1.0)
    as_accuracy, as_loss = summarise(accuracies, ones, "higher"), summarise(accuracies, ones)
    assert (as_accuracy.worst, as_accuracy.worst_decile_mean) == (0.1, 0.1)
    assert (as_loss.worst, as_loss.worst_decile_mean) == (0.9, 0.9)
    assert (as_accuracy.best, as_accuracy.best_decile_mean) == (0.9, 0.9)
    assert (as_loss.jain, as_loss.variance) == (as_accuracy.jain, as_accuracy.variance)


def test_the_identities_of_a_summary() -> None:
    found = summarise({"a": 1.0, "b": 2.0, "c": 4.0}, dict.fromkeys("abc", 1.0))
    assert found.jain == pytest.approx(1 / (1 + found.cv**2)) == pytest.approx(found.cosine**2)
    assert found.theil == pytest.approx(math.log(3) - found.entropy)
    assert found.std == pytest.approx(math.sqrt(found.variance))
    assert found.atkinson == pytest.approx(1 - 2 / (7 / 3))


def test_one_device_and_equal_devices_are_even() -> None:
    for losses in ({"a": 2.0}, {"a": 2.0, "b": 2.0}, {"a": 0.0, "b": 0.0}):
        found = summarise(losses, dict.fromkeys(losses, 1.0))
        assert (found.jain, found.cv, found.range) == (1, 0, 0)
        assert found.gini == found.theil == found.atkinson == 0


def test_indices_without_a_meaning_below_zero_are_left_out() -> None:
    found = summarise({"a": -1.0, "b": 1.0}, {"a": 1.0, "b": 1.0})
    assert (found.mean, found.worst, found.std) == (0.0, 1.0, 1.0)
    indices = (found.jain, found.gini, found.cv, found.theil, found.atkinson)
    assert indices == (None,) * 5


def test_weights_that_are_all_zero_are_equal_weights() -> None:
    assert summarise({"a": 1.0, "b": 3.0}, {"a": 0.0, "b": 0.0}).weighted_mean == 2.0


def test_the_gap_to_training_alone_is_positive_for_who_would_gain_alone() -> None:
    gap = local_gap({"a": 2.0, "b": 1.0, "c": 9.0}, {"a": 1.5, "b": 1.5, "d": 0.0})
    assert gap == LocalGap(2, 0.0, 0.5, 0.5, ("a",))
    # The same devices by accuracy, where higher is better.
    assert local_gap({"a": 0.6, "b": 0.3}, {"a": 0.5, "b": 0.5}, "higher").worse_off == ("b",)
    assert local_gap({"a": 1.0}, {"a": 1.0}).worse_off_share == 0.0  # as well off is not worse
    assert local_gap({"a": 1.0}, {"b": 1.0}) is None


def test_tiers_split_the_variance_between_and_within() -> None:
    losses = {"a": 1.0, "b": 3.0, "c": 5.0, "d": 7.0, "e": 100.0}
    found = tier_spread(losses, {"a": "pi", "b": "pi", "c": "orin", "d": "orin", "e": ""})
    assert found.means == {"orin": 6.0, "pi": 2.0} and found.gap == 4.0
    assert found.devices == {"orin": 2, "pi": 2}  # a device without a tier is left out
    assert found.between_share == pytest.approx(16 / 20)
    assert found.between_by_chance == pytest.approx(1 / 3)


def test_tiers_that_make_no_difference_show_the_share_expected_by_chance() -> None:
    rng = np.random.default_rng(0)
    tiers = {str(i): "abc"[i % 3] for i in range(9)}
    shown = [tier_spread({d: rng.normal() for d in tiers}, tiers) for _ in range(400)]
    share = sum(s.between_share for s in shown) / len(shown)
    assert share == pytest.approx(shown[0].between_by_chance, abs=0.03)


def test_tiers_without_variance_or_devices() -> None:
    assert tier_spread({"a": 1.0, "b": 1.0}, {"a": "x", "b": "y"}).between_share is None
    assert tier_spread({"a": 1.0}, {"a": "x"}).between_by_chance is None
    assert tier_spread({"a": 1.0}, {}) is None
    with pytest.raises(FairnessError, match="not finite"):
        tier_spread({"a": math.nan}, {"a": "x"})


def test_participation_counts_those_who_never_joined() -> None:
    found = evenness({"a": 4, "b": 0, "c": 0, "d": 0})
    assert found == Evenness(4.0, pytest.approx(0.25), pytest.approx(0.75), 0.0, 4.0)
    assert evenness({}) is None
    with pytest.raises(FairnessError, match="below 0"):
        evenness({"a": -1, "b": 1})


def test_summary_says_what_it_lacks() -> None:
    with pytest.raises(FairnessError, match="no device"):
        summarise({}, {})
    with pytest.raises(FairnessError, match="no weight for b"):
        summarise({"a": 1.0, "b": 1.0}, {"a": 1.0})
    with pytest.raises(FairnessError, match="b is not finite"):
        summarise({"a": 1.0, "b": math.nan}, {"a": 1.0, "b": 1.0})
    with pytest.raises(FairnessError, match="weight of a is negative"):
        summarise({"a": 1.0}, {"a": -1.0})
