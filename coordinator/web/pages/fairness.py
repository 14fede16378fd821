"""How evenly the run serves its devices, over time."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache, partial

from coordinator.charts import Axis, Bars, Line, bar_chart, line_chart
from coordinator.fairness import (
    WORST_SHARE,
    FairnessSummary,
    LocalGap,
    local_gap,
    summarise,
)
from coordinator.inequality import mean, worst_mean
from coordinator.ledger_types import LedgerRow
from coordinator.uncertainty import Bootstrap, HeldOut, Interval
from coordinator.web import words
from coordinator.web.facts import Facts
from coordinator.web.pages.outcomes import MOST_BARS
from coordinator.web.pages.parts import Cell, Chart, Figure, Notice, Table
from coordinator.web.pages.warnings import notices

MOST_INTERVALS = 24  # rounds whose intervals are drawn
REPLICATES = 500


@dataclass(frozen=True)
class FairnessView:
    """Figures now, charts over time, and the table behind them."""

    figures: tuple[Figure, ...]
    notices: tuple[Notice, ...]
    charts: tuple[Chart, ...]
    history: Table


def fairness_view(facts: Facts) -> FairnessView:
    """The page `/fairness`."""
    history = summaries(facts)
    return FairnessView(
        figures=_figures(facts, history),
        notices=notices(facts),
        charts=_charts(facts, history),
        history=_history(history),
    )


def summaries(facts: Facts) -> dict[int, FairnessSummary]:
    """By rounds merged, the spread of losses over the devices that measured that adapter."""
    found = {}
    for number, rows in sorted(facts.measured.items()):
        losses = {d: r.loss_received for d, r in rows.items() if r.loss_received is not None}
        found[number] = summarise(losses, {d: float(rows[d].examples or 0) for d in losses})
    return found


def mean_line(facts: Facts) -> list[tuple[float, float]]:
    """(rounds merged, mean loss) of the devices that measured that adapter."""
    return [(float(number), s.mean) for number, s in summaries(facts).items()]


def tier_means(facts: Facts) -> dict[str, list[tuple[float, float]]]:
    """By kind of hardware, (rounds merged, mean loss)."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for number, rows in sorted(facts.measured.items()):
        tiers: dict[str, list[float]] = {}
        for row in rows.values():
            if row.loss_received is not None:
                tiers.setdefault(row.tier or "unknown", []).append(row.loss_received)
        for tier, losses in sorted(tiers.items()):
            own = math.fsum(losses) / len(losses)
            lines.setdefault(tier, []).append((float(number), own))
    return lines


def intervals(facts: Facts) -> dict[int, tuple[Interval, Interval]]:
    """By rounds merged, mean and worst 10 % with bootstrap intervals over held-out examples.

    Only where every device told its examples one by one, and of the newest rounds.
    """
    newest = sorted(facts.measured.items())[-MOST_INTERVALS:]
    return {
        number: _interval(tuple(rows.values()))
        for number, rows in newest
        if all(row.nats for row in rows.values())
    }


@lru_cache(maxsize=4 * MOST_INTERVALS)  # a closed round stays as it is
def _interval(rows: tuple[LedgerRow, ...]) -> tuple[Interval, Interval]:
    devices = {row.device_id: HeldOut.of(row.device_id, row.nats, row.tokens) for row in rows}
    drawn = Bootstrap.of(devices, replicates=REPLICATES)
    return drawn.interval(mean), drawn.interval(partial(worst_mean, share=WORST_SHARE))


def against_alone(facts: Facts) -> LocalGap | None:
    """The adapter as received against one trained on a device's code alone, as last measured."""
    newest = {
        row.device_id: row
        for row in facts.rows
        if row.loss_received is not None and row.loss_local is not None
    }
    return local_gap(
        {d: row.loss_received for d, row in newest.items() if row.loss_received is not None},
        {d: row.loss_local for d, row in newest.items() if row.loss_local is not None},
    )


