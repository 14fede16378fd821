"""FedEx-LoRA: FedIT, and what its mean misses goes beside the base. Knows the side branch."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import ClassVar

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
    stacks: ClassVar[bool] = True

    def __init__(self, options: MethodOptions) -> None:
        self.budget = options.side_rank or 4 * options.rank

    def merge(
        self, current: ModuleState, updates: Sequence[ModuleUpdate], shares: Shares, round_: int
    ) -> ModuleState:
        """FedIT's mean and the side branch with the residual, of rank (U - 1) r."""
        mean = current.moved(sum_of_changes(current, updates, shares))
        if len(updates) == 1:
            return mean  # which misses nothing
        residual = _residual(current, mean.adapter, updates)
        rank = (len(updates) - 1) * mean.adapter.rank
        side = beside(current, residual, shares[1:].tolist(), rank, self.budget)
        return dataclasses.replace(mean, side=side)


def _residual(
    current: ModuleState, mean: Bundle, updates: Sequence[ModuleUpdate]
) -> Iterator[Bundle]:
    """Of the covariance sum p_i s (B_i - B)(A_i - A) each device's product, but the first's.

    The B_i - B sum to zero under p_i, so any one A may stand for the mean A: with the first
    device's, its term is zero.
    """
    first = today(current, updates[0])
    for update in updates[1:]:
        own = today(current, update)
        yield Bundle(own.up - mean.up, own.down - first.down, own.scale)
