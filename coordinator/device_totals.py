"""What each device gave to a whole run and what it got: its ledger rows, summed up.

Computes from plain facts; knows nothing of where they are stored.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from coordinator.ledger_types import NOTHING_HEARD, LedgerRow


@dataclass(frozen=True)
class DeviceTotals:
    """What one device gave to a run and what it got."""

    device_id: str
    board: str
    language: str
    k: int  # of its last round
    ratio: float  # sketch ratio k / r
    reason: str
    up_bytes: int
    dense_bytes: int
    seconds: float
    loss_before: float | None  # of the whole adapter, first received in a training round
    loss_after: float | None  # of the whole adapter, last received; None if only measured before
    gap: float | None  # loss_after less the fleet's mean loss_after
    rounds_joined: int
    update_share: float  # mean share of the merged update over the run's rounds
    loss_local: float | None = None  # of the local-only adapter, when `loss_after` was measured

    @property
    def compression(self) -> float | None:
        """Dense bytes per byte sent; None if nothing was sent."""
        return self.dense_bytes / self.up_bytes if self.up_bytes else None


def device_totals(rows: Iterable[LedgerRow]) -> tuple[DeviceTotals, ...]:
    """One for every device that reported, sorted by name.

    Only evaluations of the whole adapter as received count: a slice is not what a device gets. The
    evaluate-only round gives losses but no round joined.
    """
    found, history = list(rows), dict[str, list[LedgerRow]]()
    rounds = len({row.round for row in found if not row.evaluate_only})
    for row in sorted(found, key=lambda r: (r.device_id, r.round)):
        if row.outcome != NOTHING_HEARD:
            history.setdefault(row.device_id, []).append(row)
    seen = {d: [r for r in of if r.loss_received is not None] for d, of in history.items()}
    before = {d: of[0] for d, of in seen.items() if of and not of[0].evaluate_only}
    last = {d: of[-1] for d, of in seen.items() if of and of[-1] is not before.get(d)}
    losses = {d: r.loss_received for d, r in last.items() if r.loss_received is not None}
    mean = math.fsum(losses.values()) / len(losses) if losses else 0.0
    return tuple(
        _totals(of, rounds, before.get(device), last.get(device), mean)
        for device, of in history.items()
    )


def _totals(
    of: Sequence[LedgerRow],
    rounds: int,
    first: LedgerRow | None,
    final: LedgerRow | None,
    mean: float,
) -> DeviceTotals:
    after = None if final is None else final.loss_received
    last = ([row for row in of if not row.evaluate_only] or of)[-1]
    return DeviceTotals(
        device_id=last.device_id,
        board=last.board,
        language=next((row.language for row in reversed(of) if row.language), ""),
        k=last.rank,
        ratio=last.ratio,
        reason=last.reason,
        up_bytes=sum(row.up_bytes for row in of),
        dense_bytes=sum(row.dense_bytes for row in of),
        seconds=math.fsum(_busy_s(row) for row in of),
        loss_before=None if first is None else first.loss_received,
        loss_after=after,
        gap=None if after is None else after - mean,
        rounds_joined=sum(not row.evaluate_only and row.outcome == "done" for row in of),
        update_share=math.fsum(row.update_share or 0.0 for row in of) / max(1, rounds),
        loss_local=None if final is None else final.loss_local,
    )


def _busy_s(row: LedgerRow) -> float:
    """At work, waiting left out."""
    phases = (row.fetch_s, row.train_s, row.evaluate_s, row.pack_s, row.push_s)
    return math.fsum(seconds or 0.0 for seconds in phases)
