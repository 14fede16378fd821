"""`study rank-shift`: ranks unevenly spread over devices x skewed labels or domains -> robustness.

Its runs and how one is played. Every run is a simulation of real training; a device's score
is what the global adapter gets on the classes in the shares that this device has of them, from the
same held-out examples for all, so that devices differ by their mixtures and not by luck.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from coordinator.config import RunConfig
from coordinator.methods import MethodOptions, make
from trials.simulated_bench import SharedBench
from trials.simulated_types import Measured, Sending
from trials.simulation import Simulation
from trials.study.engine import Told, Workers, claim, write_whole
from trials.study.playing import trusting
from trials.study.rank_shift_settings import RankShiftSettings, TaskSection, base_of
from trials.study.settings import StudyError
from trials.study.shifted_data import Pool, code_pool, labelled_pool, shifted_fleet

FORMAT = 1  # of what a run writes; another number is another key


@dataclass(frozen=True)
class ShiftFacts:
    """Everything that decides what a run gives. ranks: of device-0, device-1, ..."""

    method: str
    spread: str
    alpha: float
    seed: int
    ranks: tuple[int, ...]
    sections: Mapping[str, Any]
    task: Mapping[str, Any]
    data: str
    examples: int
    rounds: int

    @property
    def cell(self) -> str:
        """In words."""
        return f"{self.method}, {self.spread} ranks, alpha {self.alpha:g}"

    @property
    def key(self) -> str:
        """Names its record; the same for spreads that come to the same run."""
        plain = {**asdict(self), "spread": "", "format": FORMAT}
        return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:24]


@dataclass(frozen=True)
class ShiftRecord:
    """A finished run. nats, accuracy: by class, of the first and of the last global adapter.

    nats: of each held-out example or sequence; tokens: what was predicted of it. shares:
    (devices, classes) as dealt. up_bytes: of all rounds, by device. seconds: of processor time.
    """

    key: str
    names: Sequence[str]
    nats: Sequence[Sequence[Sequence[float]]]  # (2, classes, examples)
    tokens: Sequence[Sequence[Sequence[int]]]
    accuracy: Sequence[Sequence[float]]  # (2, classes)
    shares: Sequence[Sequence[float]]
    up_bytes: Sequence[int]
    seconds: float


def runs_of(s: RankShiftSettings, data: Path | None) -> list[ShiftFacts]:
    """Every run of the study, each once."""
    found: dict[str, ShiftFacts] = {}
    for seed in s.design.seeds:
        for alpha in s.design.alphas:
            for spread in s.design.ranks:
                for method in s.design.methods:
                    facts = facts_of(s, data, method, spread, alpha, seed)
                    found.setdefault(facts.key, facts)
    return list(found.values())


def facts_of(
    s: RankShiftSettings, data: Path | None, method: str, spread: str, alpha: float, seed: int
) -> ShiftFacts:
    """One run. A method whose devices all have one rank gets the lowest of the fleet's."""
    given = s.design.ranks[spread]
    order = np.random.default_rng([seed, 3]).permutation(len(given))
    ranks = tuple(given[i] for i in order)
    made = make(method, MethodOptions(rank=max(given)))
    if not made.has_global:
        raise StudyError(
            f"{method} keeps parts on the devices, so that no adapter for all can be measured; "
            "leave it out of [design] methods"
        )
    if not made.heterogeneous:
        ranks = (min(given),) * len(given)
    rank, c = max(ranks), s.learning
    whole = {"delta": False} if made.density == 1 else {}
    task: dict[str, Any] = {}
    if s.task.labels:
        task = {"task": "sequence-classification", "labels": list(s.task.labels)}
    sections: dict[str, dict[str, Any]] = {
        "run": {"name": "study", "seed": seed, "rounds": c.rounds},
        "model": {"base": str(base_of(s.task)), "targets": list(c.targets), **task},
        "adapter": {"rank": rank, "alpha": c.alpha_per_rank * rank},
        "method": {"name": method},
        "fairness": {"weights": "samples"},
        "training": {
            "precision": "fp32", "sequence_tokens": c.sequence_tokens,
            "micro_batch": c.micro_batch, "local_steps": c.local_steps,
            "learning_rate": c.learning_rate,
        },
        "wire": {"update": "float32", "slice": "float32", "global_adapter": "float32", **whole},
        "evaluation": {"sequences": c.held_out_sequences, "held_out_share": 0.25},
    }  # fmt: skip
    return ShiftFacts(
        method, spread, alpha, seed, ranks, sections, s.task.model_dump(mode="json"),
        "" if data is None else str(data.resolve()), s.design.examples, c.rounds,
    )  # fmt: skip


