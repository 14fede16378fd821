"""The noise of small held-out sets is measured, taken out, and put into intervals."""

import math

import numpy as np
import pytest

from coordinator import inequality as q
from coordinator.fairness import FairnessError
from coordinator.uncertainty import Bootstrap, HeldOut, corrected_variance


def std(losses):
    return np.sqrt(q.variance(losses))


def fleet(rng, losses, examples):
    """Held-out sets of devices whose true losses are `losses`; harder examples are longer, too."""
    made = {}
    for i, true in enumerate(losses):
        tokens = rng.integers(50, 200, examples)
        per_token = true * np.exp(rng.normal(-0.08, 0.4, examples))
        made[f"d{i}"] = HeldOut.of(f"d{i}", per_token * tokens, tokens)
    return made


def of(devices):
    return {name: d.loss for name, d in devices.items()}, {n: d.noise for n, d in devices.items()}


def test_a_loss_is_summed_nats_over_tokens_not_a_mean_of_means() -> None:
    assert HeldOut.of("a", [10.0, 300.0], [10, 100]).loss == pytest.approx(310 / 110)


def test_the_sampling_variance_is_that_of_many_draws() -> None:
    rng = np.random.default_rng(0)
    many = [fleet(rng, [2.0], 40)["d0"] for _ in range(1500)]
    seen = np.var([d.loss for d in many])
    assert np.mean([d.noise for d in many]) == pytest.approx(seen, rel=0.1)
    assert HeldOut.of("a", [1.0], [2]).noise is None


def test_noise_is_taken_out_of_the_variance_without_bias() -> None:
    rng = np.random.default_rng(1)
    true = np.linspace(1.8, 2.2, 6)
    found = [corrected_variance(*of(fleet(rng, true, 12))) for _ in range(400)]
    unfloored = np.mean([f.naive - f.noise for f in found])
    assert np.mean([f.naive for f in found]) > 2.5 * true.var()  # what the noise alone adds
    assert unfloored == pytest.approx(true.var(), rel=0.25)


def test_equal_devices_seldom_keep_any_variance() -> None:
    rng = np.random.default_rng(2)
    found = [corrected_variance(*of(fleet(rng, [2.0] * 8, 20))) for _ in range(200)]
    assert all(f.naive > 0 and f.corrected >= 0 for f in found)
    assert np.mean([f.corrected for f in found]) < 0.25 * np.mean([f.naive for f in found])


def test_one_device_has_no_variance_to_correct() -> None:
    found = corrected_variance({"a": 2.0}, {"a": 0.1})
    assert (found.naive, found.noise, found.corrected) == (0, 0, 0)
    with pytest.raises(FairnessError, match="no sampling variance of b"):
        corrected_variance({"a": 1.0, "b": 1.0}, {"a": 0.1})


def test_replicates_vary_as_the_loss_does_and_replay_from_their_seed() -> None:
    devices = fleet(np.random.default_rng(3), [1.0, 3.0], 30)
    draw = lambda of, seed: Bootstrap.of(of, replicates=4000, seed=seed).drawn  # noqa: E731
    drawn = draw(devices, 1)
    assert drawn.shape == (4000, 2)
    for column, device in enumerate(devices.values()):
        assert drawn[:, column].mean() == pytest.approx(device.loss, rel=0.01)
        assert drawn[:, column].var() == pytest.approx(device.noise, rel=0.12)
    assert (drawn == draw(devices, 1)).all()
    assert (drawn != draw(devices, 2)).any()
    assert (drawn[:, :1] == draw({"d0": devices["d0"]}, 1)).all()


def test_large_held_out_sets_are_resampled_in_parts(monkeypatch) -> None:
    devices = fleet(np.random.default_rng(3), [1.0], 30)
    whole = Bootstrap.of(devices).drawn
    monkeypatch.setattr("coordinator.uncertainty.CHUNK_VALUES", 100)
    assert (Bootstrap.of(devices).drawn == whole).all()


