"""Labelled texts as a sequence classifier takes them, its loss, and what it says of each.

Knows a tokenizer's special tokens and transformers' sequence classifiers. It knows neither where
texts came from nor adapters.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from numpy.typing import NDArray
from torch import Tensor

from edge_agent.training.backbone import Backbone, BackboneError
from edge_agent.training.documents import CorpusError, Document
from edge_agent.training.loss import Counted
from edge_agent.training.rows import Examples

ENCODED_AT_ONCE = 256


def encode_examples(
    documents: Sequence[Document], labels: Sequence[str], base: Backbone, row_tokens: int
) -> Examples:
    """Examples of at most `row_tokens` tokens; the longer text of a pair is shortened at its end.

    As the base's tokenizer joins a pair where it has a way of its own ([CLS] a [SEP] b [SEP]); a
    decoder's has none, and reads a, separator, b. Raises `CorpusError` on a document without a
    label or with one that the run does not know, `BackboneError` when rows are longer than the
    model's positions.
    """
    most = base.most_positions
    if most is not None and row_tokens > most:
        raise BackboneError(
            f"rows of {row_tokens} tokens do not fit the {most} positions of this base; lower "
            "[training] sequence_tokens"
        )
    numbers = {label: i for i, label in enumerate(labels)}
    size = (len(documents), row_tokens)
    tokens = np.full(size, base.padding_id, dtype=np.int64)
    segments, real = np.zeros(size, dtype=np.int64), np.zeros(size, dtype=np.bool_)
    wanted = np.zeros(len(documents), dtype=np.int64)
    for batch in _alike(documents):
        texts = [tuple(text for text, _ in documents[i].parts) for i in batch]
        for i, (ids, kinds) in zip(batch, base.encode_joined(texts, row_tokens), strict=True):
            tokens[i, : len(ids)], segments[i, : len(ids)] = ids, kinds
            real[i, : len(ids)] = True
            wanted[i] = _number(documents[i], numbers)
    return Examples(tokens, segments, real, wanted)


def _alike(documents: Sequence[Document]) -> Iterator[list[int]]:
    """Places of documents of as many texts, some at a time."""
    for count in sorted({len(document.parts) for document in documents}):
        places = [i for i, document in enumerate(documents) if len(document.parts) == count]
        for start in range(0, len(places), ENCODED_AT_ONCE):
            yield places[start : start + ENCODED_AT_ONCE]


def _number(document: Document, numbers: dict[str, int]) -> int:
    if document.label is None:
        raise CorpusError(
            f"{document.origin} has no label, and this run classifies; name labelled files alone "
            "under [data]"
        )
    if document.label not in numbers:
        raise CorpusError(
            f"{document.origin} has label {document.label!r}, which is none of the run's: "
            f"{', '.join(numbers)}"
        )
    return numbers[document.label]


def label_loss(model: Any, examples: Examples) -> Tensor:
    """Mean cross-entropy of the labels in nats, a scalar with gradients."""
    logits, labels = _logits(model, examples)
    return F.cross_entropy(logits, labels)


@torch.no_grad()
def count_labels(model: Any, examples: Examples) -> Counted:
    """What the model says of each example, which counts as one token; no gradients."""
    logits, labels = _logits(model, examples)
    nats = F.cross_entropy(logits, labels, reduction="none").double().cpu().numpy()
    likeliest = logits.argmax(-1).cpu().numpy()
    right = int((likeliest == examples.labels).sum())
    return Counted(nats, right, np.ones(len(examples), dtype=np.int64), likeliest)


def macro_f1(labels: NDArray[np.int64], likeliest: NDArray[np.int64]) -> float:
    """F1 of each label that occurs, true or predicted, and their mean (scikit-learn's "macro")."""
    found = []
    for label in np.union1d(labels, likeliest):
        both = np.count_nonzero((labels == label) & (likeliest == label))
        either = np.count_nonzero(labels == label) + np.count_nonzero(likeliest == label)
        found.append(2 * both / either)
    return float(np.mean(found))


def _logits(model: Any, examples: Examples) -> tuple[Tensor, Tensor]:
    """((n, labels) float32, (n,) int64); columns that are padding in all examples are left out."""
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    wide = max(1, int(examples.real.sum(1).max(initial=1)))

    def put(values: NDArray[Any]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values[..., :wide])).to(plain.device)

    given = {"input_ids": put(examples.tokens), "attention_mask": put(examples.real).long()}
    if getattr(plain.config, "type_vocab_size", 0) > 1:
        given["token_type_ids"] = put(examples.segments)
    logits: Tensor = model(**given).logits
    return logits.float(), torch.from_numpy(examples.labels).to(plain.device)
