"""`study compression-fairness`: does compression make a fleet less fair, and what helps?

Within runs whose devices are compressed differently; across runs in which all are compressed alike,
after as many rounds and after as many bytes; and of what may help, against the same run without.
Knows cells and statistics; says nothing that a rule in this file did not conclude from figures.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from trials.study.board import Cell
from trials.study.figures import METRICS, metric, paired, resampled, tier_gap
from trials.study.settings import StudySettings
from trials.study.statistics import (
    LEVEL,
    Array,
    Estimate,
    benjamini_hochberg,
    detectable,
    draws,
    highest_spearman,
    holm,
    interval,
    kendall,
    partial_p,
    partial_spearman,
    permutation_p,
    slope,
    spearman,
)

PRIMARY = "gap to local-only"
OUTCOMES: Mapping[str, str] = {
    "gap to local-only": "loss less that of an adapter trained on the device alone",
    "gap to the fleet": "loss less the mean of the fleet",
    "excess over dense": "loss less that of the same run without compression",
    "change": "loss less that before the first round",
}
ALPHA = 1 - LEVEL
CONTROLS = "data size, skew, rounds joined"
_FIGURES = {"rho": spearman, "tau": kendall, "slope": slope}


@dataclass(frozen=True)
class Within:
    """Ratio against outcome within the runs of one cell. x: halvings of bytes; outcomes: higher is
    worse, so that a positive figure says that compression hurts. slope: nats per token and halving.
    detectable: rho found in four of five such studies; highest: rho that ties allow.
    """

    arm: str
    assignment: str
    outcome: str
    rho: Estimate
    tau: Estimate
    partial: Estimate
    slope: Estimate
    detectable: float
    highest: float
    adjusted: float = math.nan


@dataclass(frozen=True)
class Across:
    """Level of all devices against a metric of the fleet, by seed. slope: per halving."""

    arm: str
    matched: str
    metric: str
    dense: float
    most: float  # at the highest compression
    rho: Estimate
    slope: Estimate
    adjusted: float = math.nan


@dataclass(frozen=True)
class Helps:
    """A mitigation against the run without it, by metric; each a difference, paired by seed."""

    name: str
    against: str
    differences: Mapping[str, Estimate]
    bytes_ratio: float


# --- within runs --------------------------------------------------------------------------------


def within(s: StudySettings, cells: Mapping[str, Cell]) -> list[Within]:
    """Every per-device cell and outcome; p of the primary outcome adjusted by Holm over its cells,
    those of all others by Benjamini and Hochberg.
    """
    dense, local = _control(cells, "dense"), _control(cells, "local")
    found = []
    for cell in cells.values():
        if cell.facts.kind == "per device":
            found += [_within(s, cell, name, dense, local) for name in OUTCOMES]
    return _adjusted(found, lambda w: w.assignment == "independent" and w.outcome == PRIMARY)


def _within(s: StudySettings, cell: Cell, name: str, dense: Cell, local: Cell) -> Within:
    a, x, controls = s.analysis, cell.halvings, cell.controls
    y = _outcome(name, cell.final.loss, dense.final.loss, local.final.loss, cell.start.loss)
    shape = cell.final.nats.shape
    seen: dict[str, list[Array]] = {key: [] for key in (*_FIGURES, "partial")}
    for d in draws((shape[0], shape[1], shape[2]), a.replicates, a.seed):
        losses = [d.losses(of.nats, of.tokens)
                  for of in (cell.final, dense.final, local.final, cell.start)]  # fmt: skip
        drawn_x, drawn_y = d.of(x), _outcome(name, *losses)
        for key, figure in _FIGURES.items():
            seen[key].append(figure(drawn_x, drawn_y))
        seen["partial"].append(partial_spearman(drawn_x, drawn_y, [d.of(c) for c in controls]))

    def estimate(key: str, value: Array, p: float | None) -> Estimate:
        return interval(float(value), np.concatenate(seen[key]), cell.seeds, p, nested=True)

    count, seed = a.permutations, a.seed
    p_rho, null = permutation_p(lambda drawn: spearman(drawn, y), x, count, seed)
    p_tau, _ = permutation_p(lambda drawn: kendall(drawn, y), x, count, seed)
    p_slope, _ = permutation_p(lambda drawn: slope(drawn, y), x, count, seed)
    return Within(
        _arm(cell), cell.facts.assignment, name,
        estimate("rho", spearman(x, y), p_rho),
        estimate("tau", kendall(x, y), p_tau),
        estimate("partial", partial_spearman(x, y, controls),
                 partial_p(x, y, controls, count, seed)),
        estimate("slope", slope(x, y), p_slope),
        detectable(null), highest_spearman(x),
    )  # fmt: skip


def _outcome(name: str, final: Array, dense: Array, local: Array, start: Array) -> Array:
    fleet: Array = final.mean(-1, keepdims=True)
    found: Array = final - {
        "gap to the fleet": fleet, "gap to local-only": local, "excess over dense": dense,
        "change": start,
    }[name]  # fmt: skip
    return found


# --- across runs --------------------------------------------------------------------------------


def across(s: StudySettings, cells: Mapping[str, Cell]) -> list[Across]:
    """Every arm, matching and metric; p by permuting levels within seeds, then as in `within`."""
    dense, local = _control(cells, "dense"), _control(cells, "local")
    arms: dict[str, list[Cell]] = {}
    for cell in cells.values():
        if cell.facts.kind == "everywhere":
            arms.setdefault(_arm(cell), [dense]).append(cell)
    found = []
    for arm, levels in arms.items():
        # Bytes are matched at what the dense run has sent by its first measurement.
        budget = 1.02 * max(sum(r.points[1].up_bytes.values()) for r in dense.records)
        for matched in ("rounds", "bytes"):
            losses = [c.final if matched == "rounds" else c.at(c.within(budget)) for c in levels]
            found += [_across(s, arm, matched, name, levels, losses, local) for name in METRICS]
    return _adjusted(found, lambda w: w.metric == "mean loss" and w.matched == "rounds")


def _across(
    s: StudySettings, arm: str, matched: str, name: str, levels: Sequence[Cell],
    losses: Sequence[Any], local: Cell,
) -> Across:  # fmt: skip
    a, seeds = s.analysis, levels[0].seeds
    x = np.tile([c.fleet_halvings for c in levels], (seeds, 1))
    y = np.stack([metric(name, of, local.final) for of in losses], -1)
    shape = losses[0].nats.shape
    seen: list[list[Array]] = [[], []]
    for d in draws((shape[0], shape[1], shape[2]), a.replicates, a.seed, devices=False):
        drawn = np.stack([resampled(name, d, of, local.final) for of in losses], -1)
        seen[0].append(spearman(x, drawn))
        seen[1].append(slope(x, drawn))
    p_rho, _ = permutation_p(lambda v: spearman(v, y), x, a.permutations, a.seed)
    p_slope, _ = permutation_p(lambda v: slope(v, y), x, a.permutations, a.seed)
    rho = interval(float(spearman(x, y)), np.concatenate(seen[0]), seeds, p_rho, most=1.0)
    steep = interval(float(slope(x, y)), np.concatenate(seen[1]), seeds, p_slope)
    return Across(arm, matched, name, float(y[:, 0].mean()), float(y[:, -1].mean()), rho, steep)


# --- what may help ------------------------------------------------------------------------------

HELPED = ("mean loss", "worst 10 %", "range", "worst gap to local-only")


def helps(s: StudySettings, cells: Mapping[str, Cell]) -> list[Helps]:
    """Mitigations, and the same ratio for all, each against devices at different ratios."""
    local, a, found = _control(cells, "local"), s.analysis, []
    for cell in cells.values():
        kind, facts = cell.facts.kind, cell.facts
        if kind == "mitigation":
            pairs = [(facts.mitigation, f"per device | {facts.means} | {facts.method} | "
                                        f"{facts.assignment}")]  # fmt: skip
        elif kind == "equal bytes":
            arm = f"per device | {facts.means} | {facts.method}"
            pairs = [("the same ratio for all", f"{arm} | {b}") for b in s.design.assignments]
        else:
            continue
        for name, against in pairs:
            if (base := cells.get(against)) is None:
                continue
            differences = {
                m: paired(m, cell.final, base.final, local.final, a.replicates, a.seed)
                for m in HELPED
            }
            # How much less the most compressed devices lag behind the least.
            differences["tier gap"] = tier_gap(cell, base, a.replicates, a.seed, tiers=base)
            ratio = float(cell.up_bytes().sum() / base.up_bytes().sum())
            found.append(Helps(name, f"{_arm(base)}, {base.facts.assignment}", differences, ratio))
    return found


def _control(cells: Mapping[str, Cell], kind: str) -> Cell:
    return next(cell for cell in cells.values() if cell.facts.kind == kind)


def _arm(cell: Cell) -> str:
    return f"{cell.facts.means}, {cell.facts.method}"


def _adjusted(found: list[Any], primary: Callable[[Any], bool]) -> list[Any]:
    """With p of rho adjusted, for the primary family and for all others."""
    for family, adjust in (
        ([w for w in found if primary(w)], holm),
        ([w for w in found if not primary(w)], benjamini_hochberg),
    ):
        tested = [w for w in family if w.rho.p is not None and math.isfinite(w.rho.p)]
        for w, p in zip(tested, adjust([w.rho.p for w in tested]), strict=True):
            found[next(i for i, other in enumerate(found) if other is w)] = replace(
                w, adjusted=float(p)
            )
    return found
