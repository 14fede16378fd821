"""What a device's adapter starts from: its home, what was fetched, a draw, or zeros, in this order.

Knows packed files, what an assignment declares and what a home holds. It knows no models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from edge_agent.training.branches import SliceError
from edge_agent.training.home import Home
from protos.codecs import Values
from protos.contract import AdapterSpec, Assignment, BlobRef, Part
from protos.layout import Parts
from protos.sketch import initial_down
from protos.unpacking import unpack


def read_files(
    spec: AdapterSpec, blobs: Sequence[BlobRef], paths: Sequence[Path]
) -> dict[str, Parts]:
    """The parts that several packed files hold together.

    Raises `PackingError`, and `SliceError` when two files hold the same part.
    """
    found: dict[str, Parts] = {}
    for blob, path in zip(blobs, paths, strict=True):
        for name, parts in unpack(path.read_bytes(), spec, blob.payload).items():
            if twice := found.get(name, {}).keys() & parts.keys():
                raise SliceError(f"two files hold {name} {min(twice)}; they must not overlap")
            found.setdefault(name, {}).update(parts)
    return found


def starting_slice(
    spec: AdapterSpec, task: Assignment, files: Mapping[str, Parts], home: Home
) -> dict[str, Parts]:
    """Every part of the slice, as training begins with it; `home` at the slice's rows."""
    kept = _of_parts(home.slice, task.personal)
    core = _holds_core(files, kept) or "core" in (*task.trained, *task.personal)
    drawn = None
    if task.fresh:
        drawn = {
            m.name: initial_down(
                spec.seed, m.name, task.rank, m.in_features,
                round_=task.round, device_id=task.device_id,
            )
            for m in spec.modules
        }  # fmt: skip
    return _first_found(_shapes(spec, task.rank, core), kept, files, drawn or {})


def starting_personal(
    task: Assignment, received: Mapping[str, Parts], home: Home
) -> dict[str, Parts]:
    """What Ditto's own adapter goes on from: itself, or else what was received.

    Where rows mean something else each round, its own would be held to others: there it starts
    from what was received.
    """
    shapes = {name: {p: v.shape for p, v in parts.items()} for name, parts in received.items()}
    # What is not trained stands for all devices alike: RoLoRA's resting factor, Fed-SB's bases.
    kept = _of_parts(home.personal, task.trained) if task.keeps_basis else {}
    return _first_found(shapes, kept, received, {})


def whole_adapter(
    spec: AdapterSpec, task: Assignment, files: Mapping[str, Parts], home: Home
) -> dict[str, Parts]:
    """The global adapter of all r rows with the device's personal parts; empty if there is none.

    `home` at all rows.
    """
    kept = _of_parts(home.slice, task.personal)
    if not files and not kept:
        return {}
    return _first_found(_shapes(spec, spec.rank, _holds_core(files, kept)), kept, files, {})


def _of_parts(adapter: Mapping[str, Parts], parts: Sequence[Part]) -> dict[str, Parts]:
    wanted: dict[str, Parts] = {
        name: {part: values for part, values in found.items() if part in parts}
        for name, found in adapter.items()
    }
    return {name: found for name, found in wanted.items() if found}


def _holds_core(*adapters: Mapping[str, Parts]) -> bool:
    return any("core" in parts for adapter in adapters for parts in adapter.values())


def _shapes(spec: AdapterSpec, rank: int, core: bool) -> dict[str, dict[Part, tuple[int, ...]]]:
    """Module or tensor -> part -> shape, of a whole adapter of that rank."""
    shapes: dict[str, dict[Part, tuple[int, ...]]] = {}
    for m in spec.modules:
        shapes[m.name] = {"up": (rank, m.out_features), "down": (rank, m.in_features)}
        if core:
            shapes[m.name]["core"] = (rank, rank)
    return shapes | {t.name: {"dense": (t.out_features, t.in_features)} for t in spec.dense}


def _first_found(
    shapes: Mapping[str, Mapping[Part, tuple[int, ...]]],
    kept: Mapping[str, Parts],
    files: Mapping[str, Parts],
    drawn: Mapping[str, Values],
) -> dict[str, Parts]:
    """Kept values if their shape is right, else the files', else drawn ones for down, else zeros.

    What the files hold is taken as it is: that it does not fit is an error, which attaching tells.
    """
    found: dict[str, Parts] = {name: {} for name in shapes}
    for name, parts in shapes.items():
        for part, shape in parts.items():
            held = kept.get(name, {}).get(part)
            if held is None or held.shape != shape:
                held = files.get(name, {}).get(part)
            if held is None and part == "down":
                held = drawn.get(name)
            found[name][part] = np.zeros(shape, np.float32) if held is None else held
    return found
