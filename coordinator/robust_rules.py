"""The arithmetic of robust merges: factors, shares and locations, of sizes and inner products.

Knows arrays only: neither updates and methods (`robust`) nor where they came from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from coordinator.lowrank import Matrix32
from coordinator.methods.base import Shares
from coordinator.overlap import Overlap

Rule = Literal["none", "clip", "trimmed-mean", "median", "geometric-median", "multi-krum"]
CLIP = 1.5  # times the median size
TRIM = 0.3  # of a row's owners, at either end
LEAST_TRIMMED, LEAST_MEDIAN, LEAST_KRUM, LEAST = 4, 3, 5, 3
HOSTILE = 0.3  # of the devices that multi-Krum leaves out, at most
ROUNDS_OF_WEISZFELD = 8
NEAR = 1e-6  # of the mean distance: shares are bounded where a device is the centre itself
BY_VALUE: tuple[Rule, ...] = ("trimmed-mean", "median")


def clip_factors(sizes: Sequence[Mapping[Any, float]]) -> NDArray[np.float64]:
    """(n,) what changes are multiplied by so that none is above `CLIP` medians in any part.

    A part that more than half did not move at all has no scale to clip by; with fewer than `LEAST`
    devices nobody is the odd one out.
    """
    factors = np.ones(len(sizes))
    for part in sorted({part for of in sizes for part in of}):
        own = np.array([of.get(part, np.nan) for of in sizes])
        there = ~np.isnan(own)
        middle = float(np.median(own[there]))
        if there.sum() < LEAST or not middle > 0:
            continue
        with np.errstate(divide="ignore"):
            factors[there] = np.minimum(factors[there], CLIP * middle / own[there])
    return factors


def reweighted(
    rule: Rule,
    overlap: Overlap,
    grams: NDArray[np.float64],
    shares: Shares,
    counts: Sequence[int],
) -> Shares:
    """(n,) shares under geometric-median or multi-krum, of the same sum. grams: (r, c, c)."""
    if rule == "multi-krum":
        keep = krum_choice(overlap.distances(grams))
        chosen: Shares = np.where(keep, shares, 0.0)
        chosen *= shares.sum() / chosen.sum()
        return chosen
    return weiszfeld(overlap, grams, shares, counts)


def krum_choice(distances: NDArray[np.float64]) -> NDArray[np.bool_]:
    """(n,) whom multi-Krum keeps. distances: (n, n) squared; NaN where two share no row.

    The score is the sum to the n - f - 2 nearest others; the n - f lowest stay, ties by place.
    """
    n = len(distances)
    f = min(int(HOSTILE * n + 1e-9), (n - 3) // 2)
    known = distances[~np.eye(n, dtype=bool)]
    known = known[~np.isnan(known)]
    filled = np.where(np.isnan(distances), np.median(known) if len(known) else 0.0, distances)
    np.fill_diagonal(filled, np.inf)
    scores = np.sort(filled, axis=1)[:, : max(1, n - f - 2)].sum(axis=1)
    keep = np.zeros(n, dtype=bool)
    keep[np.argsort(scores, kind="stable")[: n - f]] = True
    return keep


def weiszfeld(
    overlap: Overlap, grams: NDArray[np.float64], shares: Shares, counts: Sequence[int]
) -> Shares:
    """(n,) shares whose mean is the geometric median, by `ROUNDS_OF_WEISZFELD` steps.

    Distances are per row held, so that a device of few rows is not taken for one that is close.
    """
    weights = shares.copy()
    for _ in range(ROUNDS_OF_WEISZFELD):
        away = np.sqrt(overlap.from_centre(grams, weights) / np.asarray(counts))
        least = NEAR * float(away.mean())
        if not least > 0:  # all are the same
            return shares.copy()
        weights = shares / np.maximum(away, least)
        weights *= shares.sum() / weights.sum()
    return weights


def locations(
    rule: Rule,
    overlap: Overlap,
    values: Sequence[Matrix32],
    factors: NDArray[np.float64],
    weights: Shares,
) -> Matrix32:
    """(r, w): of each value its median or trimmed mean over the owners of the row.

    The clipped weighted mean over owners where those are too few; zero where there are none.
    """
    width = values[0].shape[1]
    found = np.zeros((len(overlap.counts), width), np.float32)
    count = overlap.counts
    few = count < (LEAST_MEDIAN if rule == "median" else LEAST_TRIMMED)
    cut = (count - 1) // 2  # of a median
    if rule == "trimmed-mean":
        cut = np.minimum(cut, np.ceil(TRIM * count - 1e-9).astype(np.int64))
    place = np.arange(overlap.depth)
    kept = (place >= cut[:, None]) & (place < (count - cut)[:, None])  # (r, c), of sorted values
    share = overlap.spread(weights * factors) / np.maximum(
        overlap.spread(weights).sum(axis=1, keepdims=True), 1e-300
    )
    sorts = (kept / np.maximum(kept.sum(axis=1, keepdims=True), 1)).astype(np.float32)[:, None]
    shares = share.astype(np.float32)[:, None]  # (r, 1, c)
    for columns, block in overlap.blocks(values):
        mean = (shares @ block)[:, 0]
        block[~overlap.held] = np.inf  # behind all that is there
        block.sort(axis=1)
        block[~overlap.held] = 0
        middle = (sorts @ block)[:, 0]
        found[:, columns] = np.where(few[:, None], mean, middle)
    return found
