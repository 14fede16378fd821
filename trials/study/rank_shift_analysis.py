"""What a rank-shift study shows: figures with intervals, and what they support and do not.

The unit is a seed, which draws mixtures, ranks, batches and all; intervals resample seeds and,
within them, held-out examples, the same for what is compared. Knows records and statistics; it
plays nothing and has no words.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from trials.shift import skew
from trials.study.rank_shift import ShiftFacts, ShiftRecord, facts_of
from trials.study.rank_shift_settings import RankShiftSettings
from trials.study.statistics import Estimate, holm, interval, permutation_p

Array = NDArray[np.float64]
Cell = tuple[str, str, float]  # method, spread of ranks, alpha
LEVEL = 0.05


@dataclass(frozen=True)
class Played:
    """One cell over the seeds: S seeds, D devices, C classes, E examples of each.

    nats: (S, 2, C, E) per token, before and after. shares: (S, D, C). ranks: (S, D).
    accuracy: (S, 2, C). up_bytes: (S, D).
    """

    nats: Array
    shares: Array
    ranks: Array
    accuracy: Array
    up_bytes: Array

    def losses(self, picked: NDArray[np.int64], point: int = 1) -> Array:
        """(B, S, D) nats: of examples (B, S, C, E) by number."""
        own = np.broadcast_to(self.nats[:, point], picked.shape)
        by_class = np.take_along_axis(own, picked, -1).mean(-1)
        found: Array = np.einsum("sdc,bsc->bsd", self.shares, by_class)
        return found


Figure = Callable[[Array, Played], Array]


def mean_loss(losses: Array, _: Played) -> Array:
    """(B, S): mean over devices."""
    found: Array = losses.mean(-1)
    return found


def worst_loss(losses: Array, _: Played) -> Array:
    """(B, S): of the device that fares worst."""
    found: Array = losses.max(-1)
    return found


def tier_gap(losses: Array, played: Played) -> Array:
    """(B, S): mean of the devices of lowest rank less that of the highest."""
    return gap_of(losses, played.ranks)


def gap_of(losses: Array, ranks: Array) -> Array:
    """The same for any ranks (..., S, D), as if they had been dealt so."""
    low = ranks == ranks.min(-1, keepdims=True)
    high = ranks == ranks.max(-1, keepdims=True)
    found: Array = (losses * low).sum(-1) / low.sum(-1) - (losses * high).sum(-1) / high.sum(-1)
    return found


FIGURES: Mapping[str, Figure] = {
    "mean": mean_loss, "worst device": worst_loss, "lowest less highest rank": tier_gap,
}  # fmt: skip


@dataclass(frozen=True)
class Claim:
    """A question put to the data. p: Holm's, over all questions of its kind."""

    kind: str
    words: str
    estimate: Estimate
    p: float

    @property
    def supported(self) -> bool:
        """Whether the data say anything."""
        return self.p < LEVEL and self.estimate.excludes_zero


@dataclass(frozen=True)
class Findings:
    """Everything that the report tells. cells: estimates by cell and figure."""

    cells: dict[Cell, dict[str, Estimate]]
    accuracy: dict[Cell, tuple[float, float]]  # mean and worst device
    up_bytes: dict[Cell, float]  # mean of a device over the run
    skews: dict[float, float]
    learnt: dict[str, Estimate]  # by method, of the first spread: loss after less before
    claims: list[Claim]


def gather(
    s: RankShiftSettings, data: Path | None, records: Mapping[str, ShiftRecord]
) -> dict[Cell, Played]:
    """Records by cell."""
    found = {}
    for method in s.design.methods:
        for spread in s.design.ranks:
            for alpha in s.design.alphas:
                runs = [facts_of(s, data, method, spread, alpha, seed) for seed in s.design.seeds]
                found[method, spread, alpha] = _played(runs, [records[run.key] for run in runs])
    return found


def _played(runs: Sequence[ShiftFacts], records: Sequence[ShiftRecord]) -> Played:
    """Classes of unlike numbers of held-out examples are cut to the fewest."""
    fewest = min(len(own) for r in records for point in r.nats for own in point)

    def cut(values: Any) -> Array:
        return np.array([[[o[:fewest] for o in point] for point in r] for r in values], dtype=float)

    nats, tokens = cut([r.nats for r in records]), cut([r.tokens for r in records])
    # Of a class: nats over tokens, so that long sequences weigh more; of examples both are 1.
    return Played(
        nats / tokens.mean(-1, keepdims=True),
        np.array([r.shares for r in records]),
        np.array([run.ranks for run in runs], dtype=float),
        np.array([r.accuracy for r in records]),
        np.array([r.up_bytes for r in records], dtype=float),
    )


