"""The ledger tells of every device and round what was stored of it, and so do its files."""

import csv
import dataclasses
import math
import sys
import typing

import pytest

from coordinator.cli import main
from coordinator.ledger import ledger_rows
from coordinator.ledger_files import LedgerFileError, read_ledger, write_ledger
from coordinator.ledger_types import NOTHING_HEARD, LedgerRow
from profiles.errors import MissingExtraError
from protos.contract import (
    MOST_EXAMPLES,
    Evaluation,
    LocalReport,
    Reason,
    RefusalError,
    to_message,
)
from protos.sketch import slice_rows
from protos.sketchfleet.v1 import fleet_pb2 as pb

EVIL = LedgerRow(
    3, 'dev,"ice\n', "", "", "", "fslora", 4, 8, 0.5, "int8", None, 1.0, NOTHING_HEARD, "",
    "a reason\r\nin two lines, and 1/3", nats=(1 / 3, 2e-9), tokens=(1, 2), update_share=-0.125,
    merged=True, components=(0.0, 1.0, 128 / 255),
)  # fmt: skip


async def run_to_end(harness, folder, **sections):
    """(rows, assignments, spec, rounds) of three rounds and the last evaluation."""
    async with harness.fleet(folder, evaluation={"local_only": True}, **sections) as fleet:
        await fleet.finish()
        records, spec = fleet.coordinator.records, fleet.coordinator.engine.spec
        return (ledger_rows(records, "run"), records.assignments("run"), spec,
                records.all_rounds("run"))  # fmt: skip


async def test_a_row_says_what_the_report_and_the_merge_said(harness, tmp_path):
    rows, given, spec, history = await run_to_end(harness, tmp_path)
    assert [(r.round, r.device_id) for r in rows] == [
        (n, name) for n in range(4) for name in harness.NAMES
    ]
    for row, record in zip(rows, given, strict=True):
        a, report = record.assignment, record.report
        assert (row.rank, row.global_rank, row.ratio) == (a.rank, 8, a.rank / 8)
        assert (row.tier, row.outcome, row.method) == ("board of the test", "done", "fslora")
        received = report.evaluation("global", "received")
        assert row.loss_received == (received and received.loss)
        assert row.up_bytes == (record.update_bytes or 0)
        if received is not None:
            assert sum(row.nats) / sum(row.tokens) == pytest.approx(3.0)
        if a.trains:
            values = a.rank * spec.parameters_per_rank
            assert row.bits_per_value == pytest.approx(8 * row.up_bytes / values)
            assert row.dense_bytes == 4 * 8 * spec.parameters_per_rank > row.up_bytes
            assert row.merged and not row.evaluate_only
    for n in range(3):
        of = [r for r in rows if r.round == n]
        assert sum(r.update_share for r in of) == pytest.approx(1)
        assert sum(r.weight for r in of) == pytest.approx(1)
        assert all(-1 <= r.alignment <= 1 and r.update_norm > 0 for r in of)
        held = [sum(r.components[j] for r in of) for j in range(8)]
        assert held == pytest.approx(history[n].detail["coverage"], abs=0.02)
    for row, record in zip(rows[:9], given[:9], strict=True):
        share = [0.0] * 8
        for m in spec.modules:
            for j in slice_rows(spec, record.assignment, m.name):
                share[j] += 1 / len(spec.modules)
        assert row.components == pytest.approx(share, abs=1 / 255)
    assert all(r.evaluate_only and r.update_share is None and not r.components
               for r in rows[-3:])  # fmt: skip


async def test_the_local_only_adapter_is_told_where_it_can_be_compared(harness, tmp_path):
    """Before a round it has had the rounds that the received model has had."""
    rows, given, *_ = await run_to_end(harness, tmp_path)
    for record in given:
        a = record.assignment
        assert a.local_only == a.trains == ("for an adapter of its own" in a.reason)
    of = [r for r in rows if r.device_id == "ash"]
    assert [r.loss_local_trained for r in of] == [2.0, 1.9, 1.8, None]
    assert [r.loss_local for r in of] == [None, 2.0, 1.9, 1.8]
    assert [r.accuracy_local for r in of] == [None, 0.25, 0.25, 0.25]


async def test_a_device_that_never_reported_has_a_row(harness, tmp_path):
    async with harness.fleet(tmp_path) as fleet:
        await fleet.take()
        rows = ledger_rows(fleet.coordinator.records, "run")
    assert [(r.outcome, r.loss_received, r.train_s, r.merged) for r in rows] == [
        (NOTHING_HEARD, None, None, False)
    ] * 3


async def test_what_a_merge_gave_is_there_with_its_model_or_not_at_all(harness, tmp_path):
    async with harness.fleet(tmp_path) as fleet:
        fleet.coordinator.cut_power("publish_round", before=True)
        taken = await fleet.take()
        for name, (spec, a) in taken.items():
            await fleet[name].deliver(spec, a)
        await fleet.coordinator.died()
        await fleet.restart()
        await fleet.finish()
        rows = ledger_rows(fleet.coordinator.records, "run")
    assert sum(r.update_share for r in rows[:3]) == pytest.approx(1)


