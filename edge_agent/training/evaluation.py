"""Loss and token accuracy on held-out code.

Knows packed rows and the shared loss. It does not know which files the rows came from, nor
whether the adapter on the model is a slice or the whole.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from edge_agent.training.loss import count_next_tokens


class HeldOutResult(NamedTuple):
    """What a model predicts of text it was not trained on."""

    loss: float  # mean cross-entropy, nats per predicted token
    token_accuracy: float  # share of tokens that were the most likely one
    tokens: int  # predicted: one less than its length in each row


def evaluate(model: Any, rows: NDArray[np.int64], micro_batch: int) -> HeldOutResult:
    """Predicts every next token of `rows` (sequences, tokens) int64, `micro_batch` rows at a time.

    `model` is put in evaluation mode and left in the mode it was in. Raises `ValueError` on no
    rows.
    """
    if rows.size == 0 or rows.shape[1] < 2:
        raise ValueError("no held-out tokens to predict")
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    nats, right, tokens = 0.0, 0, 0
    try:
        for start in range(0, len(rows), micro_batch):
            batch = torch.from_numpy(rows[start : start + micro_batch]).to(device)
            n, r, t = count_next_tokens(model, batch)
            nats, right, tokens = nats + n, right + r, tokens + t
    finally:
        model.train(was_training)
    return HeldOutResult(nats / tokens, right / tokens, tokens)


def spread(rows: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """At most `count` rows, evenly spaced, so that one long file does not stand for all."""
    if len(rows) <= count:
        return rows
    return rows[np.linspace(0, len(rows) - 1, count).astype(np.int64)]
