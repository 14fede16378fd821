"""A backup is whole and of one instant, whatever is written meanwhile; nothing else is restored."""

from __future__ import annotations

import dataclasses
import json
import tarfile
import threading

import pytest

from coordinator import backup as module
from coordinator.audit import Audit
from coordinator.backup import BackupError, back_up, restore
from coordinator.store.blobs import BlobStore
from coordinator.store.records import Records
from profiles.model import ModuleShape
from protos.contract import AdapterSpec, Payload

SPEC = AdapterSpec("run", "base", "", "ab" * 32, 8, 16.0, False, 5, (ModuleShape("q", 4, 3),))
WHOLE = Payload(8, "float32")


@pytest.fixture
def state(tmp_path):
    folder = tmp_path / "state"
    records, blobs = Records(folder / "coordinator.sqlite"), BlobStore(folder / "blobs")
    records.add_run(SPEC, {"run": {"name": "run"}}, {"adapter": blobs.put(b"model", WHOLE)}, 1.0)
    Audit(records).record("enrolled", device_id="ash")
    (folder / "authority").mkdir()
    (folder / "authority" / "key").write_text("secret")
    (folder / "authority" / "key").chmod(0o600)
    (folder / "lock").touch()
    blobs.put(b"of no use", WHOLE)
    yield folder
    records.close()


@pytest.mark.parametrize("name", ["backup", "backup.tar"])
def test_what_was_backed_up_is_restored_and_both_are_told(state, tmp_path, name):
    target, again = tmp_path / name, tmp_path / "again"
    made = back_up(state, target)
    assert (made.blobs, made.size_bytes, made.audit_rows) == (1, 5, 1)
    assert restore(target, again) == made
    records, blobs = Records(again / "coordinator.sqlite"), BlobStore(again / "blobs")
    found = records.model("run")
    assert found is not None and blobs.path(found[1]["adapter"].digest).read_bytes() == b"model"
    assert [e.event for e in Audit(records).entries()] == ["enrolled", "restored"]
    assert Audit(records).check()[0] == 2
    records.close()
    assert (again / "authority" / "key").stat().st_mode & 0o777 == 0o600
    live = Records(state / "coordinator.sqlite")
    assert [e.event for e in Audit(live).entries()] == ["enrolled", "backed up"]
    live.close()


@pytest.mark.parametrize("name", ["backup", "backup.tar"])
def test_a_backup_holds_keys_and_is_for_its_owner_alone(state, tmp_path, name):
    back_up(state, tmp_path / name)
    assert (tmp_path / name).stat().st_mode & 0o077 == 0


def test_nothing_that_is_there_is_overwritten(state, tmp_path):
    back_up(state, tmp_path / "backup")
    with pytest.raises(BackupError, match="is there already; choose another name"):
        back_up(state, tmp_path / "backup")
    with pytest.raises(BackupError, match="is not empty; move it away"):
        restore(tmp_path / "backup", state)


def test_a_backup_made_while_rounds_go_by_is_of_one_instant(state, tmp_path):
    """A writer adds versions, each with its blob, and drops old ones; every backup is whole."""
    stop = threading.Event()

    def write():
        records, blobs = Records(state / "coordinator.sqlite"), BlobStore(state / "blobs")
        for number in range(10_000):
            if stop.is_set():
                break
            files = {"adapter": blobs.put(b"version %d" % number, WHOLE)}
            records.open_round("run", number, False, 1.0, 2.0, [])
            records.publish_round("run", number, files, [], {}, 3.0)
        records.close()

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for number in range(3):
            back_up(state, tmp_path / f"backup-{number}")
    finally:
        stop.set()
        writer.join()
    for number in range(3):
        again = tmp_path / f"again-{number}"
        made = restore(tmp_path / f"backup-{number}", again)
        records, blobs = Records(again / "coordinator.sqlite"), BlobStore(again / "blobs")
        digests = records.model_digests("run")
        assert len(digests) == made.rounds["run"] + 1 and all(map(blobs.is_sound, digests))
        records.close()


def test_a_blob_that_goes_while_it_is_backed_up_is_looked_for_again(state, tmp_path, monkeypatch):
    """Between the links and the database a round ends: one blob goes, another comes."""
    records, blobs = Records(state / "coordinator.sqlite"), BlobStore(state / "blobs")
    real, calls = module.copy_database, []

    def copied(path, to):
        if not calls:
            new = blobs.put(b"newer", WHOLE)
            records.publish_round("run", 0, {"adapter": new}, [], {}, 2.0)
        calls.append(1)
        real(path, to)
        if len(calls) == 1:
            blobs.drop(blobs.put(b"newer", WHOLE).digest)

    monkeypatch.setattr(module, "copy_database", copied)
    with pytest.raises(BackupError, match=r"is named by .* and not there; nothing was backed up"):
        back_up(state, tmp_path / "backup")
    assert len(calls) == module.TRIES and not (tmp_path / "backup").exists()
    records.close()


def test_damage_is_found_before_anything_is_restored(state, tmp_path):
    back_up(state, tmp_path / "backup")
    (blob,) = module._blobs(tmp_path / "backup")
    blob.unlink()
    blob.write_bytes(b"modem")
    with pytest.raises(BackupError, match="is damaged; use another backup"):
        restore(tmp_path / "backup", tmp_path / "again")
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize("spoil", ["manifest", "database", "archive"])
def test_what_is_no_backup_is_refused_in_one_sentence(state, tmp_path, spoil):
    target = tmp_path / ("backup.tar" if spoil == "archive" else "backup")
    back_up(state, target)
    if spoil == "archive":
        target.write_bytes(b"no archive")
    elif spoil == "manifest":
        (target / "manifest.json").unlink()
    else:
        (target / "coordinator.sqlite").write_bytes(b"no database" * 100)
    words = "cannot be read as a backup|is no backup|database is damaged"
    with pytest.raises(BackupError, match=words):
        restore(target, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_names_that_lead_out_of_a_backup_are_refused(state, tmp_path):
    back_up(state, tmp_path / "backup.tar")
    with tarfile.open(tmp_path / "backup.tar", "a") as archive:
        (tmp_path / "evil").write_text("x")
        archive.add(tmp_path / "evil", arcname="../evil-twin")
    with pytest.raises(BackupError, match="cannot be read as a backup"):
        restore(tmp_path / "backup.tar", tmp_path / "again")
    assert not (tmp_path / "evil-twin").exists()


def test_a_manifest_tells_where_the_audit_log_ends(state, tmp_path):
    made = back_up(state, tmp_path / "backup")
    told = json.loads((tmp_path / "backup" / "manifest.json").read_text())
    assert told == dataclasses.asdict(made)
    records = Records(state / "coordinator.sqlite")
    assert Audit(records).entries()[0].link == made.audit_link
    records.close()
