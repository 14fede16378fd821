"""docs/findings.md from finished studies: their reports as they are, one after the other.

    python -m trials.study.findings out/compression out/methods --to docs/findings.md

Nothing is edited by hand, so that what is written is what was found.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from trials.study.settings import StudyError

HEAD = """# Findings

What Sketchfleet's studies show, as their reports say it; [studies.md](studies.md) and
[rank-shift.md](rank-shift.md) explain the designs, the statistics and the words. Made by
`python -m trials.study.findings`; not edited. Every report begins with the answer, says what it
supports and what it cannot say, and ends with the command that made it.

All of it holds for what was run and no further: small models, a few rounds, devices simulated in
one process. Intervals are for other seeds, assignments, devices and held-out examples of the same
kind, not for other models. "Not shown" is not "none": reports say what would have been found.
"""


def findings(folders: Sequence[Path]) -> str:
    """The document. Raises `StudyError` when a folder holds no report."""
    parts = [HEAD]
    for folder in folders:
        try:
            report = (folder / "report.md").read_text()
            name = json.loads((folder / "study.json").read_text())["study"]
        except OSError as error:
            raise StudyError(f"{folder} holds no report.md; finish its study first") from error
        title, *lines = report.rstrip().splitlines()
        parts.append(f"#{title}\n\n`report.md` of `sketchfleet-trial study {name}`, as it came.")
        parts.append("\n".join(f"#{line}" if line.startswith("#") else line for line in lines))
    return "\n".join(parts) + "\n"


def main() -> None:
    """Writes the document."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", type=Path, nargs="+", metavar="FOLDER")
    parser.add_argument("--to", type=Path, default=Path("docs/findings.md"))
    options = parser.parse_args()
    options.to.write_text(findings(options.folders))


if __name__ == "__main__":
    main()
