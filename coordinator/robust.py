"""Robust merges: means that a few hostile updates cannot pull far, for every method that averages.

A rule sees one module of a round and hands the method other updates or shares in place of those it
got, so that no method needs to know of it. Rows are compared with the same rows of other devices
only, since sketches overlap in part; a device's up counts as its optimiser moved it where sizes are
compared, and at the adapter's common scale where rows are merged.

| rule             | what it does, module by module                                    | from    |
|------------------|-------------------------------------------------------------------|---------|
| clip             | no change is larger than 1.5 times the median of the fleet's    | n >= 3  |
| trimmed-mean     | of each value, the mean without the highest and lowest 30 %        | 4 / row |
| median           | of each value, the median (arXiv 1803.01498, as the one above)     | 3 / row |
| geometric-median | of clipped changes: shares fall with the distance from the centre  | n >= 3  |
|                  | (arXiv 1912.13445)                                                |         |
| multi-krum       | only those close to their neighbours (NeurIPS 2017, Blanchard)     | n >= 5  |

Rows with fewer owners, and rounds with fewer devices, get the clipped mean instead; how many is in
the round's record. The two rules that look at single values weigh all devices alike, as in their
papers: how many examples a device has is its own word. The others keep the shares that they got.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from coordinator.lowrank import Matrix32
from coordinator.methods.base import (
    Method,
    ModuleState,
    ModuleUpdate,
    RowMethod,
    Shares,
    UnknownMethodError,
)
from coordinator.overlap import Overlap, flat_rows
from coordinator.robust_rules import (
    BY_VALUE,
    LEAST,
    LEAST_KRUM,
    LEAST_MEDIAN,
    LEAST_TRIMMED,
    Rule,
    clip_factors,
    locations,
    reweighted,
)
from protos.contract import Part


@dataclass(frozen=True, eq=False)
class Tally:
    """What a rule did in one module. factors: (n,) of what each device gave, 1 where all of it
    counts. fallen_back, rows: rows that got the clipped mean instead, and all that were held.
    """

    factors: NDArray[np.float64]
    fallen_back: int = 0
    rows: int = 0


@dataclass(frozen=True, eq=False)
class Robustly:
    """One module as the method is to merge it.

    updates, shares: in place of those given. entered: the updates that, with those shares, stand
    for what each device gave, in the account of contributions.
    """

    updates: Sequence[ModuleUpdate]
    shares: Shares
    entered: Sequence[ModuleUpdate]
    tally: Tally


@dataclass(eq=False)
class RobustRecord:
    """What a rule did in a round, summed over its modules as they are added."""

    rule: Rule
    names: Sequence[str]
    _factors: list[NDArray[np.float64]] = field(default_factory=list)
    _fallen_back: int = 0
    _rows: int = 0

    def add(self, found: Tally) -> None:
        """Takes one module."""
        self._factors.append(found.factors)
        self._fallen_back += found.fallen_back
        self._rows += found.rows

    def plain(self) -> dict[str, Any]:
        """As JSON: the rule, the share of rows that were clipped instead, and of which devices less
        than the whole change entered (mean factor over modules, by name).
        """
        means = np.mean(self._factors, axis=0) if self._factors else np.ones(len(self.names))
        return {
            "rule": self.rule,
            "clipped_instead": self._fallen_back / self._rows if self._rows else 0.0,
            "lessened": {
                n: float(m) for n, m in zip(self.names, means, strict=True) if m < 1 - 1e-9
            },
        }


def require_fit(rule: Rule, method: Method) -> None:
    """Raises `UnknownMethodError` where the rule cannot be used with the method."""
    if rule not in get_args(Rule):
        raise UnknownMethodError(f"robust {rule!r} does not exist; use {', '.join(get_args(Rule))}")
    if rule in ("none", "clip"):
        return
    if not isinstance(method, RowMethod):
        raise UnknownMethodError(
            f'robust = "{rule}" cannot be used with {method.name}, which rebuilds its factors from '
            'products instead of averaging rows; use "clip", which works with every method'
        )
    if rule in BY_VALUE and method.density < 1:
        raise UnknownMethodError(
            f'robust = "{rule}" cannot be used with {method.name}: most devices leave a value out, '
            'so that its median is zero; use "clip", "geometric-median" or "multi-krum"'
        )


@dataclass(frozen=True)
class Robust:
    """A rule, applied to modules and to tensors that are trained whole."""

    rule: Rule = "none"

    @property
    def holds_all(self) -> bool:
        """Whether every update's values must be in memory at once, one module of them."""
        return self.rule not in ("none", "clip")

    def of(self, current: ModuleState, updates: Sequence[ModuleUpdate], shares: Shares) -> Robustly:
        """One module. Updates without a share stay as they are and count for nothing."""
        ones = np.ones(len(updates))
        heard = np.flatnonzero(shares > 0)
        if self.rule == "none" or not len(heard):
            return Robustly(updates, shares, updates, Tally(ones))
        few = [updates[int(i)] for i in heard]
        overlap = Overlap.of([u.rows for u in few], current.adapter.rank)
        own = clip_factors([rms_of(u) for u in few])
        clipped = [scaled(u, f) for u, f in zip(few, own, strict=True)]
        held = int((overlap.counts > 0).sum())
        weights, factors, back = shares[heard].copy(), own, 0
        given: Sequence[ModuleUpdate] = clipped
        entered = given
        if self.rule in BY_VALUE:
            least = LEAST_MEDIAN if self.rule == "median" else LEAST_TRIMMED
            back = int(((overlap.counts > 0) & (overlap.counts < least)).sum())
            given, entered = self._by_value(current, few, own, weights), few
            factors = np.ones(len(few))
        elif self.rule in ("geometric-median", "multi-krum"):
            if len(few) < (LEAST_KRUM if self.rule == "multi-krum" else LEAST):
                back = held
            else:
                if self.rule == "multi-krum":
                    given = few
                counts = [u.k for u in few]
                grams = _joint_grams(current, given)
                weights = reweighted(self.rule, overlap, grams, weights, counts)
                factors = weights / shares[heard] * (own if given is clipped else 1.0)
                entered = given
        after, seen, final = list(updates), list(updates), shares.copy()
        for place, i in enumerate(heard):
            after[i], seen[i], final[i] = given[place], entered[place], weights[place]
            ones[i] = factors[place]
            if final[i] != shares[i]:
                more = float(final[i] / shares[i])
                after[i] = replace(after[i], weight=after[i].weight * more)
        return Robustly(after, final, seen, Tally(np.minimum(ones, 1.0), back, held))

    def dense(self, deltas: Sequence[Matrix32], shares: Shares) -> NDArray[np.float64]:
        """The change of a tensor that everybody trains whole: one row of all its values."""
        flat = [np.reshape(d, (1, -1)) for d in deltas]
        heard = np.flatnonzero(shares > 0)
        rows = [np.zeros(1, np.int64)] * len(heard)
        overlap = Overlap.of(rows, 1)
        few, weights = [flat[i] for i in heard], shares[heard]
        sizes = [{"dense": float(np.sqrt(np.vdot(d, d) / d.size))} for d in few]
        factors = clip_factors(sizes)
        shape = deltas[0].shape
        if self.rule in BY_VALUE:
            found = locations(self.rule, overlap, few, factors, weights)
            return found.reshape(shape).astype(np.float64)
        if self.rule in ("geometric-median", "multi-krum") and len(few) >= (
            LEAST_KRUM if self.rule == "multi-krum" else LEAST
        ):
            grams = overlap.grams(few)
            weights = reweighted(self.rule, overlap, grams, weights, [1] * len(few))
            factors = np.ones(len(few))
        total = np.zeros(flat[0].shape)
        for d, w, f in zip(few, weights, factors, strict=True):
            total += (w * f) * d
        return total.reshape(shape)

    def _by_value(
        self,
        current: ModuleState,
        few: Sequence[ModuleUpdate],
        factors: NDArray[np.float64],
        weights: Shares,
    ) -> list[ModuleUpdate]:
        """Updates that all say the same of a row, so that every mean of them is the location."""
        agreed: list[dict[Part, Matrix32]] = [{} for _ in few]
        for part in _parts(few):
            holders = [i for i, u in enumerate(few) if part in u.delta]
            rows = [flat_rows(few[i], part, current.adapter.rank) for i in holders]
            size = current.adapter.rank**2 if part == "core" else current.adapter.rank
            lifts = [few[i].lift if part == "up" else 1.0 for i in holders]
            values = [_values(few[i], part, lift) for i, lift in zip(holders, lifts, strict=True)]
            overlap = Overlap.of(rows, size)
            found = locations(self.rule, overlap, values, factors[holders], weights[holders])
            for i, own, lift in zip(holders, rows, lifts, strict=True):
                said = found[own] / np.float32(lift)
                agreed[i][part] = said.reshape(few[i].delta[part].shape)
        return [replace(u, delta=delta) for u, delta in zip(few, agreed, strict=True)]


