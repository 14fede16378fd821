"""The methods a run can merge with. A new one is a file here and a line in `METHODS`."""

from __future__ import annotations

import difflib

from coordinator.methods.base import (
    Method,
    MethodError,
    MethodOptions,
    ModuleState,
    ModuleUpdate,
    RowMethod,
    UnknownMethodError,
    UpdateError,
    WeightError,
    WholeMethod,
)
from coordinator.methods.fed_plora import FedPLoRA
from coordinator.methods.fed_sb import FedSB
from coordinator.methods.fedex_lora import FedExLoRA
from coordinator.methods.fedit import FedIT
from coordinator.methods.fedsa_lora import FedSALoRA
from coordinator.methods.ffa_lora import FFALoRA
from coordinator.methods.flasc import FLASC
from coordinator.methods.flexlora import FlexLoRA
from coordinator.methods.flora import FLoRA
from coordinator.methods.flora_na import FLoRANA
from coordinator.methods.florist import FLoRIST
from coordinator.methods.fslora import FSLoRA
from coordinator.methods.hetlora import HetLoRA
from coordinator.methods.lora_fair import LoRAFAIR
from coordinator.methods.raflora import RaFLoRA
from coordinator.methods.rbla import RBLA
from coordinator.methods.rolora import RoLoRA
from coordinator.methods.zero_padding import ZeroPadding

__all__ = [
    "METHODS",
    "Method",
    "MethodError",
    "MethodOptions",
    "ModuleState",
    "ModuleUpdate",
    "RowMethod",
    "UnknownMethodError",
    "UpdateError",
    "WeightError",
    "WholeMethod",
    "make",
]

METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (
        FSLoRA,
        FedIT,
        ZeroPadding,
        HetLoRA,
        RBLA,
        FFALoRA,
        RoLoRA,
        FedSALoRA,
        FlexLoRA,
        RaFLoRA,
        FLoRIST,
        FLoRA,
        FedExLoRA,
        LoRAFAIR,
        FLoRANA,
        FedSB,
        FedPLoRA,
        FLASC,
    )
}


def make(name: str, options: MethodOptions) -> Method:
    """The method of that name. Raises `UnknownMethodError`."""
    if name not in METHODS:
        near = difflib.get_close_matches(name.lower().replace("_", "-"), METHODS, n=1)
        meant = f" (did you mean {near[0]}?)" if near else ""
        raise UnknownMethodError(
            f"method {name!r} does not exist{meant}; choose one of {', '.join(METHODS)}"
        )
    return METHODS[name](options)
