"""Federated rounds of the demo's devices in one process: real training, packing and merging.

The trainer's own local round, the coordinator's downlink and its merge work on files as in a fleet;
only processes, links and the planner are left out, so that many ways of sending can be compared on
the same data and tokens in minutes. Every device sees as many tokens as any other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from coordinator.config import RunConfig
from coordinator.downlink import Downlink, cuts_of
from coordinator.merge import Merger, StoredUpdate
from coordinator.plan_types import BUDGET_ENCODINGS
from coordinator.serve import build_spec
from coordinator.server_optimizer import Plain
from coordinator.state import ADAPTER, StateFile, StateReader, write_initial
from coordinator.store.blobs import BlobStore
from edge_agent.training.connectors import DataSelection
from edge_agent.training.local_round import run_train
from edge_agent.training.train_job import TrainJob
from edge_agent.training.workbench import Workbench
from protos.contract import (
    Assignment,
    BlobRef,
    Encoding,
    LocalReport,
    Part,
    Payload,
    Precision,
    UpdateBudget,
)
from protos.layout import Parts
from protos.packing import pack
from protos.sketch import slice_rows
from protos.transfer import sha256_of
from protos.unpacking import unpack
from trials.demo import NANO_CODE, devices
from trials.fleet import DeviceSetup

SENT: tuple[Part, ...] = ("up", "down")


@dataclass(frozen=True)
class Learning:
    """What every device does in a round, whatever the way of sending."""

    rank: int = 32
    alpha: float = 64.0
    seed: int = 7
    precision: Precision = "fp32"
    sequence_tokens: int = 128
    micro_batch: int = 4
    local_steps: int = 20
    learning_rate: float = 3e-3
    held_out_share: float = 0.2
    evaluation_sequences: int = 48

    @property
    def tokens(self) -> int:
        """That a device sees in a round."""
        return self.local_steps * self.micro_batch * self.sequence_tokens


@dataclass(frozen=True)
class Way:
    """A way of sending, in the words of run.toml.

    rank: rows a device trains, 0 for all. share: of the bytes of the whole adapter in float32 that
    an update may have; within them the device chooses ([plan] bytes_per_round). 0: no limit.
    """

    update: Encoding
    slice: Encoding
    group: int = 0
    compressed: bool = False
    density: float = 1.0
    error_feedback: bool = False
    delta: bool = False
    rank: int = 0
    share: float = 0.0

    @property
    def method(self) -> str:
        """Sketches where a device trains a part of the rows."""
        return "fslora" if self.rank else "fedit"


@dataclass(frozen=True)
class Round:
    """Bytes of all devices in a round, and the fleet's mean loss after it, where measured."""

    up_bytes: int
    down_bytes: int
    loss: float | None


def selection(device: DeviceSetup) -> DataSelection:
    """A demo device's code, as its agent would read it."""
    return DataSelection(
        tuple(device.include), tuple(device.exclude), tuple(device.languages), device.max_files
    )


def run_config(learning: Learning, method: str = "fedit") -> RunConfig:
    """The coordinator's configuration for this learning; its wire is the `Way`'s."""
    return RunConfig.model_validate({
        "run": {"name": "wire", "seed": learning.seed, "rounds": 1},
        "model": {"base": str(NANO_CODE)},
        "adapter": {"rank": learning.rank, "alpha": learning.alpha},
        "method": {"name": method},
    })  # fmt: skip


class Fleet:
    """The demo's four devices, each with its base and code in memory, and one run at a time."""

    def __init__(self, learning: Learning, folder: Path) -> None:
        self.learning, self.folder = learning, folder
        self.spec, _ = build_spec(run_config(learning), NANO_CODE)
        self.devices = devices()
        self._benches = {device.name: Workbench() for device in self.devices}

    @property
    def values(self) -> int:
        """Of the whole adapter."""
        return self.spec.rank * self.spec.parameters_per_rank

    def initial(self) -> StateFile:
        """The adapter that every run starts from."""
        method = run_config(self.learning).make_method()
        return write_initial(self.spec, method, lambda role: self.folder / "initial.bin")[ADAPTER]

    def play(self, way: Way, rounds: int, measured: Sequence[int]) -> list[Round]:
        """A run from the start; `measured`: after how many rounds the loss is taken."""
        run = _Run(self, way)
        return [run.round(number, number + 1 in measured) for number in range(rounds)]

    def first_update(self) -> dict[str, Parts]:
        """What the first device changes in the first round."""
        run = _Run(self, Way("float32", "float32"))
        model = StateReader(self.spec, {ADAPTER: self.initial()})
        update, _ = run.train(model, self.devices[0], 0)
        data, task = update.path.read_bytes(), update.assignment
        return unpack(data, self.spec, task.update, assignment_digest=task.digest)

    def loss(self, file: StateFile) -> float:
        """Fleet mean of a whole adapter on held-out code, nats per token."""
        return float(np.mean([self._evaluate(device, file) for device in self.devices]))

    def task(self, device: str, round_: int, way: Way) -> Assignment:
        """What a device is asked to do, less what it starts from."""
        c = self.learning
        method = run_config(c, way.method).make_method()
        k = way.rank or c.rank
        scale = method.device_scale(self.spec, k)
        key = hashlib.sha256(f"{c.seed}/{round_}/{device}".encode()).digest()
        number = [d.name for d in self.devices].index(device)
        budget = None
        if way.share:
            encodings = (*BUDGET_ENCODINGS, "sign") if way.error_feedback else BUDGET_ENCODINGS
            budget = UpdateBudget(int(way.share * 4 * self.values), encodings, way.error_feedback)
        return Assignment(
            assignment_id=f"wire.{round_}.{device}", run_id="wire", round=round_, device_id=device,
            method=method.name, rank=k, rows=method.rows, sketch_offset=number * k,
            alpha=scale * self.spec.divisor(k), trained=SENT, personal=(),
            keeps_basis=method.keeps_basis, keeps_state=False,
            error_feedback=way.error_feedback, fresh=False, precision=c.precision,
            sequence_tokens=c.sequence_tokens, micro_batch=c.micro_batch, accumulation=1,
            checkpointing=False, local_steps=c.local_steps, learning_rate=c.learning_rate,
            optimizer="adamw",
            update=Payload(k, way.update, SENT, way.density, way.group, way.compressed),
            evaluation_sequences=1, held_out_share=c.held_out_share, evaluates_global=False,
            seed=int.from_bytes(key[:4], "little"), deadline_s=3600.0, reason="", budget=budget,
        )  # fmt: skip

    def train(self, device: DeviceSetup, task: Assignment, **files: Any) -> LocalReport:
        """A local round, in this process; `files` as `TrainJob` takes them."""
        job = TrainJob(NANO_CODE, self.spec, task, selection(device), **files)
        return run_train(job, self._benches[device.name], lambda event: None)

    def _evaluate(self, device: DeviceSetup, file: StateFile) -> float:
        task = replace(
            self.task(device.name, 0, Way("float32", "float32")),
            local_steps=0, evaluates_global=True, global_adapter=(_blob(file),),
            evaluation_sequences=self.learning.evaluation_sequences,
        )  # fmt: skip
        report = self.train(device, task, global_paths=(file.path,))
        found = report.evaluation("global", "received")
        assert found is not None
        return found.loss


