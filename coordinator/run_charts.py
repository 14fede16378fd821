"""The figures of a run's report: charts with the captions they would have in a paper."""

from __future__ import annotations

from collections.abc import Sequence

from coordinator.charts import (
    Axis,
    Bars,
    Dot,
    Group,
    Interval,
    Line,
    bar_chart,
    interval_chart,
    line_chart,
    scatter_chart,
)
from coordinator.device_figures import DeviceFigures
from coordinator.document import Figure, Table
from coordinator.phases import PHASES
from coordinator.report import RunReport
from coordinator.run_fairness import RunFairness
from coordinator.web.words import UNKNOWN, decimal, signed

ROUNDS = Axis("rounds merged", whole=True)
NO_PHASES = ("wait",)  # the device had nothing to do


def charts_of_rounds(found: RunFairness) -> tuple[Figure, ...]:
    """Loss over rounds, of the fleet and each device; and how far apart they were."""
    if not found.over_rounds:
        return ()
    height = Axis("loss", found.unit)
    series: dict[str, dict[int, float]] = {
        "fleet mean": {r.round: r.summary.mean for r in found.over_rounds}
    }
    for r in found.over_rounds:
        for device, loss in r.losses.items():
            series.setdefault(device, {})[r.round] = loss
    spreads = {
        "worst tenth": {r.round: r.summary.worst_decile_mean for r in found.over_rounds},
        "mean": {r.round: r.summary.mean for r in found.over_rounds},
        "best tenth": {r.round: r.summary.best_decile_mean for r in found.over_rounds},
    }
    apart = {
        "range": {r.round: r.summary.range for r in found.over_rounds},
        "standard deviation": {r.round: r.summary.std for r in found.over_rounds},
    }
    return (
        _lines("Loss over rounds", series, height,
               "Loss of the global adapter as received, each device on its own held-out data, and "
               "the mean of the devices measured in that round."),
        _lines("Worst, mean and best loss", spreads, height,
               "The ends of the fleet over rounds: mean of the ⌈N/10⌉ highest and lowest losses. "
               "Rounds in which fewer devices were measured compare different fleets."),
        _lines("Spread of the losses", apart, Axis("difference", found.unit),
               "How far apart the devices were: highest less lowest loss, and the standard "
               "deviation, the noise of held-out sets included."),
    )  # fmt: skip


def charts_of_devices(found: RunFairness) -> tuple[Figure, ...]:
    """The last loss of each device with its interval."""
    shown = [d for d in found.devices if d.loss_last is not None]
    if not shown:
        return ()
    shown.sort(key=lambda d: -(d.loss_last or 0.0))
    mean = sum(d.loss_last or 0.0 for d in shown) / len(shown)
    rows = [
        Interval(d.device_id, d.loss_last or 0.0, *_ends(d))
        for d in shown
    ]  # fmt: skip
    title = "Last loss by device"
    return (Figure(
        "Loss of the last adapter on each device's held-out data, the highest first; bars are 95 % "
        "intervals from its held-out examples, the broken line is the fleet's mean.",
        interval_chart(title, rows, Axis("loss", found.unit), reference=mean),
        Table(title, ("device", "loss", "low", "high"), tuple(
            (r.name, decimal(r.value), decimal(r.low), decimal(r.high)) for r in rows)),
    ),)  # fmt: skip


def scatters(found: RunFairness) -> tuple[Figure, ...]:
    """Compression against the gap, and the sketch ratio against the fall of the loss."""
    kept = "Share of bytes kept against loss gap"
    ratio = "Sketch ratio against fall of the loss"
    return (
        _scatter(kept, [(d, d.kept_share, d.gap) for d in found.devices],
                 Axis("bytes sent / dense bytes"), Axis("loss gap", found.unit),
                 "Compression against the loss gap, a mark per device: above 0 it fares worse than "
                 "the mean. Devices differ in data and hardware, too."),
        _scatter(ratio, [(d, d.ratio, d.gain) for d in found.devices],
                 Axis("sketch ratio k / r"), Axis("fall of the loss", found.unit),
                 "Mean sketch ratio against how much the loss fell from the first adapter received "
                 "to the last."),
    )  # fmt: skip


def charts_of_costs(report: RunReport, found: RunFairness) -> tuple[Figure, ...]:
    """Bytes and seconds by device."""
    names = [d.device_id for d in found.devices]
    up = [d.up_bytes / 1e6 for d in found.devices]
    down = [d.down_bytes / 1e6 for d in found.devices]
    by_name = {p.device_id: p for p in report.phases}
    shown = [n for n in names if n in by_name]
    phases = [p for p in PHASES if p not in NO_PHASES
              and any(by_name[n].seconds[p] > 0 for n in shown)]  # fmt: skip
    bars = [Bars(p, [by_name[n].seconds[p] for n in shown]) for p in phases]
    sent, busy = "Bytes by device", "Seconds by device"
    return (
        Figure("Bytes of files over the run.",
               bar_chart(sent, names, [Bars("sent", up), Bars("fetched", down)],
                         Axis("bytes", "MB")),
               Table(sent, ("device", "sent, MB", "fetched, MB"), tuple(
                   (n, decimal(a), decimal(b)) for n, a, b in zip(names, up, down, strict=True)))),
        Figure("Seconds at work by phase over the run; waiting for a round is left out.",
               bar_chart(busy, shown, bars, Axis("time", "s"), stacked=True),
               Table(busy, ("device", *phases), tuple(
                   (n, *(decimal(by_name[n].seconds[p], 2) for p in phases)) for n in shown))),
    )  # fmt: skip


def _lines(title: str, series: dict[str, dict[int, float]], y: Axis, caption: str) -> Figure:
    rounds = sorted({r for points in series.values() for r in points})
    lines = [Line(name, [(float(r), v) for r, v in points.items()])
             for name, points in series.items()]  # fmt: skip
    rows = tuple((str(r), *(decimal(points.get(r)) for points in series.values())) for r in rounds)
    table = Table(title, ("rounds merged", *series), rows, wide=len(series) > 8)
    return Figure(caption, line_chart(title, lines, ROUNDS, y), table)


def _scatter(
    title: str,
    points: Sequence[tuple[DeviceFigures, float | None, float | None]],
    x: Axis,
    y: Axis,
    caption: str,
) -> Figure:
    tiers: dict[str, list[Dot]] = {}
    rows = []
    for device, across, up in points:
        if across is None or up is None:
            continue
        name = device.tier or "unknown hardware"
        tiers.setdefault(name, []).append(Dot(across, up, device.device_id))
        rows.append((device.device_id, device.tier or UNKNOWN, decimal(across), signed(up)))
    groups = [Group(name, dots) for name, dots in sorted(tiers.items())]
    return Figure(
        caption, scatter_chart(title, groups, x, y),
        Table(title, ("device", "hardware", x.title, y.title), tuple(rows), text_columns=2),
    )  # fmt: skip


def _ends(device: DeviceFigures) -> tuple[float | None, float | None]:
    if device.loss_last is None or device.margin is None:
        return None, None
    return device.loss_last - device.margin, device.loss_last + device.margin
