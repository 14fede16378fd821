"""Measures training here: a few real steps of the run's own base on random tokens.

Knows a loaded base and what to try. It reads no code and draws no conclusions; the planner does.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import torch

from edge_agent.training.backbone import Backbone
from edge_agent.training.loss import count_next_tokens
from edge_agent.training.memory import (
    MemoryWatch,
    OutOfMemoryError,
    give_back,
    gpu_facts,
    is_out_of_memory,
)
from edge_agent.training.slice import attached
from edge_agent.training.steps import make_optimizer, train_step
from profiles.device import ComputeProfile, GpuProfile
from profiles.errors import SketchfleetError
from protos.contract import AdapterSpec, ProfileRequest

MEASURED_STEPS = 3  # after one that is discarded: it pays for allocation and kernel choice
ENOUGH_S = 20.0  # of measuring, on devices where one step takes long
LEARNING_RATE = 1e-4
FEWEST_TOKENS = 16  # a sequence is never measured shorter; runs ask for no less


def measure(
    base: Backbone,
    spec: AdapterSpec,
    request: ProfileRequest,
    baseline_bytes: int,
    cap_bytes: int | None = None,
) -> tuple[ComputeProfile, GpuProfile | None]:
    """Trains a fresh rank-k adapter without checkpointing and times it.

    When memory runs out, or `cap_bytes` is exceeded, it tries again with half the micro-batch and
    then with half the tokens: which settings a device can afford, the planner decides from what
    was measured. `baseline_bytes` is what the process held before the base; it is passed on. The
    peak counts from after the base was loaded. Raises `OutOfMemoryError` when not even one
    sequence of `FEWEST_TOKENS` fits, and what other failures raise.
    """
    gpu = gpu_facts(base.device)
    tried = request
    while True:
        try:
            return _measure_once(base, spec, tried, baseline_bytes, cap_bytes), gpu
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            smaller = _smaller(tried)
            if smaller is None:
                why = str(error) if isinstance(error, SketchfleetError) else "memory ran out"
                raise OutOfMemoryError(
                    f"training one sequence of {tried.sequence_tokens} tokens beside the base as "
                    f"{tried.precision} does not fit this device: {why}"
                ) from error
        # Only here: while the error lives, its traceback holds the tensors of the failed step.
        tried = smaller
        give_back()


def _smaller(request: ProfileRequest) -> ProfileRequest | None:
    """The next request to try with less memory; None when there is none."""
    if request.micro_batch > 1:
        return replace(request, micro_batch=request.micro_batch // 2)
    if request.sequence_tokens > FEWEST_TOKENS:
        fewer = max(FEWEST_TOKENS, request.sequence_tokens // 2)
        return replace(request, sequence_tokens=fewer)
    return None


def _measure_once(
    base: Backbone,
    spec: AdapterSpec,
    request: ProfileRequest,
    baseline_bytes: int,
    cap_bytes: int | None,
) -> ComputeProfile:
    """Exactly as asked for. Raises what running out of memory raises."""
    watch = MemoryWatch(base.device, cap_bytes)
    rows = _random_rows(base, request)
    with attached(base.model, spec, request.rank, alpha=spec.alpha) as model:
        optimizer = make_optimizer("adamw", model, LEARNING_RATE)

        def step() -> None:
            train_step(model, optimizer, rows[None])
            watch.check()

        def forward() -> None:
            count_next_tokens(model, rows)
            watch.check()

        model.train()
        tokens_per_s = _rate(base, rows, step)
        model.eval()
        forward_per_s = _rate(base, rows, forward)
        peak_bytes = watch.peak_bytes
    return ComputeProfile(
        base_digest=spec.base_digest,
        precision=request.precision,
        tokens_per_s=tokens_per_s,
        forward_tokens_per_s=forward_per_s,
        baseline_bytes=baseline_bytes,
        peak_bytes=peak_bytes,
        rank=request.rank,
        sequence_tokens=request.sequence_tokens,
        micro_batch=request.micro_batch,
    )


def _random_rows(base: Backbone, request: ProfileRequest) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (request.micro_batch, request.sequence_tokens)
    vocabulary = int(base.model.config.vocab_size)
    return torch.randint(vocabulary, shape, generator=generator).to(base.device)


def _rate(base: Backbone, rows: torch.Tensor, once: Callable[[], None]) -> float:
    """Tokens per second of `once` over `rows`."""
    once()
    _wait(base.device)
    began, done = time.perf_counter(), 0
    while done < MEASURED_STEPS and (done == 0 or time.perf_counter() - began < ENOUGH_S):
        once()
        _wait(base.device)
        done += 1
    return done * rows.numel() / (time.perf_counter() - began)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
