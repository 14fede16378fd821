"""The methods a run can merge with. A new one is a file here and a line in `METHODS`.

A factory takes (normalisation, optimizer); methods that merge whole adapters need neither.
"""

from __future__ import annotations

from collections.abc import Callable

from coordinator.methods.base import (
    Method,
    MethodError,
    ModuleUpdate,
    UnknownMethodError,
    UpdateError,
    WeightError,
)
from coordinator.methods.fedit import FedIT
from coordinator.methods.fslora import FSLoRA, resolve

__all__ = [
    "METHODS",
    "Method",
    "MethodError",
    "ModuleUpdate",
    "UnknownMethodError",
    "UpdateError",
    "WeightError",
    "make",
]

METHODS: dict[str, Callable[[str, str], Method]] = {
    "fslora": lambda normalisation, optimizer: FSLoRA(resolve(normalisation, optimizer)),
    "fedit": lambda normalisation, optimizer: FedIT(),
}


def make(name: str, *, normalisation: str = "auto", optimizer: str = "adamw") -> Method:
    """The method of that name; `optimizer` is the devices'. Raises `UnknownMethodError`."""
    if name not in METHODS:
        raise UnknownMethodError(f"method {name!r} does not exist; choose {', '.join(METHODS)}")
    return METHODS[name](normalisation, optimizer)
