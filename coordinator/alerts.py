"""What a person running a fleet should look at: who falls behind, which tier starves, what is cold.

Works on ledger rows and on how many devices trained each component of the rank. Every rule asks
whether chance alone would show as much, at `CHANCE` for the whole fleet at one look; a quiet list
is therefore no proof that all is well, least of all in the first rounds or of few devices.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from statistics import NormalDist
from typing import Literal

import numpy as np

from coordinator.ledger_types import LedgerRow
from coordinator.uncertainty import HeldOut

CHANCE = 0.01  # of any false alarm of a kind, at one look
LEAST_ROUNDS = 5  # measured; fewer cannot show a trend
LEAST_COLD_ROUNDS = 3
LEAST_GROWTH = 0.01  # of the device's loss, where the noise of its held-out code is not known

Kind = Literal[
    "device_falling_behind", "device_worse_than_alone", "tier_falling_behind", "tier_starved",
    "component_cold",
]  # fmt: skip
Severity = Literal["warning", "critical"]
Series = Mapping[int, float]  # loss of the global adapter as received, by round


@dataclass(frozen=True)
class Alert:
    """One thing to look at. subject: a device, a tier, or components of the rank."""

    kind: Kind
    subject: str
    message: str
    since_round: int
    severity: Severity


def find_alerts(
    rows: Iterable[LedgerRow], coverage: Mapping[int, Sequence[float]] | None = None
) -> tuple[Alert, ...]:
    """All alerts of a run so far, the critical first.

    coverage: (r,) devices that trained each component, by merged round.
    """
    kept = sorted(rows, key=lambda row: (row.round, row.device_id))
    found = [
        *falling_behind(kept),
        *worse_than_alone(kept),
        *starved_tiers(kept),
        *cold_components(kept, coverage or {}),
    ]
    return tuple(sorted(found, key=lambda a: (a.severity != "critical", a.kind, a.subject)))


def falling_behind(rows: Sequence[LedgerRow]) -> list[Alert]:
    """Devices, and tiers of several, whose gap to the others grows.

    Three things at once: the gap rises over rounds more than chance orders it (Mann-Kendall, one
    for every subject); the subject gained less than half of what the others did, since devices
    with harder code part from the rest in any run; and the gap grew by more than held-out noise.
    """
    losses = _losses(rows)
    tiers: dict[str, list[str]] = {}
    for device, tier in {row.device_id: row.tier for row in rows}.items():
        if tier and device in losses:
            tiers.setdefault(tier, []).append(device)
    groups = {("device", device): [device] for device in losses}
    if len(tiers) > 1:
        groups |= {("tier", tier): of for tier, of in tiers.items() if len(of) > 1}
    noise, whole = _change_noise(rows), _sums(losses.values())
    found = []
    for (what, name), members in groups.items():
        mine = _sums(losses[m] for m in members)
        common = [r for r in sorted(mine) if whole[r][1] > mine[r][1]]
        if len(common) < LEAST_ROUNDS:
            continue
        own = {r: mine[r][0] / mine[r][1] for r in common}
        rest = {r: (whole[r][0] - mine[r][0]) / (whole[r][1] - mine[r][1]) for r in common}
        gaps = [own[r] - rest[r] for r in common]
        if _trend_p(gaps) > CHANCE / len(groups):
            continue
        growth, gain = _rise(common, gaps), -_rise(common, [rest[r] for r in common])
        known = [noise[m] for m in members if m in noise]
        least = LEAST_GROWTH * own[common[-1]]
        if len(known) == len(members):
            least = NormalDist().inv_cdf(1 - CHANCE) * math.sqrt(math.fsum(known)) / len(known)
        if growth <= max(least, gain / 2):
            continue
        rose = own[common[-1]] > own[common[0]]
        found.append(Alert(
            "device_falling_behind" if what == "device" else "tier_falling_behind", name,
            f"{what} {name} loses touch with the fleet: in rounds {common[0]} to {common[-1]} its "
            f"gap to the others' mean loss grew by {growth:.3f} to {gaps[-1]:+.3f} nats"
            + (", and its own loss rose" if rose else f", while they gained {gain:.3f}"),
            common[int(np.argmin(gaps))], "critical" if rose else "warning",
        ))  # fmt: skip
    return found


def worse_than_alone(rows: Sequence[LedgerRow]) -> list[Alert]:
    """Devices that would have a lower loss with an adapter trained on their own code alone.

    Beyond the noise of the device's held-out code where it is known, else in two rounds running.
    Devices do not send the local-only adapter's loss of each example, so the noise of the
    difference is taken as if both losses had the received one's and were independent: too much,
    as both are of the same examples.
    """
    by_device: dict[str, list[LedgerRow]] = {}
    for row in rows:
        if row.loss_received is not None and row.loss_local is not None:
            by_device.setdefault(row.device_id, []).append(row)
    found = []
    for device, of in sorted(by_device.items()):
        gaps = [(row.loss_received or 0.0) - (row.loss_local or 0.0) for row in of]
        run = next((i for i, gap in enumerate(reversed(gaps)) if gap <= 0), len(gaps))
        variance = _noise(of[-1])
        if variance is None:
            certain = run >= 2
        else:
            quantile = NormalDist().inv_cdf(1 - CHANCE / len(by_device))
            certain = run >= 1 and gaps[-1] > quantile * math.sqrt(2 * variance)
        if certain:
            found.append(Alert(
                "device_worse_than_alone", device,
                f"device {device} would do better alone: the global adapter's loss is "
                f"{gaps[-1]:.3f} nats above that of an adapter trained on its own data "
                "with the same budget", of[-run].round, "warning",
            ))  # fmt: skip
    return found


def starved_tiers(rows: Sequence[LedgerRow]) -> list[Alert]:
    """Tiers whose updates are merged more seldom than if all devices took part alike.

    Fisher's exact test of the device-rounds since each device appeared: merged, or not.
    """
    rounds = sorted({row.round for row in rows if not row.evaluate_only})
    tier_of = {row.device_id: row.tier for row in rows if row.tier}
    first: dict[str, int] = {}
    joined: dict[str, set[int]] = {}
    for row in rows:
        if row.device_id not in tier_of or row.evaluate_only:
            continue
        first.setdefault(row.device_id, row.round)
        if row.merged:
            joined.setdefault(row.device_id, set()).add(row.round)
    offered: dict[str, int] = {}
    taken: dict[str, int] = {}
    for device, since in first.items():
        tier = tier_of[device]
        offered[tier] = offered.get(tier, 0) + sum(r >= since for r in rounds)
        taken[tier] = taken.get(tier, 0) + len(joined.get(device, ()))
    found = []
    for tier, chances in offered.items():
        others = sum(offered.values()) - chances
        rate = (sum(taken.values()) - taken[tier]) / others if others else 0.0
        chance = _at_most(taken[tier], chances, sum(taken.values()), sum(offered.values()))
        if chance > CHANCE / len(offered):
            continue
        members = [d for d in first if tier_of[d] == tier]
        last = max((r for d in members for r in joined.get(d, ())), default=None)
        found.append(Alert(
            "tier_starved", tier,
            f"tier {tier} hardly takes part: {taken[tier]} of {chances} device-rounds merged, "
            f"against {100 * rate:.0f} % in the rest of the fleet"
            + (", the last in round " + str(last) if last is not None else ""),
            min(first[d] for d in members) if last is None else last + 1,
            "critical" if taken[tier] == 0 else "warning",
        ))  # fmt: skip
    return found


def cold_components(
    rows: Sequence[LedgerRow], coverage: Mapping[int, Sequence[float]]
) -> list[Alert]:
    """Components of the rank that nobody has trained for longer than random slices would miss them.

    With slices drawn at random, a component stays untrained in a round with the product of
    (1 - ratio) over its devices; so many rounds in a row are unlikely for all r together.
    """
    if not coverage:
        return []
    merged = sorted(coverage)
    components = max(len(coverage[r]) for r in merged)
    missed = [
        math.prod(1 - row.ratio for row in rows if row.round == r and row.merged) for r in merged
    ]
    chance = math.fsum(missed) / len(missed)
    patience = LEAST_COLD_ROUNDS
    if 0 < chance < 1:
        patience = max(patience, math.ceil(math.log(CHANCE / components) / math.log(chance)))
    elif chance == 1:
        return []
    since: dict[int, list[int]] = {}
    for component in range(components):
        cold = 0
        for r in reversed(merged):
            if component < len(coverage[r]) and coverage[r][component] > 0:
                break
            cold += 1
        if cold >= patience:
            since.setdefault(merged[-cold], []).append(component)
    found = []
    for start, of in sorted(since.items()):
        names = _spans(of)
        found.append(Alert(
            "component_cold", names,
            f"{'components' if len(of) > 1 else 'component'} {names} of {components} "
            f"{'have' if len(of) > 1 else 'has'} not been trained by anybody since round {start}: "
            "that part of the adapter stands still", start, "warning",
        ))  # fmt: skip
    return found


def _losses(rows: Sequence[LedgerRow]) -> dict[str, dict[int, float]]:
    """Of each device; in the rounds that all measured, unless those are too few for a trend."""
    found: dict[str, dict[int, float]] = {}
    for row in rows:
        if row.loss_received is not None:
            found.setdefault(row.device_id, {})[row.round] = row.loss_received
    common = set.intersection(*(set(series) for series in found.values())) if found else set()
    if len(common) < LEAST_ROUNDS:
        return found
    return {d: {r: series[r] for r in sorted(common)} for d, series in found.items()}


def _sums(of: Iterable[Series]) -> dict[int, tuple[float, int]]:
    """(sum, count) by round."""
    found: dict[int, tuple[float, int]] = {}
    for series in of:
        for r, loss in series.items():
            total, count = found.get(r, (0.0, 0))
            found[r] = (total + loss, count + 1)
    return found


def _trend_p(values: Sequence[float]) -> float:
    """One-sided p-value of Mann and Kendall's test for a rise; normal, corrected for continuity."""
    n = len(values)
    v = np.asarray(values)
    score = float(np.sign(v[None, :] - v[:, None])[np.triu_indices(n, 1)].sum())
    spread = math.sqrt(n * (n - 1) * (2 * n + 5) / 18)
    return 1 - NormalDist().cdf((score - 1) / spread) if score > 0 else 1.0


