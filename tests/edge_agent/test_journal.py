"""What a device has finished is sent in the end, whatever instant it was killed at."""

from __future__ import annotations

import dataclasses
import hashlib

import pytest

from edge_agent.journal import Entry, Journal, JournalError
from protos.contract import LocalReport

DATA = b"an update"
DIGEST = hashlib.sha256(DATA).hexdigest()


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "state"


@pytest.fixture
def journal(folder):
    opened = Journal(folder)
    yield opened
    opened.close()


def make_report(assignment_id="run.0.ash", **changes):
    return LocalReport(assignment_id, "done", **({"train_examples": 3} | changes))


def trained(folder, name="trained", data=DATA):
    """An update as the trainer leaves it."""
    path = folder / name
    path.write_bytes(data)
    return path


def after_a_kill(folder):
    """What the next life of the agent finds."""
    again = Journal(folder)
    try:
        return again.pending()
    finally:
        again.close()


def test_a_finished_round_survives_a_kill(journal, folder):
    update = trained(folder)
    entry = journal.add(make_report(), update)
    assert entry == Entry("run.0.ash", DIGEST, make_report(), False)
    assert not update.exists() and journal.update_path(DIGEST).read_bytes() == DATA
    assert after_a_kill(folder) == [entry]


def test_an_accepted_update_is_not_pushed_again_but_its_report_is_still_owed(journal, folder):
    entry = journal.add(make_report(), trained(folder))
    complete = make_report(push_s=1.5, pushed_bytes=9)
    journal.committed("run.0.ash", complete)
    assert after_a_kill(folder) == [dataclasses.replace(entry, report=complete, committed=True)]


def test_what_is_acknowledged_leaves_nothing_behind(journal, folder):
    journal.done(journal.add(make_report(), trained(folder)))
    assert after_a_kill(folder) == []
    assert not list((folder / "updates").iterdir())
    journal.done(Entry("run.0.ash", DIGEST, make_report(), True))  # twice does no harm


def test_a_round_without_an_update_has_only_a_report(journal, folder):
    entry = journal.add(LocalReport("run.0.ash", "out_of_memory", "no room"), None)
    assert entry.digest == "" and after_a_kill(folder) == [entry]
    journal.done(entry)
    assert (folder / "updates").is_dir(), "the folder of updates is no update"


def test_several_rounds_are_kept_oldest_first(journal, folder):
    for number in (2, 0, 1):
        journal.add(make_report(f"run.{number}.ash"), trained(folder, data=b"%d" % number))
    assert [e.assignment_id for e in after_a_kill(folder)] == ["run.2.ash", "run.0.ash",
                                                               "run.1.ash"]  # fmt: skip


def test_the_same_assignment_trained_again_is_sent_once(journal, folder):
    journal.add(make_report(), trained(folder))
    newer = journal.add(make_report(train_examples=4), trained(folder, data=b"other"))
    assert after_a_kill(folder) == [newer]


def test_the_update_is_in_place_before_the_journal_names_it(journal, folder, monkeypatch):
    def power_cut(place):
        raise OSError("power cut")

    monkeypatch.setattr("edge_agent.journal.sync_folder", power_cut)
    with pytest.raises(OSError, match="power cut"):
        journal.add(make_report(), trained(folder))
    assert after_a_kill(folder) == [], "the journal named an update that may not be there"


def test_every_row_is_written_through_to_the_disk(journal):
    assert journal._db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert journal._db.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL


def test_a_folder_that_cannot_be_used_is_told_in_one_sentence(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(JournalError, match=r"cannot be used .*; choose another \[state\] folder"):
        Journal(tmp_path / "file")
    (tmp_path / "journal.sqlite").write_bytes(b"not a database, only as long as one" * 50)
    with pytest.raises(JournalError, match="file is not a database"):
        Journal(tmp_path)
