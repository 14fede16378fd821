"""Zero-padding FedIT: the baseline of most papers on unequal ranks. Knows prefixes only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from coordinator.methods.base import ModuleState, ModuleUpdate, RowMethod, Shares
from coordinator.methods.means import Steps, mean_of_padded


class ZeroPadding(RowMethod):
    """Devices train the first k rows; the new rows are the mean of the trained ones, where a
    device that lacks a row counts as zero.

    Row j keeps only the share q_j of the fleet that holds it: untouched, it decays like q_j^T over
    T rounds. RBLA averages over owners instead.
    """

    name: ClassVar[str] = "zero-padding"
    paper: ClassVar[str] = "baseline in HetLoRA (arXiv 2401.06432) and FLoRA (arXiv 2409.05976)"
    dilutes: ClassVar[bool] = True

    def step(self, current: ModuleState, updates: Sequence[ModuleUpdate], shares: Shares) -> Steps:
        """From the current rows to the mean of the padded ones."""
        return mean_of_padded(current, updates, shares)
