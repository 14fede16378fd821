"""How evenly a run serves its devices: summaries over per-device losses, and the ledger.

Losses are lower-is-better, so the worst tail is the high one. Scale-free indices (Jain, Gini)
hide large gaps between good devices; they are always given beside the worst tail. Computes from
plain facts; knows nothing of where they are stored or how they are shown.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from profiles.errors import SketchfleetError
from protos.contract import LocalReport

WORST_SHARE = 0.1


class FairnessError(SketchfleetError):
    """A summary was asked of facts that do not allow one."""


@dataclass(frozen=True)
class FairnessSummary:
    """Spread of one loss over the fleet."""

    devices: int
    mean: float
    weighted_mean: float
    best: float
    worst: float
    range: float
    std: float  # of the population
    jain: float  # 1 / (1 + CV^2), in [1/N, 1]
    worst_decile_mean: float  # mean of the ceil(N / 10) highest losses
    gini: float


@dataclass(frozen=True)
class DeviceRound:
    """What one device was asked and gave in one training round."""

    round: int
    device_id: str
    board: str
    rank: int  # k
    global_rank: int  # r
    reason: str
    up_bytes: int  # as sent
    dense_bytes: int  # what the whole adapter, uncompressed, would have been
    report: LocalReport
    merged_share: float = 0.0  # of the round's merge; 0 if not merged


@dataclass(frozen=True)
class DeviceLedgerRow:
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
    update_share: float  # mean share of the merge over the run's rounds

    @property
    def compression(self) -> float | None:
        """Dense bytes per byte sent; None if nothing was sent."""
        return self.dense_bytes / self.up_bytes if self.up_bytes else None


def summarise(losses: Mapping[str, float], weights: Mapping[str, float]) -> FairnessSummary:
    """Spread of per-device losses; `weights` (held-out or training sizes) by the same names.

    Raises `FairnessError` on no devices, a missing weight, or a loss that is not finite.
    """
    if not losses:
        raise FairnessError("no device has a loss to summarise; wait for a round to report")
    if missing := sorted(losses.keys() - weights.keys()):
        raise FairnessError(f"no weight for {', '.join(missing)}; pass one for every loss")
    names = sorted(losses)
    values = [float(losses[name]) for name in names]
    if not all(map(math.isfinite, values)):
        bad = [name for name in names if not math.isfinite(losses[name])]
        raise FairnessError(f"loss of {', '.join(bad)} is not finite; leave it out and say so")
    shares = [float(weights[name]) for name in names]
    total = math.fsum(shares)
    mean = math.fsum(values) / len(values)
    weighted = (
        math.fsum(w * v for w, v in zip(shares, values, strict=True)) / total if total else mean
    )
    return FairnessSummary(
        devices=len(values),
        mean=mean,
        weighted_mean=weighted,
        best=min(values),
        worst=max(values),
        range=max(values) - min(values),
        std=math.sqrt(math.fsum((v - mean) ** 2 for v in values) / len(values)),
        jain=jain(values),
        worst_decile_mean=worst_mean(values, WORST_SHARE),
        gini=gini(values),
    )


def jain(values: Sequence[float]) -> float:
    """Jain's index (sum a)^2 / (N sum a^2): 1 if all are equal, 1/N if one has everything."""
    squares = math.fsum(v * v for v in values)
    return math.fsum(values) ** 2 / (len(values) * squares) if squares else 1.0


def gini(values: Sequence[float]) -> float:
    """Gini index of non-negative values, by sorting: 0 if all are equal."""
    total = math.fsum(values)
    if not total:
        return 0.0
    n = len(values)
    ranked = math.fsum((2 * i - n + 1) * v for i, v in enumerate(sorted(values)))
    return ranked / (n * total)


def worst_mean(values: Sequence[float], share: float) -> float:
    """Mean of the ceil(share * N) highest losses: CVaR. Never an empty tail, however small N."""
    tail = sorted(values)[-max(1, math.ceil(share * len(values) - 1e-9)) :]
    return math.fsum(tail) / len(tail)


def spearman(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Rank correlation, ties sharing their mean rank. None below two pairs or without spread."""
    if len(x) != len(y):
        raise FairnessError(f"{len(x)} values cannot be paired with {len(y)}")
    a, b = _ranks(x), _ranks(y)
    middle = (len(x) + 1) / 2
    va = math.fsum((r - middle) ** 2 for r in a)
    vb = math.fsum((r - middle) ** 2 for r in b)
    if not va or not vb:
        return None
    both = math.fsum((p - middle) * (q - middle) for p, q in zip(a, b, strict=True))
    return both / math.sqrt(va * vb)


def ledger(facts: Iterable[DeviceRound], rounds: int) -> tuple[DeviceLedgerRow, ...]:
    """One row per device, sorted by name. `rounds`: training rounds the run has closed.

    Only evaluations of the whole adapter as received count: a slice is not what a device gets.
    Facts of the evaluate-only round (`round` >= `rounds`) give losses but no round joined.
    """
    history: dict[str, list[DeviceRound]] = {}
    for fact in sorted(facts, key=lambda f: (f.device_id, f.round)):
        history.setdefault(fact.device_id, []).append(fact)
    seen = {device: _received(of) for device, of in history.items()}
    before = {d: losses[0] for d, losses in seen.items() if losses and losses[0][0] < rounds}
    after = {d: losses[-1][1] for d, losses in seen.items()
             if losses and losses[-1] != before.get(d)}  # fmt: skip
    mean = math.fsum(after.values()) / len(after) if after else 0.0
    rows = []
    for device, of in history.items():
        trained = [f for f in of if f.round < rounds] or of
        last = trained[-1]
        rows.append(
            DeviceLedgerRow(
                device_id=device,
                board=last.board,
                language=next(
                    (f.report.main_language for f in reversed(of) if f.report.main_language), ""
                ),
                k=last.rank,
                ratio=last.rank / last.global_rank,
                reason=last.reason,
                up_bytes=sum(f.up_bytes for f in of),
                dense_bytes=sum(f.dense_bytes for f in of),
                seconds=math.fsum(_seconds(f.report) for f in of),
                loss_before=before[device][1] if device in before else None,
                loss_after=after.get(device),
                gap=after[device] - mean if device in after else None,
                rounds_joined=sum(f.round < rounds and f.report.outcome == "done" for f in of),
                update_share=math.fsum(f.merged_share for f in of) / rounds if rounds else 0.0,
            )
        )
    return tuple(rows)


def _received(facts: Sequence[DeviceRound]) -> list[tuple[int, float]]:
    """(round, loss) of the whole adapter as received, oldest first."""
    found = ((fact.round, fact.report.evaluation("global", "received")) for fact in facts)
    return [(number, evaluation.loss) for number, evaluation in found if evaluation is not None]


def _seconds(report: LocalReport) -> float:
    return report.fetch_s + report.train_s + report.evaluate_s + report.push_s


def _ranks(values: Sequence[float]) -> list[float]:
    """Ranks from 1; equal values share the mean of theirs."""
    order = sorted(range(len(values)), key=values.__getitem__)
    ranks = [0.0] * len(values)
    start = 0
    while start < len(order):
        stop = start
        while stop < len(order) and values[order[stop]] == values[order[start]]:
            stop += 1
        for place in order[start:stop]:
            ranks[place] = (start + 1 + stop) / 2
        start = stop
    return ranks
