"""`sketchfleet-trial study`: plays what is missing, concludes, writes the report.

Knows which study is concluded by what, and where files go.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from coordinator.document import Code, Document, Section, Words, markdown
from coordinator.document_html import html
from profiles.settings import Section as Settings
from trials.results import versions
from trials.study import compression_report, methods, rank_shift_report
from trials.study.board import cells_of
from trials.study.design import runs_of
from trials.study.engine import play_all
from trials.study.rank_shift import play_rank_shift
from trials.study.rank_shift_settings import load_rank_shift
from trials.study.settings import StudyError, load_study, shipped

CONCLUDE = {"compression-fairness": compression_report.conclude, "methods": methods.conclude}
RANK_SHIFT = "rank-shift"


def study(
    name: str, config: Path | None, out: Path, jobs: int, quick: bool, data: Path | None = None
) -> int:
    """Runs or continues the study; returns the exit code. Raises `StudyError`.

    data: the folder of labelled files that rank-shift reads; it is played on code without.
    """
    console = Console(highlight=False, soft_wrap=True)

    def told(line: str) -> None:
        console.print(line, markup=False)

    settings: Settings
    given = f" --config {config}" if config else " --quick" if quick else ""
    if name == RANK_SHIFT:
        given += "" if data is None else f" --data {data.name}"
        ours = load_rank_shift(
            config or shipped(RANK_SHIFT if data is not None else "rank-shift-code", quick)
        )
        records = play_rank_shift(ours, data, out, jobs, told)
        settings, (document, figures) = ours, rank_shift_report.conclude(ours, data, records)
    else:
        theirs = load_study(config or shipped(name, quick))
        if theirs.study != name:
            raise StudyError(f'{config} is of the study "{theirs.study}", not "{name}"')
        runs = runs_of(theirs)
        cells = cells_of(runs, play_all(theirs, runs, out, jobs, told))
        settings, (document, figures) = theirs, CONCLUDE[name](theirs, cells)
    command = f"sketchfleet-trial study {name}{given} --out {out.name}"
    write_report(out, name, settings, document, figures, command)
    told(f"{out / 'report.html'}, report.md and report.json are written")
    return 0


def write_report(
    out: Path, name: str, settings: Settings, document: Document, figures: Any, command: str
) -> None:
    """report.md, report.html and report.json, each with how they were made."""
    on = ", ".join(f"{key} {value}" for key, value in versions().items())
    how = Section("How", (Code("The command", command), Words(f"On {on}.")))
    document = replace(document, sections=(*document.sections, how))
    (out / "report.md").write_text(markdown(document))
    (out / "report.html").write_text(html(document))
    (out / "report.json").write_text(json.dumps(
        {"study": name, "settings": settings.model_dump(mode="json"), **_plain(figures)}, indent=1
    ))  # fmt: skip


def _plain(value: Any) -> Any:
    """As JSON can hold it: what is no number becomes null."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
