"""Compression against loss gap, device by device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from coordinator.association import associate
from coordinator.charts import Axis, Dot, Group, scatter_chart
from coordinator.web import words
from coordinator.web.facts import Facts
from coordinator.web.pages.parts import Cell, Chart, Table
from coordinator.web.pages.standing import Standing, standings


@dataclass(frozen=True)
class CompressionView:
    """Scatters, what may be said of them, and the table behind them."""

    charts: tuple[Chart, ...]
    statements: tuple[str, ...]
    devices: Table


def compression_view(facts: Facts) -> CompressionView:
    """The page `/compression`."""
    found = [s for s in standings(facts) if s.gap is not None and s.compression is not None]
    gap = Axis("loss gap", "nats per token")
    by_bytes, by_rank = "Bytes saved against loss gap", "Sketch ratio against loss gap"
    return CompressionView(
        charts=(
            Chart(by_bytes, scatter_chart(
                by_bytes, _groups(found, lambda s: s.compression),
                Axis("dense bytes per byte sent"), gap),
                "Gap: a device's loss less the mean of all that measured the same adapter; "
                "above the line it fares worse."),
            Chart(by_rank, scatter_chart(
                by_rank, _groups(found, lambda s: s.last.ratio if s.last else None),
                Axis("sketch ratio k / r"), gap)),
        ),
        statements=_statements(found),
        devices=Table(
            caption="The same as numbers",
            columns=("Device", "Hardware", "k / r", "Sent", "Dense", "Times fewer", "Loss", "Gap"),
            rows=tuple(
                (
                    Cell(s.device_id, words.device_link(s.device_id)),
                    Cell(_tier(s)),
                    Cell(words.decimal(s.last.ratio if s.last else None, 2)),
                    Cell(words.size(s.up_bytes)),
                    Cell(words.size(s.dense_bytes)),
                    Cell(words.decimal(s.compression, 1)),
                    Cell(words.decimal(s.loss)),
                    Cell(words.signed(s.gap)),
                )
                for s in found
            ),
            empty="No device has both sent an update and measured the whole adapter yet.",
            numeric=frozenset(range(2, 8)),
        ),
    )  # fmt: skip


def _groups(
    found: Sequence[Standing], value: Callable[[Standing], float | None]
) -> list[Group]:  # fmt: skip
    tiers: dict[str, list[Dot]] = {}
    for s in found:
        x = value(s)
        if x is not None and s.gap is not None:
            tiers.setdefault(_tier(s), []).append(Dot(x, s.gap, s.device_id))
    return [Group(tier, dots) for tier, dots in sorted(tiers.items())]


def _tier(s: Standing) -> str:
    return (s.last.tier if s.last is not None else "") or "unknown hardware"


def _statements(found: Sequence[Standing]) -> tuple[str, ...]:
    pairs = [(s.compression, s.gap) for s in found if s.compression and s.gap is not None]
    result = associate([x for x, _ in pairs], [y for _, y in pairs])
    if result.spearman is None or result.low is None or result.high is None:
        return (
            f"{words.counted(len(pairs), 'device')} to compare, or no differences among them: "
            "nothing can be said of compression and fairness here.",
        )
    says = "no correlation is shown" if result.low <= 0 <= result.high else "they go together here"
    return (
        f"Spearman correlation of bytes saved and loss gap over {len(pairs)} devices: "
        f"{words.signed(result.spearman, 2)} (95 % interval {words.signed(result.low, 2)} to "
        f"{words.signed(result.high, 2)}, permutation p {words.decimal(result.p_value)}): {says}.",
        "Devices differ in code as well as in compression, so this is no statement about causes.",
    )
