"""The update as it is sent, and what that leaves out: error feedback by global row.

e <- e + delta; send C(e); e <- e - C(e) (Seide et al., Interspeech 2014). Knows packing, and where
the rows of a slice lie in the global adapter. It knows no models.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from edge_agent.training.home import Rows
from protos.codecs import Values
from protos.contract import AdapterSpec, Assignment, Part
from protos.layout import Parts
from protos.packing import pack
from protos.unpacking import unpack


def pack_update(
    spec: AdapterSpec,
    task: Assignment,
    delta: Mapping[str, Parts],
    rows: Rows,
    residual: Mapping[str, Parts],
) -> tuple[bytes, dict[str, Parts]]:
    """The packed update, and the residual after it.

    delta: trained minus received, of the parts to be sent. With `error_feedback`, the residual of
    the slice's rows is added before packing, and what the packing loses is theirs from then on;
    rows that are not in the slice keep what they have. Without it, nothing is added or left.
    Raises `PackingError`.
    """
    if not task.error_feedback:
        return _packed(spec, task, delta), {}
    after: dict[str, Parts] = {name: dict(parts) for name, parts in residual.items()}
    due: dict[str, Parts] = {name: {} for name in delta}
    for name, parts in delta.items():
        for part, values in parts.items():
            whole = _whole(spec, part, values, residual.get(name, {}).get(part))
            due[name][part] = values + whole[_place(part, rows, name)]
            after.setdefault(name, {})[part] = whole
    packed = _packed(spec, task, due)
    sent = unpack(packed, spec, task.update, assignment_digest=task.digest)
    for name, parts in due.items():
        for part, values in parts.items():
            after[name][part][_place(part, rows, name)] = values - sent[name][part]
    return packed, _less_zeros(after)


def _packed(spec: AdapterSpec, task: Assignment, delta: Mapping[str, Parts]) -> bytes:
    return pack(spec, task.update, delta, assignment_digest=task.digest, seed=task.seed)


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
