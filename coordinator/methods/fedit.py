"""FedIT: the weighted mean of whole adapters. Knows no slices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from coordinator.methods.base import ModuleState, ModuleUpdate, RowMethod, Shares
from coordinator.methods.means import Steps, sum_of_changes


class FedIT(RowMethod):
    """FederatedGPT-Shepherd: FedAvg on both LoRA factors.

    All devices start from the same factors, so the mean of what they trained is those factors plus
    the mean of the changes. The mean of products it misses by the covariance of the factors,
    sum p_i (B_i - B)(A_i - A).
    """

    name: ClassVar[str] = "fedit"
    paper: ClassVar[str] = (
        "Towards Building the Federated GPT: Federated Instruction Tuning (arXiv 2305.05644)"
    )
    heterogeneous: ClassVar[bool] = False

    def step(self, current: ModuleState, updates: Sequence[ModuleUpdate], shares: Shares) -> Steps:
        """Mean of the changes."""
        return sum_of_changes(current, updates, shares)
