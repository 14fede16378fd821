"""Rank correlations within runs, their p-values and intervals, for few runs of few devices.

The unit is a device in a run; devices of a run share a model and are not independent, and runs of
different seeds share domains. So everything is ranked and centred within its run, p-values permute
only within runs, and intervals resample seeds, then devices, then held-out sequences. Ratios take a
few levels: ties have their mean rank, and the highest correlation that the ties allow is told.
Arrays are (..., S, D): S runs (blocks) of D devices. Knows arrays only. scipy does what it can.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

Array = NDArray[np.float64]
LEVEL = 0.95
POWER = 0.8
CHUNK = 200  # replicates held at once


@dataclass(frozen=True)
class Estimate:
    """A figure with its interval. p: two-sided, where there is a test."""

    value: float
    low: float
    high: float
    p: float | None = None

    @property
    def excludes_zero(self) -> bool:
        """Whether zero lies outside the interval."""
        return self.low > 0 or self.high < 0


# --- figures ------------------------------------------------------------------------------------


def centred_ranks(values: ArrayLike) -> Array:
    """Ranks within each run less their mean; equal values share a rank."""
    v = np.asarray(values, dtype=np.float64)
    ranks: Array = stats.rankdata(v, axis=-1) - (v.shape[-1] + 1) / 2
    return ranks


def spearman(x: ArrayLike, y: ArrayLike) -> Array:
    """Spearman's rho within each run, averaged over runs: (...); runs without spread are left out.

    Equals `scipy.stats.spearmanr` for one run.
    """
    return _mean_correlation(centred_ranks(x), centred_ranks(y))


def kendall(x: ArrayLike, y: ArrayLike) -> Array:
    """Kendall's tau-b within each run, averaged over runs: (...). As `scipy.stats.kendalltau`."""
    a, b = (np.asarray(v, dtype=np.float64) for v in (x, y))
    i, j = np.triu_indices(a.shape[-1], 1)
    return _mean_correlation(np.sign(a[..., i] - a[..., j]), np.sign(b[..., i] - b[..., j]))


def slope(x: ArrayLike, y: ArrayLike) -> Array:
    """Least squares of y on x with an intercept for each run: units of y for one of x."""
    a, b = (_centred(np.asarray(v, dtype=np.float64)) for v in (x, y))
    a, b = np.broadcast_arrays(a, b)
    with np.errstate(invalid="ignore", divide="ignore"):
        found: Array = (a * b).sum((-2, -1)) / (a * a).sum((-2, -1))
    return found


def partial_spearman(x: ArrayLike, y: ArrayLike, controls: Sequence[ArrayLike]) -> Array:
    """Rank correlation of what the controls leave of x and y.

    One coefficient for each control over all runs: with eight devices a run would have none left
    for its own. Controls without spread do nothing.
    """
    a, b = residuals(centred_ranks(x), controls), residuals(centred_ranks(y), controls)
    return _pooled_correlation(a, b)


def residuals(values: Array, controls: Sequence[ArrayLike]) -> Array:
    """Within-run values (..., S, D) less their regression on the controls' ranks."""
    if not controls:
        return values
    flat = values.reshape(*values.shape[:-2], 1, -1)
    z = np.stack([_flat(centred_ranks(c)) for c in controls], -1)
    fitted = (flat @ np.linalg.pinv(z, rcond=1e-9).swapaxes(-1, -2)) @ z.swapaxes(-1, -2)
    left: Array = (flat - fitted).reshape(values.shape)
    left[np.abs(left) < 1e-9] = 0.0  # nothing left: of a control itself
    return left


def _flat(values: Array) -> Array:
    """(..., S, D) → (..., S * D)."""
    return values.reshape(*values.shape[:-2], -1)


def highest_spearman(x: ArrayLike) -> float:
    """What rho can be at most with the ties of x, where y has none."""
    a = np.asarray(x, dtype=np.float64)
    order = np.argsort(np.argsort(a, axis=-1, kind="stable"), axis=-1, kind="stable")
    return float(spearman(a, order))


def _mean_correlation(a: Array, b: Array) -> Array:
    with np.errstate(invalid="ignore", divide="ignore"):
        each = (a * b).sum(-1) / np.sqrt((a * a).sum(-1) * (b * b).sum(-1))
    there = np.isfinite(each)
    with np.errstate(invalid="ignore"):
        found: Array = np.where(there, each, 0).sum(-1) / there.sum(-1)
    return found


def _pooled_correlation(a: Array, b: Array) -> Array:
    with np.errstate(invalid="ignore", divide="ignore"):
        found: Array = (a * b).sum((-2, -1)) / np.sqrt(
            (a * a).sum((-2, -1)) * (b * b).sum((-2, -1))
        )
    return found


def _centred(values: Array) -> Array:
    found: Array = values - values.mean(-1, keepdims=True)
    return found


# --- permutations -------------------------------------------------------------------------------


def shuffled(values: Array, count: int, seed: int) -> Array:
    """(count, S, D): each run's values in random orders of their own."""
    draw = np.random.default_rng(seed)
    order = draw.random((count, *values.shape)).argsort(-1)
    return np.take_along_axis(np.broadcast_to(values, order.shape), order, -1)