def covered(trials, true, examples, statistic, *, seed, **options):
    """Share of intervals that hold the figure of the true losses."""
    rng, want = np.random.default_rng(seed), float(statistic(np.array(true)))
    found = (
        Bootstrap.of(fleet(rng, true, examples), replicates=400).interval(statistic, **options)
        for _ in range(trials)
    )
    return np.mean([i.low <= want <= i.high for i in found])


def test_intervals_cover_and_percentiles_of_a_spread_would_not() -> None:
    true = list(np.linspace(1.7, 2.3, 12))
    spread = {"statistic": std, "seed": 4, "bounds": (0, math.inf)}
    assert covered(80, true, 20, q.mean, seed=4) >= 0.85
    assert covered(80, true, 20, **spread) >= 0.8
    assert covered(80, true, 20, **spread, kind="percentile") < 0.6


@pytest.mark.slow
@pytest.mark.parametrize("devices, examples", [(4, 20), (8, 30), (20, 20), (8, 100)])
def test_coverage_of_nominal_95_percent(devices, examples) -> None:
    true = list(2 + 0.3 * np.linspace(-1, 1, devices))
    zero = (0, math.inf)
    for statistic, bounds in (
        (q.mean, zero), (std, zero), (q.value_range, zero), (q.gini, zero), (q.jain, (0, 1)),
        (lambda v: q.worst_mean(v, 0.1), zero),
    ):  # fmt: skip
        share = covered(200, true, examples, statistic, seed=5, bounds=bounds)
        assert 0.80 <= share <= 0.99, (devices, examples, statistic, share)


def test_equal_devices_are_not_called_unequal() -> None:
    rng = np.random.default_rng(6)
    fleets = (fleet(rng, [2.0] * 8, 30) for _ in range(60))
    found = [Bootstrap.of(f, replicates=400).interval(q.variance) for f in fleets]
    assert sum(i.excludes_zero for i in found) <= 6


def test_a_change_on_the_same_examples_is_known_far_better_than_either_end() -> None:
    rng = np.random.default_rng(7)
    before = fleet(rng, [2.0, 2.5, 3.0, 3.5], 25)
    after = {n: HeldOut.of(n, d.nats * 0.95, d.tokens) for n, d in before.items()}
    first, last = Bootstrap.of(before), Bootstrap.of(after)
    end, change = last.interval(q.mean), last.interval(q.mean, before=first)
    assert change.value == pytest.approx(-0.05 * first.losses.mean())
    assert change.high < 0 and change.excludes_zero
    assert change.high - change.low < 0.1 * (end.high - end.low)


def test_other_devices_are_further_uncertainty() -> None:
    devices = fleet(np.random.default_rng(8), [1.0, 2.0, 3.0, 4.0, 5.0], 40)
    these = Bootstrap.of(devices).interval(q.mean)
    any_ = Bootstrap.of(devices, resample_devices=True).interval(q.mean)
    assert any_.high - any_.low > 2 * (these.high - these.low)
    assert any_ == Bootstrap.of(devices, resample_devices=True).interval(q.mean)


def test_what_cannot_be_compared_or_resampled_is_refused_by_name() -> None:
    devices = fleet(np.random.default_rng(9), [1.0, 2.0], 5)
    other = dict(devices, d1=HeldOut.of("d1", [1.0], [3]))
    with pytest.raises(FairnessError, match="d1: not the same held-out examples"):
        Bootstrap.of(devices).interval(q.mean, before=Bootstrap.of(other))
    with pytest.raises(FairnessError, match="no device has per-example"):
        Bootstrap.of({})
    for nats, tokens in (([1.0], [0]), ([math.nan], [1]), ([1.0, 2.0], [1]), ([], [])):
        with pytest.raises(FairnessError, match="pi-3"):
            HeldOut.of("pi-3", nats, tokens)
