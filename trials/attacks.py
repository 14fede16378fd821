"""`sketchfleet-trial attacks`: what hostile devices cost, under every robust merge and screening.

Ten devices, each with its own kind of code; some are hostile. Rounds are played in this process
with the coordinator's own refusals, screening and merging (`trials.simulation`). A run that is
finished is a file, so that a table that was stopped goes on.
"""

from __future__ import annotations

import json
import shutil
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
from safetensors.torch import load_file, save_file

from coordinator.config import RunConfig
from coordinator.robust_rules import Rule
from profiles.errors import SketchfleetError
from protos.contract import Assignment, LocalReport
from trials.demo import NANO_CODE
from trials.domains import DOMAINS, domain_devices
from trials.hostile import ATTACKS, Attack, Attacker, PoisonedBench
from trials.simulated_types import Sending, SimulatedDevice
from trials.simulation import Simulation
from trials.study.engine import write_whole

RECOMMENDED = "recommended"
RECOMMENDED_RULE: Rule = "geometric-median"  # beside screening
RULES: tuple[str, ...] = ("none", RECOMMENDED, *get_args(Rule)[1:])
RANKS = (8, 8, 8, 8, 4, 4, 4, 4, 4, 4)
SEQUENCES = 48
LAYERS = 2
PROMISED = 2  # hostile devices of ten, whatever they do, that cost little
KEPT = 600  # local rounds kept in memory, since runs have their beginnings in common


class AttackError(SketchfleetError):
    """A table that cannot be continued."""


@dataclass(frozen=True)
class Cell:
    """One run: so many hostile devices of an attack, or none of None, under a rule."""

    rule: str
    attack: Attack | None = None
    hostile: int = 0

    @property
    def key(self) -> str:
        """The name of its file."""
        what = "clean" if self.attack is None else f"{self.attack}-{self.hostile}"
        return f"{self.rule}-{what}".replace(" ", "-")


@dataclass(frozen=True)
class Played:
    """A finished run. losses: at the end, of honest devices on their own held-out code, nats a
    token; before: of all, at the start. kept_out: updates of hostile devices that were refused,
    screened out or in quarantine, of `sent`; wronged: the same of honest ones, of `honest`.
    seconds: of processor time.
    """

    key: str
    losses: Mapping[str, float]
    before: Mapping[str, float]
    hostile: Sequence[str]
    kept_out: int
    sent: int
    wronged: int
    honest: int
    seconds: float
    setting: Mapping[str, Any]


@dataclass(frozen=True)
class Plan:
    """What is played. hostile: numbers of devices of ten."""

    rounds: int
    local_steps: int
    hostile: tuple[int, ...]
    attacks: tuple[Attack, ...]
    rules: tuple[str, ...]
    seed: int = 1

    @property
    def cells(self) -> list[Cell]:
        """Clean runs first, then what the promise is about; what has rounds in common in a row."""
        found = [Cell(rule) for rule in self.rules]
        found += [
            Cell(rule, attack, count)
            for count in sorted(self.hostile, key=lambda n: (n != PROMISED, -n))
            for rule in self.rules for attack in self.attacks
        ]  # fmt: skip
        return found

    def setting(self) -> dict[str, Any]:
        """What a finished run must have been played with to count."""
        return {"rounds": self.rounds, "local_steps": self.local_steps, "seed": self.seed}


FULL = Plan(3, 3, (1, 2, 3), ATTACKS, RULES)
QUICK = Plan(2, 3, (2,), ATTACKS, ("none", RECOMMENDED))


