"""Figures in words: values with their intervals, p-values, and statements in two lists.

Knows text; concludes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from coordinator.charts import Axis, Interval, interval_chart
from coordinator.document import Bullets, Figure, Section, Table, Words
from trials.study.statistics import Estimate


@dataclass(frozen=True)
class Statement:
    """What the study says, or what it asked and cannot say."""

    text: str
    supported: bool


def number(value: float, digits: int = 3) -> str:
    """With as many places; a dash for none."""
    return "-" if not math.isfinite(value) else f"{value:.{digits}f}"


def shown(e: Estimate, digits: int = 3) -> str:
    """Value and interval: 1.0 (0.5 to 1.5)."""
    if not math.isfinite(e.low):
        return number(e.value, digits)
    return f"{number(e.value, digits)} ({number(e.low, digits)} to {number(e.high, digits)})"


def p_value(p: float | None) -> str:
    """Three places; smaller ones as such."""
    if p is None or not math.isfinite(p):
        return "-"
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def answer(sentences: Sequence[str]) -> Section:
    """The study's questions with what it has to say to each, first of all."""
    return Section("The answer", (Bullets(tuple(sentences)),))


def said(statements: Sequence[Statement]) -> tuple[Section, Section]:
    """What is supported, and what is not."""
    return (
        _listed("What this supports", [s.text for s in statements if s.supported]),
        _listed("What this cannot say", [s.text for s in statements if not s.supported]),
    )


def interval_figure(caption: str, rows: Sequence[tuple[str, Estimate]], unit: str) -> Figure:
    """A dot and its interval per row, around zero."""
    drawn = [
        Interval(name, e.value, *((e.low, e.high) if math.isfinite(e.low) else (None, None)))
        for name, e in rows
    ]
    values = Table(caption, ("", unit), tuple((name, shown(e, 4)) for name, e in rows))
    return Figure(caption, interval_chart(caption, drawn, Axis(unit), reference=0.0), values)


def _listed(title: str, items: Sequence[str]) -> Section:
    return Section(title, (Bullets(tuple(items)),) if items else (Words("Nothing."),))
