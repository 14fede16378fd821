"""Means of factors, row by row: what the methods that keep one basis add to it.

Each accumulator is the size of one part of the module and the only array of that size; devices are
added to it in place. It does not know products of factors (`products`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from coordinator.lowrank import Bundle, Matrix32, add_rows
from coordinator.methods.base import ModuleState, ModuleUpdate, Shares, left_sum
from protos.contract import Part

Steps = dict[Part, Matrix32]
ORDER: tuple[Part, ...] = ("up", "down", "core")


def sum_of_changes(current: ModuleState, updates: Sequence[ModuleUpdate], factors: Shares) -> Steps:
    """sum_i factor_i * delta_i at the global rows, for every part that a device sent."""
    sent = {part for update in updates for part in update.delta}
    # float32 twice over: a change is far smaller than the weight it is rounded into.
    steps: Steps = {p: np.zeros_like(current.values(p)) for p in ORDER if p in sent}
    for update, factor in zip(updates, factors, strict=True):
        update.add_change(steps, float(factor))  # while it is in cache from having been read
    return steps


def today(current: ModuleState, update: ModuleUpdate) -> Bundle:
    """What a whole adapter is when its change is added to the current one, as it is in a mean.

    On time that is what the device trained; a late one started from an older model.
    """
    return current.moved(update.delta).adapter


def covered(rank: int, updates: Sequence[ModuleUpdate], shares: Shares) -> NDArray[np.float64]:
    """(r,): the share of the fleet that holds each row, in units of all shares' sum.

    Shares need not add to exactly 1. Against their sum in the same order, a row that everybody
    holds has exactly 1 and keeps its bits.
    """
    cover = np.zeros(rank)
    for update, share in zip(updates, shares, strict=True):
        cover[update.rows] += share
    return cover / left_sum(shares)


def owners_factors(
    rank: int, updates: Sequence[ModuleUpdate], shares: Shares
) -> list[NDArray[np.float64]]:
    """What `mean_over_owners` adds each row (k,) of each update with."""
    cover = covered(rank, updates, shares)
    cover[cover == 0] = 1
    return [s / cover[u.rows] for u, s in zip(updates, shares, strict=True)]


def mean_over_owners(
    current: ModuleState, updates: Sequence[ModuleUpdate], shares: Shares
) -> Steps:
    """The mean change of each row over the devices that hold it; zero if none does."""
    steps = sum_of_changes(current, updates, shares)
    cover = covered(current.adapter.rank, updates, shares)
    cover[cover == 0] = 1  # nothing to divide
    for step in steps.values():
        np.divide(step, cover.astype(np.float32)[:, None], out=step)
    return steps


def mean_of_padded(current: ModuleState, updates: Sequence[ModuleUpdate], shares: Shares) -> Steps:
    """From the current values to the mean of the trained ones, absent rows counting as zeros.

    sum p_i pad(trained_i) - current = sum p_i pad(delta_i) - (share that lacks the row) * current:
    only rows that somebody lacks need more than their changes.
    """
    steps = sum_of_changes(current, updates, shares)
    lacking = 1.0 - covered(current.adapter.rank, updates, shares)
    if lacking.any():
        held = ((step, -lacking, current.values(part)) for part, step in steps.items())
        add_rows(np.arange(len(lacking)), *held)
    return steps
