"""Next-token cross-entropy in chunks, so that the logits of a whole batch never exist.

With a vocabulary of 150 000 the stock loss holds three float32 tensors of (tokens, vocabulary):
1.7 GiB per 1024 tokens. Here 256 tokens at a time pass the output head, and in training their
logits are computed again on the way back. Equals the stock loss; knows no adapters and no data.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK_TOKENS = 256


def next_token_loss(model: Any, rows: Tensor) -> Tensor:
    """Mean cross-entropy in nats per predicted token, a scalar with gradients.

    `model`: a causal model or a `PeftModel` around one; `rows`: (b, t) int64, t > 1, on its
    device.
    """
    losses = [
        checkpoint(_chunk_loss, head, hidden, targets, cap, use_reentrant=False)
        for head, hidden, targets, cap in _chunks(model, rows)
    ]
    total: Tensor = torch.stack(losses).sum()
    return total / (rows.numel() - len(rows))


@torch.no_grad()
def count_next_tokens(model: Any, rows: Tensor) -> tuple[float, int, int]:
    """Summed cross-entropy in nats, tokens predicted right, and tokens predicted. No gradients."""
    nats, right = 0.0, 0
    for head, hidden, targets, cap in _chunks(model, rows):
        logits = _logits(head, hidden, cap)
        nats += float(F.cross_entropy(logits, targets, reduction="sum"))
        right += int((logits.argmax(-1) == targets).sum())
    return nats, right, rows.numel() - len(rows)


def _chunks(model: Any, rows: Tensor) -> Iterator[tuple[Any, Tensor, Tensor, float | None]]:
    """Output head, hidden (chunk, h), targets (chunk,) and the logits' cap (Gemma 2), in turn."""
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    states = causal.get_decoder()(input_ids=rows, use_cache=False).last_hidden_state
    hidden = torch.split(states[:, :-1].reshape(-1, states.shape[-1]), CHUNK_TOKENS)
    targets = torch.split(rows[:, 1:].reshape(-1), CHUNK_TOKENS)
    head = causal.get_output_embeddings()
    cap = getattr(causal.config, "final_logit_softcapping", None)
    for chunk, wanted in zip(hidden, targets, strict=True):
        yield head, chunk, wanted, cap


def _chunk_loss(head: Any, hidden: Tensor, targets: Tensor, cap: float | None) -> Tensor:
    return F.cross_entropy(_logits(head, hidden, cap), targets, reduction="sum")


def _logits(head: Any, hidden: Tensor, cap: float | None) -> Tensor:
    logits: Tensor = head(hidden)
    if cap is not None:
        logits = cap * torch.tanh(logits / cap)
    return logits.float()
