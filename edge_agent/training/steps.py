"""The optimiser steps of one local round.

Knows rows, a model with trainable parameters and what an assignment asks. It knows neither files
nor JSON; memory is watched by whoever hands in `after_step`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from edge_agent.training.local_objective import Term, proportionally_fair
from edge_agent.training.loss import next_token_loss
from profiles.errors import SketchfleetError
from protos.contract import Assignment, Objective

CLIP_NORM = 1.0


class DivergedError(SketchfleetError):
    """The loss is no number any more."""


class OptimizerError(SketchfleetError):
    """The assignment names an optimiser that this agent does not have."""


@dataclass(frozen=True)
class StepsDone:
    """What the steps of a round added up to."""

    mean_loss: float  # nats per token, over all steps; the plain loss, whatever was minimised
    tokens: int  # that went through forward and backward
    seconds: float


def settle(seed: int) -> None:
    """Makes what follows repeatable."""
    torch.manual_seed(seed % 2**63)
    torch.use_deterministic_algorithms(True, warn_only=True)


def make_optimizer(name: str, model: Any, learning_rate: float) -> torch.optim.Optimizer:
    """A fresh optimiser over the trainable parameters: "adamw" or "sgd", no weight decay.

    Decay would pull every device's rows towards zero whatever its data, and the merge would add
    those pulls up. Raises `OptimizerError` on another name.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    if name == "adamw":
        return torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0, fused=True)
    if name == "sgd":
        return torch.optim.SGD(parameters, lr=learning_rate)
    raise OptimizerError(f"optimiser {name!r} is not known; the run may ask for adamw or sgd")


def train_step(
    model: Any,
    optimizer: torch.optim.Optimizer,
    batches: torch.Tensor,
    objective: Objective | None = None,
    term: Term | None = None,
) -> float:
    """One optimiser step over `batches`: (accumulation, micro_batch, tokens) int64.

    `objective` is applied to the loss of each micro-batch, `term` is added once. Returns the mean
    plain loss in nats per token before the step.
    """
    optimizer.zero_grad(set_to_none=True)
    losses = []
    for rows in batches:
        loss = next_token_loss(model, rows)
        aim = loss if objective is None else proportionally_fair(loss, objective)
        (aim / len(batches)).backward()
        losses.append(loss.detach())
    if term is not None:
        term().backward()
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    torch.nn.utils.clip_grad_norm_(trained, CLIP_NORM)
    optimizer.step()
    return float(torch.stack(losses).mean())


def train_steps(
    model: Any,
    optimizer: torch.optim.Optimizer,
    rows: NDArray[np.int64],
    task: Assignment,
    after_step: Callable[[int, float], None],
    *,
    objective: Objective | None = None,
    term: Term | None = None,
) -> StepsDone:
    """Trains the task's steps on rows (sequences, tokens) int64, drawn by the task's seed.

    Each row is seen once before any is seen twice. `after_step` is told the step (from 1) and its
    loss. Raises `DivergedError` when a loss is not finite.
    """
    device = next(model.parameters()).device
    draws = _draws(len(rows), task.micro_batch * task.accumulation, task.seed % 2**63)
    model.train()
    began, losses = time.perf_counter(), []
    for step in range(1, task.local_steps + 1):
        picked = rows[next(draws)].reshape(task.accumulation, task.micro_batch, -1)
        batches = torch.from_numpy(picked).to(device)
        loss = train_step(model, optimizer, batches, objective, term)
        if not math.isfinite(loss):
            raise DivergedError(
                f"training diverged: the loss is {loss} at step {step} with learning rate "
                f"{task.learning_rate:g}; lower [training] learning_rate"
            )
        losses.append(loss)
        after_step(step, loss)
    model.eval()
    tokens = task.local_steps * task.micro_batch * task.accumulation * rows.shape[1]
    return StepsDone(float(np.mean(losses)), tokens, time.perf_counter() - began)


def _draws(rows: int, batch: int, seed: int) -> Iterator[NDArray[np.int64]]:
    """Row numbers of one batch after another: permutations end to end."""
    generator = np.random.default_rng(seed)
    left = np.empty(0, dtype=np.int64)
    while True:
        while len(left) < batch:
            left = np.concatenate([left, generator.permutation(rows)])
        yield left[:batch]
        left = left[batch:]
