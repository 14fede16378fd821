"""Sums in weight space: what the methods do that average products instead of factors.

Everything is a stack of the devices' components and its truncation. It does not know means of
factors (`means`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from coordinator.lowrank import Bundle, stack
from coordinator.methods.base import ModuleState, ModuleUpdate, Shares
from coordinator.truncation import truncate


def ideal(updates: Sequence[ModuleUpdate], shares: Shares) -> Bundle:
    """sum_i p_i s_i B_i A_i, the mean of the devices' products, as one stack at scale 1."""
    return stack([update.trained.product for update in updates], shares.tolist())


def factored(current: ModuleState, target: Bundle) -> ModuleState:
    """The module whose adapter is the best approximation of `target` at its rank and scale.

    Rows beyond the rank of the target start as in LoRA, up zero and down as it was: rows of zeros
    on both sides would never get a gradient again.
    """
    best = truncate(target, current.adapter.rank, scale=current.adapter.scale)
    best.bundle.down[best.kept :] = current.adapter.down[best.kept :]
    return dataclasses.replace(current, adapter=best.bundle)


def beside(current: ModuleState, more: Bundle, budget: int) -> Bundle:
    """The side branch with `more` added, cut to its `budget` largest components beyond that.

    Its rank depends on the ranks alone, so that all modules of a version have the same.
    """
    grown = more if current.side is None else stack([current.side, more], [1.0, 1.0])
    return grown if grown.rank <= budget else truncate(grown, budget).bundle
