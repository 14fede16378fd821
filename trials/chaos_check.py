"""What must hold of a run whatever happened to it, read from its database and its audit log."""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from coordinator.audit import Audit
from coordinator.store.records import Records
from profiles.errors import SketchfleetError
from protos.transfer import sha256_of


class BrokenPromiseError(SketchfleetError):
    """Something that was promised does not hold."""


@dataclass(frozen=True)
class Committed:
    """A merged round: the files of the model after it, and the updates that went in."""

    files: dict[str, str]  # role -> digest
    updates: dict[str, str]  # assignment id -> digest


@dataclass
class Promises:
    """What a run has committed so far, as seen from outside; grows, and is held against it."""

    run_id: str
    rounds: dict[int, Committed] = field(default_factory=dict)
    receipts: dict[str, str] = field(default_factory=dict)  # assignment id -> digest
    rotten: set[str] = field(default_factory=set)  # blobs of which a bit was flipped
    read: dict[Path, int] = field(default_factory=dict)  # bytes of logs that were looked at

    def observe(self, state: Path) -> int | None:
        """Takes in what is committed by now; returns the newest round, None before there is one.

        Raises `BrokenPromiseError` when what was committed before is not there any more.
        """
        with _reading(state) as db:
            if db is None:
                return None
            found = committed(db, self.run_id)
            newest = db.execute(
                "SELECT max(round) FROM rounds WHERE run_id = ?", (self.run_id,)
            ).fetchone()[0]
            kept = dict(db.execute(
                "SELECT assignment_id, update_digest FROM assignments WHERE run_id = ?",
                (self.run_id,),
            ))  # fmt: skip
        for number, before in self.rounds.items():
            if found.get(number) != before:
                raise BrokenPromiseError(
                    f"round {number} was committed as {before}, now it is {found.get(number)}"
                )
        for assignment, digest in tuple(self.receipts.items()):
            if kept.get(assignment) != digest and digest in self.rotten:
                del self.receipts[assignment]  # its device is asked again
            elif kept.get(assignment) != digest:
                raise BrokenPromiseError(
                    f"there is a receipt for {digest[:12]} of {assignment}, kept is "
                    f"{(kept.get(assignment) or 'nothing')[:12]}"
                )
        self.rounds = found
        return None if newest is None else int(newest)

    def inspect(self, state: Path) -> None:
        """Looks at everything while nobody serves. Raises `BrokenPromiseError`, `AuditError`."""
        if self.observe(state) is None:
            return
        with _reading(state) as db:
            assert db is not None
            if (said := db.execute("PRAGMA integrity_check").fetchone()[0]) != "ok":
                raise BrokenPromiseError(f"the database is damaged: {said}")
            twice = db.execute(
                "SELECT assignment_id FROM contributions WHERE assignment_id NOT IN "
                "(SELECT assignment_id FROM assignments WHERE merged_in = contributions.merged_in)"
            ).fetchall()
            if twice:
                raise BrokenPromiseError(f"contributions without a merged update: {twice}")
        self._hold_against_audit(state)
        self._hold_against_blobs(state)

    def _hold_against_audit(self, state: Path) -> None:
        records = Records(state / "coordinator.sqlite")
        try:
            log = Audit(records)
            log.check()
            entries = [e.facts for e in log.entries(self.run_id) if e.event == "merged"]
        finally:
            records.close()
        counted = [name for facts in entries for name in facts["updates"]]
        if len(counted) != len(set(counted)):
            raise BrokenPromiseError(f"an update was counted twice: {sorted(counted)}")
        told = {int(f["round"]): Committed(f["files"], f["updates"]) for f in entries}
        trained = {number: c for number, c in self.rounds.items() if c.updates}
        if {number: c for number, c in told.items() if c.updates} != trained:
            raise BrokenPromiseError("the audit log tells of other merges than the database")

    def _hold_against_blobs(self, state: Path) -> None:
        for number, round_ in self.rounds.items():
            for digest in round_.files.values():
                path = state / "blobs" / digest[:2] / digest
                if digest in self.rotten:
                    continue
                if not path.is_file() or sha256_of(path) != digest:
                    raise BrokenPromiseError(f"the model after round {number} is damaged or gone")

    def take_receipts(self, log: Path) -> None:
        """Notes the receipts that an agent tells of in its log."""
        if not log.exists():
            return
        with log.open(errors="replace") as stream:
            stream.seek(self.read.get(log, 0))
            lines = [line for line in stream.read().splitlines(keepends=True) if line[-1] == "\n"]
        self.read[log] = self.read.get(log, 0) + sum(len(line.encode()) for line in lines)
        for line in lines:
            if '"receipt"' in line:
                with contextlib.suppress(ValueError):
                    assignment, _, digest = json.loads(line)["receipt"].rpartition(":")
                    self.receipts[assignment] = digest

    def forget_after(self, state: Path) -> None:
        """After a restore: only what the backup held was promised to outlast it."""
        with _reading(state) as db:
            assert db is not None
            self.rounds = committed(db, self.run_id)
            kept = dict(db.execute("SELECT assignment_id, update_digest FROM assignments"))
        self.receipts = {a: d for a, d in self.receipts.items() if kept.get(a) == d}


