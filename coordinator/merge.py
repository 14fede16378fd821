"""Runs a method over the stored updates of a round, module by module.

Memory is one module times the participants, and a bounded number of files is open, so a fleet may
be larger than memory or the limit on open files. It knows packed files and assignments; it does not
know who may take part (screening), what weights mean (`weights`), or where results are kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from coordinator.aggregation_error import ErrorMeter, measure
from coordinator.lowrank import Bundle, ErrorEnergy, Rows
from coordinator.methods import Method, MethodError, ModuleState, ModuleUpdate
from coordinator.methods.base import normalised
from coordinator.server_optimizer import ServerOptimizer
from coordinator.state import StateFile, StateReader, StateWriter
from profiles.model import ModuleShape
from protos.codecs import PackingError
from protos.contract import AdapterSpec, Assignment
from protos.layout import Parts
from protos.sketch import initial_down, slice_rows
from protos.unpacking import PackedReader, open_packed

MOST_OPEN = 256  # updates held open at once; a process may have a thousand files


@dataclass(frozen=True)
class StoredUpdate:
    """A packed update on disk, the assignment it answers, and the weight it enters with.

    kept: the rows left after the device pruned itself, 0 for all. start: the files that the device
    began with, where they are not all values of their rows (FLASC's sparse slices).
    """

    device_id: str
    assignment: Assignment
    path: Path
    weight: float
    kept: int = 0
    start: tuple[StateFile, ...] = ()


@dataclass(frozen=True, eq=False)
class MergeResult:
    """The model after a round, and what each device gave to it.

    norms: Frobenius norm of a device's weighted deltas over everything it sent, by device id.
    share: its part in the sum of norms; equal parts when nobody moved anything. Sums to 1.
    coverage: (r,) float64, participants that held each global row, averaged over modules.
    errors: aggregation error by module, ||merged - ideal|| / ||ideal||, the ideal being the
    weighted mean of the devices' products in weight space; none where a method has no global
    model. error: over all modules. exact: computed by Gram matrices in every module, not by
    random probes.
    """

    files: dict[str, StateFile]
    norms: dict[str, float]
    share: dict[str, float]
    coverage: NDArray[np.float64]
    errors: dict[str, float]
    error: float | None
    exact: bool


@dataclass(frozen=True)
class Merger:
    """What a merge needs besides the updates: the rule, and the models they started from.

    start: the model that slices of a round were cut from. A late update's slice was cut from an
    older one: methods that move rows add its changes to today's, those that average products take
    the device's product as it was.
    """

    spec: AdapterSpec
    method: Method
    optimizer: ServerOptimizer
    start: Callable[[int], StateReader]
    new_file: Callable[[str], Path]

    def merge(
        self, round_: int, version: int, current: StateReader, updates: Sequence[StoredUpdate]
    ) -> MergeResult:
        """Merges stored updates into the model; the same bits whatever the order given.

        version: of the model that comes out. Raises `PackingError`, `SketchError`, `MethodError`,
        `OSError`; then nothing is left behind.
        """
        writer = StateWriter(self.spec, self.method.parts(version), self.new_file)
        try:
            return self._merge(round_, current, updates, writer)
        except BaseException:
            writer.abandon()
            raise

    def merge_sound(
        self, round_: int, version: int, current: StateReader, updates: Sequence[StoredUpdate]
    ) -> tuple[MergeResult | None, dict[str, str]]:
        """`merge` of what can be merged, and why the rest was left out, by assignment id.

        One update that no merge survives must not stop the run; the result is None if none is
        sound.
        """
        try:
            return self.merge(round_, version, current, updates), {}
        except (PackingError, MethodError) as error:
            whole = error
        dropped: dict[str, str] = {}
        for update in updates:
            try:
                alone = self.merge(round_, version, current, [replace(update, weight=1.0)])
            except (PackingError, MethodError) as error:
                dropped[update.assignment.assignment_id] = str(error)
            else:
                for file in alone.files.values():
                    file.path.unlink()
        if not dropped:  # each alone is sound, together they are not
            raise whole
        sound = [u for u in updates if u.assignment.assignment_id not in dropped]
        if not any(update.weight for update in sound):  # all weight was with what was dropped
            sound = [replace(update, weight=1.0) for update in sound]
        merged = self.merge(round_, version, current, sound) if sound else None
        return merged, dropped

    def _merge(
        self,
        round_: int,
        current: StateReader,
        updates: Sequence[StoredUpdate],
        writer: StateWriter,
    ) -> MergeResult:
        ordered = sorted(
            updates, key=lambda u: (u.device_id, u.assignment.round, u.assignment.assignment_id)
        )
        spec, readers = self.spec, _Readers(self.spec, ordered)
        shares = normalised([update.weight for update in ordered])
        energies = np.zeros(len(ordered))
        coverage = np.zeros(spec.rank)
        meter = ErrorMeter()
        for module in spec.modules:
            sent = readers.module(module.name)
            found = self._module(round_, current, ordered, shares, sent, module)
            writer.write(module.name, found.state)
            energies += np.square(shares) * found.energies
            coverage += found.coverage / len(spec.modules)
            if found.error is not None:
                meter.add(module.name, found.error)
        for tensor in spec.dense:
            delta = np.zeros((tensor.out_features, tensor.in_features))
            for i in range(len(ordered)):
                parts, energy = readers.dense(i, tensor.name)
                energies[i] += shares[i] ** 2 * energy
                delta += shares[i] * parts["dense"]
            values, moments = current.dense(tensor.name)
            step, kept = self.optimizer.step(delta, moments)
            writer.write_dense(tensor.name, ((values + step).astype(np.float32), kept))
        norms = _by_device(ordered, energies)
        return MergeResult(
            files=writer.finish(),
            norms=norms,
            share=_share(norms),
            coverage=coverage,
            errors=meter.errors,
            error=meter.overall,
            exact=meter.exact,
        )

    def _module(
        self,
        round_: int,
        current: StateReader,
        updates: Sequence[StoredUpdate],
        shares: NDArray[np.float64],
        sent: Sequence[tuple[Parts, float]],
        module: ModuleShape,
    ) -> _Merged:
        """One module of the round."""
        before = current.module(module.name)
        parts, energies = [], np.zeros(len(updates))
        coverage = np.zeros(self.spec.rank)
        for i, update in enumerate(updates):
            delta, energies[i] = sent[i]
            parts.append(self._read(module.name, update, delta, round_, before))
            coverage[parts[-1].rows] += 1
        after = self.method.merge_module(before, parts, round_, self.optimizer)
        error = None
        if self.method.has_global:
            error = measure(self.method, before, after, parts, shares)
        return _Merged(after, energies, coverage, error)

    def _read(
        self, module: str, update: StoredUpdate, delta: Parts, round_: int, before: ModuleState
    ) -> ModuleUpdate:
        task = update.assignment
        rows = slice_rows(self.spec, task, module)
        scale = self.method.device_scale(self.spec, task.rank)
        if 0 < update.kept < task.rank:
            rows = rows[: update.kept]
            delta = {part: values[: update.kept] for part, values in delta.items()}
        lift = scale / before.adapter.scale if self.method.scaling == "common" else 1.0
        begin = partial(self._begin, module, update, rows, scale, round_, before)
        return ModuleUpdate(
            update.device_id, rows, begin, delta, update.weight, lift,
            on_time=task.round == round_ and not update.start, finite=True,
        )  # fmt: skip

    def _begin(
        self,
        module: str,
        update: StoredUpdate,
        rows: Rows,
        scale: float,
        round_: int,
        before: ModuleState,
    ) -> ModuleState:
        """The slice as it was handed out."""
        task = update.assignment
        m, n = before.adapter.up.shape[1], before.adapter.down.shape[1]
        if update.start:
            held: Parts = {}
            for file in update.start:
                if "dense" not in file.payload.parts:
                    held |= open_packed(file.path, self.spec, file.payload).module(module)
            return ModuleState(Bundle(held["up"], held["down"], scale))
        if self.method.fresh:
            down = initial_down(
                self.spec.seed, module, task.rank, n, round_=task.round, device_id=task.device_id
            )
            return ModuleState(Bundle(np.zeros((len(rows), m), np.float32), down[rows], scale))
        whole = before if task.round == round_ else self.start(task.round).module(module)
        return self.method.cut(whole, rows, scale)


@dataclass(frozen=True)
class _Merged:
    """One module after the round, and what is counted of it: energies (U,), coverage (r,)."""

    state: ModuleState
    energies: NDArray[np.float64]
    coverage: NDArray[np.float64]
    error: ErrorEnergy | None


class _Readers:
    """Updates as open files, so that each header is read once; beyond a limit, one at a time.

    What is read of a module lies where the module before it lay: fresh memory would have to be
    paged in, which takes longer than reading.
    """

    def __init__(self, spec: AdapterSpec, updates: Sequence[StoredUpdate]) -> None:
        self._spec, self._updates = spec, updates
        self._digests = [update.assignment.digest for update in updates]
        self._open = [self._reader(i) for i in range(min(len(updates), MOST_OPEN))]
        sizes = (sum(r.stored_bytes(module.name) for r in self._open) for module in spec.modules)
        self._memory = np.empty(max(sizes, default=0), np.uint8).data

    def module(self, name: str) -> list[tuple[Parts, float]]:
        """What each update says of a module, and its sum of squares; valid until the next one."""
        found, at = [], 0
        for i in range(len(self._updates)):
            reader, into = self._at(i), None
            if i < len(self._open):
                stop = at + reader.stored_bytes(name)
                into, at = self._memory[at:stop], stop
            found.append(reader.measured(name, into))
        return found

    def dense(self, i: int, name: str) -> tuple[Parts, float]:
        """What the i-th update says of a dense tensor, and its sum of squares."""
        return self._at(i).measured(name)

    def _at(self, i: int) -> PackedReader:
        return self._open[i] if i < len(self._open) else self._reader(i)

    def _reader(self, i: int) -> PackedReader:
        update = self._updates[i]
        return open_packed(
            update.path, self._spec, update.assignment.update, assignment_digest=self._digests[i]
        )


def _by_device(updates: Sequence[StoredUpdate], energies: NDArray[np.float64]) -> dict[str, float]:
    """A device with a late and a fresh update in one round counts once."""
    totals: dict[str, float] = {}
    for update, energy in zip(updates, energies, strict=True):
        totals[update.device_id] = totals.get(update.device_id, 0.0) + float(energy)
    return {device: math.sqrt(total) for device, total in totals.items()}


def _share(norms: Mapping[str, float]) -> dict[str, float]:
    total = sum(norms.values())
    if total == 0:
        return dict.fromkeys(norms, 1 / len(norms))
    return {device: value / total for device, value in norms.items()}