def _figures(facts: Facts, history: dict[int, FairnessSummary]) -> tuple[Figure, ...]:
    last = next(reversed(history.values()), None) if history else None
    after = f"after {words.counted(next(reversed(history)), 'round')}" if history else ""

    def told(name: str, attribute: str, note: str) -> Figure:
        value = None if last is None else getattr(last, attribute)
        return Figure(name, words.decimal(value), note)

    alone = against_alone(facts)
    return (
        told("Mean loss", "mean", after),
        told("Worst 10 %", "worst_decile_mean", "mean of the highest losses"),
        told("Range", "range", "highest less lowest"),
        told("Jain's index", "jain", "1: all alike"),
        told("Gini index", "gini", "0: all alike"),
        Figure(
            "Better off alone",
            words.UNKNOWN if alone is None else f"{len(alone.worse_off)} of {alone.devices}",
            "not measured in this run"
            if alone is None
            else "devices, with an adapter of their own; noise not taken out",
        ),
    )


def _charts(facts: Facts, history: dict[int, FairnessSummary]) -> tuple[Chart, ...]:
    def over_time(attribute: str) -> list[tuple[float, float]]:
        return [(float(n), getattr(s, attribute)) for n, s in history.items()]

    known = intervals(facts)
    of_mean = [(float(n), found[0].low, found[0].high) for n, found in known.items()]
    of_worst = [(float(n), found[1].low, found[1].high) for n, found in known.items()]
    merged, nats = Axis("rounds merged", whole=True), Axis("loss", "nats per token")
    spread, range_, even, tiers = (
        "Mean, worst and best loss", "Range of losses", "Jain's index", "Mean loss by hardware",
    )  # fmt: skip
    return (
        Chart(spread, line_chart(spread, [
            Line("mean", over_time("mean"), of_mean),
            Line("worst 10 %", over_time("worst_decile_mean"), of_worst),
            Line("best", over_time("best"))], merged, nats),
            "Shaded: 95 % intervals, from resampling held-out examples." if known else ""),
        Chart(range_, line_chart(range_, [Line("", over_time("range"))], merged,
                                 Axis("highest less lowest", "nats per token"))),
        Chart(even, line_chart(even, [Line("", over_time("jain"))], merged, Axis("index")),
              "Near 1 even where gaps are large: read it beside the worst 10 %."),
        Chart(tiers, line_chart(tiers, [Line(tier, points) for tier, points
                                        in tier_means(facts).items()], merged, nats)),
        _shares(facts),
    )  # fmt: skip


def _shares(facts: Facts) -> Chart:
    """Of a large fleet, those that gave least and most."""
    own = {
        device: [r.update_share for r in rows if r.update_share is not None]
        for device, rows in facts.rows_by_device.items()
    }
    means = {device: math.fsum(of) / len(of) for device, of in own.items() if of}
    names = list(means)
    note = "Over the rounds whose merge a device took part in."
    if len(names) > MOST_BARS:
        names.sort(key=means.__getitem__)
        names = names[: MOST_BARS // 2] + names[-(MOST_BARS // 2) :]
        note += f" The {MOST_BARS // 2} smallest and largest of {len(means)}."
    title = "Mean share of the merged update"
    bars = [Bars("", [100 * means[name] for name in names])]
    return Chart(title, bar_chart(title, names, bars, Axis("share", "%")), note)


def _history(history: dict[int, FairnessSummary]) -> Table:
    return Table(
        caption="The same as numbers",
        columns=("Rounds merged", "Devices", "Mean", "Worst 10 %", "Best", "Range",
                 "Std. deviation", "Jain", "Gini"),
        rows=tuple(
            (Cell(str(n)), Cell(str(s.devices)), Cell(words.decimal(s.mean)),
             Cell(words.decimal(s.worst_decile_mean)), Cell(words.decimal(s.best)),
             Cell(words.decimal(s.range)), Cell(words.decimal(s.std)),
             Cell(words.decimal(s.jain, 4)), Cell(words.decimal(s.gini, 4)))
            for n, s in reversed(history.items())
        ),
        empty="No device has measured the whole adapter yet.",
        numeric=frozenset(range(1, 9)),
    )  # fmt: skip
