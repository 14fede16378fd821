"""HetLoRA: padded means weighted by how much a device has learned, and self-pruning devices.

Knows the weights; what a device drops, it decides while training (`protos.contract.Pruning`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from coordinator.lowrank import norm
from coordinator.methods.base import (
    MethodOptions,
    ModuleState,
    ModuleUpdate,
    RowMethod,
    Shares,
    left_sum,
)
from coordinator.methods.means import Steps, mean_of_padded
from protos.contract import Pruning


class HetLoRA(RowMethod):
    """Devices train the first k rows and may drop their tail; the new rows are the zero-padded
    mean with weights p_i ||s_i B_i A_i||, module by module.

    The paper has no p_i: with `weights = "uniform"` these are its weights. Rows that few hold
    shrink, as under zero-padding.
    """

    name: ClassVar[str] = "hetlora"
    paper: ClassVar[str] = (
        "Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models "
        "(arXiv 2401.06432)"
    )
    options: ClassVar[tuple[str, ...]] = ("prune_keep", "prune_penalty")
    dilutes: ClassVar[bool] = True

    def __init__(self, options: MethodOptions) -> None:
        self.pruning = Pruning(options.prune_keep, options.prune_penalty)

    def step(self, current: ModuleState, updates: Sequence[ModuleUpdate], shares: Shares) -> Steps:
        """From the current rows to the weighted mean of the padded ones."""
        sizes = shares * np.array([norm(update.trained.product) for update in updates])
        total = left_sum(sizes)  # zero where nothing has been learned yet
        return mean_of_padded(current, updates, sizes / total if total > 0 else shares)
