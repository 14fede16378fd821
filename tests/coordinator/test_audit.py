"""The audit log holds what happened, in order, and shows when it was changed."""

from __future__ import annotations

import sqlite3
import threading

import pytest

from coordinator.audit import Audit, AuditError
from coordinator.store.records import Records


@pytest.fixture
def records(tmp_path):
    found = Records(tmp_path / "coordinator.sqlite")
    yield found
    found.close()


@pytest.fixture
def audit(records):
    times = iter(range(100, 10**6))
    log = Audit(records, lambda: float(next(times)))
    log.record("enrolled", device_id="ash")
    log.record("assigned", run_id="run", round=0, devices=["ash"])
    log.record("merged", run_id="run", round=0, version=1)
    return log


def changed(records, statement):
    """Runs a statement as somebody with the file at hand would."""
    with records.transaction() as db:
        for what in ("update", "delete"):
            db.exec_driver_sql(f"DROP TRIGGER audit_no_{what}")
        db.exec_driver_sql(statement)


def test_rows_are_told_by_run_and_by_time(audit):
    assert [e.event for e in audit.entries()] == ["enrolled", "assigned", "merged"]
    assert [e.event for e in audit.entries("run")] == ["assigned", "merged"]
    assert [e.event for e in audit.entries(since=101.0)] == ["assigned", "merged"]
    assert audit.entries("other") == []
    assert audit.entries("run")[0].facts == {"run_id": "run", "round": 0, "devices": ["ash"]}
    assert [e.number for e in audit.entries()] == [1, 2, 3]


def test_a_whole_log_tells_its_newest_link(audit):
    count, link = audit.check()
    assert count == 3
    assert link == audit.entries()[-1].link


def test_the_database_refuses_to_change_or_remove_rows(audit, tmp_path):
    with sqlite3.connect(tmp_path / "coordinator.sqlite") as db:
        for statement in ("UPDATE audit SET event = 'x'", "DELETE FROM audit"):
            with pytest.raises(sqlite3.IntegrityError, match="append-only"):
                db.execute(statement)
    assert audit.check()[0] == 3


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE audit SET facts = '{}' WHERE number = 2",
        "UPDATE audit SET at = 1 WHERE number = 2",
        "UPDATE audit SET event = 'x' WHERE number = 2",
        "DELETE FROM audit WHERE number = 2",
        "INSERT INTO audit VALUES (0, 1, 'x', NULL, '{}', 'ab')",
    ],
)
def test_a_changed_log_is_found(audit, records, statement):
    changed(records, statement)
    with pytest.raises(AuditError, match=r"changed at row [12]; compare it with a backup"):
        audit.check()


def test_a_row_goes_with_what_it_tells_of(audit, records):
    with pytest.raises(RuntimeError), records.transaction():
        audit.record("merged", run_id="run", round=1)
        raise RuntimeError
    assert audit.check()[0] == 3


def test_many_writers_make_one_chain(audit, tmp_path):
    def write():
        own = Records(tmp_path / "coordinator.sqlite")
        for number in range(10):
            Audit(own).record("enrolled", device_id=f"d{number}")
        own.close()

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert audit.check()[0] == 43