MEAN = Robust()
"""No rule: the method's own mean."""


def rms_of(update: ModuleUpdate) -> dict[Part, float]:
    """The size of a change by part: root mean square of its values, as the device moved them."""
    found: dict[Part, float] = {}
    for part in update.delta:
        values = update.delta[part].reshape(-1)
        found[part] = float(np.sqrt(np.vdot(values, values) / max(1, values.size)))
    return found


def scaled(update: ModuleUpdate, factor: float) -> ModuleUpdate:
    """The update with its change times a factor, read when it is asked for; itself at 1."""
    return update if factor == 1 else replace(update, delta=_Scaled(update.delta, factor))


class _Scaled(Mapping[Part, Matrix32]):
    """A change times a factor; nothing is kept of it."""

    def __init__(self, delta: Mapping[Part, Matrix32], factor: float) -> None:
        self._delta, self._factor = delta, np.float32(factor)

    def __getitem__(self, part: Part) -> Matrix32:
        return self._delta[part] * self._factor

    def __contains__(self, part: object) -> bool:
        return part in self._delta

    def __iter__(self) -> Iterator[Part]:
        return iter(self._delta)

    def __len__(self) -> int:
        return len(self._delta)


def _joint_grams(current: ModuleState, updates: Sequence[ModuleUpdate]) -> NDArray[np.float64]:
    """(r, c, c) inner products of rows over all parts, each divided by its median size squared.

    Up and down have no common unit; this way neither is drowned by the other.
    """
    rank = current.adapter.rank
    total: NDArray[np.float64] | None = None
    for part in _parts(updates):
        values = [_row_values(u, part, rank) for u in updates]
        overlap = Overlap.of([u.rows for u in updates], rank)
        middle = np.median([float(np.vdot(v, v)) / len(v) for v in values])
        found = overlap.grams(values) / (middle if middle > 0 else 1.0)
        total = found if total is None else total + found
    assert total is not None
    return total


def _row_values(update: ModuleUpdate, part: Part, rank: int) -> Matrix32:
    """(k, w) of a part at the adapter's scale; zeros where a late update lacks it."""
    if part not in update.delta:
        return np.zeros((update.k, 1), np.float32)
    delta = update.delta[part]
    if part != "core":
        return delta * np.float32(update.lift) if part == "up" and update.lift != 1 else delta
    wide = np.zeros((update.k, rank), np.float32)
    wide[:, update.rows] = delta
    return wide


def _values(update: ModuleUpdate, part: Part, lift: float) -> Matrix32:
    delta = update.delta[part]
    if part == "core":
        return delta.reshape(-1, 1)
    return delta if lift == 1 else delta * np.float32(lift)


def _parts(updates: Sequence[ModuleUpdate]) -> list[Part]:
    order: tuple[Part, ...] = ("up", "down", "core")
    return [p for p in order if any(p in u.delta for u in updates)]
