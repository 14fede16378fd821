"""The fleet at a glance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from coordinator.charts import Axis, Line, line_chart
from coordinator.web import words
from coordinator.web.facts import Facts
from coordinator.web.pages.outcomes import phase_chart
from coordinator.web.pages.parts import Cell, Chart, Figure, Notice, Table
from coordinator.web.pages.standing import Standing, standings
from coordinator.web.pages.warnings import notices


@dataclass(frozen=True)
class FleetView:
    """Figures, alerts, a row per device, and their losses over the rounds."""

    figures: tuple[Figure, ...]
    notices: tuple[Notice, ...]
    devices: Table
    charts: tuple[Chart, ...]


def fleet_view(facts: Facts) -> FleetView:
    """The page `/`."""
    found = standings(facts)
    alerts = notices(facts)
    return FleetView(
        figures=_figures(facts, found),
        notices=alerts,
        devices=_devices(facts, found, alerts),
        charts=(_losses(facts), _times(facts)),
    )


def _losses(facts: Facts) -> Chart:
    title = "Loss of each device over the rounds"
    lines = [Line(device, points) for device, points in loss_lines(facts).items()]
    return Chart(
        title,
        line_chart(title, lines, Axis("rounds merged", whole=True), Axis("loss", "nats per token")),
        "Of the whole adapter as received, on the device's own held-out code; lower is better.",
    )


def _times(facts: Facts) -> Chart:
    """Of the newest round that closed."""
    closed = [r.round for r in facts.rounds if r.closed_at is not None]
    chart = phase_chart([r for r in facts.rows if closed and r.round == closed[-1]])
    where = f"In round {closed[-1]}." if closed else ""
    return replace(chart, note=f"{where} {chart.note}".strip())


def loss_lines(facts: Facts) -> dict[str, list[tuple[float, float]]]:
    """By device, (rounds merged, loss) of the whole adapter as received."""
    return {
        device: points
        for device, rows in facts.rows_by_device.items()
        if (points := [(float(r.round), r.loss_received) for r in rows
                       if r.loss_received is not None])
    }  # fmt: skip


def _figures(facts: Facts, found: Sequence[Standing]) -> tuple[Figure, ...]:
    newest = max(facts.measured, default=None)
    rows = facts.measured[newest].values() if newest is not None else ()
    losses = [r.loss_received for r in rows if r.loss_received is not None]
    after = "" if newest is None else f", after {words.counted(newest, 'round')}"
    up, dense = sum(s.up_bytes for s in found), sum(s.dense_bytes for s in found)
    ready = "" if facts.live is None else f"{len(facts.live.state.ready)} connected"
    saved = f"{dense / up:.1f} times fewer than dense" if up else "nothing yet"
    measured = f"of {words.counted(len(losses), 'device')}{after}"
    return (
        Figure("Devices", str(len(found)), ready or "enrolled"),
        Figure("Mean loss", words.decimal(sum(losses) / len(losses) if losses else None), measured),
        Figure("Highest loss", words.decimal(max(losses, default=None)), "of these devices"),
        Figure("Updates sent", words.size(up), saved),
        Figure("Models fetched", words.size(sum(s.down_bytes for s in found)), "by all devices"),
    )


def _devices(facts: Facts, found: Sequence[Standing], alerts: Sequence[Notice]) -> Table:
    warned = {n.href for n in alerts}
    newest = max(facts.measured, default=0)
    return Table(
        caption="Devices",
        columns=(
            "Device",
            "State",
            "Board",
            "Mbit/s up / down",
            "k",
            "Loss",
            "Gap",
            "Sent",
            "Seen",
        ),
        rows=tuple(_row(facts, s, words.device_link(s.device_id) in warned, newest) for s in found),
        empty="No device has enrolled yet. Give a device the join token and start its agent.",
        numeric=frozenset({3, 4, 5, 6, 7}),
        cards=True,
    )


def _row(facts: Facts, s: Standing, warned: bool, newest: int) -> tuple[Cell, ...]:
    link = None if s.profile is None else s.profile.link
    rank = words.UNKNOWN if s.last is None else f"{s.last.rank} of {s.last.global_rank}"
    compression = f"{s.compression:.1f}× fewer" if s.compression else ""
    old = s.loss_round is not None and s.loss_round < newest
    return (
        Cell(s.device_id, words.device_link(s.device_id), note="see alerts" if warned else ""),
        Cell(s.state, level=s.level, note=s.note),
        Cell(s.board),
        Cell(words.UNKNOWN if link is None
             else words.rates(link.up_bps, link.down_bps)),
        Cell(rank),
        Cell(words.decimal(s.loss), note=f"of round {s.loss_round}" if old else ""),
        Cell(words.signed(s.gap)),
        Cell(words.size(s.up_bytes), note=compression),
        Cell(words.ago(facts.at - s.last_seen_at) if s.last_seen_at else words.UNKNOWN),
    )  # fmt: skip
