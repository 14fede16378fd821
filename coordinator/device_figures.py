"""What a run asked of each of its devices, what they gave and how they fared, from ledger rows.

"First" is the global adapter as a device first received it in a training round, "last" as it last
did, on the same held-out code. Pure.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist

from coordinator.ledger_types import LedgerRow
from coordinator.uncertainty import LEVEL, HeldOut


@dataclass(frozen=True)
class DeviceFigures:
    """One device over the run. Losses in nats per token; sums over its rounds."""

    device_id: str
    board: str
    tier: str
    language: str
    reason: str  # for its last assignment of training
    examples: int | None  # sequences in its training split
    rank: int  # k of its last training round
    ratio: float  # k / r, mean over its training rounds
    encoding: str
    bits_per_value: float | None  # of the last update
    rounds_given: int  # training rounds it was given work in
    rounds_joined: int  # whose update was merged
    failures: Mapping[str, int]  # outcomes other than done, by name
    up_bytes: int
    down_bytes: int
    dense_bytes: int
    seconds: float  # fetching, training, evaluating, packing, sending
    joules: float | None
    share: float | None  # mean share of the merged update over the run's rounds
    alignment: float | None  # mean cosine with the merged update
    loss_first: float | None
    loss_last: float | None
    margin: float | None  # half of the 95 % interval of loss_last, from its held-out examples
    loss_trained: float | None  # its own after its last training
    loss_local: float | None  # of its local-only adapter when it received the last global one
    accuracy_first: float | None
    accuracy_last: float | None
    gap: float | None = None  # loss_last less the fleet's mean

    @property
    def gain(self) -> float | None:
        """How much the loss fell."""
        if self.loss_first is None or self.loss_last is None:
            return None
        return self.loss_first - self.loss_last

    @property
    def compression(self) -> float | None:
        """Dense bytes per byte sent; None if nothing was sent."""
        return self.dense_bytes / self.up_bytes if self.up_bytes else None

    @property
    def kept_share(self) -> float | None:
        """Bytes sent per byte of dense float32 adapters."""
        return self.up_bytes / self.dense_bytes if self.dense_bytes else None


def device_figures(rows: Sequence[LedgerRow]) -> tuple[DeviceFigures, ...]:
    """One for every device that was given work, by name."""
    of: dict[str, list[LedgerRow]] = {}
    for row in sorted(rows, key=lambda row: (row.device_id, row.round)):
        of.setdefault(row.device_id, []).append(row)
    rounds = len({row.round for row in rows if not row.evaluate_only})
    found = [_device(own, rounds) for own in of.values()]
    last = [d.loss_last for d in found if d.loss_last is not None]
    mean = math.fsum(last) / len(last) if last else 0.0
    return tuple(d if d.loss_last is None else replace(d, gap=d.loss_last - mean) for d in found)


def _device(of: Sequence[LedgerRow], rounds: int) -> DeviceFigures:
    trained = [row for row in of if not row.evaluate_only]
    merged = [row for row in trained if row.merged]
    measured = [row for row in of if row.loss_received is not None]
    first = measured[0] if measured and not measured[0].evaluate_only else None
    last = measured[-1] if measured and measured[-1] is not first else None
    asked = (trained or of)[-1]
    share = _sum([row.update_share for row in merged])
    outcomes = [row.outcome for row in of if row.outcome != "done"]
    return DeviceFigures(
        device_id=asked.device_id,
        board=asked.board,
        tier=asked.tier,
        language=next((row.language for row in reversed(of) if row.language), ""),
        reason=asked.reason,
        examples=next((row.examples for row in reversed(of) if row.examples), None),
        rank=asked.rank,
        ratio=mean_of([row.ratio for row in trained or of]) or 0.0,
        encoding=asked.encoding,
        bits_per_value=next(
            (row.bits_per_value for row in reversed(of) if row.bits_per_value is not None), None
        ),
        rounds_given=len(trained),
        rounds_joined=len(merged),
        failures={name: outcomes.count(name) for name in sorted(set(outcomes))},
        up_bytes=sum(row.up_bytes for row in of),
        down_bytes=sum(row.down_bytes or 0 for row in of),
        dense_bytes=sum(row.dense_bytes for row in of),
        seconds=math.fsum(
            part or 0.0 for row in of
            for part in (row.fetch_s, row.train_s, row.evaluate_s, row.pack_s, row.push_s)
        ),
        joules=_sum([row.joules for row in of]),
        share=None if share is None else share / max(1, rounds),
        alignment=mean_of([row.alignment for row in merged]),
        loss_first=first.loss_received if first else None,
        loss_last=last.loss_received if last else None,
        margin=_margin(last),
        loss_trained=_latest([row.loss_trained for row in of]),
        loss_local=last.loss_local if last else None,
        accuracy_first=first.accuracy_received if first else None,
        accuracy_last=last.accuracy_received if last else None,
    )  # fmt: skip


def _margin(row: LedgerRow | None) -> float | None:
    noise = HeldOut.of(row.device_id, row.nats, row.tokens).noise if row and row.nats else None
    return None if noise is None else NormalDist().inv_cdf((1 + LEVEL) / 2) * math.sqrt(noise)


def _latest(values: Sequence[float | None]) -> float | None:
    return next((v for v in reversed(values) if v is not None), None)


def mean_of(values: Sequence[float | None]) -> float | None:
    """Mean of those that are known; None if none is."""
    known = [v for v in values if v is not None]
    return math.fsum(known) / len(known) if known else None


def _sum(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return math.fsum(known) if known else None
