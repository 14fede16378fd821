"""FedEx-LoRA: FedIT, and what its mean misses goes beside the base. Knows the side branch."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from coordinator.lowrank import Bundle
from coordinator.methods.base import (
    MethodOptions,
    ModuleState,
    ModuleUpdate,
    Shares,
    WholeMethod,
)
from coordinator.methods.means import sum_of_changes, today
from coordinator.methods.products import beside


class FedExLoRA(WholeMethod):
    """The factors become FedIT's means B, A; the residual sum p_i s B_i A_i - s B A joins the
    frozen model, so that together they are the mean of products.

    The paper adds the residual to the base, which a quantised base would round away; here it is a
    branch beside it, of at most `side_rank` rows: beyond, its largest components are kept.
    """

    name: ClassVar[str] = "fedex-lora"
    paper: ClassVar[str] = (
        "FedEx-LoRA: Exact Aggregation for Federated and Efficient Fine-Tuning of Foundation "
        "Models (arXiv 2410.09432)"
    )
    options: ClassVar[tuple[str, ...]] = ("side_rank",)
    heterogeneous: ClassVar[bool] = False
    keeps_basis: ClassVar[bool] = True  # the factors are plain means
    exact: ClassVar[bool] = True

    def __init__(self, options: MethodOptions) -> None:
        self.budget = options.side_rank or 4 * options.rank

    def merge(
        self, current: ModuleState, updates: Sequence[ModuleUpdate], shares: Shares, round_: int
    ) -> ModuleState:
        """FedIT's mean and the side branch with the residual, of rank (U - 1) r."""
        mean = current.moved(sum_of_changes(current, updates, shares))
        if len(updates) == 1:
            return mean  # which misses nothing
        residual = _residual(current, mean.adapter, updates, shares)
        return dataclasses.replace(mean, side=beside(current, residual, self.budget))


def _residual(
    current: ModuleState, mean: Bundle, updates: Sequence[ModuleUpdate], shares: Shares
) -> Bundle:
    """The covariance sum p_i s (B_i - B)(A_i - A), of (U - 1) r components.

    The B_i - B sum to zero under p_i, so any one A may stand for the mean A: with the first
    device's, its term is zero. Filled device by device: two more copies of all of them would be
    most of a merge's memory.
    """
    rank, count = mean.rank, len(updates) - 1
    up = np.empty((count * rank, mean.up.shape[1]), np.float32)
    down = np.empty((count * rank, mean.down.shape[1]), np.float32)
    first = today(current, updates[0])
    for i in range(count):
        own, rows = today(current, updates[i + 1]), slice(i * rank, (i + 1) * rank)
        np.subtract(own.up, mean.up, out=up[rows])
        up[rows] *= np.float32(shares[i + 1] * own.scale)
        np.subtract(own.down, first.down, out=down[rows])
    return Bundle(up, down, 1.0)
