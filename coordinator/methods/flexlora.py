"""FlexLoRA: average products, refactor, hand out the largest components. Knows prefixes only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from coordinator.methods.base import ModuleState, ModuleUpdate, Shares, WholeMethod
from coordinator.methods.products import factored, ideal


class FlexLoRA(WholeMethod):
    """The mean of the devices' products s_i B_i A_i is cut to rank r by its singular values; a
    device of k rows gets the k largest components, which is its best approximation of rank k.

    Exact before truncation, best possible after. Rows that few hold shrink: a device that lacks
    them says zero.
    """

    name: ClassVar[str] = "flexlora"
    paper: ClassVar[str] = (
        "Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and Client "
        "Resources (arXiv 2402.11505)"
    )
    dilutes: ClassVar[bool] = True
    stacks: ClassVar[bool] = True

    def merge(
        self, current: ModuleState, updates: Sequence[ModuleUpdate], shares: Shares, round_: int
    ) -> ModuleState:
        """The best approximation of rank r of the mean of products."""
        return factored(current, ideal(updates, shares))