def permutation_p(
    statistic: Callable[[Array], Array], x: ArrayLike, count: int, seed: int
) -> tuple[float, float]:
    """(two-sided p, standard deviation under the null) over assignments of x within runs.

    Exact where the design drew x at random within each run, whatever the devices of a run or the
    runs share, under the null that no device would have ended differently under another
    assignment. NaN without spread.
    """
    a = np.asarray(x, dtype=np.float64)
    seen = float(statistic(a))
    if not math.isfinite(seen):
        return math.nan, math.nan
    null = np.concatenate(
        [np.atleast_1d(statistic(shuffled(a, min(CHUNK, count - i), seed + i)))
         for i in range(0, count, CHUNK)]
    )  # fmt: skip
    beyond = (np.abs(null) >= abs(seen) - 1e-12).sum()
    return float((1 + beyond) / (1 + count)), float(null.std())


def partial_p(
    x: ArrayLike, y: ArrayLike, controls: Sequence[ArrayLike], count: int, seed: int
) -> float:
    """P of a partial correlation: what controls leave of y is permuted within runs (Freedman and
    Lane, 1983), so that x keeps its relation to the controls. Approximate.
    """
    a = residuals(centred_ranks(x), controls)
    b = residuals(centred_ranks(y), controls)
    p, _ = permutation_p(
        lambda drawn: _pooled_correlation(a, residuals(drawn, controls)), b, count, seed
    )
    return p


def detectable(null_sd: float) -> float:
    """The effect that a two-sided test at 5 % finds in four of five studies, by its null spread."""
    return float((stats.norm.ppf((1 + LEVEL) / 2) + stats.norm.ppf(POWER)) * null_sd)


# --- intervals ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Draw:
    """Replicates of (seed, device, held-out sequence), nested: indices for arrays (..., S, D, E).

    Of a replicate every array takes the same, so that what is paired stays paired.
    """

    seeds: NDArray[np.int64]  # (B, S, 1)
    devices: NDArray[np.int64]  # (B, S, D)
    examples: NDArray[np.int64]  # (B, S, D, E)

    def of(self, values: ArrayLike) -> Array:
        """Values of devices (..., S, D) → (..., B, S, D)."""
        found: Array = np.asarray(values, dtype=np.float64)[..., self.seeds, self.devices]
        return found

    def losses(self, nats: Array, tokens: Array) -> Array:
        """Nats per token, of (..., S, D, E) → (..., B, S, D)."""
        where = (..., self.seeds[..., None], self.devices[..., None], self.examples)
        found: Array = nats[where].sum(-1) / tokens[where].sum(-1)
        return found


def draws(
    shape: tuple[int, int, int], count: int, seed: int, *, devices: bool = True
) -> list[Draw]:
    """`count` replicates of S seeds, D devices of each, E sequences of each, in chunks.

    devices False: the fleet stays as it is, for figures of a whole fleet, whose range and tail a
    resampled one would understate.
    """
    s, d, e = shape
    draw, found = np.random.default_rng(seed), []
    for i in range(0, count, CHUNK):
        b = min(CHUNK, count - i)
        own = draw.integers(d, size=(b, s, d))
        found.append(
            Draw(
                draw.integers(s, size=(b, s, 1)),
                own if devices else np.broadcast_to(np.arange(d), (b, s, d)),
                draw.integers(e, size=(b, s, d, e)),
            )
        )
    return found


def interval(
    value: float, replicates: ArrayLike, blocks: int, p: float | None = None, *,
    nested: bool = False, most: float = math.inf,
) -> Estimate:  # fmt: skip
    """A 95 % interval from bootstrap replicates of `blocks` seeds; NaN from a single seed.

    nested: devices were resampled too, which counts the spread among devices twice; percentiles
    are then wide enough, in planted studies rather too wide. Else the standard error times
    Student's t with `blocks` - 1 degrees of freedom: percentiles of five seeds are too narrow.
    most: the largest absolute value there can be, 1 for a correlation.
    """
    r = np.asarray(replicates, dtype=np.float64)
    r = r[np.isfinite(r)]
    if not (math.isfinite(value) and r.size) or blocks < 2:
        return Estimate(value, math.nan, math.nan, p)
    if nested:
        low, high = np.percentile(r, [50 * (1 - LEVEL), 50 * (1 + LEVEL)])
    else:
        # Means of `blocks` draws with replacement spread by (blocks - 1) / blocks too little.
        error = r.std(ddof=1) * math.sqrt(blocks / (blocks - 1))
        reach = stats.t.ppf((1 + LEVEL) / 2, blocks - 1) * error
        low, high = value - reach, value + reach
    return Estimate(value, max(-most, float(low)), min(most, float(high)), p)


# --- many tests ---------------------------------------------------------------------------------


def holm(p: ArrayLike) -> Array:
    """p-values adjusted so that any false discovery at all is as rare as the level (Holm, 1979)."""
    v = np.asarray(p, dtype=np.float64)
    order = np.argsort(v)
    steps = np.maximum.accumulate(v[order] * np.arange(len(v), 0, -1))
    found = np.empty_like(v)
    found[order] = np.minimum(steps, 1.0)
    return found


def benjamini_hochberg(p: ArrayLike) -> Array:
    """p-values adjusted for the share of false ones among discoveries (1995)."""
    v: Any = np.asarray(p, dtype=np.float64)
    return np.asarray(stats.false_discovery_control(v)) if len(v) else v
