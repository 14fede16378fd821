"""`sketchfleet-coordinator report RUN --out FILE`: one file that tells the run."""

import asyncio
import json
import re
from dataclasses import replace

import numpy as np
import pytest

from coordinator.cli import main as command_line
from coordinator.ledger import ledger_rows
from coordinator.report import ReportError, build_report
from coordinator.run_report import run_results, write_report


@pytest.fixture(scope="module")
def state(harness, tmp_path_factory):
    """The state folder of a finished run of three devices."""

    async def run():
        async with harness.fleet(tmp_path_factory.mktemp("reported")) as fleet:
            await fleet.finish()
            return fleet.coordinator.config.server.state

    return asyncio.run(run())


def report(state, path, run="run"):
    return command_line(["report", run, "--state", str(state), "--out", str(path)])


def test_the_page_tells_every_device_and_stands_alone(state, tmp_path, capsys) -> None:
    page = tmp_path / "run.html"
    assert report(state, page) == 0 and capsys.readouterr().out.strip() == str(page)
    text = page.read_text()
    for name in ("ash", "birch", "cedar"):
        assert f'<th scope="row" class="words">{name}</th>' in text
    for title in ("What this run supports", "Fairness", "Devices", "Compression and fairness",
                  "Alerts", "References"):  # fmt: skip
        assert title in text
    assert "Federated Sketching LoRA (arXiv 2501.19389)" in text
    outside = re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?(?!#)\w""", text)
    assert not outside and "<script" not in text
    assert text.count("<svg") >= 8 and "None" not in text and "nan" not in text.lower().split()


def test_markdown_has_the_same_tables(state, tmp_path) -> None:
    page = tmp_path / "run.md"
    assert report(state, page) == 0
    text = page.read_text()
    assert text.startswith("# Run run\n") and "**Table 2.** Loss of the global adapter" in text
    widths: set[int] = set()
    for block in re.findall(r"(?:^\|.*\n)+", text, re.M):
        counts = {line.replace("\\|", "").count("|") for line in block.splitlines()}
        assert len(counts) == 1, block
        widths |= counts
    assert len(widths) > 3


def test_json_keeps_what_the_plain_report_has_and_adds_to_it(state, tmp_path, harness) -> None:
    page = tmp_path / "run.json"
    assert report(state, page) == 0
    told = json.loads(page.read_text())
    assert {"run_id", "devices", "fairness_before", "fairness_after", "curve", "rounds", "phases",
            "timeline", "spearman_ratio_and_gain"} <= told.keys()  # fmt: skip
    assert len(told["devices"]) == len(told["fairness"]["devices"]) == 3
    assert all(s["text"] for s in told["statements"])
    by_name = {m["name"]: m for m in told["fairness"]["losses"]}
    assert by_name["mean"]["after"] == pytest.approx(told["fairness_after"]["mean"])
    assert by_name["Jain"]["before"] == pytest.approx(told["fairness_before"]["jain"])
    assert told["fairness"]["alerts"] == []


def enriched(records, run_id):
    """The run's own rows as devices with per-example losses and local-only adapters leave them."""
    rng, rows = np.random.default_rng(0), []
    for row in ledger_rows(records, run_id):
        changes = {"update_share": 0.3, "alignment": 0.2, "joules": 8.0}
        if row.loss_received is not None:
            hard = np.exp(rng.normal(0, 0.1, 12))
            nats = row.loss_received * 50 * hard / hard.mean()
            changes |= {"nats": tuple(nats), "tokens": (50,) * 12,
                        "loss_local": row.loss_received + 0.5}  # fmt: skip
        rows.append(replace(row, device_id=f"<b>{row.device_id}|", **changes))
    return tuple(rows)


def test_what_was_measured_is_told_with_intervals(state, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("coordinator.run_report.ledger_rows", enriched)
    page, text = tmp_path / "run.html", tmp_path / "run.md"
    assert report(state, page) == 0 and report(state, text) == 0
    told = page.read_text()
    assert "0 % have a higher loss with the global adapter; the mean difference is −0.500" in told
    assert "±" in told and "the finite held-out sets alone would show" in told
    assert "Taking part was worth it for" in told and "&lt;b&gt;ash|" in told
    assert "<b>ash" not in told and "What the run cost in energy" not in told
    assert re.search(r"\| mean \| 3\.000 \\\[[\d.]+, [\d.]+\\\]", text.read_text())


def test_a_format_a_run_and_a_folder_that_do_not_exist_are_refused(state, tmp_path, capsys) -> None:
    assert report(state, tmp_path / "run.pdf") == 1
    assert "end it in .html, .md or .json" in capsys.readouterr().err
    assert report(state, tmp_path / "a.html", run="other") == 1
    assert "no run 'other'" in capsys.readouterr().err
    assert report(state, tmp_path / "none" / "a.html") == 1
    assert "cannot be written" in capsys.readouterr().err


async def test_a_run_that_has_only_begun_can_be_reported(harness, tmp_path) -> None:
    async with harness.fleet(tmp_path / "state") as fleet:
        await fleet.round()
        records = fleet.coordinator.records
        results = run_results(records, "run")
        for suffix in ("html", "md", "json"):
            write_report(results, tmp_path / f"run.{suffix}")
        assert build_report(records, "run").rounds_merged <= 1
    assert "The run has not finished" in (tmp_path / "run.html").read_text()
    assert not any(d.failures for d in results.fairness.devices), "who is at work has not failed"
    with pytest.raises(ReportError):
        write_report(results, tmp_path / "run")
