"""Versions of the global model as packed files, read and written one module at a time.

A version is a few float32 files by role: the adapter, a side branch where the method keeps one, and
the moments of a server optimiser. Memory holds one module. Knows files and module states; it does
not know who merges or where blobs lie.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from coordinator.lowrank import Bundle, Matrix32
from coordinator.methods import Method, ModuleState
from protos.contract import AdapterSpec, Encoding, Part, Payload
from protos.layout import Parts
from protos.packing import PackedWriter
from protos.sketch import initial_down
from protos.unpacking import PackedReader, open_packed

MASTER: Encoding = "float32"
ADAPTER, SIDE, MOMENT = "adapter", "side", "moment."  # a moment's role ends with its name


@dataclass(frozen=True)
class StateFile:
    """One file of a version."""

    path: Path
    payload: Payload


Dense = tuple[Matrix32, Mapping[str, Matrix32]]
"""A dense tensor's difference from the base (rows, columns), and its moments by name."""


class StateReader:
    """Reads a version. Raises `PackingError`, `OSError` where files are damaged or gone."""

    def __init__(self, spec: AdapterSpec, files: Mapping[str, StateFile]) -> None:
        self._spec, self._files = spec, files
        self._open: dict[str, PackedReader] = {}

    def module(self, name: str) -> ModuleState:
        """One module's adapter, side branch, core and moments."""
        parts = self._read(ADAPTER, name)
        scale = self._spec.scale(self._spec.rank)
        moments: dict[Part, dict[str, Matrix32]] = {}
        for role in self._files:
            if role.startswith(MOMENT):
                for part, values in self._read(role, name).items():
                    moments.setdefault(part, {})[role.removeprefix(MOMENT)] = values
        side = None
        if SIDE in self._files:
            found = self._read(SIDE, name)
            side = Bundle(found["up"], found["down"], 1.0)
        adapter = Bundle(parts["up"], parts["down"], scale)
        return ModuleState(adapter, side, parts.get("core"), moments)

    def dense(self, name: str) -> Dense:
        """One dense tensor."""
        moments = {
            role.removeprefix(MOMENT): self._read(role, name)["dense"]
            for role in self._files
            if role.startswith(MOMENT)
        }
        return self._read(ADAPTER, name)["dense"], moments

    def useful_rank(self) -> int:
        """Rows up to the last that is not zero on both sides in every module; at least 1.

        Rows of zeros get no gradient on either side, so nothing is gained by handing them out.
        """
        most = 1
        for module in self._spec.modules:
            parts = self._read(ADAPTER, module.name)
            alive = np.any(parts["up"], axis=1) | np.any(parts["down"], axis=1)
            most = max(most, 1 + int(np.flatnonzero(alive)[-1])) if alive.any() else most
        return most

    def _read(self, role: str, name: str) -> Parts:
        if role not in self._open:
            file = self._files[role]
            self._open[role] = open_packed(file.path, self._spec, file.payload)
        return self._open[role].module(name)


class StateWriter:
    """Writes a version, module by module in the order of the spec, then its dense tensors.

    `new_file` gives an empty path for a role. The first module decides which roles there are.
    """

    def __init__(
        self, spec: AdapterSpec, parts: tuple[Part, ...], new_file: Callable[[str], Path]
    ) -> None:
        self._spec, self._new_file = spec, new_file
        self._parts: tuple[Part, ...] = (*parts, "dense") if spec.dense else parts
        self._open: dict[str, tuple[IO[bytes], PackedWriter, StateFile]] = {}

    def write(self, name: str, state: ModuleState) -> None:
        """The next module."""
        self._put(ADAPTER, name, {part: state.values(part) for part in self._parts
                                  if part != "dense"}, self._spec.rank, self._parts)  # fmt: skip
        if state.side is not None:
            side: Parts = {"up": state.side.up, "down": state.side.down}
            self._put(SIDE, name, side, state.side.rank, ("up", "down"))
        for moment in sorted({m for kept in state.moments.values() for m in kept}):
            values: Parts = {
                part: state.moments.get(part, {}).get(moment, np.zeros_like(state.values(part)))
                for part in self._parts
                if part != "dense"
            }
            self._put(MOMENT + moment, name, values, self._spec.rank, self._parts)

    def write_dense(self, name: str, dense: Dense) -> None:
        """The next dense tensor."""
        values, moments = dense
        self._put(ADAPTER, name, {"dense": values}, self._spec.rank, self._parts)
        for role in self._open:
            if role.startswith(MOMENT):
                kept = moments.get(role.removeprefix(MOMENT), np.zeros_like(values))
                self._put(role, name, {"dense": kept}, self._spec.rank, self._parts)

    def finish(self) -> dict[str, StateFile]:
        """Closes the files; what they are, by role."""
        for stream, writer, _ in self._open.values():
            writer.finish()
            stream.close()
        return {role: file for role, (_, _, file) in self._open.items()}

    def abandon(self) -> None:
        """Closes and removes what was written."""
        for stream, _, file in self._open.values():
            stream.close()
            file.path.unlink(missing_ok=True)

    def _put(self, role: str, name: str, parts: Parts, rank: int, kinds: tuple[Part, ...]) -> None:
        if role not in self._open:
            file = StateFile(self._new_file(role), Payload(rank, MASTER, kinds))
            stream = file.path.open("wb")
            self._open[role] = (stream, PackedWriter(stream, self._spec, file.payload), file)
        self._open[role][1].write(name, parts)


def write_initial(
    spec: AdapterSpec, method: Method, new_file: Callable[[str], Path]
) -> dict[str, StateFile]:
    """Version 0: down as PEFT draws it, up zero, dense tensors as in the base."""
    writer = StateWriter(spec, method.parts(0), new_file)
    for module in spec.modules:
        up = np.zeros((spec.rank, module.out_features), dtype=np.float32)
        down = initial_down(spec.seed, module.name, spec.rank, module.in_features)
        writer.write(module.name, ModuleState(Bundle(up, down, spec.scale(spec.rank))))
    for tensor in spec.dense:
        values = np.zeros((tensor.out_features, tensor.in_features), dtype=np.float32)
        writer.write_dense(tensor.name, (values, {}))
    return writer.finish()
