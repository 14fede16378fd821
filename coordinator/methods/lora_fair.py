"""LoRA-FAIR: FedIT with its up corrected towards the mean of products. Knows no slices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from coordinator.lowrank import Matrix64
from coordinator.methods.base import (
    MethodOptions,
    ModuleState,
    ModuleUpdate,
    Shares,
    WholeMethod,
)
from coordinator.methods.means import sum_of_changes, today


class LoRAFAIR(WholeMethod):
    """Down becomes FedIT's mean A; up becomes B + D with the D that minimises
    ||(B + D) A - sum p_i B_i A_i||^2 + lambda ||D||^2.

    In Frobenius norm, where the paper descends on a cosine, this has a closed form:
    D = (sum p_i (B_i - B)(A_i - A) A') (A A' + lambda I)^-1, with no matrix of the layer's size.
    lambda to infinity is FedIT, lambda = 0 least squares.
    """

    name: ClassVar[str] = "lora-fair"
    paper: ClassVar[str] = (
        "LoRA-FAIR: Federated LoRA Fine-Tuning with Aggregation and Initialization Refinement "
        "(arXiv 2411.14961)"
    )
    options: ClassVar[tuple[str, ...]] = ("regularisation",)
    heterogeneous: ClassVar[bool] = False
    keeps_basis: ClassVar[bool] = True  # down is a plain mean, up a plain mean and a correction

    def __init__(self, options: MethodOptions) -> None:
        self.regularisation = options.regularisation

    def merge(
        self, current: ModuleState, updates: Sequence[ModuleUpdate], shares: Shares, round_: int
    ) -> ModuleState:
        """FedIT's mean with the correction added to up."""
        mean = current.moved(sum_of_changes(current, updates, shares))
        up, down = mean.adapter.up, mean.adapter.down.astype(np.float64)
        missed: Matrix64 = np.zeros(up.shape)  # A (sum p_i (A_i - A)' (B_i - B)'), (r, m)
        for update, share in zip(updates, shares, strict=True):
            own = today(current, update)
            turned = down @ (own.down - mean.adapter.down).T.astype(np.float64)  # (r, r)
            missed += (share * turned) @ (own.up - up).astype(np.float64)
        square = down @ down.T + self.regularisation * np.eye(len(down))
        # Where rows of A depend on each other and lambda is 0: of all least squares the shortest.
        return mean.moved({"up": np.linalg.lstsq(square, missed, rcond=None)[0]})
