"""backup, restore and audit on the command line."""

from __future__ import annotations

import json
import time

import pytest

from coordinator.audit import Audit
from coordinator.cli import main
from coordinator.store.blobs import BlobStore
from coordinator.store.records import Records


@pytest.fixture
def state(tmp_path):
    folder = tmp_path / "state"
    BlobStore(folder / "blobs")
    records = Records(folder / "coordinator.sqlite")
    Audit(records, lambda: time.time() - 7200).record("device enrolled", device_id="ash")
    Audit(records).record("merged", run_id="run", round=0, updates={"run.0.ash": "ab"})
    records.close()
    return folder


def test_a_backup_is_restored_elsewhere(state, tmp_path, capsys):
    assert main(["backup", str(tmp_path / "b.tar"), "--state", str(state)]) == 0
    assert "audit log of 2 rows" in capsys.readouterr().out
    assert main(["restore", str(tmp_path / "b.tar"), "--state", str(tmp_path / "again")]) == 0
    capsys.readouterr()
    assert main(["audit", "--json", "--state", str(tmp_path / "again")]) == 0
    events = [json.loads(line)["event"] for line in capsys.readouterr().out.splitlines()]
    assert events == ["device enrolled", "merged", "restored"]


@pytest.mark.parametrize(
    ("asked", "events"),
    [
        ([], ["device enrolled", "merged"]),
        (["run"], ["merged"]),
        (["other"], []),
        (["--since", "1h"], ["merged"]),
        (["--since", "2020-01-01"], ["device enrolled", "merged"]),
    ],
)
def test_the_log_is_told_by_run_and_time(state, capsys, asked, events):
    assert main(["audit", *asked, "--state", str(state)]) == 0
    *rows, last = capsys.readouterr().out.splitlines()
    assert [row.split("  ")[1] for row in rows] == events
    assert last.startswith("2 rows, unchanged up to ")


def test_a_changed_log_is_told_after_its_rows(state, capsys):
    records = Records(state / "coordinator.sqlite")
    with records.transaction() as db:
        db.exec_driver_sql("DROP TRIGGER audit_no_update")
        db.exec_driver_sql("UPDATE audit SET facts = '{}' WHERE number = 1")
    records.close()
    assert main(["audit", "--state", str(state)]) == 1
    said = capsys.readouterr()
    assert "merged" in said.out and "was changed at row 1" in said.err


@pytest.mark.parametrize("command", [["backup", "b"], ["audit"]])
def test_what_is_no_state_folder_is_told_in_one_sentence(tmp_path, capsys, command):
    assert main([*command, "--state", str(tmp_path / "nothing")]) == 1
    assert "is not a coordinator's state folder" in capsys.readouterr().err


def test_a_time_that_cannot_be_read_is_told(state, capsys):
    with pytest.raises(SystemExit):
        main(["audit", "--since", "yesterday", "--state", str(state)])
    assert "'yesterday' is no time; write 2026-11-22" in capsys.readouterr().err


def test_a_restore_that_is_interrupted_leaves_no_keys_about(state, tmp_path, capsys, monkeypatch):
    assert main(["backup", str(tmp_path / "b"), "--state", str(state)]) == 0

    def interrupted(source, draft, **_):
        draft.mkdir()
        (draft / "key.pem").write_text("half of a key")
        raise KeyboardInterrupt

    monkeypatch.setattr("coordinator.backup.shutil.copytree", interrupted)
    (tmp_path / "new").mkdir()
    again = tmp_path / "new" / "state"
    assert main(["restore", str(tmp_path / "b"), "--state", str(again)]) == 130
    assert not any((tmp_path / "new").iterdir())
