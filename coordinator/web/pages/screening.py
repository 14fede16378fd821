"""What did not enter the model, and why: the screening log."""

from __future__ import annotations

from dataclasses import dataclass

from coordinator.ledger_types import NOTHING_HEARD
from coordinator.web import words
from coordinator.web.facts import Facts
from coordinator.web.pages.parts import Cell, Figure, Level, Table


@dataclass(frozen=True)
class Refused:
    """One assignment that came to nothing."""

    round: int
    device_id: str
    what: str
    why: str
    level: Level


@dataclass(frozen=True)
class ScreeningView:
    """The log, newest first, and counts by kind; who is or was in quarantine, newest first."""

    figures: tuple[Figure, ...]
    quarantines: Table
    log: Table


def screening_view(facts: Facts) -> ScreeningView:
    """The page `/screening`."""
    found = refused(facts)
    kinds = ("update refused", "device failed", "came too late", NOTHING_HEARD)
    return ScreeningView(
        figures=(
            Figure("In quarantine", str(sum(q.ended_at is None for q in facts.quarantines))),
            *(Figure(kind.capitalize(), str(sum(r.what == kind for r in found))) for kind in kinds),
        ),
        quarantines=_quarantines(facts),
        log=Table(
            caption="Work that did not enter the model",
            columns=("Round", "Device", "What", "Why"),
            rows=tuple(
                (
                    Cell(f"{r.round}", f"/rounds/{r.round}"),
                    Cell(r.device_id, words.device_link(r.device_id)),
                    Cell(r.what, level=r.level),
                    Cell(r.why),
                )
                for r in found
            ),
            empty="Every update that was asked for so far has entered the model.",
            wide=3,
            cards=True,
        ),
    )


def _quarantines(facts: Facts) -> Table:
    rows = []
    for record in reversed(facts.quarantines):
        held = record.quarantine
        state, level = f"{held.clean} of {held.needed} clean rounds", "bad"
        if record.ended_at is not None:
            state, level = f"ended by {record.ended_by}", "good"
        rows.append((
            Cell(held.device_id, words.device_link(held.device_id)), Cell(f"{held.round}"),
            Cell(state, level=level),  # type: ignore[arg-type]
            Cell(held.reason),
        ))  # fmt: skip
    return Table(
        caption="Devices in quarantine train and are checked; their updates are not merged",
        columns=("Device", "Since round", "State", "Why"), rows=tuple(rows),
        empty="No device was ever in quarantine.", wide=3, cards=True,
    )  # fmt: skip


def refused(facts: Facts) -> tuple[Refused, ...]:
    """Assignments of closed rounds that were not merged or failed, the newest round first."""
    closed = {r.round: r for r in facts.rounds if r.phase == "merged"}
    dropped: dict[str, str] = {}
    for r in facts.rounds:
        dropped |= r.detail.get("dropped", {})
    found = []
    for record in facts.given:
        a, report = record.assignment, record.report
        if a.assignment_id in dropped:
            what, why, level = "update refused", dropped[a.assignment_id], "bad"
        elif record.state == "failed" and report is not None:
            told = f": {report.message}" if report.message else ""
            what, why, level = "device failed", report.outcome.replace("_", " ") + told, "bad"
        elif a.round not in closed or record.merged_in is not None:
            continue
        elif not a.trains:
            if record.arrived:
                continue
            what, why, level = NOTHING_HEARD, "the round closed without its evaluation", "warn"
        elif record.arrived:
            what, why, level = (
                "came too late", "its round was closed, and no later one took the update", "warn",
            )  # fmt: skip
        else:
            had = "its report" if report is not None else "no word"
            if record.update_digest is not None:
                had = "its update but no report"
            what, why, level = NOTHING_HEARD, f"the round closed with {had} of it", "warn"
        found.append(Refused(a.round, a.device_id, what, why, level))  # type: ignore[arg-type]
    return tuple(sorted(found, key=lambda r: (-r.round, r.device_id)))
