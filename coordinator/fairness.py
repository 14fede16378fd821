"""How evenly a run serves its devices: one figure per device becomes what a fleet is judged by.

Every score has a declared direction: losses are lower-is-better, so their worst tail is the high
one. Scale-free indices (Jain, Gini) hide large gaps between good devices; they are always given
beside the worst tail. Computes from plain facts; knows nothing of where they are stored or shown.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from coordinator import inequality
from coordinator.inequality import Better, FairnessError

WORST_SHARE = 0.1


@dataclass(frozen=True)
class FairnessSummary:
    """Spread of one score over the fleet. None: not defined of values below zero."""

    devices: int
    mean: float
    weighted_mean: float
    best: float
    worst: float
    range: float
    std: float  # of the population
    jain: float | None  # 1 / (1 + CV^2), in [1/N, 1]; the square of the cosine to equal ones
    worst_decile_mean: float  # mean of the ceil(N / 10) worst scores
    gini: float | None
    best_decile_mean: float
    variance: float  # of the population
    cv: float | None
    cosine: float | None
    entropy: float | None  # of the shares, nats
    theil: float | None  # ln N - entropy: the shares' KL divergence from equal ones
    atkinson: float | None  # at epsilon 1
    better: Better = "lower"


@dataclass(frozen=True)
class LocalGap:
    """The global model against one trained on the device's own code alone, over `devices`.

    Gaps are positive where the device would have done better alone, in the unit of the score.
    """

    devices: int
    mean: float
    worst: float
    worse_off_share: float
    worse_off: tuple[str, ...]


@dataclass(frozen=True)
class TierSpread:
    """How far tiers of devices are apart in one score."""

    means: Mapping[str, float]
    devices: Mapping[str, int]
    gap: float  # highest less lowest tier mean
    between_share: float | None  # eta^2, of the variance; None if there is no variance
    between_by_chance: float | None  # eta^2 expected where tiers make no difference


@dataclass(frozen=True)
class Evenness:
    """How evenly something that devices give or get is spread: rounds, bytes, shares."""

    total: float
    jain: float
    gini: float
    least: float
    most: float


def summarise(
    losses: Mapping[str, float], weights: Mapping[str, float], better: Better = "lower"
) -> FairnessSummary:
    """Spread of per-device scores; `weights` (held-out or training sizes) by the same names.

    Raises `FairnessError` on no devices, a missing or negative weight, a score that is not finite.
    """
    if not losses:
        raise FairnessError("no device has a loss to summarise; wait for a round to report")
    if missing := sorted(losses.keys() - weights.keys()):
        raise FairnessError(f"no weight for {', '.join(missing)}; pass one for every loss")
    names = sorted(losses)
    if bad := [name for name in names if not math.isfinite(losses[name])]:
        raise FairnessError(f"loss of {', '.join(bad)} is not finite; leave it out and say so")
    if bad := [n for n in names if not (math.isfinite(weights[n]) and weights[n] >= 0)]:
        raise FairnessError(f"weight of {', '.join(bad)} is negative or not finite; pass a size")
    values = np.array([losses[name] for name in names], dtype=np.float64)
    shares = np.array([weights[name] for name in names], dtype=np.float64)
    low, high = float(values.min()), float(values.max())
    mean, variance = float(inequality.mean(values)), float(inequality.variance(values))
    scale_free = bool(low >= 0)
    return FairnessSummary(
        devices=len(names),
        mean=mean,
        weighted_mean=float(np.average(values, weights=shares)) if shares.any() else mean,
        best=low if better == "lower" else high,
        worst=high if better == "lower" else low,
        range=high - low,
        std=math.sqrt(variance),
        jain=float(inequality.jain(values)) if scale_free else None,
        worst_decile_mean=float(inequality.worst_mean(values, WORST_SHARE, better)),
        gini=float(inequality.gini(values)) if scale_free else None,
        best_decile_mean=float(inequality.best_mean(values, WORST_SHARE, better)),
        variance=variance,
        cv=float(inequality.cv(values)) if scale_free else None,
        cosine=float(inequality.cosine_to_one(values)) if scale_free else None,
        entropy=float(inequality.entropy(values)) if scale_free else None,
        theil=float(inequality.theil(values)) if scale_free else None,
        atkinson=float(inequality.atkinson(values, 1.0)) if scale_free else None,
        better=better,
    )


def local_gap(
    shared: Mapping[str, float], alone: Mapping[str, float], better: Better = "lower"
) -> LocalGap | None:
    """Gap of the shared model's score to the local-only model's; None if no device has both."""
    names = sorted(shared.keys() & alone.keys())
    if not names:
        return None
    sign = 1 if better == "lower" else -1
    gaps = {name: sign * (shared[name] - alone[name]) for name in names}
    if bad := [name for name, gap in gaps.items() if not math.isfinite(gap)]:
        raise FairnessError(f"score of {', '.join(bad)} is not finite; leave it out and say so")
    worse = tuple(name for name, gap in gaps.items() if gap > 0)
    return LocalGap(
        devices=len(names),
        mean=math.fsum(gaps.values()) / len(gaps),
        worst=max(gaps.values()),
        worse_off_share=len(worse) / len(names),
        worse_off=worse,
    )


def tier_spread(scores: Mapping[str, float], tiers: Mapping[str, str]) -> TierSpread | None:
    """How far apart tiers are; devices without a tier are left out. None if none is left.

    eta^2 is the share of the variance between devices that lies between tiers. Tiers that make no
    difference are expected to show (tiers - 1) / (devices - 1) of it: much, in a small fleet.
    """
    of: dict[str, list[float]] = {}
    for name in sorted(scores):
        if tier := tiers.get(name):
            of.setdefault(tier, []).append(scores[name])
    values = [v for group in of.values() for v in group]
    if not values:
        return None
    if not all(map(math.isfinite, values)):
        raise FairnessError("a score is not finite; leave its device out and say so")
    means = {tier: math.fsum(group) / len(group) for tier, group in sorted(of.items())}
    middle = math.fsum(values) / len(values)
    within = math.fsum((v - means[tier]) ** 2 for tier, group in of.items() for v in group)
    between = math.fsum(len(group) * (means[tier] - middle) ** 2 for tier, group in of.items())
    spread = within + between
    return TierSpread(
        means=means,
        devices={tier: len(of[tier]) for tier in means},
        gap=max(means.values()) - min(means.values()),
        between_share=between / spread if spread > 0 else None,
        between_by_chance=(len(of) - 1) / (len(values) - 1) if len(values) > 1 else None,
    )


def evenness(given: Mapping[str, float]) -> Evenness | None:
    """How evenly rounds joined, bytes sent or update mass are spread; devices at 0 count.

    None of no devices. Raises `FairnessError` on values below zero.
    """
    if not given:
        return None
    values = np.array([given[name] for name in sorted(given)], dtype=np.float64)
    return Evenness(
        total=math.fsum(values),
        jain=float(inequality.jain(values)),
        gini=float(inequality.gini(values)),
        least=float(values.min()),
        most=float(values.max()),
    )
