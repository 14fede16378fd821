"""A slice of the global adapter <-> a stock PEFT LoRA adapter on the loaded base.

Knows PEFT and the factor layout of the contract. It knows nothing of training, files or how a
slice was cut: rows come in, rows go out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor

from profiles.errors import SketchfleetError
from protos.contract import AdapterSpec
from protos.packing import Factors

ADAPTER = "default"
PREFIX = "base_model.model."


class SliceError(SketchfleetError):
    """The adapter does not fit the base, or the factors do not fit the adapter."""


@contextmanager
def attached(model: Any, spec: AdapterSpec, rank: int) -> Iterator[Any]:
    """A stock PEFT adapter of `rank` rows on the spec's modules, for as long as the block lasts.

    `model`: the base, a transformers causal model. Yields a `PeftModel` whose only trainable
    parameters are the adapter's, float32. On leaving, also by an error, the base is as before
    and the adapter's memory is free. Raises `SliceError` when the base lacks a module of the spec
    or has it in another shape.
    """
    _check_base(model, spec)
    alpha: Any = spec.device_alpha(rank)  # a float under rsLoRA; PEFT says int and only divides
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=alpha,
        use_rslora=spec.use_rslora,
        lora_dropout=0.0,
        bias="none",
        target_modules=[m.name for m in spec.modules],
    )
    try:
        peft_model = get_peft_model(model, config)
        if set(_layers(peft_model)) != {m.name for m in spec.modules}:
            raise SliceError(
                "PEFT adapted other modules than the run names; check [adapter] targets"
            )
        yield peft_model
    finally:
        _detach(model)


def write_factors(model: Any, factors: Mapping[str, Factors]) -> None:
    """Sets the adapter's weights from `factors`: per module up (k, out) and down (k, in).

    Raises `SliceError` on a missing or unknown module or another shape; then nothing is written.
    """
    layers = _layers(model)
    if missing := sorted(layers.keys() - factors.keys()):
        raise SliceError(f"the slice lacks {len(missing)} modules, first {missing[0]}")
    if unknown := sorted(factors.keys() - layers.keys()):
        raise SliceError(f"the slice has {len(unknown)} modules unknown here, first {unknown[0]}")
    for name, layer in layers.items():
        a, b = _weights(layer)
        got = (factors[name].up.shape, factors[name].down.shape)
        want = (tuple(b.shape[::-1]), tuple(a.shape))
        if got != want:
            raise SliceError(f"{name}: factors of shape {got} where the adapter has {want}")
    with torch.no_grad():
        for name, layer in layers.items():
            a, b = _weights(layer)
            a.copy_(_tensor(factors[name].down))
            b.copy_(_tensor(factors[name].up).T)


def read_factors(model: Any) -> dict[str, Factors]:
    """The adapter's weights as float32 factors, in wire order of the base's modules."""
    found = {}
    for name, layer in _layers(model).items():
        a, b = _weights(layer)
        found[name] = Factors(up=_array(b.T), down=_array(a))
    return found


def subtract(after: Mapping[str, Factors], before: Mapping[str, Factors]) -> dict[str, Factors]:
    """What training added, module by module: `after` - `before`, of equal shapes."""
    return {
        name: Factors(up=f.up - before[name].up, down=f.down - before[name].down)
        for name, f in after.items()
    }


def trained_parameters(model: Any) -> int:
    """How many parameters an optimiser would change."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _check_base(model: Any, spec: AdapterSpec) -> None:
    here = dict(model.named_modules())
    for module in spec.modules:
        layer = here.get(module.name)
        if layer is None:
            raise SliceError(f"the base model has no module {module.name}; it is another base")
        shape = (getattr(layer, "out_features", None), getattr(layer, "in_features", None))
        want = (module.out_features, module.in_features)
        if shape != want:
            raise SliceError(f"{module.name} is {shape} in the base model, {want} in the run")


def _detach(model: Any) -> None:
    """Puts the base's own layers back, whatever state a failure left."""
    adapted = [(n, m) for n, m in model.named_modules() if isinstance(m, LoraLayer)]
    for name, layer in adapted:
        model.set_submodule(name, layer.base_layer)
    if hasattr(model, "peft_config"):
        del model.peft_config
    model.eval()


def _layers(model: Any) -> dict[str, Any]:
    return {
        name.removeprefix(PREFIX): layer
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLayer)
    }


def _weights(layer: Any) -> tuple[Tensor, Tensor]:
    """A (k, in) and B (out, k)."""
    a, b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
    if a.dtype != torch.float32 or b.dtype != torch.float32:
        raise SliceError(f"adapter weights are {a.dtype}, not float32; this peft is not supported")
    return a, b


def _tensor(rows: np.ndarray[Any, Any]) -> Tensor:
    return torch.from_numpy(np.array(rows, dtype=np.float32))  # a copy: unpacked rows are read-only


def _array(weight: Tensor) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.array(weight.detach().cpu().numpy(), dtype=np.float32, order="C")
