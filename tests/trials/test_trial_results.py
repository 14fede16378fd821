"""A finished run leaves a folder from which its report and pictures can be made again."""

from __future__ import annotations

import dataclasses
import json

import pytest

from coordinator.ledger_files import write_parquet
from coordinator.phases import PHASES, device_times
from coordinator.report import build_report
from protos.contract import LocalReport
from trials.ledger import (
    LEDGER,
    LINKS,
    LedgerError,
    ledger_rows,
    link_during,
    read_rows,
    times_of,
)
from trials.results import Facts, read_results, versions, write_facts
from trials.trial_report import compared_rows, plot, round_rows, write_report

TIMED = {"wait_s": 1.0, "fetch_s": 2.0, "load_s": 0.5, "train_s": 4.0, "evaluate_s": 1.5,
         "pack_s": 0.25, "push_s": 8.0, "fetched_bytes": 500_000, "pushed_bytes": 1_000_000,
         "resent_bytes": 3_000, "resumes": 2}  # fmt: skip


def samples(rows):
    """A link a second for the time of these rows: 1 Mbit/s up with every fourth second silent."""
    began = min(r["opened_at"] for r in rows) - 20
    return [
        {"at": began + t, "device": device, "up_bps": 1e6 if t % 4 else 0.0, "down_bps": 2e6,
         "delay_s": 0.1, "loss": 0.0, "up_bytes": 1000 * t, "down_bytes": 3000 * t,
         "packets_lost": 0, "packets_dropped": 0}
        for device in {r["device"] for r in rows}
        for t in range(60)
    ]  # fmt: skip


def facts(rows, **changes):
    plain = {
        "fleet": "fleet.toml", "run": "run", "began_at": 0.0, "ended_at": 100.0, "remote": False,
        "outcome": "finished", "emulation": "links by magic",
        "devices": {d: {"link": "as it is", "caps": "none"} for d in {r["device"] for r in rows}},
        "bulk_tcp": {}, "fairness": ["Fair enough."],
    }  # fmt: skip
    return Facts.model_validate(plain | changes)


async def rows_of(harness, folder):
    async with harness.fleet(folder) as fleet:
        await fleet.finish()
        return ledger_rows(fleet.coordinator.records, "run")


def keep(folder, rows, **changes):
    folder.mkdir(parents=True)
    links = samples(rows) if rows else []
    write_parquet(folder / "ledger.parquet", LEDGER, rows)
    write_parquet(folder / "links.parquet", LINKS, links)
    write_facts(folder, facts(rows, **changes))
    (folder / "versions.json").write_text(json.dumps(versions()))
    return folder


def timed(rows):
    """The rows as devices that take their time would have left them."""
    told = {("up_bytes" if k == "pushed_bytes" else "down_bytes" if k == "fetched_bytes" else k): v
            for k, v in TIMED.items()}  # fmt: skip
    return [{**r, **told, "begun_at": r["opened_at"] + 1, "link_up_bps": 7.5e5,
             "link_down_bps": 2e6} for r in rows]  # fmt: skip


async def test_the_ledger_has_a_row_for_every_device_and_round(harness, tmp_path):
    async with harness.fleet(tmp_path) as fleet:
        await fleet.finish()
        records = fleet.coordinator.records
        rows, report = ledger_rows(records, "run"), build_report(records, "run")
    assert [(r["round"], r["device"]) for r in rows] == [
        (n, name) for n in range(4) for name in harness.NAMES
    ]
    by_device = {r.device_id: r for r in report.rows}
    for row in rows:
        assert row["outcome"] == "done" and row["k"] <= row["rank"] == harness.RANK
        assert row["planned_push_s"] is not None and row["planned_peak_bytes"] > 0
        assert row["closed_at"] >= row["opened_at"] and row["evaluate_only"] == (row["round"] == 3)
    for name, told in by_device.items():
        of = [r for r in rows if r["device"] == name]
        assert of[-1]["loss_global_received"] == told.loss_last
        assert of[0]["loss_global_received"] == told.loss_first


async def test_rows_are_read_as_they_were_written(harness, tmp_path):
    rows = await rows_of(harness, tmp_path / "run")
    write_parquet(tmp_path / "ledger.parquet", LEDGER, rows)
    found = read_rows(tmp_path / "ledger.parquet", LEDGER)
    assert [{k: v for k, v in row.items() if v is not None} for row in found] == [
        {k: v for k, v in row.items() if v is not None} for row in rows
    ]


