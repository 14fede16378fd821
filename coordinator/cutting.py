"""What is cut out of the model for one round, each file packed once: slices, adapters, branches.

What a device gets follows from what the method declares, not from its name. Knows the model and the
round; it does not know plans, nor what devices hold (that is handed in).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from coordinator.config import WireSection
from coordinator.downlink import Downlink, cuts_of
from coordinator.lowrank import Bundle, Rows
from coordinator.methods import Method
from coordinator.plan_types import DENSE
from coordinator.state import StateReader
from coordinator.store.blobs import BlobStore
from protos.contract import AdapterSpec, Assignment, BlobRef, Encoding, MirrorStep, Part, Payload
from protos.layout import Parts
from protos.mirror import mirror_parts, sent_whole
from protos.packing import PackedWriter, pack
from protos.sketch import slice_rows


class Cutter:
    """One round being handed out: the model it starts from, and the files already packed for it.

    groups: the parts that travel down, file by file. side_rank: rows of the model's branch.
    """

    def __init__(
        self,
        wire: WireSection,
        spec: AdapterSpec,
        method: Method,
        blobs: BlobStore,
        model: StateReader,
        *,
        groups: Sequence[tuple[Part, ...]],
        side_rank: int,
    ) -> None:
        self._wire, self._spec, self._method, self._blobs = wire, spec, method, blobs
        self._slice, self._whole = sent_whole(wire.slice), sent_whole(wire.global_adapter)
        self._model, self._groups, self._side_rank = model, groups, side_rank
        self._downlink = Downlink(spec, blobs)
        self._files: dict[Any, BlobRef] = {}
        self._steps: dict[Any, MirrorStep] = {}

    def mirror(self, task: Assignment, scale: float, base: BlobRef | None) -> MirrorStep:
        """What brings the device's mirror up to date; made once for devices that hold the same."""
        wire, spec = self._wire, self._spec
        parts = mirror_parts(self._groups)
        cuts = cuts_of(task, spec, parts, wire.slice, wire.global_adapter)
        whose = () if all(c.rows == "all" for c in cuts) else (task.rank, *_which(spec, task))
        key = (base, cuts, whose)
        if key not in self._steps:
            self._steps[key] = self._downlink.step(self._model, task, parts, cuts, base)
        whole = spec.scale(spec.rank)
        factor = whole / scale if self._method.scaling == "common" else 1.0
        return dataclasses.replace(self._steps[key], up_factor=factor)

    def slice(self, task: Assignment, scale: float, density: float) -> tuple[BlobRef, ...]:
        """The rows a device is to train, one file for each group of parts."""

        def cut(name: str) -> Parts:
            rows = slice_rows(self._spec, task, name)
            state = self._method.cut(self._model.module(name), rows, scale)
            parts = [part for part in ("up", "down", "core") if part in wanted]
            return {part: state.values(part) for part in parts}

        refs = []
        for wanted in self._groups:
            if wanted == DENSE:
                refs.append(self._dense(self._slice, density))
                continue
            payload = Payload(task.rank, self._slice, wanted, density)
            key = ("slice", scale, *_which(self._spec, task))
            refs.append(self._packed(key, payload, cut))
        return tuple(refs)

    def whole(self) -> tuple[BlobRef, ...]:
        """The whole adapter, to be evaluated."""

        def whole(name: str) -> Parts:
            state = self._model.module(name)
            return {part: state.values(part) for part in wanted}

        refs = []
        for wanted in self._groups:
            if wanted == DENSE:
                refs.append(self._dense(self._whole))
                continue
            payload = Payload(self._spec.rank, self._whole, wanted)
            scale = self._method.device_scale(self._spec, self._spec.rank)
            # A slice of all rows in this encoding is the same file.
            refs.append(self._packed(("slice", scale), payload, whole))
        return tuple(refs)

    def _dense(self, encoding: Encoding, density: float = 1.0) -> BlobRef:
        """The tensors trained whole: one file for every device, whatever its k."""
        payload = Payload(self._spec.rank, encoding, DENSE, density)
        return self._packed(("dense",), payload, lambda name: {})

    def branch(self, task: Assignment) -> BlobRef | None:
        """The frozen branch that a device trains beside."""
        if not self._method.complement:
            return self.side(self._slice)
        rank = self._spec.rank - task.rank + self._side_rank
        if not rank:
            return None

        def others(name: str) -> Parts:
            rows: Rows = slice_rows(self._spec, task, name)
            branch = self._method.branch(self._model.module(name), rows)
            assert branch is not None
            return _sides(branch)

        payload = Payload(rank, self._slice)
        return self._packed(("branch", task.device_id), payload, others)

    def side(self, encoding: Encoding) -> BlobRef | None:
        """The branch that is part of the global model."""
        if not self._side_rank:
            return None

        def side(name: str) -> Parts:
            branch = self._model.module(name).side
            assert branch is not None
            return _sides(branch)

        return self._packed(("side",), Payload(self._side_rank, encoding), side)

    def _packed(self, key: tuple[Any, ...], payload: Payload, cut: Any) -> BlobRef:
        """The blob of what `cut` gives for each module; packed once for equal keys."""
        key = (*key, payload)
        if key not in self._files:
            self._files[key] = self._pack(payload, cut)
        return self._files[key]

    def _pack(self, payload: Payload, cut: Any) -> BlobRef:
        names = [] if payload.parts == DENSE else [m.name for m in self._spec.modules]
        dense = [t.name for t in self._spec.dense] if "dense" in payload.parts else []
        if payload.density < 1:  # which values travel depends on all of them
            factors = {name: cut(name) for name in names}
            factors |= {name: {"dense": self._model.dense(name)[0]} for name in dense}
            return self._blobs.put(pack(self._spec, payload, factors), payload)
        draft: Path = self._blobs.draft()
        with draft.open("wb") as stream:
            writer = PackedWriter(stream, self._spec, payload)
            for name in names:
                writer.write(name, cut(name))
            for name in dense:
                writer.write(name, {"dense": self._model.dense(name)[0]})
            writer.finish()
        return self._blobs.adopt(draft, payload)


def _which(spec: AdapterSpec, task: Assignment) -> tuple[Any, ...]:
    """Equal for assignments of one round and k that hold the same rows."""
    if task.rows == "prefix" or task.rank == spec.rank:
        return ()
    return (task.device_id,) if task.rows == "independent" else (task.sketch_offset,)


def _sides(branch: Bundle) -> Parts:
    """A branch as it travels: at scale 1."""
    branch = branch.at_scale(1.0)
    return {"up": branch.up, "down": branch.down}
