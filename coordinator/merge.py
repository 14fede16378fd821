"""Runs a method over the stored updates of a round, module by module.

Memory is one module times the participants, and a bounded number of files is open, so a fleet may
be larger than memory or the limit on open files. Where a method looks at one update at a time,
every processor merges a module of its own. It knows packed files and assignments; it does not
know who may take part (screening), what weights mean (`weights`), or where results are kept.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coordinator.aggregation_error import ErrorMeter, measure
from coordinator.contribution import ContributionMeter, Given, attribute
from coordinator.ledger_types import Contribution
from coordinator.lowrank import Bundle, ErrorEnergy, Matrix32, Rows
from coordinator.methods import Method, MethodError, ModuleState, ModuleUpdate
from coordinator.methods.base import normalised
from coordinator.robust import MEAN, Robust, RobustRecord, Tally
from coordinator.server_optimizer import ServerOptimizer
from coordinator.state import StateFile, StateReader, StateWriter
from profiles.model import ModuleShape
from protos.codecs import PackingError
from protos.contract import AdapterSpec, Assignment, Part
from protos.layout import Parts
from protos.sketch import initial_down, slice_rows
from protos.unpacking import PackedReader, open_packed, open_update

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

    coverage: (r,) float64, participants that held each global row, averaged over modules.
    errors: aggregation error by module, ||merged - ideal|| / ||ideal||, the ideal being the
    weighted mean of the devices' products in weight space; none where a method has no global
    model. error: over all modules. exact: computed by Gram matrices in every module, not by
    random probes. contributions: by assignment id. attribution_s: what finding them took. robust:
    what the robust rule did, as JSON; None without one.
    """

    files: dict[str, StateFile]
    coverage: NDArray[np.float64]
    errors: dict[str, float]
    error: float | None
    exact: bool
    contributions: dict[str, Contribution]
    attribution_s: float
    robust: dict[str, Any] | None = None


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
    robust: Robust = MEAN

    @property
    def _streams(self) -> bool:
        """Whether updates are looked at one at a time."""
        return self.method.streams and not self.robust.holds_all

    def _readers(self, updates: Sequence[StoredUpdate]) -> _Readers:
        one_by_one = self._streams or (self.method.stacks and not self.robust.holds_all)
        return _Readers(self.spec, updates, apart=not one_by_one, sums=self._streams)

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
        spec, readers = self.spec, self._readers(ordered)
        shares = normalised([update.weight for update in ordered])
        coverage = np.zeros(spec.rank)
        meter, given = ErrorMeter(), ContributionMeter(shares, spec.rank)
        record = RobustRecord(self.robust.rule, [u.assignment.assignment_id for u in ordered])

        def one(module: ModuleShape) -> _Merged:
            sent = readers.module(module.name)
            return self._module(round_, current, ordered, shares, sent, module)

        workers = len(os.sched_getaffinity(0)) if self._streams else 1
        for module, found in zip(spec.modules, _ahead(one, spec.modules, workers), strict=True):
            writer.write(module.name, found.state)
            coverage += found.coverage / len(spec.modules)
            given.add(found.rows, found.given)
            record.add(found.robustly)
            if found.error is not None:
                meter.add(module.name, found.error)
        for tensor in spec.dense:
            delta = np.zeros((tensor.out_features, tensor.in_features))
            if self.robust.rule == "none":
                for i in range(len(ordered)):
                    delta += shares[i] * readers.dense(i, tensor.name)
            else:
                said = [readers.dense(i, tensor.name) for i in range(len(ordered))]
                delta = self.robust.dense(said, shares)
            values, moments = current.dense(tensor.name)
            step, kept = self.optimizer.step(delta, moments)
            for i in range(len(ordered)):
                given.add_dense(i, step, readers.dense(i, tensor.name))
            writer.write_dense(tensor.name, ((values + step).astype(np.float32), kept))
        return MergeResult(
            files=writer.finish(),
            coverage=coverage,
            errors=meter.errors,
            error=meter.overall,
            exact=meter.exact,
            contributions={
                update.assignment.assignment_id: of
                for update, of in zip(ordered, given.contributions(), strict=True)
            },
            attribution_s=given.seconds,
            robust=None if self.robust.rule == "none" else record.plain(),
        )

    def _module(
        self,
        round_: int,
        current: StateReader,
        updates: Sequence[StoredUpdate],
        shares: NDArray[np.float64],
        sent: Sequence[_Delta],
        module: ModuleShape,
    ) -> _Merged:
        """One module of the round."""
        before = current.module(module.name)
        parts, coverage = [], np.zeros(self.spec.rank)
        for update, delta in zip(updates, sent, strict=True):
            parts.append(self._update(module.name, update, delta, round_, before))
            coverage[parts[-1].rows] += 1
        robustly = self.robust.of(before, parts, shares)
        after = self.method.merge_module(before, robustly.updates, round_, self.optimizer)
        error = None
        if self.method.has_global:
            error = measure(self.method, before, after, parts, shares)
        given = attribute(self.method, before, after, robustly.entered, robustly.shares)
        rows = [part.rows for part in parts]
        return _Merged(after, coverage, error, rows, given, robustly.tally)

    def _update(
        self, module: str, update: StoredUpdate, delta: _Delta, round_: int, before: ModuleState
    ) -> ModuleUpdate:
        task = update.assignment
        rows = slice_rows(self.spec, task, module)
        scale = self.method.device_scale(self.spec, task.rank)
        if 0 < update.kept < task.rank:
            rows = rows[: update.kept]
        lift = scale / before.adapter.scale if self.method.scaling == "common" else 1.0
        begin = partial(self._begin, module, update, rows, scale, round_, before)
        return ModuleUpdate(
            update.device_id, rows, begin, delta, update.weight, lift,
            on_time=task.round == round_ and not update.start, sound=True,
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
    """One module after the round, and what is counted of it: coverage (r,)."""

    state: ModuleState
    coverage: NDArray[np.float64]
    error: ErrorEnergy | None
    rows: Sequence[Rows]
    given: Given
    robustly: Tally


@dataclass(eq=False)
class _Slot:
    """Memory for one update's part in a module, and the mark of whose values lie there.

    A mark, since a reference would close a circle, which keeps the memory until it is collected.
    """

    memory: memoryview
    holder: object = None
    parts: Parts = field(default_factory=dict)


class _Delta(Mapping[Part, Matrix32]):
    """What one update says of a module, read when it is first looked at.

    Deltas that share a slot push each other out; one that is looked at again is read again.
    checked: whether values that are not finite are refused here, not where they have been summed.
    """

    def __init__(
        self,
        slot: _Slot,
        reader: Callable[[], PackedReader],
        name: str,
        kinds: Sequence[Part],
        kept: int,
        checked: bool,
    ) -> None:
        self._slot, self._reader, self._name = slot, reader, name
        self._kinds, self._kept, self._checked = kinds, kept, checked
        self._mark = object()

    def __getitem__(self, part: Part) -> Matrix32:
        if self._slot.holder is not self._mark:
            self._read()
        return self._slot.parts[part]

    def __contains__(self, part: object) -> bool:
        return part in self._kinds  # a Mapping's own would read

    def __iter__(self) -> Iterator[Part]:
        return iter(self._kinds)

    def __len__(self) -> int:
        return len(self._kinds)

    def _read(self) -> None:
        slot, reader = self._slot, self._reader()
        slot.holder, slot.parts = None, {}
        enough = len(slot.memory) >= reader.stored_bytes(self._name)
        into = slot.memory if enough else None
        parts = reader.module(self._name, into, checked=self._checked)
        slot.parts = {part: values[: self._kept or None] for part, values in parts.items()}
        slot.holder = self._mark


class _Readers:
    """Updates as open files, so that each header is read once; beyond a limit, one at a time.

    What is read of a module lies where the module before it lay: fresh memory would have to be
    paged in, which takes longer than reading. apart: every update has a place of its own; else
    one takes the place of the other. Every thread has its own places. sums: values that are not
    finite show in what becomes of them.
    """

    def __init__(
        self, spec: AdapterSpec, updates: Sequence[StoredUpdate], *, apart: bool, sums: bool
    ) -> None:
        self._spec, self._updates = spec, updates
        self._digests = [update.assignment.digest for update in updates]
        self._open = [self._reader(i) for i in range(min(len(updates), MOST_OPEN))]
        names = [module.name for module in spec.modules]
        self._sizes = [max(map(reader.stored_bytes, names), default=0) for reader in self._open]
        self._sizes += [0] * (len(updates) - len(self._sizes))
        self._apart, self._sums, self._own = apart, sums, threading.local()

    def module(self, name: str) -> list[_Delta]:
        """What each update says of a module; valid until this thread asks for the next one."""
        if not hasattr(self._own, "slots"):
            self._own.slots = self._places()
        found = []
        for i, update in enumerate(self._updates):
            task = update.assignment
            kinds = [part for part in task.update.parts if part != "dense"]
            kept = update.kept if 0 < update.kept < task.rank else 0
            slot = self._own.slots[i]
            slot.holder, slot.parts = None, {}
            # Of a mean, whatever has any weight shows in the sum, which is looked at.
            checked = not self._sums or not update.weight
            found.append(_Delta(slot, partial(self._at, i), name, kinds, kept, checked))
        return found

    def _places(self) -> list[_Slot]:
        """Memory for the largest module of each update, or of the largest."""
        if not self._apart:
            return [_Slot(np.empty(max(self._sizes, default=0), np.uint8).data)] * len(self._sizes)
        return [_Slot(np.empty(size, np.uint8).data) for size in self._sizes]

    def dense(self, i: int, name: str) -> Matrix32:
        """What the i-th update says of a dense tensor."""
        return self._at(i).module(name)["dense"]

    def _at(self, i: int) -> PackedReader:
        return self._open[i] if i < len(self._open) else self._reader(i)

    def _reader(self, i: int) -> PackedReader:
        update = self._updates[i]
        return open_update(update.path, self._spec, update.assignment, self._digests[i])


def _ahead(
    work: Callable[[ModuleShape], _Merged], modules: Sequence[ModuleShape], workers: int
) -> Iterator[_Merged]:
    """`map` in order by so many threads, each one module ahead of what was asked for."""
    with ThreadPoolExecutor(workers, "merge") as pool:
        due: deque[Future[_Merged]] = deque()
        try:
            for module in modules:
                due.append(pool.submit(work, module))
                if len(due) > workers:
                    yield due.popleft().result()
            while due:
                yield due.popleft().result()
        finally:
            for left in due:
                left.cancel()