def test_a_table_of_another_version_is_refused(tmp_path):
    write_parquet(tmp_path / "a.parquet", LINKS, [])
    with pytest.raises(LedgerError, match="written by another version"):
        read_rows(tmp_path / "a.parquet", LEDGER)
    (tmp_path / "b.parquet").write_text("no table")
    with pytest.raises(LedgerError, match=r"b\.parquet cannot be read"):
        read_rows(tmp_path / "b.parquet", LEDGER)


async def test_phases_add_up_and_push_ends_when_the_update_was_in(harness, tmp_path):
    async with harness.fleet(tmp_path) as fleet:
        await fleet.finish()
        records = fleet.coordinator.records
        given, history = records.assignments("run"), records.all_rounds("run")

    def slow_one(a):
        in_at = None if a.received_at is None else history[a.assignment.round].opened_at + 30
        return dataclasses.replace(
            a, report=dataclasses.replace(a.report, **TIMED), received_at=in_at
        )

    slow = [slow_one(a) for a in given]
    for time_ in device_times(slow, history):
        opened = history[time_.round].opened_at
        at_work = sum(time_.seconds[p] for p in PHASES if p != "wait")
        ends_at = time_.begun_at + at_work
        assert ends_at == pytest.approx(opened + (30 if time_.round < 3 else at_work))
        assert time_.up_bps == pytest.approx(8e6 / 8.0)
        assert time_.down_bps == pytest.approx(4e6 / 2.0)


async def test_the_rate_of_a_link_is_what_it_was_during_the_transfer(harness, tmp_path):
    rows = timed(await rows_of(harness, tmp_path / "run"))
    time_ = times_of(rows)[0]
    up, down = link_during(time_, samples(rows))
    assert down == 2e6
    assert up == pytest.approx(7.5e5, rel=0.2), "three seconds of four at 1 Mbit/s"


async def test_a_report_is_made_from_the_folder_alone(harness, tmp_path):
    rows = timed(await rows_of(harness, tmp_path / "run"))
    bulk = {d: {"up_bps": 5e5, "down_bps": 4e6, "seconds": 60.0} for d in harness.NAMES}
    folder = keep(tmp_path / "first", rows, bulk_tcp=bulk)
    head = write_report(folder)
    assert "3 rounds merged" in head and "links by magic" in head
    assert "sent twice: 0.036 MB, 0.20% of payload; 24 resumes" in head
    assert "down 50%, up 200%" in head, head
    text = (folder / "report.md").read_text()
    for words in ("## Where bytes and seconds went", "## Against plain TCP", "Fair enough.",
                  "![Time line](timeline.png)", "![Links](links.png)"):  # fmt: skip
        assert words in text
    for name in ("timeline.png", "links.png", "loss.png"):
        assert (folder / name).stat().st_size > 5000
    row = next(line for line in text.splitlines() if line.startswith("| ash | 4.0"))
    assert "8.0" in row and "100% / 133%" in row, row


async def test_several_trials_stand_in_one_table_and_one_picture(harness, tmp_path):
    rows = timed(await rows_of(harness, tmp_path / "run"))
    folders = [keep(tmp_path / name, rows) for name in ("first", "second")]
    said = plot(folders, tmp_path / "both")
    assert "| first | fslora | 3 | 3 |" in said and "| second |" in said
    assert (tmp_path / "both" / "compared.png").stat().st_size > 5000
    found = [read_results(f) for f in folders]
    assert compared_rows(found)[0][1:] == compared_rows(found)[1][1:]


def test_a_trial_that_ended_before_its_first_round_has_a_report(tmp_path):
    folder = keep(tmp_path / "early", [], devices={"ash": {"link": "lte", "caps": "none"}},
                  outcome="ended by Ctrl-C")  # fmt: skip
    head = write_report(folder)
    assert "0 rounds merged" in head and "Ctrl-C" in head and "Nothing was transferred" in head
    assert round_rows(read_results(folder)) == []


def test_a_folder_without_a_trial_is_told(tmp_path):
    with pytest.raises(LedgerError, match="holds no trial"):
        plot([tmp_path], None)


def test_a_report_of_a_device_holds_all_phases():
    report = LocalReport("a", "done")
    assert all(hasattr(report, f"{phase}_s") for phase in PHASES)
