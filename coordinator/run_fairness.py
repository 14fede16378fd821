"""What a run did for each of its devices and how evenly, from its ledger rows alone.

"Before" is the global adapter as a device first received it, "after" as it last did, on the same
held-out code; the two ends compare the devices that were measured at both. Pure: it knows neither
the database nor how the figures are shown.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from coordinator import inequality
from coordinator.alerts import Alert, find_alerts
from coordinator.association import Association, associate
from coordinator.device_figures import DeviceFigures, device_figures
from coordinator.fairness import (
    WORST_SHARE,
    Evenness,
    FairnessSummary,
    LocalGap,
    TierSpread,
    evenness,
    local_gap,
    summarise,
    tier_spread,
)
from coordinator.inequality import Better, Figures
from coordinator.ledger_types import LedgerRow
from coordinator.uncertainty import (
    Bootstrap,
    CorrectedVariance,
    HeldOut,
    Interval,
    corrected_variance,
)


@dataclass(frozen=True)
class Measure:
    """One fairness figure at both ends. Intervals where per-example losses allow them."""

    name: str
    before: float | None
    after: float | None
    before_interval: Interval | None = None
    after_interval: Interval | None = None
    change_interval: Interval | None = None


@dataclass(frozen=True)
class RoundSpread:
    """The spread of losses over the devices that measured the adapter of so many merged rounds."""

    round: int
    summary: FairnessSummary
    losses: Mapping[str, float]  # by device


@dataclass(frozen=True)
class RunFairness:
    """Everything the report says of fairness."""

    devices: tuple[DeviceFigures, ...]
    compared: tuple[str, ...]  # devices measured at both ends
    losses: tuple[Measure, ...]
    accuracies: tuple[Measure, ...]
    noise: CorrectedVariance | None  # of loss_last
    # Of the variance, after and its change: they hold their level where devices do not differ.
    spread_interval: Interval | None
    spread_change: Interval | None
    local: LocalGap | None
    tiers: TierSpread | None  # of loss_last
    participation: Mapping[str, Evenness]
    over_rounds: tuple[RoundSpread, ...]
    compression: Association | None  # bytes sent / dense bytes with the loss gap
    ratio: Association | None  # sketch ratio with the fall of the loss
    alerts: tuple[Alert, ...]
    unit: str  # of losses

    def measure(self, name: str) -> Measure | None:
        """The loss figure of that name."""
        return next((m for m in self.losses if m.name == name), None)


def run_fairness(
    rows: Sequence[LedgerRow],
    coverage: Mapping[int, Sequence[float]] | None = None,
    unit: str = "nats per token",
) -> RunFairness:
    """The figures of a run. coverage: as `coordinator.alerts` takes it; unit: of losses."""
    devices = device_figures(rows)
    kept = sorted(rows, key=lambda row: row.round)
    last = {d.device_id: d.loss_last for d in devices if d.loss_last is not None}
    both = tuple(d.device_id for d in devices if d.gain is not None)
    ends: dict[str, list[LedgerRow]] = {name: [] for name in both}
    for row in kept:
        if row.device_id in ends and row.loss_received is not None:
            ends[row.device_id].append(row)
    weights = {d.device_id: float(d.examples or 0) for d in devices}
    samples = _samples({name: ends[name][-1] for name in both})
    earlier = _samples({name: ends[name][0] for name in both})
    noises = {n: s.noise for n, s in samples.items()} if samples else {}
    known = {n: v for n, v in noises.items() if v is not None}
    complete = bool(known) and len(known) == len(both)
    after = Bootstrap.of(samples) if samples and complete else None
    before = Bootstrap.of(earlier) if earlier and after is not None else None
    return RunFairness(
        devices=devices,
        compared=both,
        losses=_measures(
            {n: ends[n][0].loss_received for n in both},
            {n: ends[n][-1].loss_received for n in both}, weights, "lower", before, after,
        ),
        accuracies=_measures(
            {n: ends[n][0].accuracy_received for n in both},
            {n: ends[n][-1].accuracy_received for n in both}, weights, "higher",
        ),
        noise=corrected_variance({n: last[n] for n in both}, known) if complete else None,
        spread_interval=None if after is None else after.interval(inequality.variance),
        spread_change=(
            after.interval(inequality.variance, before=before)
            if after is not None and before is not None and _same_examples(before, after)
            else None
        ),
        local=local_gap(
            last, {d.device_id: d.loss_local for d in devices if d.loss_local is not None},
        ),
        tiers=tier_spread(last, {d.device_id: d.tier for d in devices}),
        participation=_participation(devices),
        over_rounds=_over_rounds(kept),
        compression=_associated(devices, lambda d: d.kept_share, lambda d: d.gap),
        ratio=_associated(devices, lambda d: d.ratio, lambda d: d.gain),
        alerts=find_alerts(kept, coverage),
        unit=unit,
    )  # fmt: skip


CVAR_LEVEL = 0.75  # two devices of eight, where a tenth is the single worst one
Rule = Callable[[Figures, Figures, Better], Figures]  # losses (..., N), weights (N,), direction
_ANY, _UNIT = (0.0, math.inf), (0.0, 1.0)
MEASURES: Mapping[str, tuple[Rule, tuple[float, float]]] = {  # and what each cannot leave
    "mean": (lambda v, w, b: inequality.mean(v), _ANY),
    "weighted mean": (lambda v, w, b: np.asarray((v * w).sum(-1) / w.sum()), _ANY),
    "worst tenth": (lambda v, w, b: inequality.worst_mean(v, WORST_SHARE, b), _ANY),
    "CVaR, worst quarter": (lambda v, w, b: inequality.cvar(v, CVAR_LEVEL, b), _ANY),
    "best tenth": (lambda v, w, b: inequality.best_mean(v, WORST_SHARE, b), _ANY),
    "range": (lambda v, w, b: inequality.value_range(v), _ANY),
    "standard deviation": (lambda v, w, b: np.sqrt(inequality.variance(v)), _ANY),
    "coefficient of variation": (lambda v, w, b: inequality.cv(v), _ANY),
    "Jain": (lambda v, w, b: inequality.jain(v), _UNIT),
    "Gini": (lambda v, w, b: inequality.gini(v), _UNIT),
    "Theil T": (lambda v, w, b: inequality.theil(v), _ANY),
    "Atkinson": (lambda v, w, b: inequality.atkinson(v, 1.0), _UNIT),
}


def _measures(
    first: Mapping[str, float | None],
    last: Mapping[str, float | None],
    weights: Mapping[str, float],
    better: Better,
    before: Bootstrap | None = None,
    after: Bootstrap | None = None,
) -> tuple[Measure, ...]:
    names = [n for n in sorted(first) if first[n] is not None and last[n] is not None]
    if not names:
        return ()
    start = np.array([first[n] for n in names], dtype=np.float64)
    end = np.array([last[n] for n in names], dtype=np.float64)
    sizes = np.array([weights[n] for n in names])
    sizes = sizes if sizes.any() else np.ones(len(names))
    paired = before is not None and after is not None and _same_examples(before, after)
    found = []
    for name, (rule, bounds) in MEASURES.items():
        of = partial(_apply, rule, sizes, better)
        found.append(Measure(
            name, float(of(start)), float(of(end)),
            None if before is None else before.interval(of, bounds=bounds),
            None if after is None else after.interval(of, bounds=bounds),
            after.interval(of, before=before) if paired and after is not None else None,
        ))  # fmt: skip
    return tuple(found)


def _apply(rule: Rule, weights: Figures, better: Better, values: Figures) -> Figures:
    return rule(values, weights, better)


def _same_examples(before: Bootstrap, after: Bootstrap) -> bool:
    one, other = before.held_out, after.held_out
    return one.keys() == other.keys() and all(
        np.array_equal(one[name].tokens, other[name].tokens) for name in one
    )


def _samples(rows: Mapping[str, LedgerRow]) -> dict[str, HeldOut] | None:
    """None unless every device kept its per-example losses."""
    if not rows or not all(row.nats for row in rows.values()):
        return None
    return {name: HeldOut.of(name, row.nats, row.tokens) for name, row in rows.items()}


def _participation(devices: Sequence[DeviceFigures]) -> dict[str, Evenness]:
    given = {
        "rounds merged": {d.device_id: float(d.rounds_joined) for d in devices},
        "bytes sent": {d.device_id: float(d.up_bytes) for d in devices},
        "seconds at work": {d.device_id: d.seconds for d in devices},
    }
    shares = {
        d.device_id: abs(d.share or 0.0) for d in devices
    }  # a device whose updates point against the others moves the model, too
    if any(shares.values()):
        given["share of the merged updates"] = shares
    found = {name: evenness(of) for name, of in given.items()}
    return {name: even for name, even in found.items() if even is not None and even.total > 0}


def _over_rounds(rows: Sequence[LedgerRow]) -> tuple[RoundSpread, ...]:
    of: dict[int, list[LedgerRow]] = {}
    for row in rows:
        if row.loss_received is not None:
            of.setdefault(row.round, []).append(row)
    spreads = []
    for number, found in sorted(of.items()):
        losses = {row.device_id: row.loss_received or 0.0 for row in found}
        sizes = {row.device_id: float(row.examples or 0) for row in found}
        spreads.append(RoundSpread(number, summarise(losses, sizes), losses))
    return tuple(spreads)


def _associated(
    devices: Sequence[DeviceFigures],
    x: Callable[[DeviceFigures], float | None],
    y: Callable[[DeviceFigures], float | None],
) -> Association | None:
    pairs = [(a, b) for d in devices if (a := x(d)) is not None and (b := y(d)) is not None]
    return associate([a for a, _ in pairs], [b for _, b in pairs]) if pairs else None
