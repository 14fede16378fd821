"""FFA-LoRA: only up is trained, so the mean of factors is the mean of products. Knows prefixes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from coordinator.methods.base import ModuleState, ModuleUpdate, RowMethod, Shares
from coordinator.methods.means import Steps, sum_of_changes
from protos.contract import Part


class FFALoRA(RowMethod):
    """The random down stays as drawn; devices train, send and get up, whose changes are averaged:
    sum p_i B_i A = (sum p_i B_i) A exactly.

    Devices of k rows hold the first k rows of both; what is averaged then are the changes of
    products, p_i s_i (B_i - B) A over the rows they hold, exactly as well.
    """

    name: ClassVar[str] = "ffa-lora"
    paper: ClassVar[str] = (
        "Improving LoRA in Privacy-preserving Federated Learning (arXiv 2403.12313)"
    )
    exact: ClassVar[bool] = True

    def trained(self, version: int) -> tuple[Part, ...]:
        """Up; down is frozen."""
        return ("up",)

    def files(self, version: int) -> tuple[tuple[Part, ...], ...]:
        """Down in a file of its own, which a device fetches once."""
        return (("down",), ("up",))

    def step(self, current: ModuleState, updates: Sequence[ModuleUpdate], shares: Shares) -> Steps:
        """Mean of the changes of up."""
        return sum_of_changes(current, updates, shares)
