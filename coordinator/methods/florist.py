"""FLoRIST: FlexLoRA's target, but as few rows as hold its energy. Knows prefixes only."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

from coordinator.lowrank import Bundle
from coordinator.methods.base import (
    MethodOptions,
    ModuleState,
    ModuleUpdate,
    Shares,
    WholeMethod,
)
from coordinator.methods.products import ideal
from coordinator.truncation import truncate


class FLoRIST(WholeMethod):
    """The mean of products keeps the fewest components whose squared singular values reach
    `energy` of the sum, at most r; the rows beyond are zero.

    The paper takes two SVDs of the stacks and one of their small cores; the result is the same.
    """

    name: ClassVar[str] = "florist"
    paper: ClassVar[str] = (
        "FLoRIST: Singular Value Thresholding for Efficient and Accurate Federated Fine-Tuning of "
        "Large Language Models (arXiv 2506.09199)"
    )
    options: ClassVar[tuple[str, ...]] = ("energy",)
    dilutes: ClassVar[bool] = True
    stacks: ClassVar[bool] = True

    def __init__(self, options: MethodOptions) -> None:
        self.energy = options.energy

    def merge(
        self, current: ModuleState, updates: Sequence[ModuleUpdate], shares: Shares, round_: int
    ) -> ModuleState:
        """The components that hold the energy."""
        rank, scale = current.adapter.rank, current.adapter.scale
        best = truncate(ideal(updates, shares), rank, scale=scale, energy=self.energy)
        # Of a mean of zero nothing is kept; without down, no row would ever learn again.
        down = best.bundle.down if best.kept else current.adapter.down
        return dataclasses.replace(current, adapter=Bundle(best.bundle.up, down, scale))
