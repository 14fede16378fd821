"""The trainer's jobs: profile and train. A job in, events through `emit`, a result out.

Knows what a job is called and what answers it. It knows nothing of processes, pipes or JSON text;
a local round is `local_round`'s.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_agent.training import profiling
from edge_agent.training.local_round import Emit, run_train
from edge_agent.training.steps import settle
from edge_agent.training.train_job import JobError, TrainJob
from edge_agent.training.workbench import Workbench
from protos.contract import AdapterSpec, ProfileRequest, from_plain, to_plain


@dataclass(frozen=True)
class ProfileJob:
    """Measure what training costs here."""

    base_folder: Path
    spec: AdapterSpec
    request: ProfileRequest
    memory_cap_bytes: int | None = None


def run_job(plain: Mapping[str, Any], bench: Workbench, emit: Emit) -> None:
    """Carries out one job given as plain JSON values; the last event is its result.

    Raises `JobError` on an unknown job, `ContractError` on ill-typed fields, and the named errors
    of the job; the caller tells them.
    """
    match plain.get("job"):
        case "profile":
            profile = from_plain(ProfileJob, plain)
            with _room(bench, profile.memory_cap_bytes):
                result = run_profile(profile, bench)
            emit(result)
        case "train":
            train = from_plain(TrainJob, plain)
            with _room(bench, train.memory_cap_bytes):
                report = run_train(train, bench, emit)
            emit({"event": "result", "report": to_plain(report)})
        case other:
            raise JobError(f"job {other!r} is not known; agent and trainer differ in version")


@contextmanager
def _room(bench: Workbench, cap_bytes: int | None) -> Iterator[None]:
    """Before a job: a base kept from one with a higher cap goes. After it: if memory is short."""
    bench.make_room(cap_bytes)
    try:
        yield
    finally:
        bench.make_room(cap_bytes)


def run_profile(job: ProfileJob, bench: Workbench) -> dict[str, Any]:
    """A few real steps on random tokens: `ComputeProfile` as "compute", `GpuProfile` as "gpu"."""
    settle(0)
    base = bench.base(job.base_folder, job.request.precision, job.spec)
    compute, gpu = profiling.measure(
        base, job.spec, job.request, bench.baseline_bytes, job.memory_cap_bytes
    )
    return {
        "event": "result",
        "compute": to_plain(compute),
        "gpu": None if gpu is None else to_plain(gpu),
    }