@dataclass
class _Run:
    """The coordinator's model, and what each device holds of it."""

    fleet: Fleet
    way: Way
    mirrors: dict[str, BlobRef | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Version 0; devices hold what they can draw themselves, and no more."""
        self._method = run_config(self.fleet.learning, self.way.method).make_method()
        self._files = {ADAPTER: self.fleet.initial()}
        self._blobs = BlobStore(self.fleet.folder / "blobs")
        self._downlink = Downlink(self.fleet.spec, self._blobs)
        for device in self.fleet.devices:
            self._home(device).unlink(missing_ok=True)

    def round(self, number: int, measured: bool) -> Round:
        """Hands out, trains, merges."""
        fleet = self.fleet
        model = StateReader(fleet.spec, self._files)
        updates, up_bytes, down_bytes = [], 0, 0
        for device in fleet.devices:
            update, size = self.train(model, device, number)
            updates.append(update)
            up_bytes += update.path.stat().st_size
            down_bytes += size
        merger = Merger(fleet.spec, self._method, Plain(), lambda round_: model,
                        self._new(number + 1))  # fmt: skip
        self._files = merger.merge(number, number + 1, model, updates).files
        loss = fleet.loss(self._files[ADAPTER]) if measured else None
        return Round(up_bytes, down_bytes, loss)

    def train(
        self, model: StateReader, device: DeviceSetup, number: int
    ) -> tuple[StoredUpdate, int]:
        """One device's round: its update, and bytes it fetched."""
        hand_out = self._step if self.way.delta else self._whole
        task, files, size = hand_out(model, self.fleet.task(device.name, number, self.way))
        path, home = self.fleet.folder / f"{device.name}.update", self._home(device)
        report = self.fleet.train(
            device, task, update_path=path, home_path=home, home_out=home, **files
        )
        return StoredUpdate(device.name, task, path, report.train_examples), size

    def _step(self, model: StateReader, task: Assignment) -> tuple[Assignment, Any, int]:
        """What the device's mirror lacks."""
        base = self.mirrors.get(task.device_id)
        cuts = cuts_of(task, self.fleet.spec, SENT, self.way.slice, self.way.slice)
        step = self._downlink.step(model, task, SENT, cuts, base)
        self.mirrors[task.device_id] = step.result
        path = self._blobs.path(step.result.digest)
        size = sum(file.blob.size_bytes for file in step.files)
        return replace(task, mirror=step), {"mirror_path": path}, size

    def _whole(self, model: StateReader, task: Assignment) -> tuple[Assignment, Any, int]:
        """The slice as it is."""
        spec, payload = self.fleet.spec, Payload(task.rank, self.way.slice)
        cut: dict[str, Parts] = {}
        for m in spec.modules:
            adapter = model.module(m.name).adapter
            rows = slice_rows(spec, task, m.name)
            cut[m.name] = {"up": adapter.up[rows], "down": adapter.down[rows]}
        file = StateFile(self.fleet.folder / f"{task.device_id}.slice", payload)
        file.path.write_bytes(pack(spec, payload, cut))
        found = replace(task, slice=(_blob(file),))
        return found, {"slice_paths": (file.path,)}, file.path.stat().st_size

    def _home(self, device: DeviceSetup) -> Path:
        return self.fleet.folder / f"{device.name}.home"

    def _new(self, version: int) -> Callable[[str], Path]:
        return lambda role: self.fleet.folder / f"version-{version % 2}-{role}.bin"


def _blob(file: StateFile) -> BlobRef:
    return BlobRef(sha256_of(file.path), file.path.stat().st_size, file.payload)
