"""What an exported base and an adapter predict of held-out text.

The same measures as `training.evaluation` takes with torch, over the same rows. Knows rows and
logits; which files the rows came from, nobody here knows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from edge_agent.inference_folder import ExportInfo, InferenceError
from edge_agent.inference_session import Adapter, Logits, Session, Tokens
from edge_agent.training.rows import Rows

PART_TOKENS = 128  # whose logits are in memory at once


class HeldOut(NamedTuple):
    """As `training.evaluation.HeldOutResult` has it, less the single rows."""

    loss: float  # mean cross-entropy, nats per predicted token
    token_accuracy: float  # share of tokens that were the most likely one
    tokens: int  # predicted: those that count


def evaluate(session: Session, info: ExportInfo, rows: Rows, adapter: Adapter | None) -> HeldOut:
    """Predicts every token of `rows` that counts, one document at a time.

    Raises `InferenceError` when nothing counts or a document is longer than the context.
    """
    nats: list[float] = []
    right = 0
    for tokens, counted in _documents(rows):
        if len(tokens) > info.context_tokens:
            raise InferenceError(
                f"held-out text of {len(tokens)} tokens does not fit a context of "
                f"{info.context_tokens}; use shorter sequences"
            )
        cache = session.empty
        for start in range(0, len(tokens) - 1, PART_TOKENS):
            part = tokens[start : min(start + PART_TOKENS, len(tokens) - 1)]
            at = np.flatnonzero(counted[start + 1 : start + 1 + len(part)])
            # Logits of one token are asked for where none counts: no graph gives none.
            asked = at if len(at) else np.zeros(1, np.int64)
            logits, cache = session.run(part[None], cache, asked, adapter)
            if len(at):
                found, hits = _measured(logits[0], tokens[start + 1 + at])
                nats.append(found)
                right += hits
    count = rows.predictions
    if not count:
        raise InferenceError("there is no held-out text to predict; add code under [data]")
    return HeldOut(math.fsum(nats) / count, right / count, count)


def _documents(rows: Rows) -> Iterator[tuple[Tokens, NDArray[np.bool_]]]:
    """(tokens, which of them count) of every document in which some do."""
    for row in range(len(rows)):
        ends = np.flatnonzero(np.diff(rows.document[row])) + 1
        for tokens, counted in zip(
            np.split(rows.tokens[row], ends), np.split(rows.counted[row], ends), strict=True
        ):
            if counted[1:].any():
                last = int(np.flatnonzero(counted)[-1]) + 1  # what follows tells nothing
                yield tokens[:last], counted[:last]


def _measured(logits: Logits, wanted: Tokens) -> tuple[float, int]:
    """Summed cross-entropy of logits (n, vocabulary) at tokens (n,); how many were likeliest."""
    likeliest = logits.argmax(1)
    each = np.arange(len(wanted))
    there = logits[each, wanted].astype(np.float64)
    best = logits[each, likeliest].astype(np.float64)
    rest = np.log(np.exp(logits - best[:, None]).sum(1))
    return float((rest + best - there).sum()), int((likeliest == wanted).sum())