async def test_losses_of_examples_that_do_not_pair_up_are_refused(harness, tmp_path):
    async with harness.fleet(tmp_path) as fleet:
        _, a = (await fleet.take())["ash"]
        for nats, tokens in (((1, 2), (1,)), ((1,) * (MOST_EXAMPLES + 1),) * 2):
            seen = Evaluation("global", "received", 1.0, 0.5, 9, example_millinats=nats,
                              example_tokens=tokens)  # fmt: skip
            report = LocalReport(a.assignment_id, "done", evaluations=(seen,), train_examples=1)
            with pytest.raises(RefusalError, match="as many of both") as caught:
                fleet.coordinator.engine.report("ash", report)
            assert caught.value.reason is Reason.BAD_REQUEST


def test_the_ledger_adds_less_than_two_kilobytes_to_a_report():
    """The largest figures: sequences of 32 k tokens, at 16 nats each."""
    seen = Evaluation("global", "received", 1 / 3, 1 / 3, 2**40)
    examples = dataclasses.replace(
        seen, example_millinats=(1000 * 16 * 2**15,) * MOST_EXAMPLES,
        example_tokens=(2**15,) * MOST_EXAMPLES,
    )  # fmt: skip
    local = Evaluation("local", "trained", 1 / 3, 1 / 3, 2**40)

    def size(*evaluations):
        report = LocalReport("run.0.device", "done", evaluations=evaluations)
        return len(to_message(report, pb.LocalReport).SerializeToString())

    assert 1500 < size(examples, local) - size(seen) < 2000


# --- files --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ledger.csv", "ledger.parquet"])
def test_a_file_is_read_back_as_it_was_written(tmp_path, name):
    hints = typing.get_type_hints(LedgerRow)
    given = {tuple[float, ...]: (0.1, 2.0), tuple[int, ...]: (3, 4), str: "words", int: 5,
             float: 1 / 3, bool: True, float | None: 2 / 3, int | None: 6}  # fmt: skip
    full = LedgerRow(**{field: given[hint] for field, hint in hints.items()})
    rows = (full, EVIL)
    assert write_ledger(tmp_path / name, "run", rows) == len(rows)
    assert read_ledger(tmp_path / name) == {"run": rows}
    assert [p.name for p in tmp_path.iterdir() if "ledger" in p.name] == [name]


@pytest.mark.parametrize("name", ["ledger.csv", "ledger.parquet"])
def test_a_run_without_rounds_is_a_file_of_columns(tmp_path, name):
    assert write_ledger(tmp_path / name, "run", ()) == 0
    assert read_ledger(tmp_path / name) == {}


def test_a_name_that_says_no_format_is_refused(tmp_path):
    with pytest.raises(LedgerFileError, match=r"neither \.parquet nor \.csv"):
        write_ledger(tmp_path / "ledger.xlsx", "run", [EVIL])
    with pytest.raises(LedgerFileError, match="cannot be written"):
        write_ledger(tmp_path / "nowhere" / "ledger.csv", "run", [EVIL])


def test_what_is_no_ledger_is_refused(tmp_path):
    write_ledger(tmp_path / "a.csv", "run", [EVIL])
    with (tmp_path / "a.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    with (tmp_path / "b.csv").open("w", newline="") as file:
        csv.writer(file).writerows(row[:-1] for row in rows)
    with pytest.raises(LedgerFileError, match="another version"):
        read_ledger(tmp_path / "b.csv")
    (tmp_path / "c.parquet").write_text("nothing")
    with pytest.raises(LedgerFileError, match="cannot be read"):
        read_ledger(tmp_path / "c.parquet")
    text = (tmp_path / "a.csv").read_text().replace("-0.125", "much")
    (tmp_path / "d.csv").write_text(text)
    with pytest.raises(LedgerFileError, match=r"d\.csv: update_share"):
        read_ledger(tmp_path / "d.csv")


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingExtraError, match="data"):
        write_ledger(tmp_path / "a.parquet", "run", [EVIL])


async def test_the_command_writes_it(harness, tmp_path, capsys):
    await run_to_end(harness, tmp_path)
    state, out = str(tmp_path / "state"), tmp_path / "ledger.csv"
    assert main(["ledger", "run", "--state", state, "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}: 12 rows\n"
    (rows,) = read_ledger(out).values()
    assert len(rows) == 12 and math.isfinite(rows[0].loss_received)
    assert main(["ledger", "ran", "--state", state, "--out", str(out)]) == 1
    assert "no run 'ran' here; runs kept: run" in capsys.readouterr().err
    assert main(["report", "run", "--state", state]) == 0
    assert "Against an adapter trained alone on the same budget, " in capsys.readouterr().out
