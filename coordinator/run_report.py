"""The report of a run as one file: read from the database, written as HTML, Markdown or JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from coordinator.document import markdown
from coordinator.document_html import html
from coordinator.ledger import ledger_rows
from coordinator.ledger_types import NOTHING_HEARD
from coordinator.report import ReportError, RunReport, build_report
from coordinator.run_document import run_document
from coordinator.run_fairness import RunFairness, run_fairness
from coordinator.run_statements import Statement, statements
from coordinator.store.records import Records
from profiles.files import replacing

SUFFIXES = (".html", ".md", ".json")


@dataclass(frozen=True)
class RunResults:
    """All that a report tells."""

    report: RunReport
    fairness: RunFairness
    statements: tuple[Statement, ...]

    def plain(self) -> dict[str, Any]:
        """JSON values: those of `RunReport.plain`, and the rest beside them."""
        return {
            **self.report.plain(),
            "fairness": asdict(self.fairness),
            "statements": [asdict(s) for s in self.statements],
        }


def run_results(records: Records, run_id: str) -> RunResults:
    """Everything known of a run. Raises `ReportError` on an unknown one."""
    report = build_report(records, run_id)
    history = records.all_rounds(run_id)
    coverage = {r.round: r.detail["coverage"] for r in history if r.detail.get("coverage")}
    # A device that is still at work has not failed.
    still_open = {r.round for r in history if r.phase == "open"}
    rows = [
        row
        for row in ledger_rows(records, run_id)
        if row.outcome != NOTHING_HEARD or row.round not in still_open
    ]
    task = report.run.config["model"].get("task", "causal-lm")
    unit = "nats per token" if task == "causal-lm" else "nats per example"
    found = run_fairness(rows, coverage, unit)
    return RunResults(report, found, statements(found, report.run.finished_at is not None))


def check_suffix(path: Path) -> None:
    """Raises `ReportError` on a name that says no format."""
    if path.suffix.lower() not in SUFFIXES:
        raise ReportError(
            f"{path} does not say which format to write; end it in {', '.join(SUFFIXES[:-1])} or "
            f"{SUFFIXES[-1]}"
        )


def write_report(results: RunResults, path: Path) -> None:
    """Writes the file, in the format that its name ends in; its folder must exist."""
    check_suffix(path)
    suffix = path.suffix.lower()
    if suffix == ".json":
        text = json.dumps(results.plain(), indent=1) + "\n"
    else:
        document = run_document(results.report, results.fairness, results.statements)
        text = html(document) if suffix == ".html" else markdown(document)
    try:
        with replacing(path) as draft:
            draft.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ReportError(f"{path} cannot be written: {error.strerror}") from error
