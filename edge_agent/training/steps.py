"""The optimiser steps of one local round.

Knows rows, a model with trainable parameters and what an assignment asks. It knows neither files
nor JSON; memory, pauses and checkpoints are watched by whoever hands in `between` and `after_step`.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edge_agent.training.local_objective import Term, proportionally_fair
from edge_agent.training.predictions import mean_loss
from edge_agent.training.rows import Sequences
from profiles.errors import SketchfleetError
from protos.contract import Assignment, Objective

CLIP_NORM = 1.0
RECENT_STEPS = 8  # over which the speed of a round in progress is told


class DivergedError(SketchfleetError):
    """The loss is no number any more."""


@dataclass
class StepLog:
    """The steps of one adapter so far, and the random state after them."""

    losses: list[float] = field(default_factory=list)  # nats per token; plain, whatever the aim
    seconds: list[float] = field(default_factory=list)  # of work; waiting left out
    random_state: Tensor = field(default_factory=torch.get_rng_state)

    @property
    def done(self) -> int:
        """Optimiser steps."""
        return len(self.losses)

    def tokens_per_s(self, tokens_per_step: int) -> float:
        """Of the last few steps."""
        recent = self.seconds[-RECENT_STEPS:]
        return len(recent) * tokens_per_step / max(sum(recent), 1e-9)


@dataclass(frozen=True)
class StepsDone:
    """What the steps of a round added up to."""

    mean_loss: float  # nats per token, over all steps; the plain loss, whatever was minimised
    tokens: int  # that went through forward and backward
    seconds: float  # of work; waiting left out
    step_s: float  # median


def settle(seed: int) -> None:
    """Makes what follows repeatable."""
    torch.manual_seed(seed % 2**63)
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Otherwise every new tensor is first filled, which costs a pass over it and finds no fault.
    deterministic: Any = torch.utils.deterministic  # its stub lacks the setting
    deterministic.fill_uninitialized_memory = False


def make_scaler(dtype: torch.dtype, device: torch.device) -> torch.amp.GradScaler | None:
    """What keeps gradients within float16's range; None for wider types."""
    # A round has few steps, so none are to be lost in finding a scale that does not overflow.
    wanted = dtype == torch.float16
    return torch.amp.GradScaler(device.type, init_scale=2.0**13) if wanted else None


def train_step(
    model: Any,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[Sequences],
    objective: Objective | None = None,
    term: Term | None = None,
    *,
    scaler: torch.amp.GradScaler | None = None,
    between: Callable[[], None] = lambda: None,
) -> float:
    """One optimiser step over micro-batches, which weigh as much as is predicted in each.

    `objective` is applied to the loss of each micro-batch, `term` is added once; `between` is
    called before each. Returns the mean plain loss in nats per token before the step.
    """
    optimizer.zero_grad(set_to_none=True)
    scaler = scaler or torch.amp.GradScaler(enabled=False)
    counts = [rows.predictions for rows in batches]
    losses = []
    for rows, count in zip(batches, counts, strict=True):
        between()
        share = count / max(1, sum(counts))
        loss = mean_loss(model, rows)
        aim = loss if objective is None else proportionally_fair(loss, objective)
        scaler.scale(aim * share).backward()
        losses.append(loss.detach() * share)
    if term is not None:
        scaler.scale(term()).backward()
    scaler.unscale_(optimizer)
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    torch.nn.utils.clip_grad_norm_(trained, CLIP_NORM)
    scaler.step(optimizer)
    scaler.update()
    return float(torch.stack(losses).sum())


def train_steps(
    model: Any,
    optimizer: torch.optim.Optimizer,
    rows: Sequences,
    task: Assignment,
    after_step: Callable[[StepLog], None],
    *,
    objective: Objective | None = None,
    term: Term | None = None,
    scaler: torch.amp.GradScaler | None = None,
    between: Callable[[], None] = lambda: None,
    waited_s: Callable[[], float] = lambda: 0.0,
    log: StepLog | None = None,
) -> StepsDone:
    """Trains the task's steps on rows drawn by the task's seed.

    Each row is seen once before any is seen twice. `between` may wait, `waited_s` tells how long
    it has so far. `log`: steps that were done before; model and optimiser are as those left them.
    Raises `DivergedError` when a loss is not finite.
    """
    log = StepLog() if log is None else log
    torch.set_rng_state(log.random_state)
    draws = _draws(len(rows), task.micro_batch * task.accumulation, task.seed % 2**63)
    for _ in range(log.done):
        next(draws)
    model.train()
    for step in range(log.done + 1, task.local_steps + 1):
        picked = next(draws).reshape(task.accumulation, task.micro_batch)
        batches = [rows.take(which) for which in picked]
        began, waited = time.perf_counter(), waited_s()
        loss = train_step(
            model, optimizer, batches, objective, term, scaler=scaler, between=between
        )
        if not math.isfinite(loss):
            raise DivergedError(
                f"training diverged: the loss is {loss} at step {step} with learning rate "
                f"{task.learning_rate:g}; lower [training] learning_rate"
            )
        log.losses.append(loss)
        log.seconds.append(time.perf_counter() - began - (waited_s() - waited))
        log.random_state = torch.get_rng_state()
        after_step(log)
    model.eval()
    tokens = tokens_per_step(task, rows) * task.local_steps
    return StepsDone(
        float(np.mean(log.losses)), tokens, sum(log.seconds), statistics.median(log.seconds)
    )


def tokens_per_step(task: Assignment, rows: Sequences) -> int:
    """Tokens of an optimiser step, counted or not: all of them cost."""
    return task.micro_batch * task.accumulation * rows.length


def _draws(rows: int, batch: int, seed: int) -> Iterator[NDArray[np.int64]]:
    """Row numbers of one batch after another: permutations end to end."""
    generator = np.random.default_rng(seed)
    left = np.empty(0, dtype=np.int64)
    while True:
        while len(left) < batch:
            left = np.concatenate([left, generator.permutation(rows)])
        yield left[:batch]
        left = left[batch:]
