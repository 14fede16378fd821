"""What was done to whom and when: enrolments, assignments, merges, rejections, backups.

An append-only table, each row linked to the one before by a SHA-256: a row that was changed, left
out or put in shows. What the chain cannot show is an end that was cut off by somebody who can write
to the database; `check` returns the newest link, which is worth keeping elsewhere. A row is
committed with what it tells of when `record` is called within `Records.transaction`, else by itself
before `record` returns. Facts are names, numbers and digests: no secret, no code, no prompt.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sql

from coordinator.store.database import take_write_lock
from coordinator.store.records import Records
from coordinator.store.schema import audit
from profiles.errors import SketchfleetError
from protos import faults

BEGINNING = "0" * 64  # what the first row is linked to


class AuditError(SketchfleetError):
    """The log was tampered with, or is damaged."""


@dataclass(frozen=True)
class Entry:
    """One row. `link`: SHA-256, hex, of the row before's link and of this row."""

    number: int
    at: float
    event: str
    facts: dict[str, Any]
    link: str


class Audit:
    """Writes and reads the log of one database."""

    def __init__(self, records: Records, clock: Callable[[], float] = faults.now) -> None:
        self._records, self._clock = records, clock

    def record(self, event: str, **facts: Any) -> None:
        """Adds a row. `run_id` among the facts makes it one of a run's. Facts must be JSON."""
        text, at = json.dumps(facts, sort_keys=True, separators=(",", ":")), self._clock()
        with self._records.transaction() as db:
            take_write_lock(db)
            newest = sql.select(audit.c.number, audit.c.link).order_by(audit.c.number.desc())
            number, before = db.execute(newest.limit(1)).one_or_none() or (0, BEGINNING)
            db.execute(audit.insert().values(
                number=number + 1, at=at, event=event, run_id=facts.get("run_id"), facts=text,
                link=_link(before, number + 1, at, event, text),
            ))  # fmt: skip

    def entries(self, run_id: str | None = None, since: float = 0.0) -> list[Entry]:
        """Rows of a run, or of all, from a time (Unix seconds) on, oldest first."""
        query = audit.select().where(audit.c.at >= since).order_by(audit.c.number)
        if run_id is not None:
            query = query.where(audit.c.run_id == run_id)
        with self._records.transaction() as db:
            rows = db.execute(query).all()
        return [Entry(r.number, r.at, r.event, json.loads(r.facts), r.link) for r in rows]

    def check(self) -> tuple[int, str]:
        """(rows, newest link) of a whole log. Raises `AuditError`."""
        before, number = BEGINNING, 0
        with self._records.transaction() as db:
            for row in db.execute(audit.select().order_by(audit.c.number)):
                number += 1
                link = _link(before, number, row.at, row.event, row.facts)
                if (row.number, row.link) != (number, link):
                    raise AuditError(
                        f"the audit log was changed at row {number}; compare it with a backup"
                    )
                before = link
        return number, before


def _link(before: str, number: int, at: float, event: str, facts: str) -> str:
    row = json.dumps([before, number, at, event, facts])
    return hashlib.sha256(row.encode()).hexdigest()
