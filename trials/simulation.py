"""Federated rounds in one process: real training, packing, downlink, methods and merging.

The trainer's own local round, the coordinator's hand-out and its merge work on files as in a fleet;
only processes, links, clocks and the planner are left out, so that hundreds of runs fit in minutes.
What a device is asked beyond run.toml (`Sending`), who takes part in a round, and what is measured
when, whoever plays the run says. The same configuration gives the same bits on the same machine.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from coordinator.config import RunConfig
from coordinator.intake import check_update
from coordinator.merge import Merger, MergeResult, StoredUpdate
from coordinator.methods import RowMethod
from coordinator.screener import Delivered, Screener, ScreeningMemory
from coordinator.screening_types import Outcome
from coordinator.serve import build_spec
from coordinator.state import SIDE, StateFile, StateReader, write_initial
from coordinator.store.blobs import BlobStore
from coordinator.weights import Voice
from edge_agent.training.branches import side_branch
from edge_agent.training.evaluation import HeldOutResult, evaluate, spread
from edge_agent.training.local_round import run_train
from edge_agent.training.slice import attached, write_parts
from edge_agent.training.train_job import TrainJob
from edge_agent.training.workbench import LocalRows
from protos.codecs import PackingError
from protos.contract import Assignment, Evaluation, LocalReport
from protos.layout import Parts
from trials.simulated_bench import SharedBench
from trials.simulated_handout import Files, HandOut
from trials.simulated_types import (
    DeviceRound,
    Measured,
    Sending,
    SimulatedDevice,
    SimulatedRound,
    SimulationError,
    TierAdapters,
)

BATCH = 16  # held-out sequences that are measured together


@dataclass
class Simulation:
    """One run from its start; `round` plays the next one.

    folder: scratch, of this run alone. bench: keeps base and code in memory, also between runs.
    sendings: by device; who is not named sends as [wire] says. tiers: an adapter for each tier
    beside the global one. Raises `SimulationError`.
    """

    config: RunConfig
    base: Path
    devices: Sequence[SimulatedDevice]
    bench: SharedBench
    folder: Path
    sendings: Mapping[str, Sending] = field(default_factory=dict)
    tiers: TierAdapters | None = None

    def __post_init__(self) -> None:
        """Version 0; devices hold what they can draw themselves, and no more."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.spec, _ = build_spec(self.config, self.base)
        self.method = self.config.make_method()
        sums = isinstance(self.method, RowMethod) and self.method.has_global
        if self.tiers is not None and not sums:
            raise SimulationError(
                f"tiers cannot have adapters of their own with {self.method.name}: changes of one "
                "adapter fit another only under a method that adds rows in place (fedit, fslora)"
            )
        self._blobs = BlobStore(self.folder / "blobs")
        self.handout = HandOut(self.config, self.spec, self.method, self._blobs, self.sendings)
        self.number = 0
        self.files: Files = write_initial(
            self.spec, self.method, lambda r: self.folder / f"initial-{r}"
        )
        tiers = () if self.tiers is None else sorted(set(self.tiers.of.values()))
        self._tier_files: dict[int, Files] = dict.fromkeys(tiers, self.files)
        self._merges = Counter[str]()
        self._rule, self._memory = self.config.make_weight_rule(), dict[str, float]()
        self._optimizer = self.config.make_server_optimizer()
        self._screener = Screener(
            self.spec, self.method, self.config.training.optimizer,
            self.config.screening.clean_rounds, key=f"simulation/{self.spec.seed}",
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

    def files_of(self, device: str) -> Files:
        """The version that a device gets: its tier's, where tiers have their own."""
        return self.files if self.tiers is None else self._tier_files[self.tiers.of[device]]

    def task(self, device: str, rank: int = 0) -> Assignment:
        """What a device is asked in this round, less what it starts from. rank 0: all rows."""
        return self.handout.task(self.number, device, rank)

    # --- a round ------------------------------------------------------------------------------

    def round(self, present: Iterable[str] | None = None) -> SimulatedRound:
        """Hands out to the devices present (None: all), trains them, merges."""
        wanted = None if present is None else set(present)
        here = [d for d in self.devices if wanted is None or d.name in wanted]
        tasks = self.handout.assignments(self.number, [d.name for d in here], self.files_of)
        reports = {
            device.name: self.train(
                device, tasks[device.name], update_path=self.update_path(device.name),
                home_out=self.home(device.name),
            )
            for device in here
        }  # fmt: skip
        refused = self._refused(tasks)
        arrived = {name: report for name, report in reports.items() if name not in refused}
        outcome = self._screened(arrived, tasks)
        kept_out = {s.device_id for s in outcome.screened if not s.merged} if outcome else set()
        updates = self._weighed({n: r for n, r in arrived.items() if n not in kept_out}, tasks)
        for tier, files in self._tier_files.items():
            if heard := self._heard(tier, updates):
                self._tier_files[tier] = self._merge(files, heard, f"tier-{tier}-").files
        merged = self._merge(self.files, updates) if updates else None
        if merged is not None:
            self.files = merged.files
        self.number += 1
        weights = {u.device_id: u.weight for u in updates}
        given = {} if merged is None else merged.contributions
        played = {}
        for name, report in arrived.items():
            gave = given.get(tasks[name].assignment_id)
            played[name] = DeviceRound(
                tasks[name], report, self.update_path(name).stat().st_size,
                self.handout.fetched(tasks[name]), weights.get(name, 0.0),
                (gave.share if gave else None) or 0.0,
            )  # fmt: skip
        return SimulatedRound(played, merged, refused, outcome)

    def _refused(self, tasks: Mapping[str, Assignment]) -> dict[str, str]:
        """Updates that the coordinator refuses as they arrive, and why."""
        found = {}
        for name, task in tasks.items():
            try:
                check_update(self.update_path(name), self.spec, task)
            except PackingError as error:
                found[name] = str(error)
        return found

    def _screened(
        self, reports: Mapping[str, LocalReport], tasks: Mapping[str, Assignment]
    ) -> Outcome | None:
        if not self.config.screening.enabled or not reports:
            return None
        delivered = [Delivered(tasks[n], self.update_path(n), r) for n, r in reports.items()]
        outcome = self._screener.screen(self.number, delivered, self.screening)
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
                kept=self.handout.kept(name, report.kept_rank),
                start=self._sparse_start(tasks[name]),
            )
            for (name, report), weight in zip(reports.items(), weights, strict=True)
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

    def _merge(
        self, files: Files, updates: Sequence[StoredUpdate], prefix: str = ""
    ) -> MergeResult:
        """Into one version. Its files and those of the next one lie beside each other.

        prefix: of a tier, which may be merged less often than there are rounds.
        """
        model, turn = StateReader(self.spec, files), self._merges[prefix] % 2
        self._merges[prefix] += 1
        merger = Merger(
            self.spec, self.method, self._optimizer, lambda _: model,
            lambda role: self.folder / f"version-{turn}-{prefix}{role}",
            self.config.make_robust(),
        )  # fmt: skip
        return merger.merge(self.number, self.number + 1, model, updates)

    def _heard(self, tier: int, updates: Sequence[StoredUpdate]) -> list[StoredUpdate]:
        """What is merged into a tier's adapter: its own updates, the others' at their share."""
        assert self.tiers is not None
        own, others = self.tiers.of, self.tiers.others
        weighed = (
            replace(u, weight=u.weight * (1.0 if own[u.device_id] == tier else others))
            for u in updates
        )
        return [u for u in weighed if u.weight > 0]

    def _voice(self, name: str, report: LocalReport) -> Voice:
        received = report.evaluation("slice", "received")
        return Voice(name, float(report.train_examples), received.loss if received else None)

    def _sparse_start(self, task: Assignment) -> tuple[StateFile, ...]:
        sparse = any(blob.payload.density < 1 for blob in task.slice)
        return tuple(StateFile(self._blobs.path(b.digest), b.payload) for b in task.slice if sparse)

    # --- what is measured ---------------------------------------------------------------------

    def measure(
        self, names: Iterable[str] | None = None, files: Files | None = None
    ) -> dict[str, Measured]:
        """What each device gets, on its own held-out code, as the coordinator holds it.

        files: of another version. Where a method leaves parts at home, each device's own are used.
        """
        wanted = None if names is None else set(names)
        devices = [d for d in self.devices if wanted is None or d.name in wanted]
        if not self.method.has_global:
            return {d.name: self._own(d) for d in devices}
        found: dict[str, Measured] = {}
        versions = {id(v): v for v in (files or self.files_of(d.name) for d in devices)}
        for key, version in versions.items():
            mine = [d for d in devices if id(files or self.files_of(d.name)) == key]
            found |= self._measured(mine, version)
        return {d.name: found[d.name] for d in devices}

    def _measured(self, devices: Sequence[SimulatedDevice], files: Files) -> dict[str, Measured]:
        model = StateReader(self.spec, files)
        base = self.bench.base(self.base, self.handout.precision, self.spec)
        whole, side = self._whole(model), self._side(model, files)
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
        base = self.bench.base(self.base, self.handout.precision, self.spec)
        self.bench.limit(device.data, device.train_sequences)
        c = self.config
        return self.bench.rows(
            self.base, base, device.data, self.handout.sequence_tokens,
            c.evaluation.held_out_share, c.training.fill_in_middle, self.spec.seed,
        )  # fmt: skip

    def _held_out(self, device: SimulatedDevice) -> Any:
        return spread(self.rows(device).held_out, self.config.evaluation.sequences)

    def _own(self, device: SimulatedDevice) -> Measured:
        """The whole adapter with the parts that the device keeps, by the trainer itself."""
        cutter = self.handout.cutter(self.number, self.files)
        task = replace(
            self.task(device.name), local_steps=0, evaluates_global=True,
            global_adapter=cutter.whole(), evaluation_sequences=self.config.evaluation.sequences,
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

    def _side(self, model: StateReader, files: Files) -> dict[str, Parts]:
        if SIDE not in files:
            return {}
        sides = ((m.name, model.module(m.name).side) for m in self.spec.modules)
        return {n: {"up": s.up, "down": s.down} for n, s in sides if s is not None}


def _seen(found: HeldOutResult) -> Measured:
    nats, tokens = found.row_nats.tolist(), found.row_tokens.tolist()
    return Measured(tuple(nats), tuple(tokens), found.token_accuracy)


def _told(found: Evaluation) -> Measured:
    """As an agent reports it: to a thousandth of a nat."""
    nats = tuple(n / 1000 for n in found.example_millinats)
    return Measured(nats, found.example_tokens, found.token_accuracy)
