"""Whether two per-device figures go together: rank correlations, their interval and p-value.

For a handful of devices: the p-value is from permutations, all of them where they can be counted.
Ranks, since neither a loss nor a ratio is normal. An association within one run is no cause.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike

from coordinator.inequality import FairnessError, Figures

ALL_PERMUTATIONS_UP_TO = 8  # 40 320; above, so many are drawn:
PERMUTATIONS = 20_000


@dataclass(frozen=True)
class Association:
    """Two figures over `devices`; None where fewer than four devices or no spread allow none.

    low, high: the 95 % interval of `spearman`. p_value: two-sided, of `spearman`, over permutations
    of which device has which figure.
    """

    devices: int
    spearman: float | None
    kendall: float | None
    low: float | None
    high: float | None
    p_value: float | None


def associate(x: Sequence[float], y: Sequence[float], seed: int = 0) -> Association:
    """Rank correlations of x and y, paired by device.

    The interval is Fisher's z with the variance of Bonett and Wright (2000): honest, hence wide,
    with few devices; at -1 or 1, where it has none, it ends at the next value that can occur.
    """
    rho = spearman(x, y)
    if rho is None or len(x) < 4:
        return Association(len(x), rho, kendall(x, y), None, None, None)
    low, high = _interval(rho, len(x))
    return Association(len(x), rho, kendall(x, y), low, high, permutation_p(x, y, seed))


def ranks(values: ArrayLike) -> Figures:
    """Ranks from 1 of values (N,); equal values share the mean of theirs."""
    v = np.asarray(values, dtype=np.float64)
    ordered = np.sort(v)
    return (np.searchsorted(ordered, v, "left") + np.searchsorted(ordered, v, "right") + 1) / 2


def spearman(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Rank correlation, ties sharing their mean rank. None below two pairs or without spread."""
    a, b = _centred(*_paired(x, y))
    scale = math.sqrt(float(a @ a) * float(b @ b))
    return float(np.clip(a @ b / scale, -1, 1)) if scale else None


def kendall(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Kendall's tau-b, corrected for ties. None below two pairs or without spread."""
    a, b = _paired(x, y)
    first, second = np.sign(a[:, None] - a), np.sign(b[:, None] - b)
    scale = math.sqrt(float(np.abs(first).sum()) * float(np.abs(second).sum()))
    return float(np.clip((first * second).sum() / scale, -1, 1)) if scale else None


def permutation_p(x: Sequence[float], y: Sequence[float], seed: int = 0) -> float | None:
    """Two-sided p-value of Spearman's rho under exchangeable devices.

    Exact up to `ALL_PERMUTATIONS_UP_TO` devices; else (b + 1) / (m + 1) of m draws, which holds its
    level (Phipson and Smyth, 2010). None where there is no rho.
    """
    a, b = _centred(*_paired(x, y))
    if not (a.any() and b.any()):
        return None
    n = len(a)
    seen = abs(float(a @ b)) - 1e-9  # equal up to rounding counts as equal
    if n <= ALL_PERMUTATIONS_UP_TO:
        orders = np.array(list(itertools.permutations(range(n))))
        return float((np.abs(b[orders] @ a) >= seen).mean())
    drawn = np.random.default_rng(seed).permuted(np.tile(b, (PERMUTATIONS, 1)), axis=1)
    return float(((np.abs(drawn @ a) >= seen).sum() + 1) / (PERMUTATIONS + 1))


def _paired(x: Sequence[float], y: Sequence[float]) -> tuple[Figures, Figures]:
    if len(x) != len(y):
        raise FairnessError(f"{len(x)} values cannot be paired with {len(y)}")
    a, b = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise FairnessError("values that are not finite have no rank; leave their devices out")
    return a, b


def _centred(x: Figures, y: Figures) -> tuple[Figures, Figures]:
    middle = (len(x) + 1) / 2
    return ranks(x) - middle, ranks(y) - middle


def _interval(rho: float, n: int) -> tuple[float, float]:
    step = 12 / (n * (n * n - 1))  # between attainable values without ties
    inner = float(np.clip(rho, -1 + step, 1 - step))
    half = NormalDist().inv_cdf(0.975) * math.sqrt((1 + inner * inner / 2) / (n - 3))
    low, high = (math.tanh(math.atanh(inner) + sign * half) for sign in (-1, 1))
    return (-1.0 if rho == -1 else low), (1.0 if rho == 1 else high)
