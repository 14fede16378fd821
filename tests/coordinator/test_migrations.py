"""Databases of earlier versions are brought up to date with all that they hold, or refused."""

from __future__ import annotations

import sqlite3
import subprocess
import sys

import pytest
import sqlalchemy as sql
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

from coordinator.store import database
from coordinator.store.database import (
    ADOPTED,
    MIGRATIONS,
    StoreError,
    _upgrade,
    locked,
    open_database,
    revisions,
)
from coordinator.store.records import Records
from coordinator.store.schema import META

FIRST = revisions()[0]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "coordinator.sqlite"


def at_revision(path, revision):
    """A database as a program of that revision left it, with a row in every table."""
    engine = sql.create_engine(f"sqlite:///{path}")
    _upgrade(engine, revision, "base")
    tables = sql.MetaData()
    with engine.begin() as db:
        tables.reflect(db)
        for table in tables.sorted_tables:
            if table.name != "alembic_version":
                db.execute(table.insert().values({c.name: sample(c) for c in table.columns}))
    engine.dispose()


def sample(column):
    kind = column.type.python_type
    return b"\x01" if kind is bytes else kind(1)


def rows(path):
    """What a database holds: (table, row as a dict) in order."""
    with sqlite3.connect(path) as db:
        db.row_factory = sqlite3.Row
        names = "SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY name"
        tables = [name for (name,) in db.execute(names) if name != "alembic_version"]
        return [(t, dict(r)) for t in tables for r in db.execute(f"SELECT * FROM {t}")]


def schema(path):
    """Every table, column by column, index and trigger, whatever the order they were made in."""
    with sqlite3.connect(path) as db:
        found = db.execute("SELECT type, name, tbl_name FROM sqlite_master").fetchall()
        columns = {
            name: sorted(tuple(c)[1:] for c in db.execute(f"PRAGMA table_info({name})"))
            for kind, name, _ in found
            if kind == "table"
        }
        version = db.execute("SELECT version_num FROM alembic_version").fetchall()
        return sorted(found), columns, version, db.execute("PRAGMA user_version").fetchone()


def test_revisions_are_one_line_in_the_order_of_their_numbers():
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    script = ScriptDirectory.from_config(config)
    assert [r.revision for r in script.walk_revisions()][::-1] == revisions()
    assert revisions() == [f"{n:04}" for n in range(1, len(revisions()) + 1)]


@pytest.mark.parametrize("revision", revisions()[:-1])
def test_each_revision_comes_up_from_the_one_before_with_all_its_rows(path, revision):
    at_revision(path, revision)
    before = rows(path)
    engine = sql.create_engine(f"sqlite:///{path}")
    _upgrade(engine, f"{int(revision) + 1:04}", revision)
    engine.dispose()
    after = rows(path)
    for table, row in before:
        assert any(t == table and row.items() <= r.items() for t, r in after), (table, row)
    assert before


def test_tables_and_revisions_agree(path):
    at_revision(path, revisions()[-1])
    engine = sql.create_engine(f"sqlite:///{path}")
    with engine.connect() as db:
        assert compare_metadata(MigrationContext.configure(db), META) == []
    engine.dispose()


def test_a_new_database_is_what_the_revisions_make(tmp_path, path):
    open_database(path).dispose()
    migrated = tmp_path / "migrated.sqlite"
    at_revision(migrated, revisions()[-1])
    assert schema(path) == schema(migrated)


def test_a_database_from_before_revisions_is_adopted(path):
    at_revision(path, FIRST)
    with sqlite3.connect(path) as db:
        db.execute("DROP TABLE alembic_version")
        db.execute(f"PRAGMA user_version = {ADOPTED}")
    before = rows(path)
    open_database(path).dispose()
    assert schema(path)[2:] == ([(revisions()[-1],)], (ADOPTED + len(revisions()) - 1,))
    assert [r for r in rows(path) if r in before] == before


def test_a_copy_is_kept_of_what_was_there(path):
    at_revision(path, FIRST)
    before = rows(path)
    open_database(path).dispose()
    assert rows(path.with_name(f"coordinator.sqlite.{FIRST}")) == before


def test_a_migration_that_fails_leaves_everything_as_it_was(path, monkeypatch):
    at_revision(path, FIRST)
    before = schema(path), rows(path)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(database, "_mark", full)
    with pytest.raises(StoreError, match="No space left"):
        open_database(path)
    assert (schema(path), rows(path)) == before


@pytest.mark.parametrize(
    ("prepare", "words"),
    [
        ("UPDATE alembic_version SET version_num = '9999'", "by a later version.*revision 9999"),
        ("DROP TABLE alembic_version; PRAGMA user_version = 77", "by a later version.*schema 77"),
        ("DROP TABLE alembic_version; PRAGMA user_version = 2", "by an earlier version.*schema 2"),
    ],
)
def test_what_is_not_known_is_refused_in_one_sentence(path, prepare, words):
    at_revision(path, revisions()[-1])
    with sqlite3.connect(path) as db:
        db.executescript(prepare)
    before = rows(path)
    with pytest.raises(StoreError, match=f"{words}.*use that version, or a new"):
        open_database(path)
    assert rows(path) == before


def test_nobody_migrates_under_a_coordinator_that_serves(path):
    at_revision(path, FIRST)
    with locked(path.parent), pytest.raises(StoreError, match="a coordinator serves from it; stop"):
        open_database(path)


def test_a_new_database_whose_making_was_cut_short_is_made_anew(path):
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA journal_mode=WAL")
    Records(path).close()
    assert schema(path)[2] == [(revisions()[-1],)]


def test_alembic_is_not_loaded_where_there_is_nothing_to_migrate(path):
    code = (
        "import sys; from pathlib import Path; from coordinator.store.records import Records; "
        f"Records(Path({str(path)!r})).close(); Records(Path({str(path)!r})); "
        "assert 'alembic' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
