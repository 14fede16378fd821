"""The update as it is sent, and what that leaves out: error feedback by global row.

e <- e + delta; send C(e); e <- e - C(e) (Seide et al., Interspeech 2014). Knows packing, and where
the rows of a slice lie in the global adapter. It knows no models.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from edge_agent.training.home import Rows
from protos.codecs import Values
from protos.contract import AdapterSpec, Assignment, ErrorCurve, Part, Payload
from protos.fitting import fit
from protos.layout import Parts
from protos.packing import pack
from protos.unpacking import open_update


@dataclass(frozen=True, eq=False)
class PackedUpdate:
    """The packed update, the residual after it, and what was chosen under a byte budget.

    error: ||sent - due||^2 / ||due||^2; curves: what the other choices would have lost.
    """

    data: bytes
    residual: dict[str, Parts]
    chosen: Payload | None = None
    error: float = 0.0
    curves: tuple[ErrorCurve, ...] = ()


def pack_update(
    spec: AdapterSpec,
    task: Assignment,
    delta: Mapping[str, Parts],
    rows: Rows,
    residual: Mapping[str, Parts],
) -> PackedUpdate:
    """The packed update, under a byte budget as whatever loses least of it.

    delta: trained minus received, of the parts to be sent. With `error_feedback`, the residual of
    the slice's rows is added before packing, and what the packing loses is theirs from then on;
    rows that are not in the slice keep what they have. Values are then rounded to their nearest
    level, not at random: what is fed back need not be unbiased (EF-SGD, arXiv 1901.09847), and
    coarse levels lose half or less. Without error feedback nothing is added or left. Raises
    `PackingError`.
    """
    if not task.error_feedback:
        return _packed(spec, task, delta)
    after: dict[str, Parts] = {name: dict(parts) for name, parts in residual.items()}
    due: dict[str, Parts] = {name: {} for name in delta}
    for name, parts in delta.items():
        for part, values in parts.items():
            whole = _whole(spec, part, values, residual.get(name, {}).get(part))
            due[name][part] = values + whole[_place(part, rows, name)]
            after.setdefault(name, {})[part] = whole
    packed = _packed(spec, task, due)
    reader = open_update(packed.data, spec, task)
    for name, parts in due.items():
        sent = reader.module(name)
        for part, values in parts.items():
            after[name][part][_place(part, rows, name)] = values - sent[part]
    return replace(packed, residual=_less_zeros(after))


def _packed(spec: AdapterSpec, task: Assignment, due: Mapping[str, Parts]) -> PackedUpdate:
    seed = None if task.error_feedback else task.seed

    def packed(payload: Payload) -> bytes:
        return pack(spec, payload, due, assignment_digest=task.digest, seed=seed)

    if task.budget is None:
        return PackedUpdate(packed(task.update), {})
    best, curves = fit(spec, task.update, task.budget, due, fed_back=task.error_feedback)
    return PackedUpdate(packed(best.payload), {}, best.payload, best.error, curves)


def _whole(spec: AdapterSpec, part: Part, values: Values, held: Values | None) -> Values:
    """A copy of what is held, or zeros: a part of the slice for all global rows."""
    shape = {"core": (spec.rank, spec.rank), "dense": values.shape}.get(
        part, (spec.rank, values.shape[1])
    )
    return np.zeros(shape, np.float32) if held is None else held.copy()


def _place(part: Part, rows: Rows, name: str) -> Any:
    """Where the slice's values of a part lie in the whole."""
    if part == "dense":
        return ...
    return np.ix_(rows[name], rows[name]) if part == "core" else rows[name]


def _less_zeros(residual: Mapping[str, Parts]) -> dict[str, Parts]:
    """Without what is nothing: an encoding that loses nothing leaves no files behind."""
    left: dict[str, Parts] = {
        name: {part: values for part, values in parts.items() if values.any()}
        for name, parts in residual.items()
    }
    return {name: parts for name, parts in left.items() if parts}
