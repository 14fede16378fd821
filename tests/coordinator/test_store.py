"""What the coordinator promised is still there after a restart, and only once."""

from __future__ import annotations

import hashlib
import sqlite3
from dataclasses import replace

import pytest

from coordinator.store.blobs import BlobStore, UnknownBlobError
from coordinator.store.database import StoreError
from coordinator.store.records import Records
from coordinator.store.rows import UploadRecord
from profiles.device import DeviceProfile
from profiles.model import ModuleShape
from protos.contract import AdapterSpec, Assignment, BlobRef, LocalReport, Payload
from protos.transfer import TransferError, crc32

SPEC = AdapterSpec("run", "base", "", "ab" * 32, 8, 16.0, False, 5, (ModuleShape("q", 4, 3),))
PROFILE = DeviceProfile("board", "cpu", 4, 8 * 10**9, 7 * 10**9, 10**11, "1")
WHOLE = Payload(8, "float32")


def version(*digests, roles=("adapter", "side", "moment.first")):
    """The files of a model, by role."""
    files = zip(roles, digests, strict=False)
    return {role: BlobRef(digest, 10, WHOLE) for role, digest in files}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "coordinator.sqlite"


@pytest.fixture
def records(path):
    opened = Records(path)
    opened.add_run(SPEC, {"run": {"name": "run"}}, version("d0", "s0"), 100.0)
    yield opened
    opened.close()


def make_assignment(device="ash", round_=0, **changes):
    facts = {
        "assignment_id": f"run.{round_}.{device}",
        "run_id": "run",
        "round": round_,
        "device_id": device,
        "method": "fslora",
        "rank": 4,
        "rows": "stratified",
        "sketch_offset": 0,
        "alpha": 16.0,
        "trained": ("up", "down"),
        "personal": (),
        "keeps_basis": True,
        "keeps_state": False,
        "error_feedback": False,
        "fresh": False,
        "precision": "nf4",
        "sequence_tokens": 64,
        "micro_batch": 1,
        "accumulation": 1,
        "checkpointing": False,
        "local_steps": 2,
        "learning_rate": 1e-3,
        "optimizer": "adamw",
        "update": Payload(4, "int8"),
        "evaluation_sequences": 2,
        "held_out_share": 0.1,
        "evaluates_global": False,
        "seed": 1,
        "deadline_s": 60.0,
        "reason": "k=4: because",
        "slice": (BlobRef("c" * 64, 10, Payload(4, "bfloat16")),),
    }
    return Assignment(**(facts | changes))


def open_round(records, *assignments, round_=0, evaluate_only=False):
    planned = [(a, {"rank": a.rank}) for a in assignments]
    records.open_round("run", round_, evaluate_only, 100.0, 160.0, planned)


def done(assignment_id="run.0.ash", **changes):
    return LocalReport(assignment_id, "done", **({"train_examples": 3} | changes))


def everything(records):
    """All that can be read back."""
    return (
        records.all_runs(), records.all_devices(), records.all_rounds("run"),
        records.assignments("run"), records.upload("u"), records.credential("ash"),
        [records.model("run", at_most) for at_most in (0, 1, None)],
    )  # fmt: skip


def test_reopening_keeps_everything(records, path):
    records.put_device("ash", "hash", 500.0, 101.0)
    records.seen("ash", 102.0, PROFILE)
    open_round(records, make_assignment("ash"), make_assignment("birch"))
    records.put_upload(UploadRecord("u", "run.0.ash", "a" * 64, 10))
    records.put_update("run.0.ash", "a" * 64, 10, 103.0)
    records.put_report(done(main_language="python"))
    records.close_round("run", 0, {"on_time": ["ash"], "late": []}, 104.0)
    detail = {"on_time": ["ash"], "x": 1.5}
    records.publish_round("run", 0, version("d1", "s1", "m1"), ["run.0.ash"], detail, 105.0)
    records.alive("run", 106.0)
    records.finish_run("run", 107.0)
    kept = everything(records)
    records.close()
    again = Records(path)
    assert everything(again) == kept
    again.close()
    (run,), (device,), (round_,), (ash, birch) = kept[:4]
    assert (run.spec, run.alive_at, run.finished_at) == (SPEC, 106.0, 107.0)
    assert (device.profile, device.last_seen_at) == (PROFILE, 102.0)
    assert (round_.phase, round_.closed_at, round_.merged_at) == ("merged", 104.0, 105.0)
    assert round_.detail == {"on_time": ["ash"], "x": 1.5}
    assert (ash.state, ash.merged_in, ash.complete) == ("arrived", 0, True)
    assert ash.assignment == make_assignment("ash") and ash.predicted == {"rank": 4}
    assert (birch.state, birch.merged_in, birch.complete) == ("issued", None, False)
    newest = (1, version("d1", "s1", "m1"))
    assert kept[6] == [(0, version("d0", "s0")), newest, newest]


