"""Token sequences of fixed length: pieces of documents, or labelled texts, to train and measure on.

Knows arrays only: neither where documents came from (`corpus`) nor what is done with them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Rows:
    """n sequences of t tokens.

    tokens: (n, t) int64. document: (n, t) int32, which document of its row a token belongs to,
    counted from 0 and never falling along a row; positions start anew and attention stops where it
    rises. counted: (n, t) bool, whether predicting this token counts in the loss (not of prompts
    nor padding; never the first token of a document, which nothing before it predicts).
    """

    tokens: NDArray[np.int64]
    document: NDArray[np.int32]
    counted: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def length(self) -> int:
        """Tokens of a sequence, t."""
        return int(self.tokens.shape[1])

    @property
    def predictions(self) -> int:
        """Tokens that count."""
        return int(self.counted[:, 1:].sum())

    def take(self, which: NDArray[np.int64] | slice) -> Rows:
        """These sequences, in this order."""
        return Rows(self.tokens[which], self.document[which], self.counted[which])


@dataclass(frozen=True, eq=False)
class Examples:
    """n labelled texts or pairs of at most t tokens, padded at the end.

    tokens, segments: (n, t) int64; a segment is 1 in the second text of a pair, where the model
    tells them apart. real: (n, t) bool, False in padding. labels: (n,) int64.
    """

    tokens: NDArray[np.int64]
    segments: NDArray[np.int64]
    real: NDArray[np.bool_]
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def length(self) -> int:
        """Tokens of the longest example that is allowed, t."""
        return int(self.tokens.shape[1])

    @property
    def predictions(self) -> int:
        """Labels to be predicted."""
        return len(self)

    def take(self, which: NDArray[np.int64] | slice) -> Examples:
        """These examples, in this order."""
        return Examples(
            self.tokens[which], self.segments[which], self.real[which], self.labels[which]
        )


Sequences = Rows | Examples
