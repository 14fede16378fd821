"""What screening found of every update, and who stands apart, in the coordinator's database."""

from __future__ import annotations

import json
import secrets
from collections import Counter
from dataclasses import dataclass

import numpy as np
import sqlalchemy as sql
from sqlalchemy.dialects.sqlite import insert

from coordinator.screener import ScreeningMemory
from coordinator.screening_types import Outcome, Quarantine, Screened
from coordinator.store.records import Records
from coordinator.store.schema import quarantines, screening_keys, screenings

ROUNDS_KEPT = 50  # that updates are compared with: older ones are of another model


@dataclass(frozen=True)
class QuarantineRecord:
    """One quarantine, run its course or not. ended_by: "clean rounds", "release"; None: it runs."""

    quarantine: Quarantine
    run_id: str
    at: float
    ended_at: float | None
    ended_by: str | None


class Screenings:
    """The tables, over the database of `records`; what is called within a transaction joins it."""

    def __init__(self, records: Records) -> None:
        self._records = records

    def key(self, run_id: str) -> str:
        """The run's key of signatures, drawn when it is first asked for. Never shown."""
        with self._records.transaction() as db:
            drawn = {"run_id": run_id, "secret": secrets.token_hex(16)}
            db.execute(insert(screening_keys).values(**drawn).on_conflict_do_nothing())
            query = sql.select(screening_keys.c.secret).where(screening_keys.c.run_id == run_id)
            return str(db.execute(query).scalar_one())

    def memory(self, run_id: str, before: int) -> ScreeningMemory:
        """What is known when a round is screened: rounds before it, and quarantines."""
        since = before - ROUNDS_KEPT
        past = [s for s in self.of_run(run_id, since) if s.round < before]
        found = self.quarantines()
        return ScreeningMemory(
            past, self.standing(), dict(Counter(r.quarantine.device_id for r in found))
        )

    def of_run(self, run_id: str, since: int = 0) -> list[Screened]:
        """Every update of a run that was screened, by round and assignment."""
        query = (
            screenings.select()
            .where((screenings.c.run_id == run_id) & (screenings.c.round >= since))
            .order_by(screenings.c.round, screenings.c.assignment_id)
        )
        with self._records.transaction() as db:
            rows = db.execute(query).all()
        return [
            Screened(
                r.assignment_id, r.device_id, r.round, r.accepted, r.shadow,
                tuple(json.loads(r.reasons)), r.size, r.agreement, r.examples,
                np.frombuffer(r.signature, np.float16).astype(np.float32),
            )
            for r in rows
        ]  # fmt: skip

    def standing(self) -> dict[str, Quarantine]:
        """Devices in quarantine now."""
        return {
            r.quarantine.device_id: r.quarantine for r in self.quarantines() if r.ended_at is None
        }

    def quarantines(self) -> list[QuarantineRecord]:
        """All there ever were, oldest first."""
        with self._records.transaction() as db:
            rows = db.execute(quarantines.select().order_by(quarantines.c.number)).all()
        return [
            QuarantineRecord(
                Quarantine(r.device_id, r.round, r.reason, r.needed, r.clean),
                r.run_id, r.at, r.ended_at, r.ended_by,
            )
            for r in rows
        ]  # fmt: skip

    def keep(self, run_id: str, outcome: Outcome, at: float) -> None:
        """Keeps a round. Call it in the transaction that publishes the round: once."""
        with self._records.transaction() as db:
            for s in outcome.screened:
                db.execute(screenings.insert().prefix_with("OR REPLACE").values(
                    assignment_id=s.assignment_id, run_id=run_id, device_id=s.device_id,
                    round=s.round, accepted=s.accepted, shadow=s.shadow,
                    reasons=json.dumps(s.reasons), size=s.size, agreement=s.agreement,
                    examples=s.examples, signature=s.signature.astype(np.float16).tobytes(),
                ))  # fmt: skip
            for held in outcome.ran:
                db.execute(
                    quarantines.update().where(_runs_for(held.device_id)).values(clean=held.clean)
                )
        for device in outcome.served:
            self.end(device, "clean rounds", at)
        for held in outcome.imposed:
            self.impose(run_id, held, at)

    def impose(self, run_id: str, held: Quarantine, at: float) -> bool:
        """Begins a quarantine; False where the device is in one already."""
        with self._records.transaction() as db:
            query = sql.select(quarantines.c.number).where(_runs_for(held.device_id))
            if db.execute(query).first() is not None:
                return False
            db.execute(quarantines.insert().values(
                device_id=held.device_id, run_id=run_id, round=held.round, at=at,
                reason=held.reason, needed=held.needed, clean=held.clean,
            ))  # fmt: skip
            return True

    def end(self, device_id: str, by: str, at: float) -> bool:
        """Ends a quarantine; False where there is none."""
        with self._records.transaction() as db:
            ended = db.execute(
                quarantines.update().where(_runs_for(device_id)).values(ended_at=at, ended_by=by)
            )
            return bool(ended.rowcount)


def _runs_for(device_id: str) -> sql.ColumnElement[bool]:
    return (quarantines.c.device_id == device_id) & quarantines.c.ended_at.is_(None)