def test_a_second_digest_does_not_replace_the_first(records):
    open_round(records, make_assignment())
    assert records.put_update("run.0.ash", "a" * 64, 10, 101.0) == ("a" * 64, True, False)
    assert records.put_update("run.0.ash", "b" * 64, 20, 102.0) == ("a" * 64, False, False)
    kept = records.assignment("run.0.ash")
    assert (kept.update_digest, kept.update_bytes, kept.received_at) == ("a" * 64, 10, 101.0)


def test_the_first_report_stands(records):
    open_round(records, make_assignment())
    records.put_report(LocalReport("run.0.ash", "out_of_memory", "no room"))
    records.put_report(done())
    kept = records.assignment("run.0.ash")
    assert (kept.state, kept.report.message) == ("failed", "no room")


def test_a_report_alone_completes_only_what_does_not_train(records):
    open_round(records, make_assignment("ash"), make_assignment("birch", local_steps=0))
    records.put_report(done("run.0.ash"))
    records.put_report(done("run.0.birch"))
    assert not records.assignment("run.0.ash").complete
    assert records.assignment("run.0.birch").complete


def test_opening_a_round_again_replaces_the_abandoned_attempt(records):
    open_round(records, make_assignment("ash"), make_assignment("birch"))
    open_round(records, make_assignment("ash", round_=1), round_=1)
    records.put_report(LocalReport("run.0.ash", "crashed"))
    open_round(records, make_assignment("birch", rank=2), make_assignment("cedar"))
    kept = records.assignments("run", 0)
    assert [(a.assignment.device_id, a.assignment.rank, a.state) for a in kept] == [
        ("birch", 2, "issued"), ("cedar", 4, "issued")
    ]  # fmt: skip
    assert len(records.all_rounds("run")) == 2, "the other round was to stay"


def test_a_round_that_cannot_be_opened_leaves_the_one_before(records):
    open_round(records, make_assignment("ash"))
    with pytest.raises(Exception, match="UNIQUE"):
        open_round(records, make_assignment("birch"), make_assignment("birch"))
    assert [a.assignment.device_id for a in records.assignments("run", 0)] == ["ash"]


def test_publishing_again_after_a_crash_changes_nothing(records):
    open_round(records, make_assignment())
    for at in (105.0, 106.0):
        records.publish_round("run", 0, version("d1"), ["run.0.ash"], {"share": {}}, at)
    assert records.model("run", 1) == records.model("run") == (1, version("d1"))


def test_publishing_again_leaves_no_file_of_the_try_before(records):
    """As a branch that is there only if an update is counted that a crash made late."""
    open_round(records, make_assignment())
    records.publish_round("run", 0, version("d1", "s1", "m1"), [], {}, 105.0)
    records.publish_round("run", 0, version("e1"), [], {}, 106.0)
    assert records.model("run") == (1, version("e1"))
    assert records.model_digests("run") == {"d0", "s0", "e1"}


def test_a_model_is_found_by_the_newest_version_at_most_so_old(records):
    """What slices of a round were cut from stays known, also after rounds that merged nothing."""
    for round_ in (0, 1, 2):
        open_round(records, make_assignment(round_=round_), round_=round_)
    records.publish_round("run", 0, version("d1", "s1"), [], {}, 105.0)
    records.publish_round("run", 1, {}, [], {}, 106.0)
    records.publish_round("run", 2, version("d3", "s3"), [], {}, 107.0)
    found = {at_most: records.model("run", at_most) for at_most in (0, 1, 2, 3, 9, None)}
    assert {at: model[0] for at, model in found.items()} == {0: 0, 1: 1, 2: 1, 3: 3, 9: 3, None: 3}
    assert found[2][1] == version("d1", "s1") and found[9][1] == version("d3", "s3")
    assert records.model_digests("run") == {"d0", "s0", "d1", "s1", "d3", "s3"}


