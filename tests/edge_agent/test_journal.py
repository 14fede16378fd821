"""What a device has finished is sent in the end, whatever instant it was killed at; what it keeps
for itself changes in the same instant.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from pathlib import Path

import pytest

from edge_agent.journal import Entry, Home, Journal, JournalError, kept_homes
from profiles.model import ModuleShape
from protos import transfer
from protos.contract import AdapterSpec, LocalReport

DATA = b"an update"
DIGEST = hashlib.sha256(DATA).hexdigest()
OLD, NEW = b"the old home", b"the new home"
SPEC = AdapterSpec(
    run_id="run", base="base", base_revision="", base_digest="b" * 64, rank=4, alpha=8.0,
    use_rslora=False, seed=7, modules=(ModuleShape("layer", 8, 8),),
)  # fmt: skip
OTHER = dataclasses.replace(SPEC, run_id="other")


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

    monkeypatch.setattr("protos.transfer.sync_folder", power_cut)
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


# --- homes --------------------------------------------------------------------------------------


def home_of(journal, spec=SPEC):
    """The bytes of a run's home."""
    path = journal.home_path(spec)
    return None if path is None else path.read_bytes()


def homes(folder):
    """What lies in the folder of homes."""
    return sorted(path.read_bytes() for path in (folder / "home").iterdir())


def keep(journal, folder, data, spec=SPEC, assignment_id="run.0.ash"):
    """A round that leaves this home."""
    return journal.add(make_report(assignment_id), None, (spec, trained(folder, "home.new", data)))


def test_a_home_outlives_the_agent_and_the_round_it_came_with(journal, folder):
    assert journal.home_path(SPEC) is None
    journal.done(keep(journal, folder, OLD))
    again = Journal(folder)
    again.sweep()
    assert home_of(again) == OLD
    again.close()


def test_a_round_without_a_home_leaves_the_one_there_is(journal, folder):
    keep(journal, folder, OLD)
    journal.add(make_report("run.1.ash"), trained(folder))
    assert home_of(journal) == OLD


def test_each_run_has_one_home(journal, folder):
    keep(journal, folder, OLD)
    keep(journal, folder, b"of the other", OTHER)
    keep(journal, folder, NEW)
    assert (home_of(journal), home_of(journal, OTHER)) == (NEW, b"of the other")
    assert homes(folder) == sorted([NEW, b"of the other"]), "the old one is removed"


def test_runs_whose_homes_are_equal_do_not_lose_them_to_each_other(journal, folder):
    keep(journal, folder, OLD)
    keep(journal, folder, OLD, OTHER)
    keep(journal, folder, OLD)  # and the same again
    keep(journal, folder, NEW)
    assert (home_of(journal), home_of(journal, OTHER)) == (NEW, OLD)


class Power:
    """Counts instants, and goes off at one of them: before it, nothing of it has happened."""

    def __init__(self):
        self.left = None
        self.passed = 0

    def tick(self):
        self.passed += 1
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise OSError("power cut")

    def before(self, call):
        def ticking(*args, **keywords):
            self.tick()
            return call(*args, **keywords)

        return ticking


class Database:
    """A connection of which every statement, and the commit, is an instant."""

    def __init__(self, real, power):
        self.real, self.power = real, power
        self.execute = power.before(real.execute)
        self.close = real.close

    def __enter__(self):
        return self.real.__enter__()

    def __exit__(self, kind, error, trace):
        if kind is None:
            try:
                self.power.tick()
            except OSError:
                self.real.rollback()
                raise
        return self.real.__exit__(kind, error, trace)


def test_the_home_changes_with_the_entry_whatever_instant_the_power_goes(tmp_path, monkeypatch):
    power = Power()
    for owner, name in ((transfer, "sync_folder"), (Path, "replace"), (Path, "unlink")):
        monkeypatch.setattr(owner, name, power.before(getattr(owner, name)))
    seen = []
    for instant in range(50):
        folder = tmp_path / str(instant)
        journal = Journal(folder)
        journal.done(keep(journal, folder, OLD))
        journal._db = Database(journal._db, power)
        update, home = trained(folder, "update"), trained(folder, "home.new", NEW)
        power.left, power.passed = instant, 0
        try:
            journal.add(make_report("run.1.ash"), update, (SPEC, home))
            whole = True
        except OSError:
            whole = False
        power.left = None
        journal.close()
        again = Journal(folder)
        again.sweep()
        found = ([e.assignment_id for e in again.pending()], home_of(again))
        assert found in (([], OLD), (["run.1.ash"], NEW)), f"cut at instant {instant}"
        assert homes(folder) == [found[1]], "the other one is removed at the next start"
        assert len(list((folder / "updates").iterdir())) == len(found[0])
        again.close()
        seen.append(found[1])
        if whole:
            break
    assert whole and seen == sorted(seen, reverse=True), "once the new one holds, it holds"
    assert seen.count(OLD) >= 8 and seen.count(NEW) >= 2


def test_files_that_no_row_names_are_removed_at_the_start(journal, folder):
    keep(journal, folder, OLD)
    journal.add(make_report(), trained(folder))
    for place in ("home", "updates"):
        (folder / place / ("f" * 64)).write_bytes(b"orphan")
    journal.sweep()
    assert homes(folder) == [OLD]
    assert [p.name for p in (folder / "updates").iterdir()] == [DIGEST]


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(b"rot")])
def test_a_home_that_cannot_be_used_is_none_with_a_warning(journal, folder, caplog, damage):
    keep(journal, folder, OLD)
    (path,) = (folder / "home").iterdir()
    damage(path)
    with caplog.at_level(logging.WARNING):
        assert journal.home_path(SPEC) is None
    assert "what was kept of run run is damaged or gone; starting anew" in caplog.text
    assert kept_homes(folder) == {"run": None}
    keep(journal, folder, NEW)
    assert home_of(journal) == NEW


def test_the_home_of_another_run_with_the_same_name_is_not_used(journal, folder, caplog):
    keep(journal, folder, OLD)
    moved = dataclasses.replace(SPEC, base="elsewhere", base_revision="main")
    assert home_of(journal, moved) == OLD, "where the base lies is no difference"
    with caplog.at_level(logging.WARNING):
        assert journal.home_path(dataclasses.replace(SPEC, rank=8)) is None
    assert "of another run with the same name" in caplog.text


def test_homes_are_listed_without_touching_the_folder(journal, folder, tmp_path):
    assert kept_homes(tmp_path / "none") == {} and not (tmp_path / "none").exists()
    assert kept_homes(folder) == {}
    keep(journal, folder, OLD)
    keep(journal, folder, NEW, OTHER)
    found = kept_homes(folder)
    assert found == {"run": Home(SPEC, journal.home_path(SPEC)),
                     "other": Home(OTHER, journal.home_path(OTHER))}  # fmt: skip
    assert list(found) == ["other", "run"]
    journal._db.execute("DROP TABLE home")  # as an earlier version left it
    assert kept_homes(folder) == {}
    (tmp_path / "journal.sqlite").write_bytes(b"not a database, only as long as one" * 50)
    with pytest.raises(JournalError, match="cannot be read"):
        kept_homes(tmp_path)


def test_a_journal_of_an_earlier_version_is_taken_over(folder):
    journal = Journal(folder)
    entry = journal.add(make_report(), trained(folder))
    journal._db.execute("DROP TABLE home")
    journal.close()
    (folder / "home").rmdir()
    again = Journal(folder)
    assert again.pending() == [entry] and again.home_path(SPEC) is None
    again.close()
