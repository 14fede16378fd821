"""Fed-PLoRA: rows as parallel branches; what a device does not train stands frozen beside it.

Knows what the frozen branch is; does not know how rows are drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from coordinator.lowrank import Bundle, Rows, stack
from coordinator.methods.base import (
    MethodOptions,
    ModuleState,
    ModuleUpdate,
    RowMethod,
    Scaling,
    Shares,
)
from coordinator.methods.means import Steps, mean_over_owners, owners_factors


class FedPLoRA(RowMethod):
    """A device trains k random rows while the others act frozen beside the base, so that it starts
    from the whole global model; row j becomes its mean over the devices that trained it.

    The paper folds the other rows into the base; a quantised base would round them, so they are a
    branch of their own.
    """

    name: ClassVar[str] = "fed-plora"
    paper: ClassVar[str] = (
        "Heterogeneous Federated Fine-Tuning with Parallel One-Rank Adaptation (arXiv 2602.16936)"
    )
    options: ClassVar[tuple[str, ...]] = ("sketches",)
    scaling: ClassVar[Scaling] = "constant"
    complement: ClassVar[bool] = True

    def __init__(self, options: MethodOptions) -> None:
        self.rows = options.sketches

    def step(self, current: ModuleState, updates: Sequence[ModuleUpdate], shares: Shares) -> Steps:
        """The mean change over owners."""
        return mean_over_owners(current, updates, shares)

    def row_factors(
        self, rank: int, updates: Sequence[ModuleUpdate], shares: Shares
    ) -> list[NDArray[np.float64]]:
        """Of the devices that hold the row."""
        return owners_factors(rank, updates, shares)

    def branch(self, state: ModuleState, rows: Rows) -> Bundle | None:
        """The rows that the device does not train, with the side branch if there is one."""
        others = np.setdiff1d(np.arange(state.adapter.rank), rows)
        if not len(others):
            return state.side
        rest = state.adapter.take(others).at_scale(1.0)
        return rest if state.side is None else stack([rest, state.side], [1.0, 1.0])

    def contribution(self, current: ModuleState, update: ModuleUpdate) -> Bundle:
        """The whole adapter with the device's rows replaced: what the device had."""
        up, down = current.adapter.up.copy(), current.adapter.down.copy()
        trained = update.trained.adapter
        up[update.rows], down[update.rows] = trained.up, trained.down
        return Bundle(up, down, current.adapter.scale)