def analyse(
    s: RankShiftSettings, data: Path | None, records: Mapping[str, ShiftRecord]
) -> Findings:
    """Estimates and claims."""
    cells = gather(s, data, records)
    one = next(iter(cells.values()))
    fewest = min(played.nats.shape[-1] for played in cells.values())
    cells = {
        cell: Played(p.nats[..., :fewest], p.shares, p.ranks, p.accuracy, p.up_bytes)
        for cell, p in cells.items()
    }
    seeds, classes = len(s.design.seeds), one.nats.shape[2]
    draw = np.random.default_rng(s.analysis.seed)
    picked = draw.integers(fewest, size=(s.analysis.replicates, seeds, classes, fewest))
    which = draw.integers(seeds, size=(s.analysis.replicates, seeds))
    everything = np.broadcast_to(np.arange(fewest), (1, seeds, classes, fewest))

    def estimate(parts: Sequence[tuple[float, Played, Figure, int]]) -> tuple[Estimate, float]:
        """A sum of figures with signs, paired by seed and examples; and its two-sided p."""
        value, resampled = 0.0, np.zeros(s.analysis.replicates)
        for sign, played, figure, point in parts:
            value += sign * float(figure(played.losses(everything, point), played).mean())
            each = figure(played.losses(picked, point), played)
            resampled += sign * np.take_along_axis(each, which, 1).mean(1)
        # Resampled means of so few vary less than means of so many new seeds would.
        resampled = value + (resampled - value) * math.sqrt(seeds / max(1, seeds - 1))
        spread = float(resampled.std(ddof=1))
        p = math.nan
        if seeds > 1 and spread > 0:
            p = 2 * float(stats.t.sf(abs(value) / spread, seeds - 1))
        return interval(value, resampled, seeds, p), p

    def of_tier(parts: Sequence[tuple[float, Played, Figure, int]]) -> tuple[Estimate, float]:
        """Of one cell's gap; p by dealing the ranks anew, since chance also dealt the classes."""
        _, played, _, _ = parts[0]
        losses = played.losses(everything)[0]

        def gap(ranks: Array) -> Array:
            found: Array = gap_of(losses, ranks).mean(-1)
            return found

        p, _ = permutation_p(gap, played.ranks, s.analysis.permutations, s.analysis.seed)
        return estimate(parts)[0], p

    claims = [
        *_family("ranks", _rank_questions(s), cells, estimate),
        *_family("shift", _shift_questions(s), cells, estimate),
        *_family("tiers", _tier_questions(s, cells), cells, of_tier),
    ]
    told = {
        cell: {
            name: estimate([(1.0, played, figure, 1)])[0]
            for name, figure in FIGURES.items()
            if figure is not tier_gap or len(np.unique(played.ranks)) > 1
        }
        for cell, played in cells.items()
    }
    baseline, widest = s.design.baseline, s.design.alphas[-1]
    learnt = {}
    for method in s.design.methods:
        played = cells[method, baseline, widest]
        after_less_before = [(1.0, played, mean_loss, 1), (-1.0, played, mean_loss, 0)]
        learnt[method] = estimate(after_less_before)[0]
    accuracy = {}
    for cell, played in cells.items():
        own = np.einsum("sdc,sc->sd", played.shares, played.accuracy[:, 1])
        accuracy[cell] = float(own.mean()), float(own.min(1).mean())
    skews = {
        alpha: float(np.mean([
            skew(shares) for shares in cells[s.design.methods[0], baseline, alpha].shares
        ]))
        for alpha in s.design.alphas
    }  # fmt: skip
    up = {cell: float(played.up_bytes.mean()) for cell, played in cells.items()}
    return Findings(told, accuracy, up, skews, learnt, claims)


Question = tuple[str, list[tuple[float, Cell, Figure]]]


def _family(
    kind: str, questions: Sequence[Question], cells: Mapping[Cell, Played],
    estimate: Callable[..., tuple[Estimate, float]],
) -> list[Claim]:  # fmt: skip
    asked = [
        (words, *estimate([(sign, cells[cell], figure, 1) for sign, cell, figure in parts]))
        for words, parts in questions
    ]
    # A difference of nothing at all, between runs that are one and the same, is no question.
    asked = [(words, found, p) for words, found, p in asked if math.isfinite(p)]
    adjusted: Sequence[float] = holm([p for _, _, p in asked]).tolist() if asked else []
    return [
        Claim(kind, words, found, float(q))
        for (words, found, _), q in zip(asked, adjusted, strict=True)
    ]


def _rank_questions(s: RankShiftSettings) -> list[Question]:
    base = s.design.baseline
    return [
        (
            f"{method}, alpha {alpha:g}: {name} with {spread} ranks less with {base}",
            [(1.0, (method, spread, alpha), figure), (-1.0, (method, base, alpha), figure)],
        )
        for method in s.design.methods
        for spread in list(s.design.ranks)[1:]
        for alpha in s.design.alphas
        for name, figure in FIGURES.items()
        if figure is not tier_gap
    ]


def _shift_questions(s: RankShiftSettings) -> list[Question]:
    low, high = s.design.alphas[0], s.design.alphas[-1]
    return [
        (
            f"{method}, {spread} ranks: {name} at alpha {low:g} less at {high:g}",
            [(1.0, (method, spread, low), figure), (-1.0, (method, spread, high), figure)],
        )
        for method in s.design.methods
        for spread in s.design.ranks
        for name, figure in FIGURES.items()
        if figure is not tier_gap and low != high
    ]


def _tier_questions(s: RankShiftSettings, cells: Mapping[Cell, Played]) -> list[Question]:
    return [
        (
            f"{method}, {spread} ranks, alpha {alpha:g}: devices of lowest less of highest rank",
            [(1.0, (method, spread, alpha), tier_gap)],
        )
        for (method, spread, alpha), played in cells.items()
        if len(np.unique(played.ranks)) > 1
    ]
