"""Documents as one stream of tokens cut into sequences, as in pretraining.

Attention crosses from one document into the next and everything counts. What devices train on
keeps documents apart: `edge_agent.training.row_packing`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from edge_agent.training.documents import Document


def pack(
    documents: Iterable[Sequence[int]], separator_id: int, sequence_tokens: int
) -> NDArray[np.int64]:
    """Joins documents with a separator and cuts the stream: (sequences, sequence_tokens) int64.

    The tail shorter than a sequence is dropped.
    """
    stream: list[int] = []
    for document in documents:
        stream.append(separator_id)
        stream.extend(document)
    whole = len(stream) // sequence_tokens
    flat = np.asarray(stream[: whole * sequence_tokens], dtype=np.int64)
    return flat.reshape(whole, sequence_tokens)


def tokenise(
    files: Sequence[Document],
    encode: Callable[[list[str]], list[list[int]]],
    separator_id: int,
    sequence_tokens: int,
    max_sequences: int | None = None,
) -> NDArray[np.int64]:
    """Packed sequences of these files: (sequences, sequence_tokens) int64.

    `encode` turns texts into token ids. Stops reading once `max_sequences` are full.
    """
    documents: list[list[int]] = []
    wanted = None if max_sequences is None else max_sequences * sequence_tokens
    total = 0
    for start in range(0, len(files), 64):
        for ids in encode([f.text for f in files[start : start + 64]]):
            documents.append(ids)
            total += len(ids) + 1
        if wanted is not None and total >= wanted:
            break
    return pack(documents, separator_id, sequence_tokens)[:max_sequences]
