"""FedIT: the weighted mean of whole adapters. Knows no sketches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from coordinator.lowrank import Bundle, Matrix64
from coordinator.methods.base import Method, ModuleUpdate


class FedIT(Method):
    """FederatedGPT-Shepherd (arXiv 2305.05644): FedAvg on both LoRA factors.

    All devices start from the same factors, so the mean of what they trained is those factors
    plus the mean of the deltas.
    """

    name: ClassVar[str] = "fedit"
    heterogeneous: ClassVar[bool] = False

    def step(
        self, current: Bundle, updates: Sequence[ModuleUpdate], shares: NDArray[np.float64]
    ) -> tuple[Matrix64, Matrix64]:
        """Mean of the deltas: (r, m) and (r, n)."""
        up, down = np.zeros(current.up.shape), np.zeros(current.down.shape)
        for update, share in zip(updates, shares, strict=True):
            up += share * update.delta.up.astype(np.float64)
            down += share * update.delta.down.astype(np.float64)
        return up, down
