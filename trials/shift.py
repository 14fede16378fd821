"""Who has which classes: labels of examples or domains of code, dealt to devices with a known skew.

Every device's mixture is drawn from a Dirichlet distribution around the pool's (Hsu et al., arXiv
1909.06335): alpha large, all alike; alpha small, a class or two each. Sizes are given, so that a
skew of classes is none of amounts. Everything is drawn by the seed. Knows arrays only.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from profiles.errors import SketchfleetError

Shares = NDArray[np.float64]


class ShiftError(SketchfleetError):
    """Classes that cannot be dealt as asked."""


def mixtures(prior: ArrayLike, devices: int, alpha: float, seed: int) -> Shares:
    """(devices, C) shares of the classes, each row from Dirichlet(alpha * C * prior).

    prior: (C,) shares in the pool, so that alpha = 1 is the uniform draw where classes are equal.
    """
    p = np.asarray(prior, dtype=np.float64)
    # NumPy may change `Generator.dirichlet` (NEP 19), but not within what one study compares.
    drawn = np.random.default_rng([seed, 1]).dirichlet(alpha * len(p) * p / p.sum(), devices)
    drawn[~np.isfinite(drawn).all(1)] = p / p.sum()  # a tiny alpha underflows to 0 / 0
    found: Shares = drawn
    return found


def deal(
    classes: ArrayLike, wanted: Shares, sizes: Sequence[int], seed: int
) -> list[NDArray[np.int64]]:
    """Which examples each device has, without a copy: arrays of so many indices, sorted.

    classes: (n,) the class of each example. wanted: (devices, C). Devices draw in turn, one example
    at a time; where a class is used up, its share goes to the classes that are left. Raises
    `ShiftError` when there are fewer examples than sizes ask for.
    """
    labels = np.asarray(classes, dtype=np.int64)
    if sum(sizes) > len(labels):
        raise ShiftError(
            f"{len(sizes)} devices ask for {sum(sizes)} examples of {len(labels)}; ask for fewer"
        )
    draw = np.random.default_rng([seed, 2])
    pools = [draw.permutation(np.flatnonzero(labels == c)).tolist() for c in range(wanted.shape[1])]
    taken: list[list[int]] = [[] for _ in sizes]
    for turn in range(max(sizes, default=0)):
        for device in draw.permutation(len(sizes)):
            if turn >= sizes[device]:
                continue
            left = np.array([bool(pool) for pool in pools])
            share = np.where(left, wanted[device], 0.0)
            share = share / share.sum() if share.sum() > 0 else left / left.sum()
            taken[device].append(pools[int(draw.choice(len(pools), p=share))].pop())
    return [np.sort(np.array(found, dtype=np.int64)) for found in taken]


def shares_of(classes: ArrayLike, dealt: Sequence[NDArray[np.int64]], count: int) -> Shares:
    """(devices, C): the shares that were dealt, of `count` classes."""
    labels = np.asarray(classes, dtype=np.int64)
    counts = np.stack([np.bincount(labels[which], minlength=count) for which in dealt])
    found: Shares = counts / counts.sum(1, keepdims=True)
    return found


def skew(shares: Shares, sizes: Sequence[int] | None = None) -> float:
    """Mean total-variation distance of the devices' shares from the fleet's, 0 to below 1.

    sizes: what devices weigh in the fleet's; all the same where not given.
    """
    pooled = np.average(shares, axis=0, weights=sizes)
    return float(np.abs(shares - pooled).sum(1).mean() / 2)
