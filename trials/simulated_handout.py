"""What simulated devices are asked in a round, and the files that they start from.

As the coordinator's planner and issuing would ask it, from run.toml and a `Sending` for each
device. Knows models and assignments; it knows neither training nor merging.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from coordinator.config import RunConfig
from coordinator.cutting import Cutter
from coordinator.methods import Method
from coordinator.plan_types import BUDGET_ENCODINGS, DENSE, Level, update_payload
from coordinator.state import SIDE, StateFile, StateReader
from coordinator.store.blobs import BlobStore
from protos.contract import AdapterSpec, Assignment, BlobRef, Part, Precision, UpdateBudget
from trials.simulated_types import Sending, SimulationError

Files = Mapping[str, StateFile]  # a version of the model, by role


@dataclass
class HandOut:
    """Asks devices and cuts what they start from, round after round.

    sendings: by device; who is not named sends as [wire] says. Raises `SimulationError` where
    run.toml leaves to a planner what nobody plans here.
    """

    config: RunConfig
    spec: AdapterSpec
    method: Method
    blobs: BlobStore
    sendings: Mapping[str, Sending]
    _mirrors: dict[str, BlobRef] = field(default_factory=dict)
    _held: dict[str, set[str]] = field(default_factory=dict)
    _left: dict[str, int] = field(default_factory=dict)  # rows of devices that pruned themselves

    def __post_init__(self) -> None:
        """Refuses "auto"."""
        training = self.config.training
        if "auto" in (training.precision, training.sequence_tokens, self.config.wire.update):
            raise SimulationError(
                "a simulated run has no planner: give [training] precision and sequence_tokens and "
                '[wire] update a value other than "auto"'
            )

    def assignments(
        self, number: int, devices: Sequence[str], files_of: Callable[[str], Files]
    ) -> dict[str, Assignment]:
        """Of round `number`, by device. files_of: the version that a device gets.

        Sketches are blocks of one permutation, one after another, as the planner deals them.
        """
        cutters: dict[int, tuple[Cutter, int]] = {}
        offset, found = 0, {}
        for name in devices:
            files = files_of(name)
            if id(files) not in cutters:
                cutters[id(files)] = self.cutter(number, files), self._most_rows(files)
            cutter, most = cutters[id(files)]
            sending = self.sendings.get(name, self._default())
            k = self._left.get(name) or sending.rank or self.spec.rank
            k = min(k, most) if self.method.heterogeneous else self.spec.rank
            found[name] = self._filled(self.task(number, name, k, offset), cutter, sending)
            offset += k
        return found

    def task(self, number: int, device: str, rank: int = 0, offset: int = 0) -> Assignment:
        """What a device is asked in this round, less what it starts from. rank 0: all rows."""
        c, spec, method = self.config, self.spec, self.method
        sending = self.sendings.get(device, self._default())
        k = rank or spec.rank
        scale = method.device_scale(spec, k)
        key = hashlib.sha256(f"{spec.seed}/{number}/{device}".encode()).digest()
        sent = (*method.sent(number), *self._dense)
        return Assignment(
            assignment_id=f"{spec.run_id}.{number}.{device}", run_id=spec.run_id, round=number,
            device_id=device, method=method.name, rank=k, rows=method.rows, sketch_offset=offset,
            alpha=scale * spec.divisor(k), trained=(*method.trained(number), *self._dense),
            personal=method.personal, keeps_basis=method.keeps_basis,
            keeps_state=c.training.keep_optimizer, error_feedback=c.wire.error_feedback,
            fresh=method.fresh, precision=self.precision, sequence_tokens=self.sequence_tokens,
            micro_batch=c.training.micro_batch, accumulation=c.training.accumulation,
            checkpointing=False, local_steps=c.training.local_steps,
            learning_rate=c.training.learning_rate, optimizer=c.training.optimizer,
            update=update_payload(
                Level(k, sending.density), sending.encoding, sent, group=sending.group,
                compressed=sending.compressed,
            ),
            evaluation_sequences=self._slice_sequences, held_out_share=c.evaluation.held_out_share,
            evaluates_global=False, seed=int.from_bytes(key[:4], "little"), deadline_s=3600.0,
            reason="", objective=c.fairness.objective, pruning=method.pruning,
            fill_in_middle=c.training.fill_in_middle, budget=self._budget(sending),
        )  # fmt: skip

    def cutter(self, number: int, files: Files) -> Cutter:
        """Of one version in round `number`."""
        return Cutter(
            self.config.wire, self.spec, self.method, self.blobs, StateReader(self.spec, files),
            groups=self._groups(number), side_rank=files[SIDE].payload.rank if SIDE in files else 0,
        )  # fmt: skip

    def fetched(self, task: Assignment) -> int:
        """Bytes of the files that the device did not hold from the round before."""
        held = self._held.get(task.device_id, set())
        self._held[task.device_id] = {blob.digest for blob in task.blobs}
        return sum(blob.size_bytes for blob in task.blobs if blob.digest not in held)

    def kept(self, device: str, rows: int) -> int:
        """Rows left after the device pruned itself, which it is asked from now on; 0: all."""
        if self.method.pruning is None or not rows:
            return 0
        self._left[device] = rows
        return rows

    @property
    def precision(self) -> Precision:
        """Of the base and the computation."""
        precision = self.config.training.precision
        assert precision != "auto"
        return precision

    @property
    def sequence_tokens(self) -> int:
        """Of each row."""
        tokens = self.config.training.sequence_tokens
        assert tokens != "auto"
        return tokens

    def _most_rows(self, files: Files) -> int:
        if not self.method.keeps_basis and self.method.heterogeneous:
            return StateReader(self.spec, files).useful_rank()
        return self.spec.rank

    def _filled(self, task: Assignment, cutter: Cutter, sending: Sending) -> Assignment:
        """With its files: differences from the device's mirror where [wire] delta, else whole."""
        scale = self.method.device_scale(self.spec, task.rank)
        density = min(sending.density, 1.0) if self.method.density < 1 else 1.0
        name, side = task.device_id, cutter.branch(task)
        if not (self.config.wire.delta and self._groups(task.round) and density == 1):
            return replace(task, slice=cutter.slice(task, scale, density), side=side)
        step = cutter.mirror(task, scale, self._mirrors.get(name))
        self._mirrors[name] = step.result
        return replace(task, mirror=step, side=side)

    def _budget(self, sending: Sending) -> UpdateBudget | None:
        if not sending.share:
            return None
        feeds_back = self.config.wire.error_feedback
        encodings = (*BUDGET_ENCODINGS, "sign") if feeds_back else BUDGET_ENCODINGS
        values = self.spec.rank * self.spec.parameters_per_rank
        return UpdateBudget(int(sending.share * 4 * values), encodings, feeds_back)

    def _default(self) -> Sending:
        wire = self.config.wire
        assert wire.update != "auto"
        return Sending(wire.update, density=self.method.density, group=wire.group,
                       compressed=wire.compressed)  # fmt: skip

    @property
    def _dense(self) -> tuple[Part, ...]:
        return DENSE if self.spec.dense else ()

    def _groups(self, number: int) -> tuple[tuple[Part, ...], ...]:
        return self.method.files(number) + ((DENSE,) if self.spec.dense else ())

    @property
    def _slice_sequences(self) -> int:
        """Held-out sequences per local round: only rules that weigh by loss look at them."""
        by_loss = self.config.fairness.weights not in ("samples", "uniform")
        return self.config.evaluation.sequences if by_loss else 1
