"""Sums in weight space: what the methods do that average products instead of factors.

Everything is a stack of the devices' components and its truncation. It does not know means of
factors (`means`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from itertools import chain

from coordinator.lowrank import Bundle, stack
from coordinator.methods.base import ModuleState, ModuleUpdate, Shares
from coordinator.truncation import truncate


def ideal(updates: Sequence[ModuleUpdate], shares: Shares) -> Bundle:
    """sum_i p_i s_i B_i A_i, the mean of the devices' products, as one stack at scale 1."""
    rank = sum(update.k for update in updates)
    return stack((update.trained.product for update in updates), shares.tolist(), rank)


def factored(current: ModuleState, target: Bundle) -> ModuleState:
    """The module whose adapter is the best approximation of `target` at its rank and scale.

    Rows beyond the rank of the target start as in LoRA, up zero and down as it was: rows of zeros
    on both sides would never get a gradient again.
    """
    best = truncate(target, current.adapter.rank, scale=current.adapter.scale)
    best.bundle.down[best.kept :] = current.adapter.down[best.kept :]
    return dataclasses.replace(current, adapter=best.bundle)


def beside(
    current: ModuleState, more: Iterable[Bundle], weights: Sequence[float], rank: int, budget: int
) -> Bundle:
    """The side branch with sum_i weight_i * more_i added, cut to its `budget` largest components.

    rank: of all `more` together. The branch's rank depends on the ranks alone, so that all modules
    of a version have the same.
    """
    side = [] if current.side is None else [current.side]
    grown = stack(
        chain(side, more), [1.0] * len(side) + list(weights), rank + sum(s.rank for s in side)
    )
    return grown if grown.rank <= budget else truncate(grown, budget).bundle
