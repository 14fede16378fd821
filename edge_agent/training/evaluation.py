"""What a model makes of held-out code: loss, token accuracy, completed lines, solved problems.

Knows rows and how the single measures come together in one `Evaluation`. It does not know which
files the rows came from, nor whether the adapter on the model is a slice or the whole.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from edge_agent.training.backbone import Backbone
from edge_agent.training.completions import measure_completions
from edge_agent.training.connectors import Problems
from edge_agent.training.loss import count_next_tokens
from edge_agent.training.problems import measure_problems
from edge_agent.training.rows import Rows
from edge_agent.training.sandbox import Limits
from protos.contract import Evaluation, Stage, Subject


class HeldOutResult(NamedTuple):
    """What a model predicts of text it was not trained on."""

    loss: float  # mean cross-entropy, nats per predicted token
    token_accuracy: float  # share of tokens that were the most likely one
    tokens: int  # predicted: those that count


def evaluate(model: Any, rows: Rows, micro_batch: int) -> HeldOutResult:
    """Predicts every token of `rows` that counts, `micro_batch` rows at a time.

    `model` is put in evaluation mode and left in the mode it was in. Raises `ValueError` when
    nothing counts.
    """
    if not rows.counted[:, 1:].any():
        raise ValueError("no held-out tokens to predict")
    was_training = model.training
    model.eval()
    nats, right, tokens = 0.0, 0, 0
    try:
        for start in range(0, len(rows), micro_batch):
            n, r, t = count_next_tokens(model, rows.take(slice(start, start + micro_batch)))
            nats, right, tokens = nats + n, right + r, tokens + t
    finally:
        model.train(was_training)
    return HeldOutResult(nats / tokens, right / tokens, tokens)


def measure(
    base: Backbone,
    model: Any,
    held_out: Rows,
    subject: Subject,
    stage: Stage,
    *,
    micro_batch: int,
    completions: int,
    problems: Problems | None,
    seed: int,
) -> Evaluation:
    """Everything that is asked of one adapter at one moment.

    completions: lines to complete, drawn by `seed`; give the same seed to what is to be compared.
    problems: solved with the adapter that all devices share only, since a device's own few would
    tell little and cost much. A model whose loss is not finite is asked nothing more.
    """
    found = evaluate(model, held_out, micro_batch)
    seen = Evaluation(subject, stage, *found)
    if not math.isfinite(found.loss):
        return seen
    facts: dict[str, Any] = {}
    if completions > 0:
        lines = measure_completions(base, model, held_out, completions, seed)
        facts |= {
            "completions": lines.count,
            "exact_match": lines.exact_match,
            "edit_similarity": lines.edit_similarity,
        }
    if problems is not None and subject == "global":
        facts |= _solved(base, model, problems, seed)
    return Evaluation(subject, stage, *found, **facts)


def _solved(base: Backbone, model: Any, problems: Problems, seed: int) -> dict[str, Any]:
    limits = Limits(wall_s=problems.wall_s, memory_bytes=problems.memory_mb * 10**6)
    result = measure_problems(
        base,
        model,
        problems.path,
        problems.samples,
        limits,
        seed,
        max_problems=problems.max_problems,
        temperature=problems.temperature,
        max_new_tokens=problems.max_new_tokens,
    )
    return result._asdict()


def spread(rows: Rows, count: int) -> Rows:
    """At most `count` rows, evenly spaced, so that one long file does not stand for all."""
    if len(rows) <= count:
        return rows
    return rows.take(np.linspace(0, len(rows) - 1, count).astype(np.int64))
