"""The trainer's jobs: profile and train. A job in, events through `emit`, a result out.

Knows how a local round is put together from the other files of this room. It knows nothing of
processes, pipes or JSON text, nor of coordinators: paths and facts come in with the job.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from edge_agent.training import profiling
from edge_agent.training.backbone import Backbone
from edge_agent.training.evaluation import evaluate, spread
from edge_agent.training.memory import MemoryWatch, give_back
from edge_agent.training.slice import (
    attached,
    read_factors,
    subtract,
    trained_parameters,
    write_factors,
)
from edge_agent.training.steps import DivergedError, StepsDone, train_steps
from edge_agent.training.workbench import DataSelection, LocalRows, NoDataError, Workbench
from profiles.errors import SketchfleetError
from protos.contract import (
    AdapterSpec,
    Assignment,
    Evaluation,
    LocalReport,
    ProfileRequest,
    Stage,
    Subject,
    from_plain,
    to_plain,
)
from protos.packing import Factors, pack, unpack
from protos.transfer import write_durably

Emit = Callable[[Mapping[str, Any]], None]


class JobError(SketchfleetError):
    """A job that this trainer cannot read or carry out."""


@dataclass(frozen=True)
class ProfileJob:
    """Measure what training costs here."""

    base_folder: Path
    spec: AdapterSpec
    request: ProfileRequest
    memory_cap_bytes: int | None = None


@dataclass(frozen=True)
class TrainJob:
    """One local round: evaluate the whole adapter, train the slice, or both."""

    base_folder: Path
    spec: AdapterSpec
    assignment: Assignment
    data: DataSelection
    slice_path: Path | None = None
    global_path: Path | None = None
    update_path: Path | None = None  # where the packed delta goes
    memory_cap_bytes: int | None = None


def run_job(plain: Mapping[str, Any], bench: Workbench, emit: Emit) -> None:
    """Carries out one job given as plain JSON values; the last event is its result.

    Raises `JobError` on an unknown job, `ContractError` on ill-typed fields, and the named errors
    of the job; the caller tells them.
    """
    match plain.get("job"):
        case "profile":
            emit(run_profile(from_plain(ProfileJob, plain), bench))
        case "train":
            report = run_train(from_plain(TrainJob, plain), bench, emit)
            emit({"event": "result", "report": to_plain(report)})
        case other:
            raise JobError(f"job {other!r} is not known; agent and trainer differ in version")


def run_profile(job: ProfileJob, bench: Workbench) -> dict[str, Any]:
    """A few real steps on random tokens: `ComputeProfile` as "compute", `GpuProfile` as "gpu"."""
    _settle(0)
    base = bench.base(job.base_folder, job.request.precision, job.spec)
    compute, gpu = profiling.measure(
        base, job.spec, job.request, bench.baseline_bytes, job.memory_cap_bytes
    )
    return {
        "event": "result",
        "compute": to_plain(compute),
        "gpu": None if gpu is None else to_plain(gpu),
    }


def run_train(job: TrainJob, bench: Workbench, emit: Emit) -> LocalReport:
    """One local round; writes the packed delta to `update_path` when the assignment trains.

    `peak_bytes` of the report is the highest memory after the base was loaded. On CPU the same
    job gives the same bytes for the same number of threads.
    """
    task = job.assignment
    _settle(task.seed)
    base = bench.base(job.base_folder, task.precision, job.spec)
    rows = bench.rows(job.base_folder, base, job.data, task.sequence_tokens, task.held_out_share)
    held_out = _require_rows(rows, task)
    watch = MemoryWatch(base.device, job.memory_cap_bytes)
    evaluations: list[Evaluation] = []
    evaluate_s = 0.0

    def measure(model: Any, subject: Subject, stage: Stage) -> None:
        nonlocal evaluate_s
        began = time.perf_counter()
        loss, accuracy, tokens = evaluate(model, held_out, task.micro_batch)
        if not math.isfinite(loss):
            raise DivergedError(
                f"the {subject} adapter as {stage} has a loss of {loss}; its weights are unusable"
            )
        evaluations.append(Evaluation(subject, stage, loss, accuracy, tokens))
        evaluate_s += time.perf_counter() - began
        watch.check()

    if job.global_path is not None:
        encoding = None if task.global_adapter is None else task.global_adapter.encoding
        whole = unpack(job.global_path.read_bytes(), job.spec, job.spec.rank, encoding=encoding)
        with attached(base.model, job.spec, job.spec.rank) as model:
            write_factors(model, whole)
            measure(model, "global", "received")
        del whole, model
        give_back()

    done, trained = StepsDone(0.0, 0, 0.0), 0
    if task.trains:
        received = _read_slice(job)
        with attached(base.model, job.spec, task.rank) as model:
            write_factors(model, received)
            trained = trained_parameters(model)
            measure(model, "slice", "received")
            done = _train(base, model, rows.train, task=task, watch=watch, emit=emit)
            measure(model, "slice", "trained")
            delta = subtract(read_factors(model), received)
        _write_update(job, delta)

    return LocalReport(
        assignment_id=task.assignment_id,
        outcome="done",
        evaluations=tuple(evaluations),
        train_examples=len(rows.train),
        train_tokens=done.tokens,
        train_loss=done.mean_loss,
        trained_parameters=trained,
        peak_bytes=watch.peak_bytes,
        train_s=done.seconds,
        evaluate_s=evaluate_s,
        main_language=rows.main_language,
    )


def _settle(seed: int) -> None:
    torch.manual_seed(seed % 2**63)
    torch.use_deterministic_algorithms(True, warn_only=True)


def _require_rows(rows: LocalRows, task: Assignment) -> NDArray[np.int64]:
    """The held-out rows to evaluate on. Raises `NoDataError`."""
    if len(rows.held_out) == 0:
        raise NoDataError(
            f"held-out code is shorter than one sequence of {task.sequence_tokens} tokens; "
            "add code under [data] include"
        )
    if task.trains and len(rows.train) == 0:
        raise NoDataError(
            f"training code is shorter than one sequence of {task.sequence_tokens} tokens; "
            "add code under [data] include"
        )
    return spread(rows.held_out, task.evaluation_sequences)


def _read_slice(job: TrainJob) -> dict[str, Factors]:
    task = job.assignment
    if job.slice_path is None or job.update_path is None or task.slice is None:
        raise JobError("an assignment that trains needs slice_path and update_path")
    buffer = job.slice_path.read_bytes()
    return unpack(buffer, job.spec, task.rank, encoding=task.slice.encoding)


def _train(
    base: Backbone,
    model: Any,
    rows: NDArray[np.int64],
    *,
    task: Assignment,
    watch: MemoryWatch,
    emit: Emit,
) -> StepsDone:
    def after_step(step: int, loss: float) -> None:
        emit({"event": "progress", "step": step, "steps": task.local_steps, "loss": loss})
        watch.check()

    base.checkpointing(task.checkpointing)
    try:
        return train_steps(
            model,
            rows,
            steps=task.local_steps,
            micro_batch=task.micro_batch,
            accumulation=task.accumulation,
            optimizer=task.optimizer,
            learning_rate=task.learning_rate,
            seed=task.seed % 2**63,
            after_step=after_step,
        )
    finally:
        base.checkpointing(False)


def _write_update(job: TrainJob, delta: Mapping[str, Factors]) -> None:
    task = job.assignment
    assert job.update_path is not None
    packed = pack(
        job.spec,
        task.rank,
        delta,
        encoding=task.update_encoding,
        assignment_digest=task.digest,
        seed=task.seed,
    )
    write_durably(job.update_path, packed)
