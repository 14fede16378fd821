"""FLASC: FedIT with sparse files both ways. Knows the density; what is kept, packing decides."""

from __future__ import annotations

from typing import ClassVar

from coordinator.methods.base import MethodOptions
from coordinator.methods.fedit import FedIT


class FLASC(FedIT):
    """Every device gets the largest values of the adapter, trains all of them densely, and sends
    the largest values of its change; slow links get a lower density instead of a lower rank.

    "Largest" is over all modules together, zeros elsewhere. The paper steps with Adam at the
    server; here that is [server_optimizer], as for every method that keeps its rows.
    """

    name: ClassVar[str] = "flasc"
    paper: ClassVar[str] = "Federated LoRA with Sparse Communication (arXiv 2406.05233)"
    options: ClassVar[tuple[str, ...]] = ("density",)

    def __init__(self, options: MethodOptions) -> None:
        self.density = options.density
