"""One local round, put together from the other files of this room as its assignment declares.

Knows the order of things: evaluate the whole adapter, train the slice, train the device's own
adapter, write what leaves and what stays. It asks no method's name, and knows no processes or
coordinators: paths and facts come in with the job.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_agent.training.backbone import Backbone
from edge_agent.training.branches import side_branch
from edge_agent.training.evaluation import evaluate, spread
from edge_agent.training.feedback import pack_update
from edge_agent.training.home import Home, read_home, write_home
from edge_agent.training.local_objective import Term, kept_rows, pull, tail_product
from edge_agent.training.memory import MemoryWatch, give_back
from edge_agent.training.moments import Moments, carried_over, read_moments, restore_moments
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
from edge_agent.training.steps import DivergedError, StepsDone, make_optimizer, settle, train_steps
from edge_agent.training.train_job import JobError, TrainJob, require_consistent
from edge_agent.training.workbench import LocalRows, Workbench
from protos.contract import BlobRef, Evaluation, LocalReport, Objective, Part, Stage, Subject
from protos.packing import Parts
from protos.sketch import slice_rows
from protos.transfer import write_durably

Emit = Callable[[Mapping[str, Any]], None]


def run_train(job: TrainJob, bench: Workbench, emit: Emit) -> LocalReport:
    """One local round; writes the packed delta to `update_path` when the assignment trains.

    `peak_bytes` of the report is the highest memory after the base was loaded. On CPU the same
    job gives the same bytes for the same number of threads.
    """
    task = job.assignment
    require_consistent(job)
    settle(task.seed)
    base = bench.base(job.base_folder, task.precision, job.spec)
    rows = bench.rows(job.base_folder, base, job.data, task.sequence_tokens, task.held_out_share)
    rows.require(task.trains)
    held_out = spread(rows.held_out, task.evaluation_sequences)
    watch = MemoryWatch(base.device, job.memory_cap_bytes)
    local = _LocalRound(job, base, rows, held_out, watch, emit)
    home = read_home(job.home_path, job.spec)
    if task.evaluates_global:
        local.evaluate_global(home)
        give_back()
    if task.trains:
        local.train(home)
    return local.report()


@dataclass
class _LocalRound:
    """A round in progress and what it measured so far."""

    job: TrainJob
    base: Backbone
    rows: LocalRows
    held_out: NDArray[np.int64]
    watch: MemoryWatch
    emit: Emit
    evaluations: list[Evaluation] = field(default_factory=list)
    evaluate_s: float = 0.0
    done: list[StepsDone] = field(default_factory=list)
    trained_parameters: int = 0
    kept_rank: int = 0

    def evaluate_global(self, home: Home) -> None:
        """The adapter that all devices share, with this device's personal parts."""
        job, task, spec = self.job, self.job.assignment, self.job.spec
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
        """Trains the slice, and the device's own adapter after it; writes update and home."""
        job, task, spec = self.job, self.job.assignment, self.job.spec
        assert job.update_path is not None
        rows = {m.name: slice_rows(spec, task, m.name) for m in spec.modules}
        here = home.at(rows)
        received = starting_slice(spec, task, read_files(spec, task.slice, job.slice_paths), here)
        side = self._read_side(task.side, job.side_path)
        personal: dict[str, Parts] = {}
        with (
            side_branch(self.base.model, side, self.base.compute_dtype),
            self._adapter(received, task.rank, task.alpha, task.trained) as model,
        ):
            self._evaluate(model, "slice", "received")
            moments = self._train_slice(model, here.moments)
            self._evaluate(model, "slice", "trained")
            trained = read_parts(model)
            if job.personal_weight > 0:
                write_parts(model, received)
                term = pull(model, job.personal_weight)
                write_parts(model, starting_personal(task, received, here))
                self._steps(model, self._optimizer(model), term=term)
                self._evaluate(model, "personal", "trained")
                personal = read_parts(model)
        delta = subtract(trained, received, task.update.parts)
        packed, residual = pack_update(spec, task, delta, rows, home.residual)
        write_durably(job.update_path, packed)
        kept = Home(
            round=task.round,
            alpha=task.alpha,
            rows=rows,
            slice=trained if task.personal else {},
            personal=personal,
            side=side if task.personal or personal else {},
            moments=moments,
            residual=residual,
        )
        if job.home_out is not None and not kept.is_empty:
            write_home(job.home_out, kept, spec)

    def report(self) -> LocalReport:
        """What was done and measured."""
        return LocalReport(
            assignment_id=self.job.assignment.assignment_id,
            outcome="done",
            evaluations=tuple(self.evaluations),
            train_examples=len(self.rows.train),
            train_tokens=sum(done.tokens for done in self.done),
            train_loss=self.done[0].mean_loss if self.done else 0.0,
            trained_parameters=self.trained_parameters,
            peak_bytes=self.watch.peak_bytes,
            train_s=sum(done.seconds for done in self.done),
            evaluate_s=self.evaluate_s,
            main_language=self.rows.main_language,
            kept_rank=self.kept_rank,
        )

    def _train_slice(self, model: Any, moments: Moments) -> Moments:
        """Trains what is on the model; returns the moments that are to be kept."""
        task = self.job.assignment
        self.trained_parameters = trained_parameters(model)
        if self.trained_parameters == 0:
            raise JobError("the assignment trains, but nothing that this run has; ask for a part")
        optimizer = self._optimizer(model)
        if task.keeps_state:
            restore_moments(model, optimizer, moments)
        pruning = task.pruning
        first = task.rank if pruning is None else kept_rows(pruning, task.rank)
        if pruning is None or first == task.rank:
            self._steps(model, optimizer, objective=task.objective)
        else:
            penalty = pruning.penalty
            before = float(tail_product(model, first).detach())
            self._steps(
                model, optimizer, objective=task.objective,
                term=lambda: penalty * tail_product(model, first),
            )  # fmt: skip
            after = float(tail_product(model, first).detach())
            self.kept_rank = first if after < before else 0
        return carried_over(moments, read_moments(model, optimizer)) if task.keeps_state else {}

    def _steps(
        self,
        model: Any,
        optimizer: Any,
        *,
        objective: Objective | None = None,
        term: Term | None = None,
    ) -> None:
        task = self.job.assignment

        def after_step(step: int, loss: float) -> None:
            self.emit({"event": "progress", "step": step, "steps": task.local_steps, "loss": loss})
            self.watch.check()

        self.base.checkpointing(task.checkpointing)
        try:
            done = train_steps(
                model, optimizer, self.rows.train, task, after_step, objective=objective, term=term
            )
        finally:
            self.base.checkpointing(False)
        self.done.append(done)

    def _optimizer(self, model: Any) -> Any:
        task = self.job.assignment
        return make_optimizer(task.optimizer, model, task.learning_rate)

    def _evaluate(self, model: Any, subject: Subject, stage: Stage) -> None:
        began = time.perf_counter()
        loss, accuracy, tokens = evaluate(model, self.held_out, self.job.assignment.micro_batch)
        if not math.isfinite(loss):
            raise DivergedError(
                f"the {subject} adapter as {stage} has a loss of {loss}; its weights are unusable"
            )
        self.evaluations.append(Evaluation(subject, stage, loss, accuracy, tokens))
        self.evaluate_s += time.perf_counter() - began
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
