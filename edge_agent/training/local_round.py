"""One local round, put together from the other files of this room as its assignment declares.

Knows the order of things: evaluate the whole adapter, train the slice, train the device's own
adapters, write what leaves and what stays; and when to write down how far it is. It asks no
method's name, and knows no processes or coordinators: paths and facts come in with the job.
"""

from __future__ import annotations

import logging
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from edge_agent.training.backbone import Backbone
from edge_agent.training.branches import side_branch
from edge_agent.training.evaluation import measure, spread
from edge_agent.training.feedback import PackedUpdate, pack_update
from edge_agent.training.home import Home, read_home, write_home
from edge_agent.training.local_objective import Term, kept_rows, pull, tail_product
from edge_agent.training.local_only import starting_local, trained_locally
from edge_agent.training.memory import MemoryWatch, give_back
from edge_agent.training.moments import Moments, carried_over, read_moments, restore_moments
from edge_agent.training.optimizers import make_optimizer
from edge_agent.training.pace import Pace
from edge_agent.training.resume import (
    Phase,
    RoundSoFar,
    Snapshot,
    SnapshotError,
    capture,
    read_snapshot,
    restore,
    write_snapshot,
)
from edge_agent.training.rows import Sequences
from edge_agent.training.slice import (
    attached,
    read_parts,
    subtract,
    trained_parameters,
    write_parts,
)
from edge_agent.training.starting import (
    read_files,
    starting_personal,
    starting_slice,
    whole_adapter,
)
from edge_agent.training.steps import (
    DivergedError,
    StepLog,
    make_scaler,
    settle,
    tokens_per_step,
    train_steps,
)
from edge_agent.training.train_job import JobError, TrainJob, require_consistent
from edge_agent.training.workbench import LocalRows, Workbench
from protos.contract import BlobRef, LocalReport, Objective, Part, Stage, Subject
from protos.layout import Parts
from protos.mirror import slice_of, whole_of
from protos.sketch import slice_rows
from protos.transfer import write_durably

CHECKPOINT_S = 30.0  # between two checkpoints of a round, at the least
CHECKPOINT_SHARE = 50  # and this many times what writing one takes: at most 2 % of the time
KEPT_S = 0.01  # a look at what is still in memory takes less, a load takes more

log = logging.getLogger("sketchfleet.trainer")

Emit = Callable[[Mapping[str, Any]], None]


def run_train(job: TrainJob, bench: Workbench, emit: Emit) -> LocalReport:
    """One local round; writes the packed delta to `update_path` when the assignment trains.

    `peak_bytes` of the report is the highest memory after the base was loaded. On CPU the same
    job gives the same bytes for the same number of threads, also when its process ended in the
    middle and another one went on from the file at `checkpoint_path`.
    """
    task, path = job.assignment, job.checkpoint_path
    require_consistent(job)
    settle(task.seed)
    began = time.perf_counter()
    base = bench.base(job.base_folder, task.precision, job.spec)
    rows = bench.rows(
        job.base_folder, base, job.data, task.sequence_tokens, task.held_out_share,
        task.fill_in_middle, job.spec.seed,
    )  # fmt: skip
    load_s = time.perf_counter() - began
    rows.require(task.trains)

    def carry_out(found: Snapshot | None) -> LocalReport:
        held_out = spread(rows.held_out, task.evaluation_sequences)
        watch = MemoryWatch(base.device, job.memory_cap_bytes)
        local = _LocalRound(job, base, rows, held_out, watch, emit, found)
        home = read_home(job.home_path, job.spec)
        if task.evaluates_global and found is None:
            local.evaluate_global(home)
            give_back()
        del found  # its tensors are the round's, which lets go of them once they are in place
        if task.trains:
            local.train(home)
        return local.report(load_s if load_s >= KEPT_S else 0.0)

    try:
        try:
            report = carry_out(read_snapshot(path, job.key) if task.trains else None)
        except SnapshotError as error:
            log.warning("%s", error)
            report = carry_out(None)
    except DivergedError:
        _forget(path)  # it would diverge again
        raise
    _forget(path)
    return report


