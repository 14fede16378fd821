"""raFLoRA: FlexLoRA whose mean counts, row by row, only the devices that hold it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from coordinator.lowrank import Bundle, stack
from coordinator.methods.base import ModuleState, ModuleUpdate, Shares, WholeMethod
from coordinator.methods.means import covered
from coordinator.methods.products import factored


class RaFLoRA(WholeMethod):
    """Component j of device i enters the mean of products with p_i / (p of all that hold row j);
    the sum is cut to rank r by its singular values, so that rows few hold do not collapse.

    Rows that nobody holds this round stay in the sum as they are: without them, one round without
    large devices would shrink the model. With equal ranks this is FlexLoRA.
    """

    name: ClassVar[str] = "raflora"
    paper: ClassVar[str] = (
        "Preventing Rank Collapse in Federated Low-Rank Adaptation with Client Heterogeneity "
        "(arXiv 2602.13486)"
    )
    stacks: ClassVar[bool] = True

    def merge(
        self, current: ModuleState, updates: Sequence[ModuleUpdate], shares: Shares, round_: int
    ) -> ModuleState:
        """The best approximation of rank r of the mean over owners, component by component."""
        cover = covered(current.adapter.rank, updates, shares)
        bundles = [current.adapter.take(np.flatnonzero(cover == 0))]
        for update, share in zip(updates, shares, strict=True):
            product = update.trained.product
            weights = (share / cover[update.rows]).astype(np.float32)  # (k,)
            bundles.append(Bundle(weights[:, None] * product.up, product.down, product.scale))
        return factored(current, stack(bundles, [1.0] * len(bundles)))