def write_short_base(folder: Path, layers: int = LAYERS) -> Path:
    """The shipped nano model with its first layers only, to which adapters have much to add.

    A step takes less than half the time, and what is learned is a large part of the loss, so that
    what an attack takes away shows.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for path in NANO_CODE.iterdir():
        if path.suffix == ".json":
            shutil.copy(path, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": layers}))
    gone = tuple(f"model.layers.{n}." for n in range(layers, config["num_hidden_layers"]))
    values = load_file(NANO_CODE / "model.safetensors")
    kept = {n: v for n, v in values.items() if not n.startswith(gone)}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


class HostileSimulation(Simulation):
    """A simulation in which some devices attack, and local rounds that repeat are not repeated."""

    attacker: Attacker | None = None
    known: OrderedDict[tuple[Any, ...], tuple[LocalReport, bytes]]

    def train(self, device: SimulatedDevice, task: Assignment, **paths: Any) -> LocalReport:
        """A local round; of a hostile device, with what it sends in place of its update."""
        attacker = self.attacker if self.attacker and device.name in self.attacker.names else None
        poisons = attacker is not None and attacker.attack == "label flip"
        assert isinstance(self.bench, PoisonedBench)
        self.bench.poisoned = frozenset([device.data] if poisons else [])
        path: Path = paths["update_path"]
        key = (task.digest, poisons)
        if key in self.known:
            report, update = self.known[key]
            path.write_bytes(update)
        else:
            report = super().train(device, task, **paths)
            self.known[key] = report, path.read_bytes()
            if len(self.known) > KEPT:
                self.known.popitem(last=False)
        if attacker is not None:
            attacker.tamper(task, path)
        return report


class Range:
    """Plays cells one after another; base and code stay in memory."""

    def __init__(
        self, plan: Plan, scratch: Path, base: Path | None = None,
        devices: Sequence[SimulatedDevice] | None = None,
    ) -> None:  # fmt: skip
        self._plan, self._scratch = plan, scratch / "run"
        self._base = base or write_short_base(scratch / "base")
        self._before: dict[str, float] = {}
        given = devices or domain_devices(tuple(DOMAINS))
        self._devices = [SimulatedDevice(d.name, d.data, SEQUENCES) for d in given]
        self._bench = PoisonedBench()
        self._known: OrderedDict[tuple[Any, ...], tuple[LocalReport, bytes]] = OrderedDict()
        order = np.random.default_rng(plan.seed).permutation(len(self._devices))
        self._order = [self._devices[i].name for i in order]  # who turns hostile first

    def play(self, cell: Cell) -> Played:
        """The whole run. Raises what training and merging raise."""
        began = time.process_time()
        shutil.rmtree(self._scratch, ignore_errors=True)
        run = HostileSimulation(
            self._config(cell), self._base, self._devices, self._bench, self._scratch,
            {d.name: Sending("bfloat16", k) for d, k in zip(self._devices, RANKS, strict=True)},
        )  # fmt: skip
        run.known = self._known
        hostile = self._order[: cell.hostile]
        if cell.attack is not None:
            run.attacker = Attacker(cell.attack, hostile, run.spec)
        if not self._before:  # the same of every run
            self._before = {n: m.loss for n, m in run.measure().items()}
        kept_out = wronged = 0
        for _ in range(self._plan.rounds):
            played = run.round()
            out = set(played.refused)
            if played.screening is not None:
                out |= {s.device_id for s in played.screening.screened if not s.merged}
            kept_out += len(out & set(hostile))
            wronged += len(out - set(hostile))
        names = [d.name for d in self._devices if d.name not in hostile]
        losses = {n: m.loss for n, m in run.measure(names).items()}
        rounds, fleet = self._plan.rounds, len(self._devices)
        return Played(
            cell.key, losses, self._before, hostile, kept_out, rounds * len(hostile), wronged,
            rounds * (fleet - len(hostile)), time.process_time() - began, self._plan.setting(),
        )  # fmt: skip

    def _config(self, cell: Cell) -> RunConfig:
        rule = RECOMMENDED_RULE if cell.rule == RECOMMENDED else cell.rule
        return RunConfig.model_validate({
            "run": {"name": "attacks", "seed": self._plan.seed, "rounds": self._plan.rounds},
            "model": {"base": str(self._base),
                      "targets": ["q_proj", "v_proj", "o_proj", "down_proj"]},
            "adapter": {"rank": 8, "alpha": 16.0},
            "method": {"name": "fslora", "robust": rule},
            "screening": {"enabled": cell.rule == RECOMMENDED},
            "training": {"precision": "fp32", "sequence_tokens": 64, "micro_batch": 2,
                         "local_steps": self._plan.local_steps, "learning_rate": 1e-2},
            "wire": {"update": "bfloat16"},
            "evaluation": {"sequences": 16, "held_out_share": 0.3},
        })  # fmt: skip


def play_all(plan: Plan, out: Path, player: Callable[[Cell], Played], say: Callable[[str], None],
             ) -> dict[str, Played]:  # fmt: skip
    """Every cell, those that are there already read from their files. Raises `AttackError`."""
    runs = out / "runs"
    runs.mkdir(parents=True, exist_ok=True)
    found = {}
    for number, cell in enumerate(plan.cells, 1):
        path = runs / f"{cell.key}.json"
        if path.exists():
            found[cell.key] = read_played(path, plan)
            continue
        found[cell.key] = player(cell)
        write_whole(path, json.dumps(asdict(found[cell.key])))
        say(f"{number} of {len(plan.cells)}: {cell.key}, {found[cell.key].seconds:.0f} s")
    return found


def read_played(path: Path, plan: Plan) -> Played:
    """Raises `AttackError` on a file that is no run of this plan."""
    try:
        found = Played(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise AttackError(f"{path} holds no finished run ({error}); delete it") from error
    if found.setting != plan.setting():
        raise AttackError(
            f"{path} was played with other settings ({found.setting}); choose a new --out folder"
        )
    return found


def costs(plan: Plan, played: Mapping[str, Played]) -> Iterator[tuple[Cell, float, float]]:
    """Cells with their cost: how much higher, as a share, the honest devices' mean final loss is
    than the same devices' in the clean run without any rule; and the share of what that run had
    gained which is lost.
    """
    clean = played[Cell("none").key]
    for cell in plan.cells:
        run = played[cell.key]
        want, got, start = (
            float(np.mean([of[n] for n in run.losses]))
            for of in (clean.losses, run.losses, run.before)
        )
        yield cell, got / want - 1, (got - want) / (start - want)
