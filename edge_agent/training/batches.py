"""Rows as a model takes them: on its device, documents apart, and which predictions count.

Knows what transformers makes of `position_ids`: where they start anew it masks attention between
the stretches, for full and sliding windows alike. It knows no losses and no adapters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edge_agent.training.rows import Rows


@dataclass(frozen=True, eq=False)
class Batch:
    """b rows of t tokens on a device, and the n tokens among them that count."""

    tokens: Tensor  # (b, t) int64
    positions: Tensor | None  # (b, t) int64, from 0 in each document; None: plain causal will do
    predicting: Tensor  # (n,) int64, where in the b * t hidden states the next token counts
    targets: Tensor  # (n,) int64, those next tokens

    def hidden_states(self, decoder: Any, flash: bool = False) -> Tensor:
        """What the decoder makes of the tokens: (n, h), only where the next token counts.

        `flash`: flash attention keeps documents apart only in a single row, so the rows are then
        laid end to end; elsewhere that would cost b times the attention.
        """
        if self.positions is None:
            states = decoder(input_ids=self.tokens, use_cache=False).last_hidden_state
        else:
            shape = (1, -1) if flash else self.tokens.shape
            states = decoder(
                input_ids=self.tokens.reshape(shape),
                position_ids=self.positions.reshape(shape),
                use_cache=False,
            ).last_hidden_state
        found: Tensor = states.reshape(-1, states.shape[-1]).index_select(0, self.predicting)
        return found


def to_batch(rows: Rows, device: torch.device) -> Batch:
    """These rows on `device`.

    Plain causal attention where only first documents count: what stands behind one, another or
    padding, it does not see anyway.
    """
    counted = rows.counted[:, 1:]
    which, where = np.nonzero(counted)
    positions = None
    if (rows.document[rows.counted] != 0).any():
        positions = torch.from_numpy(positions_of(rows.document)).to(device)
    return Batch(
        tokens=torch.from_numpy(np.ascontiguousarray(rows.tokens)).to(device),
        positions=positions,
        predicting=torch.from_numpy(which * rows.length + where).to(device),
        targets=torch.from_numpy(rows.tokens[:, 1:][counted]).to(device),
    )


def positions_of(document: NDArray[np.int32]) -> NDArray[np.int64]:
    """How far into its document each token stands; document (n, t), never falling along a row."""
    places = np.broadcast_to(np.arange(document.shape[1]), document.shape)
    begins = np.zeros(document.shape, dtype=np.int64)
    begins[:, 1:] = np.where(document[:, 1:] != document[:, :-1], places[:, 1:], 0)
    return places - np.maximum.accumulate(begins, axis=1)


def whole_rows(tokens: NDArray[np.int64]) -> Rows:
    """Rows of one document each in which every token but the first counts; tokens (n, t)."""
    counted = np.ones(tokens.shape, dtype=np.bool_)
    counted[:, :1] = False
    return Rows(tokens, np.zeros(tokens.shape, dtype=np.int32), counted)
