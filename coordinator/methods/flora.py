"""FLoRA: stack what devices trained beside the base, then start anew. Knows the side branch."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

from coordinator.methods.base import (
    MethodOptions,
    ModuleState,
    ModuleUpdate,
    Scaling,
    Shares,
    WholeMethod,
)
from coordinator.methods.products import beside
from protos.contract import Part


class FLoRA(WholeMethod):
    """Each round every device trains a fresh adapter of its own rank; all of them, stacked with
    their weights, join the frozen model: exact, whatever the ranks.

    The paper merges the stack into the base, which a quantised base would round away; here it is a
    branch beside it, of at most `side_rank` rows: beyond, its largest components are kept. All
    devices share one scale, as in the paper.
    """

    name: ClassVar[str] = "flora"
    paper: ClassVar[str] = (
        "FLoRA: Federated Fine-Tuning Large Language Models with Heterogeneous Low-Rank "
        "Adaptations (arXiv 2409.05976)"
    )
    options: ClassVar[tuple[str, ...]] = ("side_rank",)
    scaling: ClassVar[Scaling] = "constant"
    fresh: ClassVar[bool] = True
    exact: ClassVar[bool] = True
    stacks: ClassVar[bool] = True

    def __init__(self, options: MethodOptions) -> None:
        self.budget = options.side_rank or 4 * options.rank

    def files(self, version: int) -> tuple[tuple[Part, ...], ...]:
        """None: adapters start anew on the device; only the side branch travels."""
        return ()

    def merge(
        self, current: ModuleState, updates: Sequence[ModuleUpdate], shares: Shares, round_: int
    ) -> ModuleState:
        """The side branch with the stack; the adapter stays as it started, up zero."""
        products = (update.trained.product for update in updates)
        rank = sum(update.k for update in updates)
        side = beside(current, products, shares.tolist(), rank, self.budget)
        return dataclasses.replace(current, side=side)