def _forget(path: Path | None) -> None:
    if path is not None:
        path.unlink(missing_ok=True)


@dataclass
class _LocalRound:
    """A round in progress and what it measured so far."""

    job: TrainJob
    base: Backbone
    rows: LocalRows
    held_out: Sequences
    watch: MemoryWatch
    emit: Emit
    found: Snapshot | None  # the checkpoint that it goes on from; None once that is done
    so_far: RoundSoFar = field(default_factory=RoundSoFar)
    paused_before_s: float = 0.0
    resumed_step: int = 0  # steps found done, of both adapters together
    pack_s: float = 0.0  # comes last, so no checkpoint holds it
    packed: PackedUpdate | None = None

    def __post_init__(self) -> None:
        """Takes over what was measured before."""
        self.pace = Pace(self.job.control_path, self.emit)
        self._saved_at, self._saving_s = time.perf_counter(), 0.0
        if self.found is not None:
            self.so_far = self.found.so_far
            self.paused_before_s = self.found.so_far.paused_s
            before = len(self.so_far.done) * self.job.assignment.local_steps
            self.resumed_step = before + self.found.training.steps.done

    def evaluate_global(self, home: Home) -> None:
        """The adapter that all devices share, with this device's personal parts."""
        job, task, spec = self.job, self.job.assignment, self.job.spec
        if job.mirror_path is not None:
            files = whole_of(spec, task, job.mirror_path)
        else:
            files = read_files(spec, task.global_adapter, job.global_paths)
        everything = {m.name: np.arange(spec.rank, dtype=np.int64) for m in spec.modules}
        whole = whole_adapter(spec, task, files, home.at(everything))
        side = self._read_side(task.global_side, job.global_side_path)
        with side_branch(self.base.model, side, self.base.compute_dtype):
            if not whole:
                self._evaluate(self.base.model, "global", "received")
                return
            with self._adapter(whole, spec.rank, spec.alpha, ()) as model:
                self._evaluate(model, "global", "received")

    def train(self, home: Home) -> None:
        """Trains the slice, and the device's own adapters after it; writes update and home."""
        job, task, spec = self.job, self.job.assignment, self.job.spec
        assert job.update_path is not None
        rows = {m.name: slice_rows(spec, task, m.name) for m in spec.modules}
        here = home.at(rows)
        if job.mirror_path is not None:
            files = slice_of(spec, task, job.mirror_path)
        else:
            files = read_files(spec, task.slice, job.slice_paths)
        received = starting_slice(spec, task, files, here)
        side = self._read_side(task.side, job.side_path)
        personal: Mapping[str, Parts] = {}
        goes_on = None if self.found is None else self.found.phase  # those before it are done
        with (
            side_branch(self.base.model, side, self.base.compute_dtype),
            self._adapter(received, task.rank, task.alpha, task.trained) as model,
        ):
            if self.found is not None and goes_on != "slice":
                trained, moments = self.found.trained, self.found.moments
            else:
                moments = self._train_slice(model, here.moments)
                self._evaluate(model, "slice", "trained")
                trained = read_parts(model)
            if self.found is not None and goes_on == "local":
                personal = self.found.personal
            elif job.personal_weight > 0:
                write_parts(model, received)
                term = pull(model, job.personal_weight)
                write_parts(model, starting_personal(task, received, here))
                self._steps(model, self._optimizer(model), "personal", trained, moments, term=term)
                self._evaluate(model, "personal", "trained")
                personal = read_parts(model)
        local = home.local
        if task.local_only:
            local = self._train_alone(local, trained, moments, personal)
        packing = time.perf_counter()
        delta = subtract(trained, received, task.update.parts)
        packed = self.packed = pack_update(spec, task, delta, rows, home.residual)
        write_durably(job.update_path, packed.data)
        self.pack_s = time.perf_counter() - packing
        kept = Home(
            round=task.round,
            alpha=task.alpha,
            rows=rows,
            slice=dict(trained) if task.personal else {},
            personal=dict(personal),
            side=side if task.personal or personal else {},
            moments=moments,
            residual=packed.residual,
            local=local,
        )
        if job.home_out is not None and not kept.is_empty:
            write_home(job.home_out, kept, spec)

    def report(self, load_s: float) -> LocalReport:
        """What was done and measured."""
        so_far = self.so_far
        return LocalReport(
            assignment_id=self.job.assignment.assignment_id,
            outcome="done",
            evaluations=so_far.evaluations,
            train_examples=len(self.rows.train),
            train_tokens=sum(done.tokens for done in so_far.done),
            train_loss=so_far.done[0].mean_loss if so_far.done else 0.0,
            trained_parameters=so_far.trained_parameters,
            peak_bytes=self.watch.peak_bytes,
            train_s=sum(done.seconds for done in so_far.done),
            evaluate_s=so_far.evaluate_s,
            main_language=self.rows.main_language,
            kept_rank=so_far.kept_rank,
            step_s=statistics.median(d.step_s for d in so_far.done) if so_far.done else 0.0,
            load_s=load_s,
            paused_s=self._paused_s,
            resumed_step=self.resumed_step,
            pack_s=self.pack_s,
            sent=None if self.packed is None else self.packed.chosen,
            update_error=0.0 if self.packed is None else self.packed.error,
            error_curves=() if self.packed is None else self.packed.curves,
        )

    @property
    def _paused_s(self) -> float:
        return self.paused_before_s + self.pace.waited_s

    def _train_slice(self, model: Any, moments: Moments) -> Moments:
        """Trains what is on the model; returns the moments that are to be kept."""
        task, pruning = self.job.assignment, self.job.assignment.pruning
        trained = trained_parameters(model)
        if trained == 0:
            raise JobError("the assignment trains, but nothing that this run has; ask for a part")
        first = task.rank if pruning is None else kept_rows(pruning, task.rank)
        prunes = pruning is not None and first < task.rank
        optimizer = self._optimizer(model)
        if self.found is None:
            self._evaluate(model, "slice", "received")
            if task.keeps_state:
                restore_moments(model, optimizer, moments)
            tail = float(tail_product(model, first).detach()) if prunes else 0.0
            self.so_far = replace(self.so_far, trained_parameters=trained, tail_before=tail)
        penalty = pruning.penalty if pruning is not None else 0.0

        def tail_penalty() -> Tensor:
            return penalty * tail_product(model, first)

        term = tail_penalty if prunes else None
        self._steps(model, optimizer, "slice", objective=task.objective, term=term)
        if prunes and float(tail_product(model, first).detach()) < self.so_far.tail_before:
            self.so_far = replace(self.so_far, kept_rank=first)
        return carried_over(moments, read_moments(model, optimizer)) if task.keeps_state else {}

    def _train_alone(
        self,
        kept: Mapping[str, Parts],
        trained: Mapping[str, Parts],
        moments: Moments,
        personal: Mapping[str, Parts],
    ) -> dict[str, Parts]:
        """Trains the adapter that is never merged, from what was kept of it."""
        task, spec = self.job.assignment, self.job.spec
        give_back()  # the slice's: one adapter at a time is what was planned for
        values = starting_local(spec, task.rank, kept)
        with self._adapter(values, task.rank, spec.alpha, trained_locally(spec)) as model:
            del values
            self._steps(model, self._optimizer(model), "local", trained, moments, personal)
            self._evaluate(model, "local", "trained")
            return read_parts(model)

    def _steps(
        self,
        model: Any,
        optimizer: Any,
        phase: Phase,
        trained: Mapping[str, Parts] | None = None,
        moments: Moments | None = None,
        personal: Mapping[str, Parts] | None = None,
        *,
        objective: Objective | None = None,
        term: Term | None = None,
    ) -> None:
        """The steps of one adapter, or what a checkpoint left of them."""
        task, rows = self.job.assignment, self.rows.train
        scaler = make_scaler(self.base.compute_dtype, self.base.device)
        steps = StepLog()
        if self.found is not None and self.found.phase == phase:
            steps = self.found.training.steps
            restore(model, optimizer, scaler, self.found.training)
            self.found = None
            log.info("resumed", extra={"adapter": phase, "step": steps.done})

        def save() -> None:
            training = capture(model, optimizer, scaler, steps)
            so_far = replace(self.so_far, paused_s=self._paused_s)
            before = (trained or {}, moments or {}, personal or {})
            self._save(Snapshot(phase, so_far, training, *before))

        def after_step(log_: StepLog) -> None:
            self.watch.check()
            if self._is_due():
                save()
            self.emit({
                "event": "progress", "step": log_.done, "steps": task.local_steps,
                "loss": log_.losses[-1],
                "tokens_per_s": log_.tokens_per_s(tokens_per_step(task, rows)),
                "memory_bytes": self.watch.used_bytes,
            })  # fmt: skip

        self.pace.on_pause = save
        self.base.checkpointing(task.checkpointing)
        try:
            if self._is_due():  # evaluations may have taken long
                save()
            done = train_steps(
                model, optimizer, rows, task, after_step, objective=objective, term=term,
                scaler=scaler, between=self.pace.keep, waited_s=lambda: self.pace.waited_s,
                log=steps,
            )  # fmt: skip
        finally:
            self.base.checkpointing(False)
            self.pace.on_pause = _nothing
        self.so_far = replace(self.so_far, done=(*self.so_far.done, done))

    def _is_due(self) -> bool:
        """Whether it is time for a checkpoint."""
        if self.job.checkpoint_path is None:
            return False
        wanted = max(CHECKPOINT_S, CHECKPOINT_SHARE * self._saving_s)
        return time.perf_counter() - self._saved_at >= wanted

    def _save(self, snapshot: Snapshot) -> None:
        """Writes the checkpoint; a disk that takes none costs the round nothing else."""
        if self.job.checkpoint_path is None:
            return
        began = time.perf_counter()
        try:
            write_snapshot(self.job.checkpoint_path, self.job.key, snapshot)
        except OSError as error:
            log.warning("no checkpoint written", extra={"error": error.strerror})
        self._saved_at = time.perf_counter()
        self._saving_s = self._saved_at - began

    def _optimizer(self, model: Any) -> Any:
        task = self.job.assignment
        return make_optimizer(task.optimizer, model, task.learning_rate)

    def _evaluate(self, model: Any, subject: Subject, stage: Stage) -> None:
        self.pace.keep()
        began, task = time.perf_counter(), self.job.assignment
        found = measure(
            self.base, model, self.held_out, subject, stage, micro_batch=task.micro_batch,
            completions=task.completions, problems=self.job.data.problems, seed=self.job.spec.seed,
        )  # fmt: skip
        if not math.isfinite(found.loss):
            raise DivergedError(
                f"the {subject} adapter as {stage} has a loss of {found.loss}; its weights are "
                "unusable"
            )
        self.so_far = replace(
            self.so_far,
            evaluations=(*self.so_far.evaluations, found),
            evaluate_s=self.so_far.evaluate_s + time.perf_counter() - began,
        )
        self.watch.check()

    @contextmanager
    def _adapter(
        self, values: Mapping[str, Parts], rank: int, alpha: float, trained: Sequence[Part]
    ) -> Iterator[Any]:
        """The base with these values attached; only `trained` parts can move."""
        core = any("core" in parts for parts in values.values())
        with attached(
            self.base.model, self.job.spec, rank, alpha=alpha, trained=trained, core=core
        ) as model:
            write_parts(model, values)
            yield model

    def _read_side(self, blob: BlobRef | None, path: Path | None) -> dict[str, Parts]:
        """The frozen branch beside the base; empty if there is none."""
        return {} if blob is None or path is None else read_files(self.job.spec, (blob,), (path,))


def _nothing() -> None:
    """Between two adapters there are no steps to write down."""
