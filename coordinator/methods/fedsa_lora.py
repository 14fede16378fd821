"""FedSA-LoRA: down is shared, up stays at home. Knows no global model, since there is none."""

from __future__ import annotations

from typing import ClassVar

from coordinator.methods.fedit import FedIT
from protos.contract import Part


class FedSALoRA(FedIT):
    """Devices train both factors, send down and keep up; down is averaged.

    A device's model is W + s B_i A with its own B_i. The coordinator never sees any B_i, and its
    own up stays zero.
    """

    name: ClassVar[str] = "fedsa-lora"
    paper: ClassVar[str] = (
        "Selective Aggregation for Low-Rank Adaptation in Federated Learning (arXiv 2410.01463)"
    )
    personal: ClassVar[tuple[Part, ...]] = ("up",)
    has_global: ClassVar[bool] = False

    def files(self, version: int) -> tuple[tuple[Part, ...], ...]:
        """Down; up is at home."""
        return (("down",),)
