"""A device's own copy of the global adapter, its mirror: how files make the next one out of it.

A mirror is a packed float32 file of all r rows, as the device has them: as they were when the run
started, until they were sent, and with all that encoding lost. The coordinator makes the same file
from the same bytes, so what it sends next are differences from it, and carries what was lost before
(`docs/wire-format.md`). Memory holds one module. Knows neither who decides what is sent nor where
mirrors are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from protos.codecs import PackingError, Values
from protos.contract import (
    AdapterSpec,
    Assignment,
    BlobRef,
    Encoding,
    MirrorRows,
    MirrorStep,
    Part,
    Payload,
)
from protos.layout import Parts
from protos.packing import PackedWriter
from protos.sketch import initial_down, slice_rows
from protos.unpacking import open_packed


class MirrorError(PackingError):
    """A mirror and what is to be done with it do not fit."""


def mirror_payload(spec: AdapterSpec, parts: Sequence[Part]) -> Payload:
    """What a mirror of these parts is."""
    return Payload(spec.rank, "float32", tuple(parts))


class MirrorReader:
    """Reads a mirror; for None, the adapter that every run starts from.

    Raises `PackingError`, `OSError`.
    """

    def __init__(self, spec: AdapterSpec, blob: BlobRef | None, path: Path | None) -> None:
        if (blob is None) != (path is None):
            raise MirrorError("a mirror and its file belong together; fetch it whole")
        self._spec = spec
        self._shapes = {m.name: (m.out_features, m.in_features) for m in spec.modules}
        self._dense = {t.name: (t.out_features, t.in_features) for t in spec.dense}
        self._file = None
        if blob is not None and path is not None:
            self._file = open_packed(path, spec, blob.payload)

    def module(self, name: str, parts: Sequence[Part]) -> Parts:
        """These parts of a module or dense tensor, in memory of their own."""
        held = self._file.module(name) if self._file and name in self._file.names else {}
        return {
            part: np.array(held[part]) if part in held else self._first(name, part)
            for part in parts
            if (part == "dense") == (name in self._dense)
        }

    def _first(self, name: str, part: Part) -> Values:
        """A part as every run starts: down as PEFT draws it, all else zero."""
        if part == "dense":
            return np.zeros(self._dense[name], np.float32)
        rank, (m, n) = self._spec.rank, self._shapes[name]
        if part == "down":
            return initial_down(self._spec.seed, name, rank, n)
        return np.zeros((rank, m if part == "up" else rank), np.float32)


def sent_whole(encoding: Encoding) -> Encoding:
    """What rows travel as where they are no differences: 2 bits would lose half of the model."""
    return "int4" if encoding == "int2" else encoding


def place(spec: AdapterSpec, task: Assignment, name: str, part: Part, rows: MirrorRows) -> Any:
    """Where in a whole part the values of a file lie: an index into the array."""
    if part == "dense" or rows == "all":
        return ...
    own = slice_rows(spec, task, name)
    if part == "core":
        return np.ix_(own, own)
    return own if rows == "slice" else np.setdiff1d(np.arange(spec.rank), own)


def advance(
    spec: AdapterSpec, task: Assignment, base: Path | None, files: Sequence[Path], out: Path
) -> None:
    """Writes the next mirror of `task.mirror` to `out`, from its base and its files in order.

    The caller compares its digest with the one that the step names. Raises `PackingError`,
    `OSError`.
    """
    step = _step_of(task)
    parts = step.result.payload.parts
    held = MirrorReader(spec, step.base, base)
    opened = [
        (file, open_packed(path, spec, file.blob.payload))
        for file, path in zip(step.files, files, strict=True)
    ]
    with out.open("wb") as stream:
        writer = PackedWriter(stream, spec, step.result.payload)
        for name in (t.name for t in (*spec.modules, *spec.dense)):
            values = held.module(name, parts)
            for file, reader in opened:
                if name not in reader.names:
                    continue
                for part, got in reader.module(name).items():
                    if part not in values:
                        raise MirrorError(
                            f"a file holds {part}, which its mirror does not; agent and "
                            "coordinator differ in version"
                        )
                    where = place(spec, task, name, part, file.rows)
                    before = values[part][where]
                    if before.shape != got.shape:
                        raise MirrorError(
                            f"{name} {part}: values of shape {got.shape} for rows of shape "
                            f"{before.shape}; agent and coordinator differ in version"
                        )
                    values[part][where] = before + got if file.adds else got
            writer.write(name, values)
        writer.finish()


def slice_of(spec: AdapterSpec, task: Assignment, path: Path) -> dict[str, Parts]:
    """The slice of an assignment, cut from the mirror that its step ends with.

    Raises `PackingError`, `OSError`.
    """
    step = _step_of(task)
    reader = open_packed(path, spec, step.result.payload)
    found: dict[str, Parts] = {}
    for name in reader.names:
        found[name] = {
            part: np.ascontiguousarray(values[place(spec, task, name, part, "slice")])
            for part, values in reader.module(name).items()
        }
        if "up" in found[name] and step.up_factor != 1:
            up = found[name]["up"].astype(np.float64) * step.up_factor
            found[name]["up"] = up.astype(np.float32)
    return found


def whole_of(spec: AdapterSpec, task: Assignment, path: Path) -> dict[str, Parts]:
    """The global adapter as the mirror has it. Raises `PackingError`, `OSError`."""
    reader = open_packed(path, spec, _step_of(task).result.payload)
    return {name: reader.module(name) for name in reader.names}


def mirror_parts(files: Sequence[Sequence[Part]]) -> tuple[Part, ...]:
    """The parts that travel in these files, in the order of a packed file."""
    order: tuple[Part, ...] = ("up", "down", "core", "dense")
    return tuple(part for part in order if any(part in group for group in files))


def _step_of(task: Assignment) -> MirrorStep:
    if task.mirror is None:
        raise MirrorError("the assignment names no mirror; fetch its files")
    return task.mirror