def test_a_round_without_updates_keeps_the_model(records):
    open_round(records, make_assignment(local_steps=0), evaluate_only=True)
    records.publish_round("run", 0, {}, [], {}, 105.0)
    assert records.model("run") == (0, version("d0", "s0"))
    assert records.all_rounds("run")[0].phase == "merged"


def test_an_upload_is_remembered_once(records):
    upload = UploadRecord("u", "run.0.ash", "a" * 64, 10)
    records.put_upload(upload)
    records.put_upload(replace(upload, size_bytes=99))
    assert records.upload("u") == upload
    assert records.upload("v") is None


def test_unknown_things_are_none(records):
    assert records.run("other") is None
    assert records.assignment("run.9.ash") is None
    assert records.credential("nobody") is None
    assert records.model("other") is None
    assert records.model_digests("other") == set()


def test_another_schema_is_refused_in_one_sentence(records, path):
    records.close()
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version = 99")
    with pytest.raises(StoreError, match=r"schema 99, .*; this one reads .* a new .* folder"):
        Records(path)


def test_a_file_that_is_no_database_is_refused_in_one_sentence(path):
    path.write_bytes(b"this is not a database, it only has the length of one" * 50)
    with pytest.raises(StoreError, match="cannot be opened: file is not a database"):
        Records(path)


def test_receipts_are_written_through_to_the_disk(records):
    with records.transaction() as db:
        assert db.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
        assert db.exec_driver_sql("PRAGMA synchronous").scalar() == 2  # FULL


# --- blobs --------------------------------------------------------------------------------------


def test_a_blob_is_kept_once_under_its_digest(tmp_path):
    blobs = BlobStore(tmp_path)
    digest = hashlib.sha256(b"bytes").hexdigest()
    assert blobs.put(b"bytes", WHOLE) == BlobRef(digest, 5, WHOLE) == blobs.put(b"bytes", WHOLE)
    assert BlobStore(tmp_path).path(digest).read_bytes() == b"bytes"
    blobs.drop(digest)
    blobs.drop(digest)
    assert not blobs.holds(digest)
    with pytest.raises(UnknownBlobError, match=f"blob {digest[:12]} is not kept here"):
        blobs.path(digest)


def test_a_draft_becomes_the_blob_that_its_bytes_are(tmp_path):
    blobs = BlobStore(tmp_path)
    drafts = [blobs.draft() for _ in range(2)]
    assert len(set(drafts)) == 2
    for draft in drafts:  # of the second, the same bytes are there already
        draft.write_bytes(b"bytes")
        assert blobs.adopt(draft, WHOLE) == blobs.put(b"bytes", WHOLE)
        assert not draft.exists()
    assert blobs.path(hashlib.sha256(b"bytes").hexdigest()).read_bytes() == b"bytes"


def test_what_a_crash_left_half_written_goes_and_nothing_else(tmp_path):
    blobs = BlobStore(tmp_path)
    kept = blobs.put(b"bytes", WHOLE)
    blobs.part("u", 10).write(0, b"0123", crc32(b"0123"))
    blobs.draft().write_bytes(b"half of")
    again = BlobStore(tmp_path)
    again.settle()
    assert not list((tmp_path / "drafts").iterdir())
    assert again.holds(kept.digest) and again.part("u", 10).length == 4


@pytest.mark.parametrize("digest", ["", "../../etc/passwd", "A" * 64, "g" * 64, "a" * 63, "/" * 64])
def test_what_is_no_digest_names_no_file(tmp_path, digest):
    blobs = BlobStore(tmp_path)
    for use in (blobs.path, blobs.holds, blobs.drop):
        with pytest.raises(UnknownBlobError, match="64 hexadecimal digits"):
            use(digest)


def test_an_upload_grows_across_a_restart_and_becomes_a_blob(tmp_path):
    data = b"0123456789"
    digest = hashlib.sha256(data).hexdigest()
    assert BlobStore(tmp_path).part("u", 10).write(0, data[:4], crc32(data[:4])) == 4
    blobs = BlobStore(tmp_path)
    part = blobs.part("u", 10)
    assert part.length == 4 and part is blobs.part("u", 10)
    with pytest.raises(TransferError, match="resume at 4"):
        blobs.finish("u", digest)
    part.write(4, data[4:], crc32(data[4:]))
    assert blobs.finish("u", digest).read_bytes() == data
    assert not list((tmp_path / "uploads").iterdir())
