"""What a fleet's losses come to, as figures of arrays (..., D): the metrics of the studies.

Knows the fairness metrics of the coordinator and how a difference of two runs is paired.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from coordinator import inequality
from coordinator.run_fairness import CVAR_LEVEL
from trials.study.board import Cell, Losses
from trials.study.statistics import Array, Draw, Estimate, draws, interval

WORST = 0.1
Metric = Callable[[Array, Array], Array]  # losses (..., D) and of local-only ones -> (...)

# Lower is better for all but Jain.
METRICS: Mapping[str, Metric] = {
    "mean loss": lambda loss, local: inequality.mean(loss),
    "worst 10 %": lambda loss, local: inequality.worst_mean(loss, WORST),
    "CVaR, worst 25 %": lambda loss, local: inequality.cvar(loss, CVAR_LEVEL),
    "range": lambda loss, local: inequality.value_range(loss),
    "variance": lambda loss, local: inequality.variance(loss),
    "Jain": lambda loss, local: inequality.jain(loss),
    "Gini": lambda loss, local: inequality.gini(loss),
    "worst gap to local-only": lambda loss, local: inequality.worst_mean(loss - local, WORST),
    "share worse off": lambda loss, local: (loss > local).mean(-1),
}
CORRECTED = "variance"  # less the noise of finite held-out sets


def metric(name: str, losses: Losses, local: Losses) -> Array:
    """(S,) of runs; the variance less what sampling adds to it."""
    found = METRICS[name](losses.loss, local.loss)
    if name == CORRECTED:
        d = losses.loss.shape[-1]
        found = found - (1 - 1 / d) * losses.noise.mean(-1)
    return found


def resampled(name: str, draw: Draw, losses: Losses, local: Losses) -> Array:
    """(B, S) of replicates. The noise in a variance moves all replicates alike: it is left."""
    return METRICS[name](
        draw.losses(losses.nats, losses.tokens), draw.losses(local.nats, local.tokens)
    )


def paired(name: str, one: Losses, other: Losses, local: Losses, count: int, seed: int) -> Estimate:
    """Mean over seeds of metric(one) - metric(other), runs of the same seed together.

    The fleet stays; seeds and held-out sequences are resampled, the same for both.
    """
    value = float((metric(name, one, local) - metric(name, other, local)).mean())
    shape = one.nats.shape
    found = [
        (resampled(name, d, one, local) - resampled(name, d, other, local)).mean(-1)
        for d in draws((shape[0], shape[1], shape[2]), count, seed, devices=False)
    ]
    return interval(value, np.concatenate(found), shape[0])


def tier_gap(cell: Cell, base: Cell, count: int, seed: int, tiers: Cell | None = None) -> Estimate:
    """What the most compressed devices lose against runs of `base`, more than the least do.

    tiers: whose tiers devices are in, if not the cell's own.
    """
    tier = (tiers or cell).tier
    top, low = (tier == tier.max()).astype(float), (tier == tier.min()).astype(float)

    def gap(excess: Array, top: Array, low: Array) -> Array:
        with np.errstate(invalid="ignore", divide="ignore"):
            each = (excess * top).sum(-1) / top.sum(-1) - (excess * low).sum(-1) / low.sum(-1)
        found: Array = np.nanmean(each, -1)
        return found

    value = float(gap(cell.final.loss - base.final.loss, top, low))
    shape = cell.final.nats.shape
    found = []
    for d in draws((shape[0], shape[1], shape[2]), count, seed, devices=False):
        excess = d.losses(cell.final.nats, cell.final.tokens)
        excess = excess - d.losses(base.final.nats, base.final.tokens)
        found.append(gap(excess, d.of(top), d.of(low)))
    return interval(value, np.concatenate(found), shape[0])
