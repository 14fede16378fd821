"""Finished runs as arrays: losses of cells by seed, device and held-out sequence.

Knows runs and records; it knows no statistics. A cell is what runs of different seeds share.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from trials.study.design import RunFacts
from trials.study.playing import Point, RunRecord
from trials.study.settings import StudyError
from trials.study.statistics import Array


@dataclass(frozen=True, eq=False)
class Losses:
    """nats, tokens (S, D, E): summed over each held-out sequence, and predicted tokens."""

    nats: Array
    tokens: Array

    @cached_property
    def loss(self) -> Array:
        """(S, D) nats per token."""
        found: Array = self.nats.sum(-1) / self.tokens.sum(-1)
        return found

    @cached_property
    def noise(self) -> Array:
        """(S, D) sampling variance of `loss`, of a ratio of sums over E sequences."""
        e = self.nats.shape[-1]
        off = self.nats - self.loss[..., None] * self.tokens
        found: Array = e / (e - 1) * (off * off).sum(-1) / self.tokens.sum(-1) ** 2
        return found


@dataclass(frozen=True, eq=False)
class Cell:
    """Runs that differ in their seed alone, in the order of the study's seeds."""

    runs: Sequence[RunFacts]
    records: Sequence[RunRecord]
    sequences: int  # E: as many as every device of the study has

    @property
    def facts(self) -> RunFacts:
        """Of the first seed."""
        return self.runs[0]

    @property
    def devices(self) -> tuple[str, ...]:
        """By name."""
        return self.facts.devices

    @property
    def seeds(self) -> int:
        """How many, S."""
        return len(self.runs)

    def at(self, places: Sequence[int]) -> Losses:
        """At the point of that place in each run."""
        points = [r.points[i] for r, i in zip(self.records, places, strict=True)]
        return Losses(self._stack(points, "nats"), self._stack(points, "tokens"))

    @cached_property
    def final(self) -> Losses:
        """After the last round."""
        return self.at([len(r.points) - 1 for r in self.records])

    @cached_property
    def start(self) -> Losses:
        """Before the first round."""
        return self.at([0] * self.seeds)

    @cached_property
    def tier(self) -> Array:
        """(S, D) index of the level of each device."""
        return np.array([[run.tier[d] for d in self.devices] for run in self.runs], np.float64)

    @cached_property
    def halvings(self) -> Array:
        """(S, D) log2 of dense bytes over bytes sent, as measured, one value for each tier.

        Of a tier as a whole, so that devices of the same ratio stay tied.
        """
        found = np.zeros_like(self.tier)
        sent, dense = self.up_bytes(), self._per_device("joined") * self.records[0].dense_bytes
        for tier in np.unique(self.tier):
            of = self.tier == tier
            found[of] = np.log2(dense[of].sum() / max(1.0, sent[of].sum()))
        return found

    @property
    def fleet_halvings(self) -> float:
        """log2 of dense bytes over bytes sent, of all devices."""
        dense = self._per_device("joined").sum() * self.records[0].dense_bytes
        return float(np.log2(dense / max(1.0, self.up_bytes().sum())))

    @property
    def sizes(self) -> Array:
        """(S, D) training sequences."""
        return np.array([[run.sizes[d] for d in self.devices] for run in self.runs], np.float64)

    @property
    def controls(self) -> list[Array]:
        """What else may matter: data size, skew, rounds joined."""
        return [self.sizes, self._per_device("skew"), self._per_device("joined")]

    def up_bytes(self) -> Array:
        """(S, D) sent in the whole run."""
        return np.array(
            [[r.points[-1].up_bytes[d] for d in self.devices] for r in self.records], np.float64
        )

    def within(self, bytes_: float) -> list[int]:
        """The last point of each run until which the fleet sent at most so many bytes."""
        found = []
        for r in self.records:
            sent = [sum(p.up_bytes.values()) for p in r.points]
            found.append(max(i for i, size in enumerate(sent) if size <= bytes_))
        return found

    def _per_device(self, name: str) -> Array:
        return np.array(
            [[getattr(r, name)[d] for d in self.devices] for r in self.records], np.float64
        )

    def _stack(self, points: Sequence[Point], name: str) -> Array:
        return np.array(
            [[getattr(p, name)[d][: self.sequences] for d in self.devices] for p in points],
            np.float64,
        )


def cells_of(runs: Sequence[RunFacts], records: Mapping[str, RunRecord]) -> dict[str, Cell]:
    """By name. Raises `StudyError` when seeds have different cells or runs are missing."""
    of: dict[str, list[RunFacts]] = {}
    for run in runs:
        of.setdefault(run.cell, []).append(run)
    if missing := [run.cell for run in runs if run.key not in records]:
        raise StudyError(f"{len(missing)} runs are missing, first {missing[0]!r}; play them first")
    if len({len(same) for same in of.values()}) > 1:
        raise StudyError("not every seed has every cell; play the study anew")
    shortest = min(
        len(nats) for r in records.values() for p in r.points for nats in p.nats.values()
    )
    return {
        name: Cell(same, [records[run.key] for run in same], shortest) for name, same in of.items()
    }