def committed(db: sqlite3.Connection, run_id: str) -> dict[int, Committed]:
    """The merged rounds of a run."""
    files: dict[int, dict[str, str]] = {}
    query = "SELECT version, role, blob FROM adapters WHERE run_id = ?"
    for version, role, blob in db.execute(query, (run_id,)):
        files.setdefault(version - 1, {})[role] = json.loads(blob)["digest"]
    updates: dict[int, dict[str, str]] = {}
    query = "SELECT merged_in, assignment_id, update_digest FROM assignments WHERE run_id = ?"
    for merged, assignment, digest in db.execute(query, (run_id,)):
        if merged is not None and digest is not None:
            updates.setdefault(merged, {})[assignment] = digest
    query = "SELECT round FROM rounds WHERE run_id = ? AND phase = 'merged'"
    return {
        number: Committed(files.get(number, {}), updates.get(number, {}))
        for (number,) in db.execute(query, (run_id,))
    }


def committed_rounds(state: Path, run_id: str) -> dict[int, Committed]:
    """The merged rounds of a run, from its state folder."""
    with _reading(state) as db:
        return {} if db is None else committed(db, run_id)


def needed(state: Path, run_id: str) -> list[str]:
    """Digests of blobs that the run needs to go on: of the newest model and the open round."""
    with _reading(state) as db:
        if db is None:
            return []
        query = (
            "SELECT blob FROM adapters WHERE run_id = ?1 AND version = "
            "(SELECT max(version) FROM adapters WHERE run_id = ?1)"
        )
        digests = [json.loads(blob)["digest"] for (blob,) in db.execute(query, (run_id,))]
        query = (
            "SELECT assignment, update_digest FROM assignments WHERE round = "
            "(SELECT max(round) FROM rounds WHERE run_id = ?1 AND phase != 'merged')"
        )
        for text, update in db.execute(query, (run_id,)):
            task = json.loads(text)
            digests += [update] if update else []
            digests += [blob["digest"] for blob in task["slice"]]
            step = task["mirror"]
            digests += [] if step is None else [file["blob"]["digest"] for file in step["files"]]
    return digests


def finished(state: Path, run_id: str) -> bool:
    """Whether a run is finished."""
    with _reading(state) as db:
        query = "SELECT finished_at FROM runs WHERE run_id = ?"
        row: Any = None if db is None else db.execute(query, (run_id,)).fetchone()
    return row is not None and row[0] is not None


@contextlib.contextmanager
def _reading(state: Path) -> Iterator[sqlite3.Connection | None]:
    """The database, in one transaction; None before there is one."""
    path = state / "coordinator.sqlite"
    if not path.exists():
        yield None
        return
    with contextlib.closing(
        sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True, timeout=10)
    ) as db:
        made = db.execute("SELECT 1 FROM sqlite_master WHERE name = 'audit'").fetchone()
        db.execute("BEGIN")
        yield db if made else None