class ShiftPlayer:
    """Plays runs one after the other, with base and pool in memory. scratch: emptied by runs."""

    def __init__(self, scratch: Path) -> None:
        self._scratch, self._bench = scratch, SharedBench()
        self._pools: dict[str, Pool] = {}

    def play(self, run: ShiftFacts) -> ShiftRecord:
        """The whole run. Raises what data, training, packing and merging raise."""
        began = time.process_time()
        pool, place = self._pool(run), self._scratch / f"alpha-{run.alpha:g}-seed-{run.seed}"
        fleet = shifted_fleet(pool, [run.examples] * len(run.ranks), run.alpha, run.seed, place)
        names = [device.name for device in fleet.devices]
        config = RunConfig.model_validate(trusting(run.sections))
        sendings = {name: Sending(rank=k) for name, k in zip(names, run.ranks, strict=True)}
        simulation = Simulation(
            config, Path(config.model.base), [*fleet.devices, *fleet.probes], self._bench,
            self._scratch / "run", sendings,
        )  # fmt: skip
        probes = [probe.name for probe in fleet.probes]
        seen = [self._measured(simulation, probes)]
        up = dict.fromkeys(names, 0)
        for _ in range(run.rounds):
            for name, device in simulation.round(names).devices.items():
                up[name] += device.up_bytes
        seen.append(self._measured(simulation, probes))
        return ShiftRecord(
            run.key, list(pool.names),
            [[list(m.nats) for m in point] for point in seen],
            [[list(m.tokens) for m in point] for point in seen],
            [[m.accuracy for m in point] for point in seen],
            fleet.shares.tolist(), list(up.values()), time.process_time() - began,
        )  # fmt: skip

    @staticmethod
    def _measured(simulation: Simulation, probes: Sequence[str]) -> list[Measured]:
        found = simulation.measure(probes)
        return [found[probe] for probe in probes]

    def _pool(self, run: ShiftFacts) -> Pool:
        key = json.dumps([run.task, run.data], sort_keys=True)
        if key not in self._pools:
            task = TaskSection.model_validate(run.task)
            if task.kind == "code":
                share = run.sections["evaluation"]["held_out_share"]
                self._pools[key] = code_pool(task.domains, share)
            else:
                files = [
                    [str(Path(run.data) / name) for name in names]
                    for names in (task.train, task.held_out)
                ]
                self._pools[key] = labelled_pool(
                    files[0], files[1], task.labels, self._scratch / "pool"
                )
        return self._pools[key]


def play_rank_shift(
    s: RankShiftSettings, data: Path | None, out: Path, jobs: int, told: Told
) -> dict[str, ShiftRecord]:
    """Finished records by key; plays what `out` lacks. Raises `StudyError`."""
    if s.task.kind == "classification" and data is None:
        raise StudyError(
            f"this study reads {', '.join((*s.task.train, *s.task.held_out))}; say below which "
            "folder with --data"
        )
    claim(s, out)
    folder = out / "runs"
    folder.mkdir(exist_ok=True)
    runs = runs_of(s, data)
    missing = [run for run in runs if not (folder / f"{run.key}.json").is_file()]
    told(f"{len(runs)} runs, {len(runs) - len(missing)} of them found finished in {out}")
    if missing:
        began = time.monotonic()
        with Workers(jobs, _begin, _play) as workers:
            for done, cell in enumerate(workers.play(missing, folder), 1):
                past = time.monotonic() - began
                left = past / done * (len(missing) - done)
                told(f"{done}/{len(missing)} {cell} ({past / 60:.1f} min, {left / 60:.1f} left)")
    return {run.key: read_shift(folder / f"{run.key}.json") for run in runs}


def read_shift(path: Path) -> ShiftRecord:
    """Raises `StudyError` on a file that is no record."""
    try:
        return ShiftRecord(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise StudyError(f"{path} holds no finished run ({error}); delete it") from error


_player: ShiftPlayer | None = None


def _begin(scratch: Path) -> None:
    """In a worker, once."""
    global _player  # noqa: PLW0603 - what a worker keeps between runs
    import torch

    torch.set_num_threads(1)
    _player = ShiftPlayer(scratch / str(os.getpid()))


def _play(run: ShiftFacts, folder: Path) -> None:
    assert _player is not None
    write_whole(folder / f"{run.key}.json", json.dumps(asdict(_player.play(run))))
