"""RBLA: rank-based averaging, each row over the devices that hold it. Knows prefixes only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from coordinator.methods.base import ModuleState, ModuleUpdate, RowMethod, Shares
from coordinator.methods.means import Steps, mean_over_owners, owners_factors


class RBLA(RowMethod):
    """Devices train the first k rows; row j becomes the mean of row j over those with k > j.

    Rows that nobody holds this round stay as they are.
    """

    name: ClassVar[str] = "rbla"
    paper: ClassVar[str] = (
        "RBLA: Rank-Based-LoRA-Aggregation for Fine-tuning Heterogeneous Models (arXiv 2408.08699)"
    )

    def step(self, current: ModuleState, updates: Sequence[ModuleUpdate], shares: Shares) -> Steps:
        """The mean change over owners."""
        return mean_over_owners(current, updates, shares)

    def row_factors(
        self, rank: int, updates: Sequence[ModuleUpdate], shares: Shares
    ) -> list[NDArray[np.float64]]:
        """Of the devices that hold the row."""
        return owners_factors(rank, updates, shares)
