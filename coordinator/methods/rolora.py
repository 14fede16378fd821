"""RoLoRA: the factors take turns, so every round is exact. Knows which part moves when."""

from __future__ import annotations

from typing import ClassVar

from coordinator.methods.fedit import FedIT
from protos.contract import Part


class RoLoRA(FedIT):
    """Devices train, send and average up in even versions and down in odd ones, the other frozen.

    Up moves first: while it is zero, down has no gradient.
    """

    name: ClassVar[str] = "rolora"
    paper: ClassVar[str] = (
        "Robust Federated Finetuning of LLMs via Alternating Optimization of LoRA "
        "(arXiv 2502.01755)"
    )
    exact: ClassVar[bool] = True

    def trained(self, version: int) -> tuple[Part, ...]:
        """The part whose turn it is."""
        return ("down",) if version % 2 else ("up",)

    def files(self, version: int) -> tuple[tuple[Part, ...], ...]:
        """Apart: from one version to the next only one of them changes."""
        return (("up",), ("down",))
