"""What pages are put together from: tables, figures, charts, alerts, and the head of every page."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from coordinator.web import words
from coordinator.web.facts import Facts

Level = Literal["", "good", "warn", "bad"]


@dataclass(frozen=True)
class Cell:
    """Text in a table; `href` makes it a link, `note` stands below it in small print."""

    text: str
    href: str = ""
    level: Level = ""
    note: str = ""


@dataclass(frozen=True)
class Table:
    """Rows under columns; the first cell of a row names it. numeric: columns set flush right."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    empty: str  # said in place of the table when there are no rows
    numeric: frozenset[int] = frozenset()
    wide: int | None = None  # the column that holds sentences
    cards: bool = False  # on a phone, each row becomes a card; else the table is scrolled


@dataclass(frozen=True)
class Figure:
    """One number with its name, as on a tile."""

    name: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Chart:
    """A chart with its heading; `note` says what to mind when reading it."""

    title: str
    svg: str
    note: str = ""


@dataclass(frozen=True)
class Notice:
    """An alert in words; `href` leads to whom it concerns."""

    text: str
    level: Level = "warn"
    href: str = ""


@dataclass(frozen=True)
class RunHead:
    """What stands at the top of every page."""

    run_id: str
    phase: str  # "gathering", "open", "merging", "finished", "stored"
    sentence: str
    merged: int
    wanted: int
    elapsed_s: float | None  # of an open round
    length_s: float | None


def run_head(facts: Facts) -> RunHead:
    """Where the run stands, in a sentence."""
    phase, sentence = _standing(facts)
    elapsed_s = length_s = None
    state = None if facts.live is None else facts.live.state
    if state is not None and state.phase == "open":
        length_s = max(0.0, state.deadline_at_s - state.opened_at_s)
        elapsed_s = min(length_s, max(0.0, facts.at - state.opened_at_s))
    return RunHead(
        facts.run.run_id, phase, sentence, facts.rounds_merged, facts.rounds_wanted,
        elapsed_s, length_s,
    )  # fmt: skip


def _standing(facts: Facts) -> tuple[str, str]:
    if facts.run.finished_at is not None:
        return "finished", f"Finished {words.ago(facts.at - facts.run.finished_at)}."
    if facts.live is None:
        return "stored", (
            "Shown from the database alone; a coordinator was last at work "
            f"{words.ago(facts.at - facts.run.alive_at)}."
        )
    state = facts.live.state
    if state.phase == "gathering":
        ready = words.counted(len(state.ready), "device")
        needs = int(facts.run.config["round"]["min_devices"])
        again = f" for the {state.attempts + 1}. time" if state.attempts else ""
        return "gathering", (
            f"Gathering devices for round {state.round}{again}: {ready} ready, "
            f"{needs} needed to begin."
        )
    if state.phase == "merging":
        return "merging", f"Merging round {state.round}."
    if state.phase == "finished":
        return "finished", "Finished."
    left_s = state.deadline_at_s - facts.at
    deadline = (
        f"closes in {words.duration(left_s)} at the latest" if left_s > 0
        else f"is {words.duration(-left_s)} past its deadline, waiting for a quorum"
    )  # fmt: skip
    doing = "evaluates the finished adapter" if state.evaluating else "trains"
    failed = f", {len(state.failed)} failed" if state.failed else ""
    return "open", (
        f"Round {state.round} {doing}: {len(state.arrived)} of "
        f"{words.counted(len(state.assigned), 'device')} done{failed}; it {deadline}."
    )
