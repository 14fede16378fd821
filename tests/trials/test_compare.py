"""A comparison runs every method under the same settings and tells what each came to."""

from __future__ import annotations

import dataclasses
import json

import pytest

from coordinator.config import RunConfig
from coordinator.methods import METHODS, UnknownMethodError
from coordinator.report import build_report
from trials.compare import COLUMNS, Outcome, _outcome, compare, markdown, sections_for
from trials.fleet import FleetError
from trials.picture import compare_picture

every_method = pytest.mark.parametrize("name", METHODS)
KEPT = {"run", "model", "adapter", "training", "round", "wire", "evaluation"}


def outcome_of(name="fslora", **changes):
    plain = Outcome(
        method=name, personal=False, devices=4, loss_before=2.5, loss_after=2.0, worst_after=2.25,
        gap_before=0.5, gap_after=0.25, up_bytes=1_500_000, down_bytes=3_000_000, round_s=20.4,
        merge_s=0.0125, aggregation_error=0.03, peak_bytes=700_000_000,
        curve=((0, 2.5), (2, 2.2), (4, 2.0)),
    )  # fmt: skip
    return dataclasses.replace(plain, **changes)


@every_method
def test_all_methods_run_under_the_same_settings(name):
    config = RunConfig.model_validate(sections_for(name, 4))
    assert config.make_method().name == name and config.run.rounds == 4
    one = RunConfig.model_validate(sections_for("fedit", 4))
    assert {s: getattr(config, s) for s in KEPT} == {s: getattr(one, s) for s in KEPT}
    assert config.round.round_s == 0, "a method that asks more of a slow device takes longer"


async def finished(harness, folder, name):
    profiles = harness.UNEQUAL if METHODS[name].heterogeneous else {}
    async with harness.fleet(folder, method={"name": name}, profiles=profiles) as fleet:
        await fleet.finish()
        records = fleet.coordinator.records
        return _outcome(name, build_report(records, "run"), records), build_report(records, "run")


@pytest.mark.parametrize("name", ["fslora", "fedsa-lora"])
async def test_an_outcome_is_what_the_report_says(harness, tmp_path, name):
    found, report = await finished(harness, tmp_path, name)
    assert found.method == name and found.devices == 3
    assert found.personal == (name == "fedsa-lora")
    assert (found.loss_before, found.loss_after) == (report.before.mean, report.after.mean)
    assert (found.worst_after, found.gap_after) == (report.after.worst, report.after.range)
    assert [round_ for round_, _ in found.curve] == [0, 2, 3]
    assert found.curve[0][1] == pytest.approx(found.loss_before)
    assert found.curve[-1][1] == pytest.approx(found.loss_after)
    assert found.round_s > 0 and found.merge_s > 0
    error = report.rounds[2]["aggregation_error"]
    assert found.aggregation_error == error and (error is None) == found.personal


async def test_a_run_without_losses_is_no_outcome(harness, tmp_path):
    async with harness.fleet(tmp_path) as fleet:
        await fleet.round()
        records = fleet.coordinator.records
        with pytest.raises(FleetError, match="fslora has no losses to compare"):
            _outcome("fslora", build_report(records, "run"), records)


def test_the_table_has_a_row_for_each_method_and_marks_personal_ones():
    lines = markdown([
        outcome_of("fedit"), outcome_of("fedsa-lora", personal=True, aggregation_error=None),
    ]).splitlines()  # fmt: skip
    assert len(lines) == 4
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert all(len(row) == len(COLUMNS) for row in cells)
    assert cells[0][0] == "method" and set(cells[1]) == {"---"}
    assert cells[2] == ["fedit", "2.500, 2.000", "2.250", "0.500, 0.250", "1.50, 3.00", "20",
                        "0.013", "3.0e-02", "700"]  # fmt: skip
    assert cells[3][0] == "fedsa-lora*" and cells[3][7] == "-"


def test_an_outcome_survives_its_file():
    found = outcome_of()
    plain = json.loads(json.dumps(dataclasses.asdict(found)))
    plain["curve"] = tuple(map(tuple, plain["curve"]))
    assert Outcome(**plain) == found


def test_the_picture_is_drawn_for_any_number_of_methods(tmp_path):
    for names in (["fedit"], list(METHODS)):
        found = [outcome_of(n, loss_after=2 - 0.01 * i) for i, n in enumerate(names)]
        path = compare_picture(found, tmp_path / f"{len(names)}.png")
        assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000


def test_an_unknown_method_ends_a_comparison_before_it_begins(tmp_path):
    with pytest.raises(UnknownMethodError, match="'fedsgd' does not exist"):
        compare(tmp_path / "out", ["fslora", "fedsgd"], 2, [])
    assert not (tmp_path / "out").exists()
