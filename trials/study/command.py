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

from coordinator.document import Code, Section, Words, markdown
from coordinator.document_html import html
from trials.results import versions
from trials.study import compression_report, methods
from trials.study.board import cells_of
from trials.study.design import runs_of
from trials.study.engine import play_all
from trials.study.settings import StudyError, load_study, shipped

CONCLUDE = {"compression-fairness": compression_report.conclude, "methods": methods.conclude}


def study(name: str, config: Path | None, out: Path, jobs: int, quick: bool) -> int:
    """Runs or continues the study; returns the exit code. Raises `StudyError`."""
    settings = load_study(config or shipped(name, quick))
    if settings.study != name:
        raise StudyError(f'{config} is of the study "{settings.study}", not "{name}"')
    console = Console(highlight=False, soft_wrap=True)
    runs = runs_of(settings)
    records = play_all(settings, runs, out, jobs, lambda line: console.print(line, markup=False))
    document, figures = CONCLUDE[name](settings, cells_of(runs, records))
    given = f" --config {config}" if config else " --quick" if quick else ""
    command = f"sketchfleet-trial study {name}{given} --out {out.name}"
    on = ", ".join(f"{key} {value}" for key, value in versions().items())
    how = Section("How", (Code("The command", command), Words(f"On {on}.")))
    document = replace(document, sections=(*document.sections, how))
    (out / "report.md").write_text(markdown(document))
    (out / "report.html").write_text(html(document))
    (out / "report.json").write_text(json.dumps(
        {"study": name, "settings": settings.model_dump(mode="json"), **_plain(figures)}, indent=1
    ))  # fmt: skip
    console.print(f"{out / 'report.html'}, report.md and report.json are written", markup=False)
    return 0


def _plain(value: Any) -> Any:
    """As JSON can hold it: what is no number becomes null."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
