"""Federated rounds in one process: real training, packing, downlink, methods and merging.

The trainer's own local round, the coordinator's hand-out and its merge work on files as in a fleet;
only processes, links, clocks and the planner are left out, so that hundreds of runs fit in minutes.
What a device is asked beyond run.toml (`Sending`), who takes part in a round, and what is measured
when, whoever plays the run says. The same configuration gives the same bits on the same machine.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from coordinator.config import RunConfig
from coordinator.cutting import Cutter
from coordinator.intake import check_update
from coordinator.merge import Merger, MergeResult, StoredUpdate
from coordinator.plan_types import BUDGET_ENCODINGS, DENSE, Level, update_payload
from coordinator.screener import Delivered, Screener, ScreeningMemory
from coordinator.screening_types import Outcome
from coordinator.serve import build_spec
from coordinator.state import ADAPTER, SIDE, StateFile, StateReader, write_initial
from coordinator.store.blobs import BlobStore
from coordinator.weights import Voice
from edge_agent.training.branches import side_branch
from edge_agent.training.connectors import DataSelection
from edge_agent.training.evaluation import HeldOutResult, evaluate, spread
from edge_agent.training.local_round import run_train
from edge_agent.training.slice import attached, write_parts
from edge_agent.training.train_job import TrainJob
from edge_agent.training.workbench import LocalRows
from profiles.errors import SketchfleetError
from protos.codecs import PackingError
from protos.contract import (
    Assignment,
    BlobRef,
    Encoding,
    Evaluation,
    LocalReport,
    Part,
    Precision,
    UpdateBudget,
)
from protos.layout import Parts
from trials.simulated_bench import SharedBench

BATCH = 16  # held-out sequences that are measured together


class SimulationError(SketchfleetError):
    """A run that cannot be simulated."""


@dataclass(frozen=True)
class SimulatedDevice:
    """One device: its code, and how many training sequences of it it has (None: all)."""

    name: str
    data: DataSelection
    train_sequences: int | None = None


@dataclass(frozen=True)
class Sending:
    """What one device trains and how its updates travel, where devices differ.

    rank: rows trained, 0 for all. density: share of the values that is sent. share: of the bytes of
    the whole adapter in float32 that an update may have; within them the device chooses. 0: no
    limit.
    """

    encoding: Encoding = "float32"
    rank: int = 0
    density: float = 1.0
    group: int = 0
    compressed: bool = False
    share: float = 0.0


@dataclass(frozen=True)
class DeviceRound:
    """One device in one round. Bytes as packed; weight as it entered the merge."""

    task: Assignment
    report: LocalReport
    up_bytes: int
    down_bytes: int
    weight: float
    update_share: float  # 0 where the model took no step


@dataclass(frozen=True)
class Measured:
    """One adapter on one device's held-out sequences: summed nats and predicted tokens of each."""

    nats: tuple[float, ...]
    tokens: tuple[int, ...]
    accuracy: float

    @property
    def loss(self) -> float:
        """Nats per token."""
        return sum(self.nats) / sum(self.tokens)


@dataclass(frozen=True)
class SimulatedRound:
    """What a round came to.

    merge: None where nothing was merged. refused: why an update was refused when it arrived, by
    device; those have no part in `devices`. screening: what it found; None where it is off.
    """

    devices: Mapping[str, DeviceRound]
    merge: MergeResult | None
    refused: Mapping[str, str] = field(default_factory=dict)
    screening: Outcome | None = None

    @property
    def up_bytes(self) -> int:
        """Of all devices."""
        return sum(d.up_bytes for d in self.devices.values())

    @property
    def down_bytes(self) -> int:
        """Of all devices."""
        return sum(d.down_bytes for d in self.devices.values())