def _rise(rounds: Sequence[int], values: Sequence[float]) -> float:
    """How much the least-squares line rises from the first round to the last."""
    x, y = np.asarray(rounds, dtype=np.float64), np.asarray(values)
    off = x - x.mean()
    return float(off @ y / (off @ off) * (x[-1] - x[0]))


def _change_noise(rows: Sequence[LedgerRow]) -> dict[str, float]:
    """Sampling variance of each device's change of loss, first to last, on the same examples."""
    ends: dict[str, list[LedgerRow]] = {}
    for row in rows:
        if row.nats:
            ends.setdefault(row.device_id, []).append(row)
    found = {}
    for device, of in ends.items():
        first, last = of[0], of[-1]
        if first is last or first.tokens != last.tokens or len(first.tokens) < 2:
            continue
        changes = np.subtract(last.nats, first.nats)
        variance = HeldOut.of(device, changes, first.tokens).noise
        if variance is not None:
            found[device] = variance
    return found


def _noise(row: LedgerRow) -> float | None:
    return HeldOut.of(row.device_id, row.nats, row.tokens).noise if row.nats else None


def _at_most(count: int, drawn: int, marked: int, of: int) -> float:
    """P(X <= count) marked among `drawn` of `of` that hold `marked` (hypergeometric)."""
    ways = sum(
        math.comb(marked, k) * math.comb(of - marked, drawn - k)
        for k in range(max(0, drawn - (of - marked)), min(count, marked, drawn) + 1)
    )
    return ways / math.comb(of, drawn)


def _spans(numbers: Sequence[int]) -> str:
    """Sorted numbers as "0-3, 7"."""
    spans = []
    for _, group in groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0]):
        run = [number for _, number in group]
        spans.append(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}")
    return ", ".join(spans)
