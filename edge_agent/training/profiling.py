"""Measures training here: a few real steps of the run's own base on random tokens.

Knows a loaded base and what to try. It reads no code and draws no conclusions; the planner does.
"""

from __future__ import annotations

import time
from typing import Any

import torch

from edge_agent.training.backbone import Backbone
from edge_agent.training.loss import count_next_tokens
from edge_agent.training.memory import MemoryWatch, gpu_facts
from edge_agent.training.slice import attached
from edge_agent.training.steps import make_optimizer, train_step
from profiles.device import ComputeProfile, GpuProfile
from protos.contract import AdapterSpec, ProfileRequest

MEASURED_STEPS = 3  # after one that is discarded: it pays for allocation and kernel choice
ENOUGH_S = 20.0  # of measuring, on devices where one step takes long
LEARNING_RATE = 1e-4


def measure(
    base: Backbone, spec: AdapterSpec, request: ProfileRequest, baseline_bytes: int
) -> tuple[ComputeProfile, GpuProfile | None]:
    """Trains a fresh rank-k adapter without checkpointing and times it.

    `baseline_bytes` is what the process held before the base; it is passed on. The peak counts
    from after the base was loaded. Raises what running out of memory raises.
    """
    gpu = gpu_facts(base.device)
    watch = MemoryWatch(base.device)
    rows = _random_rows(base, request)
    with attached(base.model, spec, request.rank) as model:
        optimizer = make_optimizer("adamw", model, LEARNING_RATE)
        model.train()
        tokens_per_s = _rate(base, rows, lambda: train_step(model, optimizer, rows[None]))
        model.eval()
        forward_per_s = _rate(base, rows, lambda: count_next_tokens(model, rows))
        peak_bytes = watch.peak_bytes
    profile = ComputeProfile(
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
    return profile, gpu


def _random_rows(base: Backbone, request: ProfileRequest) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (request.micro_batch, request.sequence_tokens)
    vocabulary = int(base.model.config.vocab_size)
    return torch.randint(vocabulary, shape, generator=generator).to(base.device)


def _rate(base: Backbone, rows: torch.Tensor, once: Any) -> float:
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
