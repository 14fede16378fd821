"""One device: what it is, what it was asked and why, what it gave and got, what went wrong."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from coordinator.charts import Axis, Bars, Line, bar_chart, line_chart
from coordinator.ledger_types import LedgerRow
from coordinator.web import words
from coordinator.web.facts import Facts
from coordinator.web.pages.fairness import mean_line
from coordinator.web.pages.fleet import loss_lines
from coordinator.web.pages.outcomes import MOST_BARS, outcome_cell, phase_chart
from coordinator.web.pages.parts import Cell, Chart, Figure, Notice, Table
from coordinator.web.pages.screening import Refused, refused
from coordinator.web.pages.standing import Standing, standings
from coordinator.web.pages.warnings import notices
from profiles.device import DeviceProfile


@dataclass(frozen=True)
class DeviceView:
    """Everything about one device."""

    device_id: str
    state: str
    level: str
    note: str
    figures: tuple[Figure, ...]
    notices: tuple[Notice, ...]
    profile: tuple[Figure, ...]
    loss: Chart
    seconds: Chart
    traffic: Chart
    rounds: Table
    faults: Table


def device_view(facts: Facts, device_id: str) -> DeviceView | None:
    """The page `/devices/NAME`; None for a device that is not known here."""
    standing = next((s for s in standings(facts) if s.device_id == device_id), None)
    if standing is None:
        return None
    rows = facts.rows_by_device.get(device_id, ())
    href = words.device_link(device_id)
    return DeviceView(
        device_id=device_id,
        state=standing.state,
        level=standing.level,
        note=standing.note,
        figures=_figures(facts, standing),
        notices=tuple(n for n in notices(facts) if n.href == href),
        profile=_profile(standing.profile),
        loss=_loss(facts, device_id),
        seconds=phase_chart(rows, by_round=True),
        traffic=_traffic(rows),
        rounds=_rounds(facts, rows),
        faults=_faults([r for r in refused(facts) if r.device_id == device_id]),
    )


def _figures(facts: Facts, s: Standing) -> tuple[Figure, ...]:
    asked = [r for r in facts.rows_by_device.get(s.device_id, ()) if not r.evaluate_only]
    shares = [r.update_share for r in asked if r.update_share is not None]
    return (
        Figure("Loss", words.decimal(s.loss), "nothing to compare it with" if s.gap is None
               else f"{words.signed(s.gap)} to the mean of round {s.loss_round}"),
        Figure("Rank", words.UNKNOWN if s.last is None else str(s.last.rank),
               "" if s.last is None else f"of {s.last.global_rank} rows"),
        Figure("Merged", f"{s.merged} of {len(asked)}", "training rounds it was asked for"),
        Figure("Sent", words.size(s.up_bytes),
               f"{s.compression:.1f} times fewer than dense" if s.compression else "nothing yet"),
        Figure("Share", words.percent(sum(shares) / len(shares) if shares else None, 1),
               "of the merged updates it took part in"),
    )  # fmt: skip


def _profile(p: DeviceProfile | None) -> tuple[Figure, ...]:
    if p is None:
        return ()
    gpu, compute, link, power = p.gpu, p.compute, p.link, p.power
    facts = [
        Figure("Board", p.board or words.UNKNOWN),
        Figure("Processor", f"{p.cpu}, {words.counted(p.cores, 'core')}"),
        Figure("Memory", words.size(p.memory_total_bytes),
               f"{words.size(p.trainer_bytes)} for training"),
        Figure("Graphics", words.UNKNOWN if gpu is None
               else f"{gpu.name}, {words.size(gpu.memory_total_bytes)}"),
        Figure("Compute", words.UNKNOWN if compute is None
               else f"{compute.tokens_per_s:,.0f} tokens/s", "training, as measured"),
        Figure("Link", words.UNKNOWN if link is None
               else f"{words.rate(link.up_bps)} up, {words.rate(link.down_bps)} down",
               "" if link is None else f"{1e3 * link.rtt_s:.0f} ms round trip"
               + (", metered" if link.metered else "")),
        Figure("Disk", words.size(p.disk_free_bytes), "free"),
        Figure("Agent", p.agent_version or words.UNKNOWN),
    ]  # fmt: skip
    if power is not None and (power.mode or power.temperature_c is not None):
        warm = "" if power.temperature_c is None else f"{power.temperature_c:.0f} °C"
        facts.append(Figure("Power", power.mode or words.UNKNOWN, warm))
    return tuple(facts)


def _loss(facts: Facts, device_id: str) -> Chart:
    own = loss_lines(facts).get(device_id, [])
    title = "Loss against the fleet"
    return Chart(
        title,
        line_chart(
            title,
            [Line(device_id, own), Line("mean of the fleet", mean_line(facts))],
            Axis("rounds merged", whole=True),
            Axis("loss", "nats per token"),
        ),
        "Of the whole adapter as received, each device on its own held-out code.",
    )


def _traffic(rows: Sequence[LedgerRow]) -> Chart:
    told = [r for r in rows if r.up_bytes or r.down_bytes][-MOST_BARS:]
    title = "Bytes over its link"
    return Chart(
        title,
        bar_chart(
            title,
            [f"round {r.round}" for r in told],
            [Bars("sent", [r.up_bytes / 1e6 for r in told]),
             Bars("fetched", [(r.down_bytes or 0) / 1e6 for r in told])],
            Axis("payload", "MB"),
        ),
        f"The newest {MOST_BARS} rounds." if len(told) == MOST_BARS else "",
    )  # fmt: skip


def _rounds(facts: Facts, rows: Sequence[LedgerRow]) -> Table:
    return Table(
        caption="What it was asked, and what came of it",
        columns=("Round", "k", "Update", "Outcome", "Loss received", "Loss trained", "Sent",
                 "Fetched", "Share", "Why this k"),
        rows=tuple(_row(facts, r) for r in reversed(rows)),
        empty="It has not been given work yet.",
        numeric=frozenset({1, 4, 5, 6, 7, 8}),
        wide=9,
        cards=True,
    )  # fmt: skip


def _row(facts: Facts, r: LedgerRow) -> tuple[Cell, ...]:
    bits = "" if r.bits_per_value is None else f"{r.bits_per_value:.2f} bits a value"
    return (
        Cell(f"{r.round}", f"/rounds/{r.round}", note="evaluation" if r.evaluate_only else ""),
        Cell(words.UNKNOWN if r.evaluate_only else f"{r.rank} of {r.global_rank}"),
        Cell(words.UNKNOWN if r.evaluate_only else r.encoding, note=bits),
        outcome_cell(facts, r),
        Cell(words.decimal(r.loss_received)),
        Cell(words.decimal(r.loss_trained)),
        Cell(words.size(r.up_bytes) if r.up_bytes else words.UNKNOWN),
        Cell(words.size(r.down_bytes)),
        Cell(words.percent(r.update_share, 1)),
        Cell(r.reason),
    )


def _faults(found: Sequence[Refused]) -> Table:
    return Table(
        caption="Faults and refusals",
        columns=("Round", "What", "Why"),
        rows=tuple(
            (Cell(f"{r.round}", f"/rounds/{r.round}"), Cell(r.what, level=r.level), Cell(r.why))
            for r in found
        ),
        empty="Nothing has gone wrong on this device.",
        wide=2,
        cards=True,
    )
