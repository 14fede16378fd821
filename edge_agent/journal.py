"""What must survive a power cut: finished updates not yet accepted, their reports, and homes.

A home is what stays on this device between the rounds of a run: personal factors, optimiser
moments, residuals. SQLite, fully synchronised; updates and homes lie beside it, named by their
digests and on disk before their rows are. The trainer writes these files; what they hold is its
business.
"""

from __future__ import annotations

import contextlib
import logging
import sqlite3
from dataclasses import dataclass
from pathlib import Path

from profiles.errors import SketchfleetError
from protos import faults
from protos.contract import AdapterSpec, ContractError, LocalReport, canonical_json, from_json
from protos.transfer import make_folder, move_durably, sha256_of

log = logging.getLogger("sketchfleet.agent")

DATABASE = "journal.sqlite"
NAMED_IN = {"updates": "outbox", "home": "home"}  # folder of files -> table that names them


class JournalError(SketchfleetError):
    """The state folder cannot be used."""


@dataclass(frozen=True)
class Entry:
    """A trained assignment on its way out. `digest` is empty when there is only a report."""

    assignment_id: str
    digest: str
    report: LocalReport
    committed: bool


@dataclass(frozen=True)
class Home:
    """What this device keeps of one run between its rounds."""

    spec: AdapterSpec
    path: Path


class Journal:
    """One row per assignment until its report is acknowledged, and one home per run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            for name in ("updates", "home"):
                make_folder(folder / name)
            self._db = sqlite3.connect(folder / DATABASE, isolation_level=None)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            self._db.execute(
                "CREATE TABLE IF NOT EXISTS outbox (assignment_id TEXT PRIMARY KEY, digest TEXT "
                "NOT NULL, report TEXT NOT NULL, committed INTEGER NOT NULL DEFAULT 0)"
            )
            self._db.execute(
                "CREATE TABLE IF NOT EXISTS home (run_id TEXT PRIMARY KEY, digest TEXT NOT NULL, "
                "spec TEXT NOT NULL)"
            )
        except (OSError, sqlite3.Error) as error:
            raise JournalError(
                f"state folder {folder} cannot be used ({error}); choose another [state] folder"
            ) from error

    def holds(self, entry: Entry) -> bool:
        """Whether the update of an entry lies here as it was taken over."""
        path = self.update_path(entry.digest)
        return path.is_file() and sha256_of(path) == entry.digest

    def update_path(self, digest: str) -> Path:
        """Where an update lies."""
        return self.folder / "updates" / digest

    def add(
        self,
        report: LocalReport,
        update: Path | None,
        home: tuple[AdapterSpec, Path] | None = None,
    ) -> Entry:
        """Takes over a finished round; from here on it is not lost.

        `home`, the run's new home, takes the place of the old one in the same instant: a round
        that is not in the journal is done again, from the home it began with. None leaves it.
        """
        digest = "" if update is None else self._take(update, "updates")
        kept = "" if home is None else self._take(home[1], "home")
        replaced = None
        faults.point("journal.taken")
        with self._db:  # commits what was begun
            self._db.execute("BEGIN IMMEDIATE")
            self._db.execute(
                "INSERT OR REPLACE INTO outbox VALUES (?, ?, ?, 0)",
                (report.assignment_id, digest, canonical_json(report).decode()),
            )
            if home is not None:
                spec = home[0]
                replaced = self._db.execute(
                    "SELECT digest FROM home WHERE run_id = ?", (spec.run_id,)
                ).fetchone()
                self._db.execute(
                    "INSERT OR REPLACE INTO home VALUES (?, ?, ?)",
                    (spec.run_id, kept, canonical_json(spec).decode()),
                )
        if replaced is not None:
            self._drop("home", replaced[0])
        return Entry(report.assignment_id, digest, report, False)

    def home_path(self, spec: AdapterSpec) -> Path | None:
        """Where the home of this run lies; None, with a warning, when it is of no use."""
        row = self._db.execute(
            "SELECT digest, spec FROM home WHERE run_id = ?", (spec.run_id,)
        ).fetchone()
        if row is None:
            return None
        home = _home(self.folder, *row)
        if home is None or home.spec.digest != spec.digest:
            fault = "damaged or gone" if home is None else "of another run with the same name"
            log.warning("what was kept of run %s is %s; starting anew", spec.run_id, fault)
            return None
        return home.path

    def sweep(self) -> None:
        """Removes files that no row names: what a kill left between the file and its row.

        For the agent as it starts: while a round is taken over, its files are without a row.
        """
        for folder, table in NAMED_IN.items():
            rows = self._db.execute(f"SELECT digest FROM {table}")  # noqa: S608 - one of ours
            named = {digest for (digest,) in rows}
            for path in (self.folder / folder).iterdir():
                if path.name not in named:
                    path.unlink()

    def _take(self, file: Path, folder: str) -> str:
        """Moves a file to where it is named by its digest, all on disk; returns the digest."""
        digest = sha256_of(file)
        move_durably(file, self.folder / folder / digest)
        return digest

    def _drop(self, folder: str, digest: str) -> None:
        """Removes a file unless a row names it: equal bytes are one file."""
        named = f"SELECT 1 FROM {NAMED_IN[folder]} WHERE digest = ?"  # noqa: S608 - one of ours
        if self._db.execute(named, (digest,)).fetchone() is None:
            (self.folder / folder / digest).unlink(missing_ok=True)

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
            self._drop("updates", entry.digest)

    def pending(self) -> list[Entry]:
        """What an earlier life of this agent left to be sent, oldest first."""
        rows = self._db.execute(
            "SELECT assignment_id, digest, report, committed FROM outbox ORDER BY rowid"
        ).fetchall()
        return [Entry(a, d, from_json(LocalReport, r), bool(c)) for a, d, r, c in rows]

    def close(self) -> None:
        """Releases the database file."""
        self._db.close()


def kept_homes(folder: Path) -> dict[str, Home | None]:
    """run_id -> home, of all runs that left one in a state folder; None: damaged or gone.

    Only reads: an agent may be at work there. Raises `JournalError`.
    """
    if not (folder / DATABASE).is_file():
        return {}
    try:
        with contextlib.closing(
            sqlite3.connect(f"{(folder / DATABASE).resolve().as_uri()}?mode=ro", uri=True)
        ) as db:
            known = db.execute("SELECT 1 FROM sqlite_master WHERE name = 'home'").fetchone()
            rows = db.execute("SELECT run_id, digest, spec FROM home").fetchall() if known else []
    except sqlite3.Error as error:
        raise JournalError(f"{folder / DATABASE} cannot be read ({error})") from error
    return {run_id: _home(folder, digest, spec) for run_id, digest, spec in sorted(rows)}


def _home(folder: Path, digest: str, spec: str) -> Home | None:
    path = folder / "home" / digest
    try:
        whole = sha256_of(path) == digest
        return Home(from_json(AdapterSpec, spec), path) if whole else None
    except (OSError, ContractError):  # the spec may be an earlier version's
        return None
