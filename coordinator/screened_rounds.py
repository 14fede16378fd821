"""Screening of a served run: the engine's updates through the rules, and what must last kept.

Connects `screener` with the database, the audit log and the ordinary log; decides nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from coordinator.audit import Audit
from coordinator.config import RunConfig
from coordinator.intake import check_update
from coordinator.methods import Method
from coordinator.screener import Delivered, Screener
from coordinator.screening_types import Outcome, Quarantine
from coordinator.store.blobs import BlobStore
from coordinator.store.records import Records
from coordinator.store.rows import AssignmentRecord
from coordinator.store.screenings import Screenings
from protos.codecs import PackingError
from protos.contract import AdapterSpec, Assignment

log = logging.getLogger("sketchfleet.coordinator")


class ScreenedRounds:
    """One run's screening. Where it is off, every method says that nothing was found."""

    def __init__(
        self,
        config: RunConfig,
        spec: AdapterSpec,
        method: Method,
        records: Records,
        blobs: BlobStore,
        clock: Callable[[], float],
    ) -> None:
        self._on, self._run_id = config.screening.enabled, spec.run_id
        self._spec, self._blobs, self._clock = spec, blobs, clock
        self._store, self._audit = Screenings(records), Audit(records)
        self._method, self._config = method, config

    def screen(self, round_: int, taken: Sequence[AssignmentRecord]) -> Outcome | None:
        """Judges what a closed round holds; the same again after a crash. Raises `OSError`."""
        if not self._on or not taken:
            return None
        screener = Screener(
            self._spec, self._method, self._config.training.optimizer,
            self._config.screening.clean_rounds, self._store.key(self._run_id),
        )  # fmt: skip
        memory = self._store.memory(self._run_id, round_)
        delivered = [self._delivered(record) for record in taken]
        try:
            return screener.screen(round_, delivered, memory)
        except PackingError:  # a file was damaged since it arrived: the merge says which and why
            whole = [d for d in delivered if self._is_whole(d)]
            return screener.screen(round_, whole, memory)

    def keep(self, outcome: Outcome | None) -> None:
        """Keeps what was found, in the transaction that publishes the round."""
        if outcome is None:
            return
        self._store.keep(self._run_id, outcome, self._clock())
        for found in outcome.screened:
            if found.reasons:
                self._audit.record(
                    "screened out", run_id=self._run_id, round=found.round,
                    assignment=found.assignment_id, device=found.device_id,
                    reasons=list(found.reasons),
                )  # fmt: skip
        for held in outcome.imposed:
            self._tell(held)
        for device in outcome.served:
            self._audit.record(
                "quarantine ended", run_id=self._run_id, device=device, by="clean rounds"
            )
            log.info("back from quarantine", extra={"device_id": device})

    def second_update(self, assignment: Assignment, first: str, second: str) -> None:
        """Notes that a device brought another update for an assignment it had answered."""
        held = Quarantine(
            assignment.device_id, assignment.round,
            f"it brought two different updates for round {assignment.round}",
            self._config.screening.clean_rounds,
        )  # fmt: skip
        if self._on and self._store.impose(self._run_id, held, self._clock()):
            self._audit.record(
                "second update", run_id=self._run_id, assignment=assignment.assignment_id,
                device=assignment.device_id, first=first, second=second,
            )  # fmt: skip
            self._tell(held)

    def told(self, device_id: str) -> str:
        """What a device in quarantine is to know; "" for others."""
        held = self._store.standing().get(device_id) if self._on else None
        return "" if held is None else held.told

    def _tell(self, held: Quarantine) -> None:
        self._audit.record(
            "quarantined", run_id=self._run_id, device=held.device_id, round=held.round,
            reason=held.reason,
        )  # fmt: skip
        log.warning("quarantined: %s", held.reason, extra={"device_id": held.device_id})

    def _delivered(self, record: AssignmentRecord) -> Delivered:
        assert record.update_digest is not None and record.report is not None
        task = record.assignment
        train_s = float(record.predicted.get("predicted", {}).get("train_s", 0.0))
        return Delivered(
            task, self._blobs.path(record.update_digest), record.report,
            train_s / max(1, task.local_steps),
        )  # fmt: skip

    def _is_whole(self, delivered: Delivered) -> bool:
        try:
            check_update(delivered.path, self._spec, delivered.assignment)
        except PackingError:
            return False
        return True


def facts_of(outcome: Outcome | None) -> dict[str, Any]:
    """What the round's record says of its screening, as JSON."""
    if outcome is None:
        return {}
    return {
        "screening": {
            s.assignment_id: {"size": s.size, "agreement": s.agreement, "shadow": s.shadow}
            for s in outcome.screened
        }
    }


def kept_out(outcome: Outcome | None) -> dict[str, str]:
    """Why updates are not merged, by assignment id."""
    if outcome is None:
        return {}
    return {
        s.assignment_id: "; ".join(s.reasons) or "its device is in quarantine"
        for s in outcome.screened
        if not s.merged
    }
