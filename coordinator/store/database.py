"""Opens the coordinator's database, and brings one of an earlier version up to date.

Revisions are the files of `migrations/versions`, named by number; Alembic carries them out and is
loaded only when there is something to carry out. A new database gets the tables as they are today.
Whoever may still hold an earlier program is told by SQLite's `user_version`, which moves along.
"""

from __future__ import annotations

import contextlib
import fcntl
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import sqlalchemy as sql

from coordinator.store.schema import META
from profiles.errors import ExitCode, SketchfleetError
from protos.transfer import move_durably

MIGRATIONS = Path(__file__).with_name("migrations")
ADOPTED = 3  # the `user_version` that revision 0001 describes: databases had no revision before it
LOCK = "lock"  # beside the database; whoever serves holds it


class StoreError(SketchfleetError):
    """The state folder cannot be used."""


class StoreBusyError(StoreError):
    """A coordinator serves from the state folder; what is asked for waits until it ends."""

    exit_code: ClassVar[ExitCode] = ExitCode.LATER


def revisions() -> list[str]:
    """The known revisions, oldest first."""
    return sorted(path.name[:4] for path in (MIGRATIONS / "versions").glob("[0-9]*.py"))


def open_database(path: Path) -> sql.Engine:
    """The database at `path`, made or migrated as needed. Raises `StoreError`."""
    engine = sql.create_engine(f"sqlite:///{path}")
    sql.event.listen(engine, "connect", _configure)
    try:
        found = _revision(engine, path)
        if found is None:
            _create(engine)
        elif found != revisions()[-1]:
            _migrate(engine, path, found)
    except (sql.exc.SQLAlchemyError, OSError) as error:
        raise StoreError(f"{path} cannot be opened: {error.__cause__ or error}") from error
    return engine


@contextlib.contextmanager
def locked(state: Path) -> Iterator[bool]:
    """Holds a state folder for this process; the lock goes with it. False: another has it."""
    with (state / LOCK).open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def _revision(engine: sql.Engine, path: Path) -> str | None:
    """The revision of a database; None for a new one. Raises `StoreError` on an unknown one."""
    known = revisions()
    with engine.connect() as db:
        version = db.exec_driver_sql("PRAGMA user_version").scalar_one()
        tables = set(sql.inspect(db).get_table_names())
        found = None
        if "alembic_version" in tables:
            query = "SELECT version_num FROM alembic_version"
            found = db.exec_driver_sql(query).scalar_one_or_none()
    if found in known and version <= _user_version(known[-1]):
        return str(found)
    if found is None and version == 0:
        return None  # a crash may have left some tables of a new one
    if found is None and version == ADOPTED:
        return known[0]
    raise StoreError(
        f"{path} was written by a{' later' if found or version > ADOPTED else 'n earlier'} version "
        f"of Sketchfleet (schema {version}, revision {found or 'none'}; this one reads schema "
        f"{ADOPTED} and revisions {known[0]} to {known[-1]}); use that version, or a new [server] "
        "state folder"
    )


def _create(engine: sql.Engine) -> None:
    with engine.begin() as db:
        take_write_lock(db)
        META.create_all(db)
        db.exec_driver_sql(
            "CREATE TABLE IF NOT EXISTS alembic_version (version_num VARCHAR(32) NOT NULL, "
            "CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num))"
        )
        db.exec_driver_sql("DELETE FROM alembic_version")
        _mark(db, revisions()[-1], insert=True)


def _mark(db: sql.Connection, revision: str, *, insert: bool) -> None:
    if insert:
        db.exec_driver_sql("INSERT INTO alembic_version VALUES (?)", (revision,))
    db.exec_driver_sql(f"PRAGMA user_version = {_user_version(revision)}")


def _user_version(revision: str) -> int:
    return ADOPTED + int(revision) - 1


def _migrate(engine: sql.Engine, path: Path, found: str) -> None:
    """Carries the newer revisions out in one transaction, after a copy was put beside it."""
    with locked(path.parent) as alone:
        if not alone:
            raise StoreBusyError(
                f"{path} is of an earlier version and a coordinator serves from it; stop that one "
                "before this version opens it"
            )
        copy_database(path, path.with_name(f"{path.name}.{found}"))
        _upgrade(engine, revisions()[-1], found)
    engine.dispose()  # the connection that heeded no foreign keys


def _upgrade(engine: sql.Engine, to: str, found: str) -> None:
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    with engine.begin() as db:
        db.exec_driver_sql("PRAGMA foreign_keys = OFF")  # tables are rebuilt; no effect later on
        take_write_lock(db)
        config.attributes["connection"] = db
        if not sql.inspect(db).has_table("alembic_version"):
            command.stamp(config, found)
        command.upgrade(config, to)
        _mark(db, to, insert=False)


def take_write_lock(db: sql.Connection) -> None:
    """Makes what is read next still hold when it is written: nobody else writes in between.

    `sqlite3` begins a transaction with its first change only.
    """
    connection: Any = db.connection.dbapi_connection
    if not connection.in_transaction:
        db.exec_driver_sql("BEGIN IMMEDIATE")


def copy_database(path: Path, to: Path) -> None:
    """A consistent copy of a database that may be in use, durably; all of it or nothing."""
    draft = to.with_name(f"{to.name}.tmp")
    draft.unlink(missing_ok=True)
    with (
        contextlib.closing(sqlite3.connect(path)) as source,
        contextlib.closing(sqlite3.connect(draft)) as target,
    ):
        source.backup(target)
    move_durably(draft, to)


def _configure(connection: Any, _: Any) -> None:
    cursor = connection.cursor()
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "busy_timeout=5000", "foreign_keys=ON"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()
