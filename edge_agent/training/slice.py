"""Parts of an adapter <-> a stock PEFT LoRA adapter on the loaded base.

Knows PEFT and the layout of the contract: per module up (k, out), down (k, in) and, with a core
(k, k), dW = scale * up' core down. It knows nothing of training, files or how a slice was cut:
rows come in, rows go out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from edge_agent.training.branches import DenseDelta, SliceError, adapted_layer, dense_deltas
from protos.codecs import Values
from protos.contract import AdapterSpec, Part
from protos.layout import Parts

ADAPTER = "default"
PREFIX = "base_model.model."


@contextmanager
def attached(
    model: Any,
    spec: AdapterSpec,
    rank: int,
    *,
    alpha: float,
    trained: Sequence[Part] = ("up", "down"),
    core: bool = False,
) -> Iterator[Any]:
    """A stock PEFT adapter of `rank` rows on the spec's modules, for as long as the block lasts.

    `model`: the base, a transformers model. Yields a `PeftModel` whose trainable
    parameters, all float32, are those of the `trained` parts; the spec's dense tensors are part
    of it. With `core`, a (k, k) matrix stands between the two factors. On leaving, also by an
    error, the base is as before and the adapter's memory is free. Raises `SliceError` when the
    base lacks a module or tensor of the spec or has it in another shape.
    """
    for module in spec.modules:
        adapted_layer(model, module.name, module.out_features, module.in_features)
    any_alpha: Any = alpha  # a float; PEFT says int and only divides
    config = LoraConfig(
        # PEFT would wrap the head of a classifier, whose tensors are the run's dense ones here.
        task_type="CAUSAL_LM" if spec.classification is None else None,
        r=rank,
        lora_alpha=any_alpha,
        use_rslora=spec.use_rslora,
        lora_dropout=0.0,
        bias="none",
        target_modules=[m.name for m in spec.modules],
    )
    with dense_deltas(model, spec.dense):
        try:
            peft_model = get_peft_model(model, config)
            layers = _layers(peft_model)
            if set(layers) != {m.name for m in spec.modules}:
                raise SliceError(
                    "PEFT adapted other modules than the run names; check [adapter] targets"
                )
            if core:
                for layer in layers.values():
                    _insert_core(layer, rank)
            for parts in parameters(peft_model).values():
                for part, weight in parts.items():
                    weight.requires_grad_(part in trained)
            yield peft_model
        finally:
            _detach(model)


def parameters(model: Any) -> dict[str, dict[Part, nn.Parameter]]:
    """The adapter's own parameters, by module and part, and the dense tensors' differences."""
    found = {name: _weights(layer) for name, layer in _layers(model).items()}
    deltas = {m.name: m.delta for m in model.modules() if isinstance(m, DenseDelta)}
    return found | {name: {"dense": delta} for name, delta in deltas.items()}


def as_rows(part: Part, values: Tensor) -> Tensor:
    """A view of a parameter, or of what has its shape, with the shape it has on the wire.

    PEFT keeps up as (out, k); a tensor of one dimension travels as one row.
    """
    if values.ndim == 1:
        return values[None]
    return values.T if part == "up" and values.ndim == 2 else values


def write_parts(model: Any, values: Mapping[str, Parts]) -> None:
    """Sets everything that `parameters` finds.

    Raises `SliceError` on what is missing or unknown or has another shape; then nothing is written.
    """
    found = parameters(model)
    if missing := sorted(found.keys() - values.keys()):
        raise SliceError(f"the slice lacks {len(missing)} modules, first {missing[0]}")
    if unknown := sorted(values.keys() - found.keys()):
        raise SliceError(f"the slice has {len(unknown)} modules unknown here, first {unknown[0]}")
    for name, parts in found.items():
        got = {part: value.shape for part, value in values[name].items()}
        want = {part: tuple(as_rows(part, weight).shape) for part, weight in parts.items()}
        if got != want:
            raise SliceError(f"{name}: values of shape {got} where the adapter has {want}")
    with torch.no_grad():
        for name, parts in found.items():
            for part, weight in parts.items():
                as_rows(part, weight).copy_(_tensor(values[name][part]))


def read_parts(model: Any) -> dict[str, Parts]:
    """Everything that `parameters` finds, as float32 arrays in the wire's layout."""
    return {
        name: {part: array(as_rows(part, weight)) for part, weight in parts.items()}
        for name, parts in parameters(model).items()
    }


def subtract(
    after: Mapping[str, Parts], before: Mapping[str, Parts], parts: Sequence[Part]
) -> dict[str, Parts]:
    """What training added to these parts: `after` - `before`, of equal shapes."""
    added: dict[str, Parts] = {
        name: {part: values[part] - before[name][part] for part in values if part in parts}
        for name, values in after.items()
    }
    return {name: found for name, found in added.items() if found}


def trained_parameters(model: Any) -> int:
    """How many parameters an optimiser would change."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def array(values: Tensor) -> Values:
    """A copy of its own, float32."""
    return np.array(values.detach().cpu().numpy(), dtype=np.float32, order="C")


def _insert_core(layer: Any, rank: int) -> None:
    """Puts a core before B; PEFT's forward pass calls B and asks no more of it."""
    up = layer.lora_B[ADAPTER]
    core = nn.Linear(rank, rank, bias=False, device=up.weight.device, dtype=up.weight.dtype)
    layer.lora_B[ADAPTER] = nn.Sequential(core, up)


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


def _weights(layer: Any) -> dict[Part, nn.Parameter]:
    """Down (k, in), up as B (out, k), and the core (k, k), if there is one."""
    second: Any = layer.lora_B[ADAPTER]
    found: dict[Part, nn.Parameter] = {}
    if isinstance(second, nn.Sequential):
        found["core"] = second.get_parameter("0.weight")
        second = second[1]
    found |= {"up": second.weight, "down": layer.lora_A[ADAPTER].weight}
    for weight in found.values():
        if weight.dtype != torch.float32:
            raise SliceError(
                f"adapter weights are {weight.dtype}, not float32; this peft is not supported"
            )
    return found


def _tensor(values: Values) -> Tensor:
    return torch.from_numpy(np.array(values, dtype=np.float32))  # a copy: these may be read-only
