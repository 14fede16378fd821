"""What came of assignments, and where their time went."""

from __future__ import annotations

from collections.abc import Sequence

from coordinator.charts import Axis, Bars, bar_chart
from coordinator.ledger_types import NOTHING_HEARD, LedgerRow
from coordinator.web.facts import Facts
from coordinator.web.pages.parts import Cell, Chart

PHASES = ("wait", "fetch", "train", "evaluate", "pack", "push")
MOST_BARS = 24


def outcome_cell(facts: Facts, row: LedgerRow) -> Cell:
    """What came of an assignment, and the device's words where it failed."""
    if row.merged:
        return Cell("merged", level="good")
    if row.outcome == "done":
        return Cell("evaluated" if row.evaluate_only else "not merged", note=row.message)
    if row.outcome == NOTHING_HEARD:
        under_way = any(r.round == row.round and r.phase == "open" for r in facts.rounds)
        return Cell("under way" if under_way else NOTHING_HEARD)
    return Cell(row.outcome.replace("_", " "), level="bad", note=row.message)


def phase_chart(rows: Sequence[LedgerRow], *, by_round: bool = False) -> Chart:
    """Seconds by phase: of the slowest devices of a round, or of a device's newest rounds."""
    told = [r for r in rows if r.train_s is not None]
    if by_round:
        shown = told[-MOST_BARS:]
        note = f"The newest {MOST_BARS} rounds." if len(told) > len(shown) else ""
    else:
        shown = sorted(told, key=_busy_s, reverse=True)[:MOST_BARS]
        note = f"The {MOST_BARS} slowest devices." if len(told) > len(shown) else ""
    title = "Where the time went"
    return Chart(
        title,
        bar_chart(
            title,
            [f"round {r.round}" if by_round else r.device_id for r in shown],
            [Bars(phase, [_seconds(r, phase) for r in shown]) for phase in PHASES],
            Axis("time", "s"),
            stacked=True,
        ),
        note,
    )


def _seconds(row: LedgerRow, phase: str) -> float:
    return float(getattr(row, f"{phase}_s") or 0.0)


def _busy_s(row: LedgerRow) -> float:
    return sum(_seconds(row, phase) for phase in PHASES)
