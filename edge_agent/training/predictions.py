"""What a model predicts of sequences of either kind: next tokens of text, labels of examples.

Knows which loss goes with which sequences, and nothing of how either is computed.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from edge_agent.training.classification import count_labels, label_loss
from edge_agent.training.loss import Counted, count_next_tokens, next_token_loss
from edge_agent.training.rows import Examples, Sequences


def mean_loss(model: Any, rows: Sequences) -> Tensor:
    """Mean cross-entropy in nats over what is predicted, a scalar with gradients."""
    if isinstance(rows, Examples):
        return label_loss(model, rows)
    return next_token_loss(model, rows)


def count_predictions(model: Any, rows: Sequences) -> Counted:
    """What the model makes of each sequence; no gradients."""
    if isinstance(rows, Examples):
        return count_labels(model, rows)
    return count_next_tokens(model, rows)