@dataclass
class Simulation:
    """One run from its start; `round` plays the next one.

    folder: scratch, of this run alone. bench: keeps base and code in memory, also between runs.
    sendings: by device; who is not named sends as [wire] says. Raises `SimulationError`.
    """

    config: RunConfig
    base: Path
    devices: Sequence[SimulatedDevice]
    bench: SharedBench
    folder: Path
    sendings: Mapping[str, Sending] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Version 0; devices hold what they can draw themselves, and no more."""
        training = self.config.training
        if "auto" in (training.precision, training.sequence_tokens, self.config.wire.update):
            raise SimulationError(
                "a simulated run has no planner: give [training] precision and sequence_tokens and "
                '[wire] update a value other than "auto"'
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        self.spec, _ = build_spec(self.config, self.base)
        self.method = self.config.make_method()
        self.number = self._merges = 0
        self.files = write_initial(self.spec, self.method, lambda r: self.folder / f"initial-{r}")
        self._rule, self._memory = self.config.make_weight_rule(), dict[str, float]()
        self._optimizer = self.config.make_server_optimizer()
        self._blobs = BlobStore(self.folder / "blobs")
        self._mirrors: dict[str, BlobRef] = {}
        self._held: dict[str, set[str]] = {}
        self._left: dict[str, int] = {}  # rows of devices that pruned themselves
        c = self.config
        self._screener = Screener(
            self.spec, self.method, c.training.optimizer, c.screening.clean_rounds,
            key=f"simulation/{self.spec.seed}",
        )  # fmt: skip
        self.screening = ScreeningMemory()
        for device in self.devices:
            self.home(device.name).unlink(missing_ok=True)

    @property
    def values(self) -> int:
        """Of the whole adapter."""
        return self.spec.rank * self.spec.parameters_per_rank

    def home(self, device: str) -> Path:
        """Where a device keeps what stays with it."""
        return self.folder / f"{device}.home"

    def update_path(self, device: str) -> Path:
        """Where a device's newest update lies."""
        return self.folder / f"{device}.update"

    # --- a round ------------------------------------------------------------------------------

    def round(self, present: Iterable[str] | None = None) -> SimulatedRound:
        """Hands out to the devices present (None: all), trains them, merges."""
        wanted = None if present is None else set(present)
        here = [d for d in self.devices if wanted is None or d.name in wanted]
        model = StateReader(self.spec, self.files)
        tasks = self._hand_out(model, here)
        reports, paths = {}, {}
        for device in here:
            paths[device.name] = self.update_path(device.name)
            reports[device.name] = self.train(
                device, tasks[device.name], update_path=paths[device.name],
                home_out=self.home(device.name),
            )  # fmt: skip
        refused = self._refused(tasks, paths)
        outcome = self._screened({n: r for n, r in reports.items() if n not in refused}, tasks)
        kept_out = set(refused)
        if outcome is not None:
            kept_out |= {found.device_id for found in outcome.screened if not found.merged}
        updates = self._weighed({n: r for n, r in reports.items() if n not in kept_out}, tasks)
        merged = None
        if updates:
            merger = Merger(
                self.spec, self.method, self._optimizer, lambda _: model, self._new,
                self.config.make_robust(),
            )  # fmt: skip
            merged = merger.merge(self.number, self.number + 1, model, updates)
            self.files = merged.files
            self._merges += 1
        self.number += 1
        weights = {u.device_id: u.weight for u in updates}
        given = {} if merged is None else merged.contributions
        played = {}
        for name, report in reports.items():
            if name in refused:
                continue
            gave = given.get(tasks[name].assignment_id)
            played[name] = DeviceRound(
                tasks[name], report, paths[name].stat().st_size, self._fetched(tasks[name]),
                weights.get(name, 0.0), (gave.share if gave else None) or 0.0,
            )  # fmt: skip
        return SimulatedRound(played, merged, refused, outcome)

    def _refused(
        self, tasks: Mapping[str, Assignment], paths: Mapping[str, Path]
    ) -> dict[str, str]:
        """Updates that the coordinator refuses as they arrive, and why."""
        found = {}
        for name, path in paths.items():
            try:
                check_update(path, self.spec, tasks[name])
            except PackingError as error:
                found[name] = str(error)
        return found

    def _screened(
        self, reports: Mapping[str, LocalReport], tasks: Mapping[str, Assignment]
    ) -> Outcome | None:
        if not self.config.screening.enabled or not reports:
            return None
        outcome = self._screener.screen(
            self.number,
            [Delivered(tasks[n], self.update_path(n), report) for n, report in reports.items()],
            self.screening,
        )
        self.screening.note(outcome)
        return outcome

    def _weighed(
        self, reports: Mapping[str, LocalReport], tasks: Mapping[str, Assignment]
    ) -> list[StoredUpdate]:
        voices = [self._voice(name, report) for name, report in reports.items()]
        if not voices:
            return []
        weights, self._memory = self._rule.weigh(voices, self._memory)
        return [
            StoredUpdate(
                name, tasks[name], self.update_path(name), weight,
                kept=self._kept(name, reports[name]), start=self._sparse_start(tasks[name]),
            )
            for name, weight in zip(reports, weights, strict=True)
        ]  # fmt: skip

    def train(self, device: SimulatedDevice, task: Assignment, **paths: Any) -> LocalReport:
        """A local round in this process, of the files that the assignment names."""
        files: dict[str, Any] = {
            "slice_paths": tuple(self._blobs.path(blob.digest) for blob in task.slice),
            "global_paths": tuple(self._blobs.path(blob.digest) for blob in task.global_adapter),
            "home_path": self.home(device.name),
        }
        for name, blob in (
            ("side_path", task.side),
            ("global_side_path", task.global_side),
            ("mirror_path", None if task.mirror is None else task.mirror.result),
        ):
            files[name] = None if blob is None else self._blobs.path(blob.digest)
        self.bench.limit(device.data, device.train_sequences)
        job = TrainJob(self.base, self.spec, task, device.data, **files | paths)
        return run_train(job, self.bench, lambda event: None)

    def task(self, device: str, rank: int = 0, offset: int = 0) -> Assignment:
        """What a device is asked in this round, less what it starts from. rank 0: all rows."""
        c, spec, method = self.config, self.spec, self.method
        sending = self.sendings.get(device, self._default())
        k = rank or spec.rank
        scale = method.device_scale(spec, k)
        number = self.number
        key = hashlib.sha256(f"{spec.seed}/{number}/{device}".encode()).digest()
        sent = (*method.sent(number), *self._dense)
        objective = c.fairness.objective
        return Assignment(
            assignment_id=f"{spec.run_id}.{number}.{device}", run_id=spec.run_id, round=number,
            device_id=device, method=method.name, rank=k, rows=method.rows, sketch_offset=offset,
            alpha=scale * spec.divisor(k), trained=(*method.trained(number), *self._dense),
            personal=method.personal, keeps_basis=method.keeps_basis,
            keeps_state=c.training.keep_optimizer, error_feedback=c.wire.error_feedback,
            fresh=method.fresh, precision=self._precision, sequence_tokens=self._sequence_tokens,
            micro_batch=c.training.micro_batch, accumulation=c.training.accumulation,
            checkpointing=False, local_steps=c.training.local_steps,
            learning_rate=c.training.learning_rate, optimizer=c.training.optimizer,
            update=update_payload(
                Level(k, sending.density), sending.encoding, sent, group=sending.group,
                compressed=sending.compressed,
            ),
            evaluation_sequences=self._slice_sequences, held_out_share=c.evaluation.held_out_share,
            evaluates_global=False, seed=int.from_bytes(key[:4], "little"), deadline_s=3600.0,
            reason="", objective=objective, pruning=method.pruning,
            fill_in_middle=c.training.fill_in_middle, budget=self._budget(sending),
        )  # fmt: skip

    # --- what is measured ---------------------------------------------------------------------

    def measure(
        self, names: Iterable[str] | None = None, files: Mapping[str, StateFile] | None = None
    ) -> dict[str, Measured]:
        """The global adapter on each device's own held-out code, as the coordinator holds it.

        files: of another version. Where a method leaves parts at home, each device's own are used.
        """
        wanted = None if names is None else set(names)
        devices = [d for d in self.devices if wanted is None or d.name in wanted]
        if not self.method.has_global:
            return {d.name: self._own(d) for d in devices}
        model = StateReader(self.spec, files or self.files)
        base = self.bench.base(self.base, self._precision, self.spec)
        whole, side = self._whole(model), self._side(model, files or self.files)
        core = any("core" in parts for parts in whole.values())
        with ExitStack() as stack:
            stack.enter_context(side_branch(base.model, side, base.compute_dtype))
            peft = stack.enter_context(
                attached(base.model, self.spec, self.spec.rank, alpha=self.spec.alpha,
                         trained=(), core=core)
            )  # fmt: skip
            write_parts(peft, whole)
            return {d.name: _seen(evaluate(peft, self._held_out(d), BATCH)) for d in devices}

    def rows(self, device: SimulatedDevice) -> LocalRows:
        """A device's code in tokens."""
        base = self.bench.base(self.base, self._precision, self.spec)
        self.bench.limit(device.data, device.train_sequences)
        c = self.config
        return self.bench.rows(
            self.base, base, device.data, self._sequence_tokens, c.evaluation.held_out_share,
            c.training.fill_in_middle, self.spec.seed,
        )  # fmt: skip

    def _held_out(self, device: SimulatedDevice) -> Any:
        return spread(self.rows(device).held_out, self.config.evaluation.sequences)

    def _own(self, device: SimulatedDevice) -> Measured:
        """The whole adapter with the parts that the device keeps, by the trainer itself."""
        model = StateReader(self.spec, self.files)
        blank = self.task(device.name)
        cutter = self._cutter(model)
        task = replace(
            blank, local_steps=0, evaluates_global=True, global_adapter=cutter.whole(),
            evaluation_sequences=self.config.evaluation.sequences,
            global_side=cutter.side(self.config.wire.global_adapter),
        )  # fmt: skip
        found = self.train(device, task).evaluation("global", "received")
        assert found is not None
        return _told(found)

    def _whole(self, model: StateReader) -> dict[str, Parts]:
        found: dict[str, Parts] = {}
        for m in self.spec.modules:
            state = model.module(m.name)
            found[m.name] = {part: state.values(part) for part in state.parts}
        return found | {t.name: {"dense": model.dense(t.name)[0]} for t in self.spec.dense}

    def _side(self, model: StateReader, files: Mapping[str, StateFile]) -> dict[str, Parts]:
        if SIDE not in files:
            return {}
        sides = ((m.name, model.module(m.name).side) for m in self.spec.modules)
        return {n: {"up": s.up, "down": s.down} for n, s in sides if s is not None}

    # --- handing out --------------------------------------------------------------------------

    def _hand_out(
        self, model: StateReader, devices: Sequence[SimulatedDevice]
    ) -> dict[str, Assignment]:
        """Sketches are blocks of one permutation, one after another, as the planner deals them."""
        cutter, offset, found = self._cutter(model), 0, {}
        most = self.spec.rank
        if not self.method.keeps_basis and self.method.heterogeneous:
            most = model.useful_rank()
        for device in devices:
            sending = self.sendings.get(device.name, self._default())
            k = self._left.get(device.name) or sending.rank or self.spec.rank
            k = min(k, most) if self.method.heterogeneous else self.spec.rank
            task = self.task(device.name, k, offset)
            found[device.name] = self._filled(task, cutter, sending)
            offset += k
        return found

    def _filled(self, task: Assignment, cutter: Cutter, sending: Sending) -> Assignment:
        """With its files: differences from the device's mirror where [wire] delta, else whole."""
        scale = self.method.device_scale(self.spec, task.rank)
        density = min(sending.density, 1.0) if self.method.density < 1 else 1.0
        name, side = task.device_id, cutter.branch(task)
        if not (self.config.wire.delta and self._groups and density == 1):
            return replace(task, slice=cutter.slice(task, scale, density), side=side)
        step = cutter.mirror(task, scale, self._mirrors.get(name))
        self._mirrors[name] = step.result
        return replace(task, mirror=step, side=side)

    def _cutter(self, model: StateReader) -> Cutter:
        side_rank = self.files[SIDE].payload.rank if SIDE in self.files else 0
        return Cutter(
            self.config.wire, self.spec, self.method, self._blobs, model,
            groups=self._groups, side_rank=side_rank,
        )  # fmt: skip

    def _fetched(self, task: Assignment) -> int:
        """Bytes of the files that the device did not hold from the round before."""
        held = self._held.get(task.device_id, set())
        self._held[task.device_id] = {blob.digest for blob in task.blobs}
        return sum(blob.size_bytes for blob in task.blobs if blob.digest not in held)

    def _voice(self, name: str, report: LocalReport) -> Voice:
        received = report.evaluation("slice", "received")
        return Voice(name, float(report.train_examples), received.loss if received else None)

    def _kept(self, name: str, report: LocalReport) -> int:
        if self.method.pruning is None or not report.kept_rank:
            return 0
        self._left[name] = report.kept_rank
        return report.kept_rank

    def _sparse_start(self, task: Assignment) -> tuple[StateFile, ...]:
        sparse = any(blob.payload.density < 1 for blob in task.slice)
        return tuple(StateFile(self._blobs.path(b.digest), b.payload) for b in task.slice if sparse)

    def _budget(self, sending: Sending) -> UpdateBudget | None:
        if not sending.share:
            return None
        feeds_back = self.config.wire.error_feedback
        encodings = (*BUDGET_ENCODINGS, "sign") if feeds_back else BUDGET_ENCODINGS
        return UpdateBudget(int(sending.share * 4 * self.values), encodings, feeds_back)

    def _default(self) -> Sending:
        wire = self.config.wire
        assert wire.update != "auto"
        return Sending(wire.update, density=self.method.density, group=wire.group,
                       compressed=wire.compressed)  # fmt: skip

    def _new(self, role: str) -> Path:
        return self.folder / f"version-{self._merges % 2}-{role}"

    @property
    def _dense(self) -> tuple[Part, ...]:
        return DENSE if self.spec.dense else ()

    @property
    def _groups(self) -> tuple[tuple[Part, ...], ...]:
        return self.method.files(self.number) + ((DENSE,) if self.spec.dense else ())

    @property
    def _precision(self) -> Precision:
        precision = self.config.training.precision
        assert precision != "auto"
        return precision

    @property
    def _sequence_tokens(self) -> int:
        tokens = self.config.training.sequence_tokens
        assert tokens != "auto"
        return tokens

    @property
    def _slice_sequences(self) -> int:
        """Held-out sequences per local round: only rules that weigh by loss look at them."""
        by_loss = self.config.fairness.weights not in ("samples", "uniform")
        return self.config.evaluation.sequences if by_loss else 1


def _seen(found: HeldOutResult) -> Measured:
    nats, tokens = found.row_nats.tolist(), found.row_tokens.tolist()
    return Measured(tuple(nats), tuple(tokens), found.token_accuracy)


def _told(found: Evaluation) -> Measured:
    """As an agent reports it: to a thousandth of a nat."""
    nats = tuple(n / 1000 for n in found.example_millinats)
    return Measured(nats, found.example_tokens, found.token_accuracy)


def fleet_loss(measured: Mapping[str, Measured]) -> float:
    """Mean over devices, nats per token."""
    return float(np.mean([m.loss for m in measured.values()]))


Adapter = Mapping[str, StateFile]
"""Files of a version of the model by role; `ADAPTER` is always there."""

__all__ = [
    "ADAPTER",
    "Adapter",
    "DeviceRound",
    "Measured",
    "Sending",
    "SharedBench",
    "SimulatedDevice",
    "SimulatedRound",
    "Simulation",
    "SimulationError",
    "fleet_loss",
]
