"""Next-token cross-entropy in chunks, so that the logits of a whole batch never exist.

With a vocabulary of 150 000 the stock loss holds three float32 tensors of (tokens, vocabulary):
1.7 GiB per 1024 tokens. Here 256 tokens at a time pass the output head, tokens that do not count
never do, and what the head sends back is computed with the chunk. Equals the stock loss; knows no
adapters and no data.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from edge_agent.training.batches import to_batch
from edge_agent.training.rows import Rows

CHUNK_TOKENS = 256


class Counted(NamedTuple):
    """What a model predicts of b rows, over the tokens of each that count."""

    nats: NDArray[np.float64]  # (b,) summed cross-entropy
    right: int  # tokens of all rows that were the most likely one
    tokens: NDArray[np.int64]  # (b,) predicted
    likeliest: NDArray[np.int64] | None = None  # (b,) labels, where those are what is predicted


def next_token_loss(model: Any, rows: Rows) -> Tensor:
    """Mean cross-entropy in nats over the tokens that count, a scalar with gradients.

    `model`: a causal model or a `PeftModel` around one. Zero where nothing counts.
    """
    head, hidden, targets = _to_predict(model, rows)
    if _is_plain(head):
        total: Tensor = _FrozenHeadLoss.apply(hidden, targets, head)  # type: ignore[no-untyped-call]
    else:
        losses = [
            checkpoint(_chunk_loss, head, chunk, wanted, use_reentrant=False)
            for chunk, wanted in _chunks(hidden, targets)
        ]
        total = torch.stack(losses).sum() if losses else hidden.sum()
    return total / max(1, len(targets))


@torch.no_grad()
def count_next_tokens(model: Any, rows: Rows) -> Counted:
    """What the model makes of each row; no gradients. `model` as for `next_token_loss`."""
    head, hidden, targets = _to_predict(model, rows)
    nats, right = [], 0
    for chunk, wanted in _chunks(hidden, targets):
        logits = head(chunk)
        best, likeliest = logits.max(-1)
        there = logits.gather(1, wanted[:, None])[:, 0]
        rest = logits.sub_(best[:, None]).exp_().sum(-1).log()
        nats.append((rest + best - there).cpu())
        right += int((likeliest == wanted).sum())
    which = np.nonzero(rows.counted[:, 1:])[0]  # the row of each target
    each = torch.cat(nats).numpy() if nats else None
    return Counted(
        np.bincount(which, weights=each, minlength=len(rows)).astype(np.float64),
        right,
        np.bincount(which, minlength=len(rows)),
    )


class _Head:
    """An output head with what its model does to the logits; gives float32."""

    def __init__(self, causal: Any) -> None:
        self.layer = causal.get_output_embeddings()
        config = causal.config
        self.cap: float | None = getattr(config, "final_logit_softcapping", None)  # Gemma 2
        self.divisor = float(getattr(config, "logits_scaling", None) or 1.0)  # Granite
        if config.model_type == "hyperclovax":  # multiplies by the same name
            self.divisor = 1 / self.divisor
        self.divisor /= float(getattr(config, "logit_scale", None) or 1.0)  # Cohere

    def __call__(self, hidden: Tensor) -> Tensor:
        """(n, vocabulary) float32 of hidden (n, h)."""
        logits: Tensor = self.layer(hidden)
        if self.divisor != 1:
            logits = logits / self.divisor
        if self.cap is not None:
            logits = self.cap * torch.tanh(logits / self.cap)
        return logits.float()


class _FrozenHeadLoss(torch.autograd.Function):
    """Summed cross-entropy behind a head that is not trained.

    The gradient at the hidden states needs the logits once more; while a chunk of them is there,
    it costs one product, as in "Cut Your Losses", arXiv 2411.09009, and Liger, arXiv 2410.10989.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, targets: Tensor, head: _Head) -> Tensor:
        """A float32 scalar; hidden (n, h), targets (n,)."""
        weight, bias = head.layer.weight, head.layer.bias
        back = torch.empty_like(hidden)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        memory: Tensor | None = None
        if weight.dtype == torch.float32 and len(hidden):
            memory = hidden.new_empty(min(CHUNK_TOKENS, len(hidden)), len(weight))
        for start in range(0, len(hidden), CHUNK_TOKENS):
            part = slice(start, start + CHUNK_TOKENS)
            chunk, wanted, sent = hidden[part], targets[part, None], back[part]
            if memory is None:
                logits = F.linear(chunk, weight, bias).float()
            else:
                logits = torch.mm(chunk, weight.T, out=memory[: len(chunk)])
                if bias is not None:
                    logits.add_(bias)
            if head.divisor != 1:
                logits.div_(head.divisor)
            best = logits.amax(-1, keepdim=True)
            there = logits.gather(1, wanted)
            # In place on the processor, where each row is read before it is written.
            shares = torch.softmax(logits, -1, out=logits if logits.is_cpu else None)
            total += (best - shares.amax(-1, keepdim=True).log() - there).sum()
            shares.scatter_(1, wanted, shares.gather(1, wanted) - 1)
            torch.mm(shares.to(weight.dtype), weight, out=sent)
            if head.divisor != 1:
                sent.div_(head.divisor)
        ctx.back = back
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        """The kept gradient, scaled."""
        back: Tensor = ctx.back
        return back * grads[0], None, None


def _is_plain(head: _Head) -> bool:
    """Whether the head is one frozen product: not trained, adapted, quantised, hooked or capped."""
    layer = head.layer
    hooked = bool(layer._forward_hooks or layer._forward_pre_hooks)
    frozen = type(layer) is nn.Linear and not any(p.requires_grad for p in layer.parameters())
    return frozen and not hooked and head.cap is None


def _to_predict(model: Any, rows: Rows) -> tuple[_Head, Tensor, Tensor]:
    """Output head, hidden states (n, h) and their targets (n,): only where tokens count."""
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    batch = to_batch(rows, causal.device)
    flash = "flash" in str(causal.config._attn_implementation)
    return _Head(causal), batch.hidden_states(causal.get_decoder(), flash), batch.targets


def _chunks(hidden: Tensor, targets: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    if len(targets):
        yield from zip(hidden.split(CHUNK_TOKENS), targets.split(CHUNK_TOKENS), strict=True)


def _chunk_loss(head: _Head, hidden: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(head(hidden), targets, reduction="sum")
