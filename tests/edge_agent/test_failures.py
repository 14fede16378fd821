"""What a disk that fails says, through SQLite too, is told from other faults."""

import errno
import sqlite3

import pytest

from edge_agent.failures import is_of_disk


def test_a_full_database_is_the_disks_fault(tmp_path):
    full = sqlite3.connect(tmp_path / "a")
    full.execute("pragma max_page_count = 1")
    with pytest.raises(sqlite3.Error) as told:
        full.execute("create table t (x)")
    full.close()
    assert is_of_disk(told.value)


def test_a_read_only_database_is_the_disks_fault(tmp_path):
    sqlite3.connect(tmp_path / "a").execute("create table t (x)").connection.close()
    reader = sqlite3.connect(f"file:{tmp_path / 'a'}?mode=ro", uri=True)
    with pytest.raises(sqlite3.Error) as told:
        reader.execute("create table u (x)")
    reader.close()
    assert is_of_disk(told.value)


def test_other_faults_are_not_the_disks():
    with pytest.raises(sqlite3.Error) as told:
        sqlite3.connect(":memory:").execute("no SQL")
    assert not is_of_disk(told.value)
    assert is_of_disk(OSError(errno.ENOSPC, "full"))
    assert not is_of_disk(OSError(errno.EACCES, "denied"))
