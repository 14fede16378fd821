"""What a model makes of held-out code: loss, token accuracy, completed lines, solved problems.

Knows rows and how the single measures come together in one `Evaluation`. It does not know which
files the rows came from, nor whether the adapter on the model is a slice or the whole.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from edge_agent.training.backbone import Backbone
from edge_agent.training.classification import macro_f1
from edge_agent.training.completions import measure_completions
from edge_agent.training.connectors import Problems
from edge_agent.training.predictions import count_predictions
from edge_agent.training.problems import measure_problems
from edge_agent.training.rows import Examples, Sequences
from edge_agent.training.sandbox import Limits
from protos.contract import MOST_EXAMPLES, Evaluation, Stage, Subject


class HeldOutResult(NamedTuple):
    """What a model predicts of text it was not trained on."""

    loss: float  # mean cross-entropy, nats per predicted token
    token_accuracy: float  # share of tokens that were the most likely one
    tokens: int  # predicted: those that count
    row_nats: NDArray[np.float64]  # (n,) summed cross-entropy of each row
    row_tokens: NDArray[np.int64]  # (n,) predicted
    macro_f1: float | None = None  # of a classifier


def evaluate(model: Any, rows: Sequences, micro_batch: int) -> HeldOutResult:
    """Predicts every token of `rows` that counts, `micro_batch` rows at a time.

    `model` is put in evaluation mode and left in the mode it was in. Raises `ValueError` when
    nothing counts.
    """
    if not rows.predictions:
        raise ValueError("no held-out tokens to predict")
    was_training = model.training
    model.eval()
    try:
        found = [
            count_predictions(model, rows.take(slice(start, start + micro_batch)))
            for start in range(0, len(rows), micro_batch)
        ]
    finally:
        model.train(was_training)
    nats = np.concatenate([counted.nats for counted in found])
    tokens = np.concatenate([counted.tokens for counted in found])
    count, right = int(tokens.sum()), sum(counted.right for counted in found)
    f1 = None
    if isinstance(rows, Examples):
        said = [counted.likeliest for counted in found if counted.likeliest is not None]
        f1 = macro_f1(rows.labels, np.concatenate(said))
    return HeldOutResult(math.fsum(nats) / count, right / count, count, nats, tokens, f1)


def measure(
    base: Backbone,
    model: Any,
    held_out: Sequences,
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
    seen = Evaluation(
        subject, stage, found.loss, found.token_accuracy, found.tokens, macro_f1=found.macro_f1
    )
    if not math.isfinite(found.loss):
        return seen
    facts: dict[str, Any] = {}
    writes = not isinstance(held_out, Examples)  # a classifier has nothing to write
    if completions > 0 and not isinstance(held_out, Examples):
        lines = measure_completions(base, model, held_out, completions, seed)
        facts |= {
            "completions": lines.count,
            "exact_match": lines.exact_match,
            "edit_similarity": lines.edit_similarity,
        }
    if subject == "global":
        facts |= _examples(found)
        if problems is not None and writes:
            facts |= _solved(base, model, problems, seed)
    return replace(seen, **facts)


def _examples(found: HeldOutResult) -> dict[str, Any]:
    """Losses of single rows, from which the noise of their mean can be told."""
    which = _spaced(len(found.row_nats), MOST_EXAMPLES)
    millinats = np.rint(np.minimum(1000 * found.row_nats[which], 2**32 - 1))  # as the wire holds
    return {
        "example_millinats": tuple(millinats.astype(np.int64).tolist()),
        "example_tokens": tuple(found.row_tokens[which].tolist()),
    }


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


def spread(rows: Sequences, count: int) -> Sequences:
    """At most `count` rows, evenly spaced, so that one long file does not stand for all."""
    return rows if len(rows) <= count else rows.take(_spaced(len(rows), count))


def _spaced(size: int, count: int) -> NDArray[np.int64]:
    """At most `count` places in [0, size), from the first to the last."""
    return np.linspace(0, size - 1, min(size, count)).astype(np.int64)
