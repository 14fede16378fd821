"""What a check found, and how a list of findings is shown."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "warn", "fail", "skip"]


@dataclass(frozen=True)
class Finding:
    """One check. `mend` says what to do when it is not well."""

    name: str
    state: State
    found: str
    mend: str = ""


def ok(name: str, found: str) -> Finding:
    """All is well."""
    return Finding(name, "ok", found)


def warn(name: str, found: str, mend: str = "") -> Finding:
    """It works, but not as well as it could."""
    return Finding(name, "warn", found, mend)


def fail(name: str, found: str, mend: str) -> Finding:
    """Training will not work before this is mended."""
    return Finding(name, "fail", found, mend)


def skip(name: str, why: str) -> Finding:
    """It could not be looked at."""
    return Finding(name, "skip", why)


def render(findings: Sequence[Finding], width: int = 100) -> str:
    """A line per finding, what to do below it, and the sum."""
    lines = []
    for finding in findings:
        head = f"{finding.state:5}{finding.name:14}"
        lines += textwrap.wrap(
            finding.found, width, initial_indent=head, subsequent_indent=" " * 19
        )
        if finding.mend:
            lines += textwrap.wrap(
                finding.mend, width, initial_indent=" " * 19 + "-> ", subsequent_indent=" " * 22
            )
    counts = {state: sum(f.state == state for f in findings) for state in ("fail", "warn", "skip")}
    told = {"fail": "to mend", "warn": "to consider", "skip": "not looked at"}
    said = [f"{counts[state]} {words}" for state, words in told.items() if counts[state]]
    return "\n".join([*lines, "", ", ".join(said) or "all is well"])
