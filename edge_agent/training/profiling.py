"""Measures training here: a few real steps of the run's own base on random tokens.

Knows a loaded base and what to try. It reads no code and draws no conclusions; the planner does.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from edge_agent.training.backbone import Backbone
from edge_agent.training.batches import whole_rows
from edge_agent.training.memory import (
    MemoryWatch,
    OutOfMemoryError,
    give_back,
    gpu_facts,
    is_out_of_memory,
)
from edge_agent.training.optimizers import make_optimizer
from edge_agent.training.predictions import count_predictions
from edge_agent.training.rows import Examples, Sequences
from edge_agent.training.slice import attached
from edge_agent.training.steps import make_scaler, train_step
from profiles.device import ComputePoint, ComputeProfile, GpuProfile
from profiles.errors import SketchfleetError
from protos.contract import AdapterSpec, ProfileRequest

MEASURED_STEPS = 3  # after one that is discarded: it pays for allocation and kernel choice
ENOUGH_S = 20.0  # of measuring in all, on devices where one step takes long
KINDS = 4  # of things timed: steps and evaluations, at two sizes
SMALLER = 4  # times fewer tokens in the small size
LEARNING_RATE = 1e-4
FEWEST_TOKENS = 16  # a sequence is never measured shorter; runs ask for no less


def measure(
    base: Backbone,
    spec: AdapterSpec,
    request: ProfileRequest,
    baseline_bytes: int,
    cap_bytes: int | None = None,
) -> tuple[ComputeProfile, GpuProfile | None]:
    """Trains a fresh rank-k adapter without checkpointing and times it, at two sizes.

    The sizes are the requested one and a quarter of its tokens: what a step costs however small,
    and what each token adds, only two can tell apart. When memory runs out, or `cap_bytes` is
    exceeded, it tries again with half the micro-batch and then with half the tokens: which
    settings a device can afford, the planner decides from what was measured. `baseline_bytes` is
    what the process held before the base; it is passed on. Peaks count from after the base was
    loaded. Raises `OutOfMemoryError` when not even one sequence of `FEWEST_TOKENS` fits, and what
    other failures raise.
    """
    gpu = gpu_facts(base.device)
    tried = request
    while True:
        try:
            return _measure_both(base, spec, tried, baseline_bytes, cap_bytes), gpu
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


def quarter(request: ProfileRequest) -> ProfileRequest | None:
    """The same with a quarter of the tokens: fewer sequences first, then shorter ones.

    None when sequences are as short as they may be, so that there is no second size.
    """
    fewer = max(1, request.micro_batch // SMALLER)
    shorter = SMALLER * fewer // request.micro_batch  # times
    tokens = max(FEWEST_TOKENS, request.sequence_tokens // max(1, shorter))
    found = replace(request, micro_batch=fewer, sequence_tokens=tokens)
    return None if found == request else found


def _measure_both(
    base: Backbone,
    spec: AdapterSpec,
    request: ProfileRequest,
    baseline_bytes: int,
    cap_bytes: int | None,
) -> ComputeProfile:
    """Exactly as asked for. Raises what running out of memory raises."""
    loaded_bytes = MemoryWatch(base.device).held_bytes
    less = quarter(request)
    # The small one first: freed pages that the process keeps would count as its own.
    small = None if less is None else _measure_once(base, spec, less, cap_bytes, warm=False)
    give_back()
    point = _measure_once(base, spec, request, cap_bytes, warm=small is not None)
    tokens = request.micro_batch * request.sequence_tokens
    return ComputeProfile(
        base_digest=spec.base_digest,
        precision=request.precision,
        tokens_per_s=tokens / point.step_s,
        forward_tokens_per_s=tokens / point.forward_s,
        baseline_bytes=baseline_bytes,
        peak_bytes=point.peak_bytes,
        rank=request.rank,
        sequence_tokens=request.sequence_tokens,
        micro_batch=request.micro_batch,
        loaded_bytes=loaded_bytes,
        small=small,
    )


def _measure_once(
    base: Backbone, spec: AdapterSpec, request: ProfileRequest, cap_bytes: int | None, *, warm: bool
) -> ComputePoint:
    """One size; `warm` when another was measured before. Raises what out of memory raises."""
    watch = MemoryWatch(base.device, cap_bytes)
    rows = _random_rows(base, request)
    with attached(base.model, spec, request.rank, alpha=spec.alpha) as model:
        optimizer = make_optimizer("adamw", model, LEARNING_RATE)
        scaler = make_scaler(base.compute_dtype, base.device)

        def step() -> None:
            train_step(model, optimizer, [rows], scaler=scaler)
            watch.check()

        def forward() -> None:
            count_predictions(model, rows)
            watch.check()

        model.train()
        step_s = _seconds(base.device, step, warm)
        model.eval()
        forward_s = _seconds(base.device, forward, warm)
        return ComputePoint(
            request.sequence_tokens, request.micro_batch, step_s, forward_s, watch.peak_bytes
        )


def _random_rows(base: Backbone, request: ProfileRequest) -> Sequences:
    shape = (request.micro_batch, request.sequence_tokens)
    vocabulary, draw = int(base.model.config.vocab_size), np.random.default_rng(0)
    tokens = draw.integers(vocabulary, size=shape, dtype=np.int64)
    if base.labels:
        tokens[tokens == base.padding_id] = base.padding_id + 1  # no row is to be shorter
        labels = draw.integers(len(base.labels), size=len(tokens), dtype=np.int64)
        return Examples(tokens, np.zeros_like(tokens), np.ones(shape, dtype=np.bool_), labels)
    return whole_rows(tokens)


def _seconds(device: torch.device, once: Callable[[], None], warm: bool) -> float:
    """Mean seconds of `once`, after one that is discarded.

    `warm`: something like it ran before, so that kernels are loaded. Then, where a second one
    would not fit the share of the budget, the first is the measurement.
    """
    share = ENOUGH_S / KINDS
    start = time.perf_counter()
    once()
    _wait(device)
    first = time.perf_counter() - start
    if warm and 2 * first > share:
        return first
    began, done = time.perf_counter(), 0
    while done < MEASURED_STEPS and (done == 0 or time.perf_counter() - start + first < share):
        once()
        _wait(device)
        done += 1
    return (time.perf_counter() - began) / done


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
