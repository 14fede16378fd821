"""What must survive a power cut: finished updates that are not yet accepted, and their reports.

SQLite, fully synchronised; the update file itself lies beside it, named by its digest and on disk
before its row is.
"""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass
from pathlib import Path

from profiles.errors import SketchfleetError
from protos.contract import LocalReport, canonical_json, from_json
from protos.transfer import sha256_of, sync_folder


class JournalError(SketchfleetError):
    """The state folder cannot be used."""


@dataclass(frozen=True)
class Entry:
    """A trained assignment on its way out. `digest` is empty when there is only a report."""

    assignment_id: str
    digest: str
    report: LocalReport
    committed: bool


class Journal:
    """One row per assignment until its report is acknowledged."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            (folder / "updates").mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(folder / "journal.sqlite", isolation_level=None)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            self._db.execute(
                "CREATE TABLE IF NOT EXISTS outbox (assignment_id TEXT PRIMARY KEY, digest TEXT "
                "NOT NULL, report TEXT NOT NULL, committed INTEGER NOT NULL DEFAULT 0)"
            )
        except (OSError, sqlite3.Error) as error:
            raise JournalError(
                f"state folder {folder} cannot be used ({error}); choose another [state] folder"
            ) from error

    def update_path(self, digest: str) -> Path:
        """Where an update lies."""
        return self.folder / "updates" / digest

    def add(self, report: LocalReport, update: Path | None) -> Entry:
        """Takes over a finished round; from here on it is not lost."""
        digest = ""
        if update is not None:
            digest = sha256_of(update)
            update.replace(self.update_path(digest))
            sync_folder(self.folder / "updates")
        self._db.execute(
            "INSERT OR REPLACE INTO outbox VALUES (?, ?, ?, 0)",
            (report.assignment_id, digest, canonical_json(report).decode()),
        )
        return Entry(report.assignment_id, digest, report, False)

    def committed(self, assignment_id: str, report: LocalReport) -> None:
        """The coordinator holds the update; the report (now complete) is still to go."""
        self._db.execute(
            "UPDATE outbox SET committed = 1, report = ? WHERE assignment_id = ?",
            (canonical_json(report).decode(), assignment_id),
        )

    def done(self, entry: Entry) -> None:
        """Everything of this assignment is acknowledged, or will never be wanted."""
        self._db.execute("DELETE FROM outbox WHERE assignment_id = ?", (entry.assignment_id,))
        if entry.digest:
            self.update_path(entry.digest).unlink(missing_ok=True)

    def pending(self) -> list[Entry]:
        """What an earlier life of this agent left to be sent, oldest first."""
        rows = self._db.execute(
            "SELECT assignment_id, digest, report, committed FROM outbox ORDER BY rowid"
        ).fetchall()
        return [Entry(a, d, from_json(LocalReport, r), bool(c)) for a, d, r, c in rows]

    def close(self) -> None:
        """Releases the database file."""
        self._db.close()
