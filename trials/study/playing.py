"""One run of a study, played: what was measured on every device, and what it cost.

Knows the simulation and a run's facts; it knows neither other runs nor what is made of them.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from coordinator.config import RunConfig
from edge_agent.training.rows import Rows
from trials.demo import NANO_CODE
from trials.domains import domain_devices
from trials.simulated_bench import SharedBench
from trials.simulated_types import (
    Measured,
    Sending,
    SimulatedDevice,
    SimulatedRound,
    TierAdapters,
)
from trials.simulation import Simulation
from trials.study.design import RunFacts


def trusting(sections: Mapping[str, Any]) -> dict[str, Any]:
    """run.toml as studies play it: every update as the method has it, none screened or clipped."""
    method = {**sections.get("method", {}), "robust": "none"}
    return {**sections, "method": method, "screening": {"enabled": False}}


@dataclass(frozen=True)
class Point:
    """The fleet after some rounds. nats, tokens: of each held-out sequence, by device.

    up_bytes, down_bytes, train_s: of all rounds so far, by device.
    """

    rounds: int
    nats: Mapping[str, Sequence[float]]
    tokens: Mapping[str, Sequence[int]]
    up_bytes: Mapping[str, int]
    down_bytes: Mapping[str, int]
    train_s: Mapping[str, float]


@dataclass(frozen=True)
class RunRecord:
    """A finished run. joined: rounds by device. skew: how far a device's tokens are from the
    fleet's, Jensen-Shannon divergence in bits. dense_bytes: of one whole float32 adapter.
    update_share: mean over the rounds joined. seconds: of processor time.
    """

    key: str
    cell: str
    seed: int
    points: Sequence[Point]
    joined: Mapping[str, int]
    skew: Mapping[str, float]
    dense_bytes: int
    update_share: Mapping[str, float]
    seconds: float


class Player:
    """Plays runs one after the other, with base and code kept in memory. scratch: emptied by runs.

    devices: of a base's own, for tests; the study's domains where not given.
    """

    def __init__(
        self, scratch: Path, base: Path = NANO_CODE,
        devices: Sequence[SimulatedDevice] | None = None,
    ) -> None:  # fmt: skip
        self._scratch, self._base, self._devices = scratch, base, devices
        self._bench = SharedBench()
        self._skews: dict[tuple[str, ...], dict[str, float]] = {}

    def play(self, run: RunFacts) -> RunRecord:
        """The whole run. Raises what training, packing and merging raise."""
        began = time.process_time()
        if run.kind == "local":
            points, joined, shares, size = self._alone(run)
        else:
            points, joined, shares, size = self._together(run)
        return RunRecord(
            run.key, run.cell, run.seed, points, joined, self._skew(run), size, shares,
            time.process_time() - began,
        )  # fmt: skip

    def _together(self, run: RunFacts) -> tuple[list[Point], dict[str, int], dict[str, float], int]:
        simulation = self._simulation(run, self._of(run), "fleet")
        tally = _Tally(run.devices)
        points = [tally.point(0, simulation.measure())]
        for number, present in enumerate(run.present, 1):
            tally.add(simulation.round(present))
            if number in run.measured:
                points.append(tally.point(number, simulation.measure()))
        return points, dict(tally.joined), tally.shares, 4 * simulation.values

    def _alone(self, run: RunFacts) -> tuple[list[Point], dict[str, int], dict[str, float], int]:
        """Every device by itself, in the rounds in which it would have taken part."""
        of: dict[str, list[Point]] = {}
        tally = _Tally(run.devices)
        size = 0
        for device in self._of(run):
            simulation = self._simulation(run, [device], f"alone-{device.name}")
            size = 4 * simulation.values
            of[device.name] = [tally.point(0, simulation.measure())]
            for number, present in enumerate(run.present, 1):
                if device.name in present:
                    tally.add(simulation.round())
                if number in run.measured:
                    of[device.name].append(tally.point(number, simulation.measure()))
        points = [_joint(same) for same in zip(*of.values(), strict=True)]
        return points, dict(tally.joined), tally.shares, size

    def _simulation(
        self, run: RunFacts, devices: Sequence[SimulatedDevice], folder: str
    ) -> Simulation:
        sections = {**run.sections, "model": {**run.sections["model"], "base": str(self._base)}}
        sections = trusting(sections)
        return Simulation(
            RunConfig.model_validate(sections), self._base, devices, self._bench,
            self._scratch / folder, {n: Sending(**given) for n, given in run.sendings.items()},
            None if run.other_tiers is None else TierAdapters(run.tier, run.other_tiers),
        )  # fmt: skip

    def _of(self, run: RunFacts) -> list[SimulatedDevice]:
        named = {d.name: d for d in self._devices or domain_devices(run.devices)}
        return [SimulatedDevice(n, named[n].data, size) for n, size in run.sizes.items()]

    def _skew(self, run: RunFacts) -> dict[str, float]:
        names = run.devices
        if names not in self._skews:
            simulation = self._simulation(run, self._of(run), "fleet")
            rows = {d.name: simulation.rows(d).held_out for d in simulation.devices}
            self._skews[names] = skew_of(
                {n: r.tokens for n, r in rows.items() if isinstance(r, Rows)}
            )
        return self._skews[names]


class _Tally:
    """What devices have sent, fetched and done so far."""

    def __init__(self, devices: Sequence[str]) -> None:
        self.joined: Counter[str] = Counter(dict.fromkeys(devices, 0))
        self._up: Counter[str] = Counter(dict.fromkeys(devices, 0))
        self._down: Counter[str] = Counter(dict.fromkeys(devices, 0))
        self._train_s = dict.fromkeys(devices, 0.0)
        self._shares = dict.fromkeys(devices, 0.0)

    def add(self, played: SimulatedRound) -> None:
        """One more round."""
        for name, device in played.devices.items():
            self.joined[name] += 1
            self._up[name] += device.up_bytes
            self._down[name] += device.down_bytes
            self._train_s[name] += device.report.train_s
            self._shares[name] += device.update_share

    def point(self, rounds: int, measured: Mapping[str, Measured]) -> Point:
        """As it is now."""
        return Point(
            rounds, {n: m.nats for n, m in measured.items()},
            {n: m.tokens for n, m in measured.items()},
            dict(self._up), dict(self._down), dict(self._train_s),
        )  # fmt: skip

    @property
    def shares(self) -> dict[str, float]:
        """Mean share of the merges that a device took part in."""
        return {n: total / max(1, self.joined[n]) for n, total in self._shares.items()}


def _joint(points: Sequence[Point]) -> Point:
    """Points of single devices as one of all."""
    last = points[-1]
    return Point(
        last.rounds, {n: v for p in points for n, v in p.nats.items()},
        {n: v for p in points for n, v in p.tokens.items()},
        *({n: getattr(p, name)[n] for p in points for n in p.nats}
          for name in ("up_bytes", "down_bytes", "train_s")),
    )  # fmt: skip


def skew_of(tokens: Mapping[str, Any]) -> dict[str, float]:
    """Jensen-Shannon divergence of each device's token frequencies from all the others', in bits.

    tokens: integer arrays of any shape.
    """
    size = 1 + max(int(t.max()) for t in tokens.values())
    shares = {n: np.bincount(t.ravel(), minlength=size) / t.size for n, t in tokens.items()}
    found = {}
    for name, own in shares.items():
        others = np.mean([s for other, s in shares.items() if other != name], axis=0)
        middle = (own + others) / 2
        found[name] = float((_kl(own, middle) + _kl(others, middle)) / 2)
    return found


def _kl(p: Any, q: Any) -> float:
    there = p > 0
    return float((p[there] * np.log2(p[there] / q[there])).sum())
