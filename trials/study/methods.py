"""`study methods`: every method on the same budget of rounds, of bytes, of seconds.

The budget is what the reference, the first method, spends in all its rounds of the same seed. A
method is read at the last measurement within it: before its end where it spends more, at its end
where it spends less, which is told. Bytes are all devices' up and down.
Seconds are what devices measured for training, plus their bytes over the study's link, the slowest
device of each round: no clock of a fleet, but the same for all methods. Methods that keep parts at
home are measured with each device's own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from coordinator.document import Document, Part, Section, Table, Words
from coordinator.methods import METHODS
from trials.study.board import Cell
from trials.study.figures import metric, paired, resampled
from trials.study.playing import Point
from trials.study.settings import LinkSection, StudySettings
from trials.study.statistics import Array, Estimate, draws, interval
from trials.study.words import Statement, answer, interval_figure, number, said, shown

TITLE = "Methods on the same budget"
LEAD = (
    "Every method on the same devices, data and turns, read within the same rounds, bytes and "
    "seconds. Intervals are of 95 %, for single comparisons; learning rate and scale were tuned "
    "for no method."
)
SHOWN = ("mean loss", "worst 10 %", "range", "Jain")
BUDGETS = ("rounds", "bytes", "seconds")


@dataclass(frozen=True)
class Standing:
    """A method within a budget. rounds: done by then, on average; spent: share of the budget;
    against: its mean loss less the reference's, paired by seed.
    """

    method: str
    budget: str
    rounds: float
    spent: float
    figures: Mapping[str, Estimate]
    against: Estimate


def conclude(s: StudySettings, cells: Mapping[str, Cell]) -> tuple[Document, dict[str, Any]]:
    """The report, and all figures as plain values."""
    of = {cell.facts.method: cell for cell in cells.values()}
    reference = next(iter(of))
    spent = {budget: {m: _spent(s.link, cell, budget) for m, cell in of.items()}
             for budget in BUDGETS}  # fmt: skip
    limits = {budget: each[reference][:, -1] for budget, each in spent.items()}  # (S,)
    standings = []
    for budget in BUDGETS:
        base = of[reference].final
        for m, cell in of.items():
            points, most = spent[budget][m], limits[budget]
            places = (points <= most[:, None] * (1 + 1e-9)).sum(1) - 1
            share = float((points[np.arange(len(most)), places] / most).mean())
            standings.append(_standing(s, m, budget, cell, places.tolist(), base, share))
    statements = [
        Statement(f"{x.method} has a {'lower' if x.against.value < 0 else 'higher'} mean loss than "
                  f"{reference} within the same {x.budget}: {shown(x.against)} nats per token.",
                  supported=True)
        for x in standings if x.method != reference and x.against.excludes_zero
    ]  # fmt: skip
    statements += [
        Statement(f"Within the same {budget}, no difference in mean loss from {reference} was "
                  f"shown for {', '.join(alike)}.", supported=False)
        for budget in BUDGETS
        if (alike := [x.method for x in standings if x.budget == budget and x.method != reference
                      and not x.against.excludes_zero])
    ]  # fmt: skip
    budgets = (_budget(b, float(limits[b].mean()), standings, reference) for b in BUDGETS)
    answers = [_answer(b, [x for x in standings if x.budget == b], reference) for b in BUDGETS]
    sections = (answer(answers), *said(statements), _setting(s, of), *budgets)
    figures = {
        "limits": {budget: most.tolist() for budget, most in limits.items()},
        "standings": [asdict(x) for x in standings],
        "statements": [asdict(x) for x in statements],
    }
    return Document(TITLE, LEAD, sections), figures


def _answer(budget: str, standings: Sequence[Standing], reference: str) -> str:
    """Who stands where within one budget."""
    ordered = sorted(standings, key=lambda x: x.figures["mean loss"].value)
    one_model = next((x for x in ordered if METHODS[x.method].has_global), ordered[0])
    apart = [x for x in standings if x.method != reference and x.against.excludes_zero]
    lower, higher = (
        ", ".join(x.method for x in apart if (x.against.value < 0) == below) or "none"
        for below in (True, False)
    )
    alike = len(standings) - 1 - len(apart)
    return (
        f"Within the same {budget}, {_named(ordered[0])} has the lowest mean loss"
        f"{_unless_first(one_model, ordered[0])}. Against {reference}, a lower one was shown for "
        f"{lower}; a higher one for {higher}; no difference for {alike} others. Of such "
        "comparisons without a difference one in twenty would be said to have one."
    )


def _named(x: Standing) -> str:
    what = "" if METHODS[x.method].has_global else " (a model for each device)"
    return f"{x.method}{what}, {shown(x.figures['mean loss'])},"


def _unless_first(one_model: Standing, first: Standing) -> str:
    """Who leads those with one model for all, where it is not who leads."""
    return (
        "" if one_model is first else f"; of those with one model for all, {_named(one_model)[:-1]}"
    )


def _spent(link: LinkSection, cell: Cell, budget: str) -> Array:
    """(S, points) so far."""
    if budget == "rounds":
        return np.array([[p.rounds for p in r.points] for r in cell.records], np.float64)
    if budget == "bytes":
        return np.array([[_bytes(p) for p in r.points] for r in cell.records], np.float64)
    return np.stack([_seconds(link, r.points) for r in cell.records])


def _bytes(p: Point) -> float:
    return float(sum(p.up_bytes.values()) + sum(p.down_bytes.values()))


def _seconds(link: LinkSection, points: Sequence[Point]) -> Array:
    """(points,) so far; between two of them the slowest device counts."""
    each = np.array(
        [[p.train_s[d] + 8 * p.up_bytes[d] / link.up_bps + 8 * p.down_bytes[d] / link.down_bps
          for d in p.nats] for p in points]
    )  # fmt: skip
    steps: Array = np.diff(each, axis=0).max(-1)
    return np.concatenate([[0.0], steps.cumsum()])


def _standing(
    s: StudySettings, method: str, budget: str, cell: Cell, places: Sequence[int], base: Any,
    spent: float,
) -> Standing:  # fmt: skip
    a, losses = s.analysis, cell.at(places)
    shape, figures = losses.nats.shape, {}
    for name in SHOWN:
        found = [resampled(name, d, losses, losses).mean(-1)
                 for d in draws((shape[0], shape[1], shape[2]), a.replicates, a.seed,
                                devices=False)]  # fmt: skip
        value = float(metric(name, losses, losses).mean())
        figures[name] = interval(value, np.concatenate(found), cell.seeds)
    rounds = float(np.mean([r.points[i].rounds for r, i in zip(cell.records, places, strict=True)]))
    against = paired("mean loss", losses, base, losses, a.replicates, a.seed)
    return Standing(method, budget, rounds, spent, figures, against)


def _setting(s: StudySettings, of: Mapping[str, Cell]) -> Section:
    c, personal = s.learning, [m for m in of if not METHODS[m].has_global]
    start = next(iter(of.values())).start.loss.mean()
    ranks = ", ".join(f"{share:g}" for share in s.ratios.sketch)
    parts: list[Part] = [
        Words(
            f"The nano model, rank {c.rank}, {len(s.fleet.domains)} devices with a domain each, "
            f"{s.fleet.participants} in each of {c.rounds} rounds of {c.local_steps} steps, "
            f"{len(s.design.seeds)} seeds; mean loss before {number(start)} nats per token. "
            f"Methods that allow it have devices at {ranks} of the rank, drawn for each seed; the "
            "others, all of it. Everything travels as float32. Seconds: training as measured here, "
            f"plus bytes over {s.link.up_bps / 1e6:g} Mbit/s up and {s.link.down_bps / 1e6:g} "
            "down, the slowest device of each round. That training was timed while the machine did "
            "other things too: small differences within the same seconds are none of methods."
        )
    ]
    if personal:
        parts.append(Words(
            f"{', '.join(personal)}: devices keep part of the model, and are measured with it; "
            "their losses are of as many models as devices, the others' of one."
        ))  # fmt: skip
    return Section("What was run", tuple(parts))


UNITS = {"rounds": "rounds", "bytes": "bytes up and down", "seconds": "seconds"}


def _budget(budget: str, limit: float, standings: Sequence[Standing], reference: str) -> Section:
    mine = sorted((x for x in standings if x.budget == budget),
                  key=lambda x: x.figures["mean loss"].value)  # fmt: skip
    columns = ("method", "rounds", "of the budget", *SHOWN, f"mean loss less {reference}'s")
    rows = tuple(
        (
            x.method,
            number(x.rounds, 1),
            f"{x.spent:.0%}",
            *(shown(x.figures[n]) for n in SHOWN),
            shown(x.against),
        )
        for x in mine
    )
    table = Table("Losses in nats per token", columns, rows, wide=True)
    figure = interval_figure(
        f"Mean loss less {reference}'s, within the same {budget}",
        [(x.method, x.against) for x in mine], "nats per token",
    )  # fmt: skip
    return Section(f"Within {limit:,.0f} {UNITS[budget]}", (table, figure))
