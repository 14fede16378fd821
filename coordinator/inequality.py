"""How unequal a row of per-device scores is: the indices of the field, on arrays.

Every function takes values of shape (..., N), N devices last, and gives figures of shape (...): one
row, or every row of a bootstrap at once. They know no losses: which end is the bad one is said by
`better`. Scale-free indices (Jain to Atkinson) want values >= 0. Values that are all equal, zeros
among them, are perfectly even.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from profiles.errors import SketchfleetError

Better = Literal["lower", "higher"]  # losses: lower is better; accuracies: higher is
Figures = NDArray[np.float64]


class FairnessError(SketchfleetError):
    """A figure was asked of facts that do not allow one."""


def mean(values: ArrayLike) -> Figures:
    """Arithmetic mean."""
    return _mean(_checked(values))


def variance(values: ArrayLike) -> Figures:
    """Of the population: divided by N."""
    v = _checked(values)
    return _mean(np.square(v - _mean(v)[..., None]))


def cv(values: ArrayLike) -> Figures:
    """Coefficient of variation, standard deviation / mean, of values >= 0."""
    v = _evenly(values)
    return np.sqrt(variance(v))


def tail_size(devices: int, share: float) -> int:
    """ceil(share * devices), at least one: a tail is never empty, however small the fleet."""
    if not 0 < share <= 1:
        raise FairnessError(f"a tail of {share} of the devices does not exist; give 0 < share <= 1")
    return max(1, math.ceil(share * devices - 1e-9))


def worst_mean(values: ArrayLike, share: float, better: Better = "lower") -> Figures:
    """Mean of the ceil(share * N) worst values; see `cvar` for tails of parts of devices."""
    v = np.sort(_checked(values), axis=-1)
    size = tail_size(v.shape[-1], share)
    return _mean(v[..., -size:] if better == "lower" else v[..., :size])


def best_mean(values: ArrayLike, share: float, better: Better = "lower") -> Figures:
    """Mean of the ceil(share * N) best values."""
    return worst_mean(values, share, "higher" if better == "lower" else "lower")


def cvar(values: ArrayLike, level: float, better: Better = "lower") -> Figures:
    """Conditional value at risk: mean of the worst 1 - `level` of the values, 0 <= level < 1.

    Rockafellar and Uryasev (2000), the device at the edge counted by the part of it that lies in
    the tail; `worst_mean` counts it whole, and is the same where (1 - level) * N is an integer.
    """
    if not 0 <= level < 1:
        raise FairnessError(f"level {level} leaves no tail; give 0 <= level < 1")
    v = np.sort(_checked(values), axis=-1)
    v = v[..., ::-1] if better == "lower" else v
    count = (1 - level) * v.shape[-1]
    part = np.clip(count - np.arange(v.shape[-1]), 0, 1)
    return np.asarray((v * part).sum(-1) / count)


def value_range(values: ArrayLike) -> Figures:
    """Highest less lowest."""
    v = _checked(values)
    return np.asarray(v.max(-1) - v.min(-1))


def jain(values: ArrayLike) -> Figures:
    """Jain, Chiu and Hawe (1984): (sum a)^2 / (N sum a^2) = 1 / (1 + CV^2), in [1/N, 1]."""
    v = _evenly(values)
    return 1 / _mean(v * v)


def cosine_to_one(values: ArrayLike) -> Figures:
    """Cosine between the values and equal ones: the square root of Jain's index."""
    return np.sqrt(jain(values))


def gini(values: ArrayLike) -> Figures:
    """Gini's index: mean absolute difference of pairs / (2 mean), in [0, 1 - 1/N]; by sorting."""
    v = np.sort(_evenly(values), axis=-1)
    n = v.shape[-1]
    ranks = 2 * np.arange(n) - n + 1
    return np.asarray(np.maximum(v @ ranks / n**2, 0.0))


def entropy(values: ArrayLike) -> Figures:
    """-sum p ln p of the shares p = a / sum a, in nats; ln N if all are equal."""
    v = _evenly(values)
    return math.log(v.shape[-1]) - theil(v)


def theil(values: ArrayLike) -> Figures:
    """Theil's T: mean of (a / mean) ln (a / mean), in [0, ln N].

    Also ln N less the entropy of the shares, and their KL divergence from equal shares.
    """
    v = _evenly(values)
    return np.maximum(_mean(v * np.log(np.where(v > 0, v, 1.0))), 0.0)


def atkinson(values: ArrayLike, epsilon: float) -> Figures:
    """Atkinson (1970): 1 - (mean a^(1 - epsilon))^(1 / (1 - epsilon)) / mean, in [0, 1].

    `epsilon` > 0 is the aversion to inequality; at 1 the inner mean is the geometric one. A zero
    among the values gives 1 from there on.
    """
    if not (math.isfinite(epsilon) and epsilon > 0):
        raise FairnessError(f"epsilon {epsilon}: give a finite aversion above 0")
    v = _evenly(values)
    known = np.where(v > 0, v, 1.0)
    logs = np.log(known)
    if epsilon == 1:
        inner = np.exp(_mean(logs))
    else:
        # About the largest term, so that no power overflows; a zero adds nothing below 1.
        powers = (1 - epsilon) * logs
        top = powers.max(-1)
        terms = np.where(v > 0, np.exp(powers - top[..., None]), 0.0)
        inner = np.exp((top + np.log(_mean(terms))) / (1 - epsilon))
    ruined = (v == 0).any(-1) & (epsilon >= 1)
    return np.where(ruined, 1.0, np.clip(1 - inner, 0.0, 1.0))


def _mean(v: Figures) -> Figures:
    return np.asarray(v.mean(-1))


def _checked(values: ArrayLike) -> Figures:
    v = np.asarray(values, dtype=np.float64)
    if v.ndim == 0 or not v.shape[-1]:
        raise FairnessError("no values to compare; give one per device")
    if not np.isfinite(v).all():
        where = int(np.argwhere(~np.isfinite(v))[0][-1])
        raise FairnessError(f"value {where} is not finite; leave that device out and say so")
    return v


def _non_negative(values: ArrayLike) -> Figures:
    v = _checked(values)
    if (v < 0).any():
        where = int(np.argwhere(v < 0)[0][-1])
        raise FairnessError(f"value {where} is below 0, where shares of a whole are not defined")
    return v


def _evenly(values: ArrayLike) -> Figures:
    """Values over their mean; ones where all are zero. Scaled first, so that no sum overflows."""
    v = _non_negative(values)
    top = v.max(-1, keepdims=True)
    scaled = v / np.where(top > 0, top, 1.0)
    return np.where(top > 0, scaled / np.where(top > 0, scaled.mean(-1, keepdims=True), 1.0), 1.0)
