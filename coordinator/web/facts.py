"""What every page and metric is made of: one reading of the database, and where the run stands now.

Read on the threads of the web server in short transactions; the coordinator's loop is never waited
for. A reading is used again until it has rested ten times as long as it took, so that any number of
browsers costs the coordinator at most a tenth of one core.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from coordinator.alerts import Alert, find_alerts
from coordinator.ledger import rows_of
from coordinator.ledger_types import LedgerRow
from coordinator.rounds import RunState
from coordinator.store.records import Records
from coordinator.store.rows import AssignmentRecord, DeviceRecord, RoundRecord, RunRecord
from coordinator.store.screenings import QuarantineRecord, Screenings
from profiles.errors import SketchfleetError
from protos.contract import Progress

LEAST_REST_S = 1.0
REST_FACTOR = 10
FORGET_S = 600.0


class UnknownRunError(SketchfleetError):
    """The database does not hold the run."""


@dataclass(frozen=True)
class Live:
    """What only the running coordinator knows."""

    state: RunState
    progress: Mapping[str, Progress]  # of devices at work
    left_out: Mapping[str, str]  # why the last plan gave a device nothing


@dataclass(frozen=True)
class Facts:
    """One run as it stands. live: None where no coordinator serves it."""

    at: float
    run: RunRecord
    rounds: tuple[RoundRecord, ...]
    devices: tuple[DeviceRecord, ...]  # by name
    given: tuple[AssignmentRecord, ...]  # by round and device
    rows: tuple[LedgerRow, ...]  # by round and device
    live: Live | None
    quarantines: tuple[QuarantineRecord, ...] = ()  # of all runs, oldest first

    @property
    def rounds_wanted(self) -> int:
        """Training rounds that the run is to have; an evaluation follows."""
        return int(self.run.config["run"]["rounds"])

    @property
    def rounds_merged(self) -> int:
        """Training rounds that are done."""
        return sum(r.phase == "merged" and not r.evaluate_only for r in self.rounds)

    @cached_property
    def rows_by_device(self) -> Mapping[str, tuple[LedgerRow, ...]]:
        """The ledger of each device, oldest round first."""
        found: dict[str, list[LedgerRow]] = {}
        for row in self.rows:
            found.setdefault(row.device_id, []).append(row)
        return {device: tuple(rows) for device, rows in found.items()}

    @cached_property
    def measured(self) -> Mapping[int, Mapping[str, LedgerRow]]:
        """By round that is closed, the rows of devices that measured the whole adapter as received.

        Not of the open one: the mean of whoever was first would jump about.
        """
        closed = {r.round for r in self.rounds if r.phase != "open"}
        found: dict[int, dict[str, LedgerRow]] = {}
        for row in self.rows:
            if row.loss_received is not None and row.round in closed:
                found.setdefault(row.round, {})[row.device_id] = row
        return found

    @cached_property
    def alerts(self) -> tuple[Alert, ...]:
        """What stands out in the ledger."""
        coverage = {r.round: r.detail["coverage"] for r in self.rounds if r.detail.get("coverage")}
        return find_alerts(self.rows, coverage)


class FactReader:
    """Reads one run; call it from any thread but the coordinator's own."""

    def __init__(
        self,
        records: Records,
        run_id: str,
        live: Callable[[], Live] | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._records, self._run_id, self._live, self._clock = records, run_id, live, clock
        self._reading = threading.Lock()
        self._kept: tuple[float, Facts] | None = None  # good until then, monotonic seconds
        self._settled: dict[int, tuple[AssignmentRecord, ...]] = {}
        self._forget_at = 0.0

    def __call__(self) -> Facts:
        """The newest facts. Raises `UnknownRunError`, and what the database raises."""
        with self._reading:
            started = time.monotonic()
            if self._kept is not None and started < self._kept[0]:
                return self._kept[1]
            facts = self._read()
            took_s = time.monotonic() - started
            good_until = time.monotonic() + max(LEAST_REST_S, REST_FACTOR * took_s)
            self._kept = (good_until, facts)
            return facts

    def check(self) -> None:
        """One short query. Raises what the database raises, and `UnknownRunError`."""
        if self._records.run(self._run_id) is None:
            raise UnknownRunError(f"there is no run {self._run_id!r} in this state folder")

    def _read(self) -> Facts:
        run = self._records.run(self._run_id)
        if run is None:
            known = ", ".join(r.run_id for r in self._records.all_runs()) or "none"
            raise UnknownRunError(f"no run {self._run_id!r} here; runs kept: {known}")
        rounds = tuple(self._records.all_rounds(self._run_id))
        devices = tuple(self._records.all_devices())
        given = self._given(run, rounds)
        contributions = self._records.contributions(self._run_id)
        return Facts(
            at=self._clock(),
            run=run,
            rounds=rounds,
            devices=devices,
            given=given,
            rows=rows_of(run, rounds, devices, given, contributions),
            live=None if self._live is None else self._live(),
            quarantines=tuple(Screenings(self._records).quarantines()),
        )

    def _given(self, run: RunRecord, rounds: Sequence[RoundRecord]) -> tuple[AssignmentRecord, ...]:
        """All assignments; those of rounds that no update can join any more are remembered."""
        if time.monotonic() > self._forget_at:  # a report may come after everything
            self._settled.clear()
            self._forget_at = time.monotonic() + FORGET_S
        joinable = (rounds[-1].round if rounds else 0) - int(run.config["round"]["late_rounds"])
        found: list[AssignmentRecord] = []
        for r in rounds:
            here = self._settled.get(r.round)
            if here is None:
                here = tuple(self._records.assignments(self._run_id, r.round))
                if r.phase == "merged" and r.round < joinable:
                    self._settled[r.round] = here
            found += here
        return tuple(found)
