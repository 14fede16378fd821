"""What an optimiser remembers <-> arrays beside the parts they belong to.

Knows torch optimisers by their state alone. It knows neither files nor rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from edge_agent.training.slice import array, as_rows, parameters
from protos.contract import Part
from protos.packing import Parts, Values

Moments = dict[str, dict[str, Parts]]
"""By the optimiser's own name ("exp_avg"), then by module and part; scalars have shape ()."""


def read_moments(model: Any, optimizer: torch.optim.Optimizer) -> Moments:
    """Everything that the optimiser remembers of the model's trained parameters."""
    found: Moments = {}
    for name, parts in parameters(model).items():
        for part, weight in parts.items():
            for kind, values in optimizer.state.get(weight, {}).items():
                if isinstance(values, Tensor):
                    held = array(values if values.ndim == 0 else as_rows(part, values))
                    found.setdefault(kind, {}).setdefault(name, {})[part] = held
    return found


def restore_moments(model: Any, optimizer: torch.optim.Optimizer, moments: Moments) -> None:
    """Has a fresh optimiser go on from these moments, for every parameter that they fit."""
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


def _laid_out(part: Part, weight: Tensor, values: Values) -> Tensor:
    """As the optimiser holds it: a scalar, or in the parameter's own layout."""
    found = torch.from_numpy(values.copy())
    if values.shape:
        rows_first, found = found, torch.empty_like(weight)
        as_rows(part, found).copy_(rows_first)
    return found
