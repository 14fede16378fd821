"""What stands beside the frozen base: a low-rank branch, and differences of tensors trained whole.

Knows the base's own modules and how to hang something on them without touching a stored bit. It
knows no adapters (`slice`) and no files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from profiles.errors import SketchfleetError
from profiles.model import ModuleShape
from protos.layout import Parts


class SliceError(SketchfleetError):
    """What a run asks for does not fit the base, or the values do not fit the adapter."""


def adapted_layer(model: Any, name: str, out_features: int, in_features: int) -> Any:
    """The base's linear layer of that name. Raises `SliceError` when it has another shape."""
    try:
        layer = model.get_submodule(name)
    except AttributeError as error:
        raise SliceError(f"the base model has no module {name}; it is another base") from error
    shape = (getattr(layer, "out_features", None), getattr(layer, "in_features", None))
    if shape != (out_features, in_features):
        want = (out_features, in_features)
        raise SliceError(f"{name} is {shape} in the base model, {want} in the run")
    return layer


@contextmanager
def side_branch(model: Any, side: Mapping[str, Parts], dtype: torch.dtype) -> Iterator[None]:
    """A frozen branch at scale 1 beside the base's layers, for as long as the block lasts.

    `side`: module -> up (p, out) and down (p, in), of any rank p; empty for none. It is added to
    what the base layer gives, so that it holds for quantised weights too, which nothing can be
    added into. `dtype`: what the base computes in. Raises `SliceError`.
    """
    hooks = []
    try:
        for name, parts in side.items():
            if not parts.keys() >= {"up", "down"}:
                raise SliceError(f"the side branch of {name} has no up and down; fetch it again")
            up, down = torch.tensor(parts["up"]), torch.tensor(parts["down"])
            layer = adapted_layer(model, name, up.shape[1], down.shape[1])
            place = {"device": layer.weight.device, "dtype": dtype}
            hooks.append(layer.register_forward_hook(_adding(up.to(**place), down.to(**place))))
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _adding(up: Tensor, down: Tensor) -> Callable[[Any, Any, Tensor], Tensor]:
    """A forward hook that adds (x down') up; up (p, out), down (p, in)."""

    def add(_layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        beside = (inputs[0].to(down.dtype) @ down.T) @ up
        return output + beside.to(output.dtype)

    return add


class DenseDelta(nn.Module):
    """The trained difference of one of the base's tensors, float32: steps too small for a
    bfloat16 weight still add up in it.
    """

    def __init__(self, name: str, weight: Tensor) -> None:
        super().__init__()
        self.name = name
        self.delta = nn.Parameter(torch.zeros_like(weight, dtype=torch.float32))

    def forward(self, weight: Tensor) -> Tensor:
        """The weight as the model is to see it."""
        return weight + self.delta.to(weight.dtype)


@contextmanager
def dense_deltas(model: Any, tensors: tuple[ModuleShape, ...]) -> Iterator[None]:
    """A `DenseDelta` of zeros on each of these tensors of the base, for as long as the block lasts.

    A tensor that the base ties to another (an output head to the embeddings) is untied: only the
    named one moves. Raises `SliceError` when the base has no such tensor, or a quantised one.
    """
    changed: list[tuple[nn.Module, str]] = []
    try:
        for tensor in tensors:
            place, _, leaf = tensor.name.rpartition(".")
            weight = _dense_weight(model, tensor)
            module = model.get_submodule(place)
            parametrize.register_parametrization(module, leaf, DenseDelta(tensor.name, weight))
            changed.append((module, leaf))
        yield
    finally:
        for module, leaf in changed:
            parametrize.remove_parametrizations(module, leaf, leave_parametrized=False)


def _dense_weight(model: Any, tensor: ModuleShape) -> Tensor:
    try:
        weight: Tensor = model.get_parameter(tensor.name)
    except AttributeError as error:
        raise SliceError(
            f"the base model has no tensor {tensor.name}; it is another base"
        ) from error
    if not weight.is_floating_point():
        raise SliceError(
            f"{tensor.name} is quantised here and cannot be trained whole; name tensors that stay "
            "in floating point, or plan bf16 for this device"
        )
    shape = tuple(weight.shape) if weight.ndim > 1 else (1, *weight.shape)
    want = (tensor.out_features, tensor.in_features)
    if shape != want:
        raise SliceError(f"{tensor.name} is {shape} in the base model, {want} in the run")
    return weight
