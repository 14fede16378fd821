"""Backups of a state folder while a coordinator serves from it, and the way back.

A backup is a folder, or the same as one .tar file: the database as of one instant, every blob that
it needs, and whatever else lies in the state folder (keys, tokens). Blobs never change, so in a
folder on the same file system they are hard links and cost nothing; that protects from mistakes,
not from a disk that fails.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sqlite3
import tarfile
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from coordinator.audit import Audit
from coordinator.store.database import LOCK, copy_database
from coordinator.store.records import Records
from profiles.errors import SketchfleetError
from protos.transfer import make_folder, sha256_of, sync_file, sync_folder

DATABASE, BLOBS, MANIFEST = "coordinator.sqlite", "blobs", "manifest.json"
NOT_KEPT = (BLOBS, LOCK, DATABASE, f"{DATABASE}-wal", f"{DATABASE}-shm")
TRIES = 5


class BackupError(SketchfleetError):
    """The backup cannot be made or used."""


@dataclass(frozen=True)
class Manifest:
    """What a backup is: when it was made (Unix seconds), of what, and where its audit log ends."""

    at: float
    rounds: dict[str, int]  # run -> merged rounds
    blobs: int
    size_bytes: int
    audit_rows: int
    audit_link: str


def back_up(state: Path, target: Path) -> Manifest:
    """Makes a backup of a state folder, durably: all of it is there in the end, or nothing.

    Raises `BackupError` when the target is there already or a blob that is needed is damaged.
    """
    if target.exists():
        raise BackupError(f"{target} is there already; choose another name")
    folder = target.parent.resolve()
    if not folder.is_dir():
        raise BackupError(f"{folder} is not there; make it first")
    with tempfile.TemporaryDirectory(dir=folder, prefix=f".{target.name}.") as name:
        draft = Path(name) / "backup"
        manifest = _copy(state, draft)
        (draft / MANIFEST).write_text(json.dumps(asdict(manifest), indent=1) + "\n")
        for path in draft.rglob("*"):
            if path.is_file() and path.stat().st_nlink == 1:
                sync_file(path)
        for path in (draft, *(p for p in draft.rglob("*") if p.is_dir())):
            sync_folder(path)
        if target.suffix == ".tar":
            packed = Path(name) / "packed"
            packed.touch(mode=0o600)
            with tarfile.open(packed, "w") as archive:
                archive.add(draft, arcname=".")
            sync_file(packed)
            draft = packed
        draft.rename(target)
        sync_folder(folder)
    records = Records(state / DATABASE)
    try:
        Audit(records).record("backed up", blobs=manifest.blobs, size_bytes=manifest.size_bytes)
    finally:
        records.close()
    return manifest


def restore(backup: Path, state: Path) -> Manifest:
    """Makes a state folder of a backup, after every byte of it was checked.

    Raises `BackupError` when something is damaged or the state folder is not empty.
    """
    if state.exists() and any(state.iterdir()):
        raise BackupError(f"{state} is not empty; move it away, nothing is overwritten")
    make_folder(state.parent.resolve())
    with _unpacked(backup, state) as folder:
        manifest = _manifest(folder)
        _check_database(folder / DATABASE)
        for path in _blobs(folder):
            if sha256_of(path) != path.name:
                raise BackupError(f"{backup}: blob {path.name[:12]} is damaged; use another backup")
        draft = state.with_name(f".{state.name}.restoring")
        try:
            _restore_into(draft, folder, manifest)
        except BaseException:  # Ctrl-C too: it holds keys
            shutil.rmtree(draft, ignore_errors=True)
            raise
    if state.exists():
        state.rmdir()
    draft.rename(state)
    sync_folder(state.parent)
    return manifest


def _restore_into(draft: Path, folder: Path, manifest: Manifest) -> None:
    """Makes the state folder under another name, durably."""
    shutil.rmtree(draft, ignore_errors=True)  # of a restore that was killed
    shutil.copytree(folder, draft, ignore=shutil.ignore_patterns(MANIFEST))
    for path in draft.rglob("*"):
        sync_file(path) if path.is_file() else sync_folder(path)
    sync_folder(draft)
    records = Records(draft / DATABASE)
    try:
        Audit(records).record("restored", made_at=manifest.at, audit_link=manifest.audit_link)
    finally:
        records.close()


def _copy(state: Path, draft: Path) -> Manifest:
    """Puts the parts of a backup into a new folder.

    Blobs are durable before the database names them, and go when it has not needed them for some
    rounds. So what one instant's database needs was there when its copy began or came since: links
    are made before and after, and if a blob went in between, all of it is done again.
    """
    for _ in range(TRIES):
        draft.mkdir(mode=0o700)  # it holds keys
        for path in state.iterdir():
            if path.name not in NOT_KEPT and ".sqlite." not in path.name:
                _take(path, draft / path.name)
        _link_blobs(state, draft)
        copy_database(state / DATABASE, draft / DATABASE)
        _link_blobs(state, draft)
        records = Records(draft / DATABASE)
        try:
            needed, named = _needed(records), _named(records)
            rounds = {r.run_id: sum(x.phase == "merged" for x in records.all_rounds(r.run_id))
                      for r in records.all_runs()}  # fmt: skip
            rows, link = Audit(records).check()
        finally:
            records.close()
        for rest in draft.glob(f"{DATABASE}-*"):
            rest.unlink()
        kept = _blobs(draft)
        for path in kept:
            if path.name not in named:
                path.unlink()
        here = {path.name for path in kept} & named
        if needed <= here:
            size = sum(path.stat().st_size for path in _blobs(draft))
            return Manifest(time.time(), rounds, len(here), size, rows, link)
        missing = needed - here
        shutil.rmtree(draft)
    raise BackupError(
        f"blob {min(missing)[:12]} is named by {state / DATABASE} and not there; nothing was "
        "backed up"
    )


def _needed(records: Records) -> set[str]:
    """Blobs without which a run does not go on: the models, and all of the newest round."""
    needed: set[str] = set()
    for run in records.all_runs():
        needed |= records.model_digests(run.run_id)
        history = records.all_rounds(run.run_id)
        if history and run.finished_at is None and history[-1].phase != "merged":
            for record in records.assignments(run.run_id, history[-1].round):
                needed |= {blob.digest for blob in record.assignment.blobs}
                if record.update_digest is not None:
                    needed.add(record.update_digest)
    return needed


def _named(records: Records) -> set[str]:
    """Blobs that the database names anywhere."""
    named: set[str] = set()
    for run in records.all_runs():
        named |= records.model_digests(run.run_id)
        for record in records.assignments(run.run_id):
            task = record.assignment
            named |= {blob.digest for blob in task.blobs}
            if task.mirror is not None:
                named.add(task.mirror.result.digest)
            if record.update_digest is not None:
                named.add(record.update_digest)
    return named


def _link_blobs(state: Path, draft: Path) -> None:
    """Has the blobs of a state folder in the draft too: as links, or as copies elsewhere."""
    for path in _blobs(state):
        target = draft / BLOBS / path.parent.name / path.name
        if target.exists():
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # it was not needed any more
            _take(path, target)


def _blobs(folder: Path) -> list[Path]:
    return [p for p in (folder / BLOBS).glob("[0-9a-f][0-9a-f]/*") if len(p.name) == 64]


def _take(path: Path, target: Path) -> None:
    """Links blobs; copies what may change, and what lies on another file system."""
    if path.is_dir():
        shutil.copytree(path, target)
        return
    if len(path.name) == 64:
        with contextlib.suppress(OSError):
            os.link(path, target)
            return
    shutil.copy2(path, target)


@contextlib.contextmanager
def _unpacked(backup: Path, state: Path) -> Iterator[Path]:
    if backup.is_dir():
        yield backup
        return
    with tempfile.TemporaryDirectory(dir=state.parent.resolve(), prefix=".restoring.") as name:
        try:
            with tarfile.open(backup) as archive:
                archive.extractall(name, filter="data")
        except (OSError, tarfile.TarError) as error:
            raise BackupError(f"{backup} cannot be read as a backup: {error}") from error
        yield Path(name)


def _manifest(folder: Path) -> Manifest:
    try:
        plain: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
        return Manifest(**plain)
    except (OSError, ValueError, TypeError) as error:
        raise BackupError(f"{folder} is no backup: its {MANIFEST} cannot be read") from error


def _check_database(path: Path) -> None:
    try:
        with contextlib.closing(sqlite3.connect(path)) as db:
            said = db.execute("PRAGMA integrity_check").fetchone()[0]
    except sqlite3.Error as error:
        said = str(error)
    if said != "ok":
        raise BackupError(f"the backup's database is damaged ({said}); use another backup")
