"""What an optimiser remembers <-> arrays beside the parts they belong to.

Knows torch optimisers by their state alone, and how bitsandbytes holds the same in 8 bits. It
knows neither files nor rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from edge_agent.training.slice import array, as_rows, parameters
from protos.codecs import Values
from protos.contract import Part
from protos.layout import Parts

Moments = dict[str, dict[str, Parts]]
"""By torch's own name ("exp_avg"), then by module and part; scalars have shape ()."""

EIGHT_BIT = {"state1": "exp_avg", "state2": "exp_avg_sq"}  # bitsandbytes' names and torch's
SMALLEST_QUANTISED = 4096  # bitsandbytes keeps the moments of smaller tensors in 32 bits
BLOCK = 256  # of values that share a scale there


def read_moments(model: Any, optimizer: torch.optim.Optimizer) -> Moments:
    """Everything that the optimiser remembers of the model's trained parameters."""
    found: Moments = {}
    for name, parts in parameters(model).items():
        for part, weight in parts.items():
            for kind, values in _widened(optimizer.state.get(weight, {})).items():
                held = array(values if values.ndim == 0 else as_rows(part, values))
                found.setdefault(kind, {}).setdefault(name, {})[part] = held
    return found


def restore_moments(model: Any, optimizer: torch.optim.Optimizer, moments: Moments) -> None:
    """Has a fresh optimiser go on from these moments, for every parameter that they fit.

    An optimiser may go on from what another of its family left: 8 bits from 32 and back.
    """
    states: dict[Tensor, dict[str, Tensor]] = {}
    for name, parts in parameters(model).items():
        for part, weight in parts.items():
            fits = ((), tuple(as_rows(part, weight).shape))
            held = {kind: found.get(name, {}).get(part) for kind, found in moments.items()}
            state = {
                kind: _laid_out(part, weight, values)
                for kind, values in held.items()
                if values is not None and values.shape in fits
            }
            if len(state) == len(moments):  # a part of what an optimiser needs is of no use to it
                states[weight] = state
    order = [weight for group in optimizer.param_groups for weight in group["params"]]
    if hasattr(optimizer, "name2qmap"):
        for weight in order:
            if states.get(weight):
                optimizer.state[weight] = _narrowed(optimizer, weight, states[weight])
        return
    facts = optimizer.state_dict()
    facts["state"] = {i: states[weight] for i, weight in enumerate(order) if weight in states}
    optimizer.load_state_dict(facts)


def carried_over(before: Moments, after: Moments) -> Moments:
    """The moments after a round: those of parts that it did not train stay as they were."""
    found: Moments = {}
    for kind in sorted(before.keys() | after.keys()):
        old, new = before.get(kind, {}), after.get(kind, {})
        found[kind] = {n: old.get(n, {}) | new.get(n, {}) for n in sorted(old.keys() | new.keys())}
    return {kind: adapter for kind, adapter in found.items() if adapter}


def _widened(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """A parameter's state under torch's names, float32."""
    if "state1" not in state:
        return {kind: values for kind, values in state.items() if isinstance(values, Tensor)}
    found = {"step": torch.tensor(float(state["step"]))}
    for number, (kind, name) in enumerate(EIGHT_BIT.items(), start=1):
        values = state[kind]
        if values.dtype == torch.uint8:
            from bitsandbytes.functional import dequantize_blockwise

            scales, code = state[f"absmax{number}"], state[f"qmap{number}"]
            values = dequantize_blockwise(values, absmax=scales, code=code, blocksize=BLOCK)
        found[name] = values
    return found


def _narrowed(optimizer: Any, weight: Tensor, state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The same as bitsandbytes holds it.

    What came out of 8 bits goes back as it was, or within 1 % of its block's largest value: the
    kernel does not always put that one on the highest level, and then the scale is another.
    """
    from bitsandbytes.functional import quantize_blockwise

    found: dict[str, Any] = {"step": int(state["step"])}
    codes = ("dynamic", "udynamic")
    for number, ((kind, name), code) in enumerate(zip(EIGHT_BIT.items(), codes, strict=True), 1):
        found[kind] = state[name].to(weight.device)
        if weight.numel() >= SMALLEST_QUANTISED:
            levels = optimizer.name2qmap[code] = optimizer.name2qmap[code].to(weight.device)
            found[kind], how = quantize_blockwise(found[kind], code=levels, blocksize=BLOCK)
            found |= {f"qmap{number}": levels, f"absmax{number}": how.absmax}
    return found


def _laid_out(part: Part, weight: Tensor, values: Values) -> Tensor:
    """As the optimiser holds it: a scalar, or in the parameter's own layout."""
    found = torch.from_numpy(values.copy())
    if values.shape:
        rows_first, found = found, torch.empty_like(weight)
        as_rows(part, found).copy_(rows_first)
    return found
