"""The model of a power cut takes what was not synced, and nothing else; the stores survive it."""

from __future__ import annotations

import hashlib
import os

import pytest

from coordinator.store.blobs import BlobStore
from edge_agent.journal import Journal
from protos import faults
from protos.contract import LocalReport, Payload
from protos.transfer import make_folder, move_durably, sync_file, sync_folder, write_durably
from trials.power import baseline, cut_power

WHOLE = Payload(8, "float32")


@pytest.fixture
def state(tmp_path):
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "before").write_bytes(b"was here")
    baseline(tmp_path / "state", tmp_path / "faults")
    faults.arm(tmp_path / "faults")
    yield tmp_path / "state"
    faults.arm(None)


def cut(state):
    faults.arm(None)
    lost = cut_power(state, state.parent / "faults")
    faults.arm(state.parent / "faults")
    return lost


def holds(state):
    return {str(p.relative_to(state)): p.read_bytes() for p in state.rglob("*") if p.is_file()}


def test_bytes_and_names_that_were_not_synced_are_gone(state):
    write_durably(state / "whole", b"written durably")
    (state / "never").write_bytes(b"synced")
    with (state / "whole").open("ab") as stream:
        stream.write(b" and more")
    lost = cut(state)
    assert holds(state) == {"before": b"was here", "whole": b"written durably"}
    assert lost == ["never is gone", "whole is cut to 15 bytes"]


def test_a_rename_without_a_sync_of_its_folder_is_undone(state):
    write_durably(state / "old", b"bytes")
    (state / "old").rename(state / "new")
    cut(state)
    assert holds(state) == {"before": b"was here", "old": b"bytes"}
    (state / "old").rename(state / "new")
    sync_folder(state)
    cut(state)
    assert holds(state) == {"before": b"was here", "new": b"bytes"}


def test_what_was_removed_is_back_unless_its_folder_was_synced(state):
    (state / "before").unlink()
    assert cut(state) == ["before is back"]
    (state / "before").unlink()
    sync_folder(state)
    assert cut(state) == [] and holds(state) == {}


def test_a_file_whose_name_alone_was_synced_is_empty(state):
    (state / "file").write_bytes(b"bytes")
    sync_folder(state)
    cut(state)
    assert holds(state)["file"] == b""
    (state / "file").write_bytes(b"bytes")
    sync_file(state / "file")
    cut(state)
    assert holds(state)["file"] == b"bytes"


def test_a_folder_is_there_with_what_was_made_in_it_durably(state):
    make_folder(state / "a" / "b")
    write_durably(state / "a" / "b" / "file", b"bytes")
    (state / "a" / "c").mkdir()
    write_durably(state / "a" / "c" / "file", b"in a folder that was not synced")
    cut(state)
    assert holds(state) == {"before": b"was here", "a/b/file": b"bytes"}


def test_what_an_earlier_process_did_not_sync_is_lost_too(state):
    (state / "file").write_bytes(b"bytes")
    faults.arm(None)  # a process ends
    faults.arm(state.parent / "faults")
    cut(state)
    assert "file" not in holds(state)


def test_a_blob_outlasts_the_power_from_the_instant_it_is_there(state):
    blobs = BlobStore(state / "blobs")
    draft = blobs.draft()
    draft.write_bytes(b"adopted")
    kept = [blobs.put(b"put", WHOLE), blobs.adopt(draft, WHOLE)]
    data = b"pushed"
    blobs.part("u", len(data)).write(0, data, None)
    pushed = blobs.finish("u", hashlib.sha256(data).hexdigest())
    blobs.draft().write_bytes(b"half")
    cut(state)
    again = BlobStore(state / "blobs")
    digests = [*(blob.digest for blob in kept), pushed.name]
    assert [again.path(d).read_bytes() for d in digests] == [b"put", b"adopted", data]


def test_a_blob_that_a_kill_left_unsynced_is_durable_once_it_is_taken_for_there(state, monkeypatch):
    """Else a second life commits a row for it, and the power goes."""
    blobs = BlobStore(state / "blobs")

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("protos.transfer.sync_folder", killed)
        draft = blobs.draft()
        draft.write_bytes(b"bytes")
        make_folder(blobs._place(hashlib.sha256(b"bytes").hexdigest()).parent)
        move_durably(draft, blobs._place(hashlib.sha256(b"bytes").hexdigest()))
    again = BlobStore(state / "blobs")
    again.settle()
    if again.holds(digest := hashlib.sha256(b"bytes").hexdigest()):
        assert again.put(b"bytes", WHOLE).digest == digest
        cut(state)
        assert BlobStore(state / "blobs").path(digest).read_bytes() == b"bytes"


def test_the_journal_names_nothing_that_a_power_cut_takes(state):
    journal = Journal(state / "agent")
    update = state / "trained"
    update.write_bytes(b"an update")
    journal.add(LocalReport("run.0.ash", "done", train_examples=3), update)
    journal.close()
    cut(state)
    again = Journal(state / "agent")
    again.sweep()
    (entry,) = again.pending()
    assert again.holds(entry)
    os.truncate(again.update_path(entry.digest), 3)
    assert not again.holds(entry)
    again.close()
