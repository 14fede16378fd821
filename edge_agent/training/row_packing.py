"""Documents -> rows: tokens of a fixed length, with the documents in a row kept apart.

Knows how texts become tokens that count or do not, and how pieces share rows. It knows neither
where documents came from nor what is done with rows.

A document is: separator, its tokens, separator; the first is context, the last counts, so that a
model learns where to stop. One that is longer than a row is cut into rows; a prompt with its
completion is not, but shortened: the prompt loses its beginning, to no less than half a row, then
the completion its end. What is shorter shares rows by best fit, the longest first ("Fewer
Truncations Improve Language Modeling", arXiv 2404.10830), so nothing is dropped; what stays empty
at the end of a row is a document of its own that does not count. The same documents in the same
order give the same rows.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from edge_agent.training.documents import Document
from edge_agent.training.fill_in_middle import Encode, FillInMiddle
from edge_agent.training.rows import Rows

ENCODED_AT_ONCE = 64
Piece = tuple[NDArray[np.int64], NDArray[np.bool_]]  # tokens, and whether each counts


def pack_documents(
    documents: Sequence[Document],
    encode: Encode,
    separator_id: int,
    row_tokens: int,
    middle: FillInMiddle | None = None,
) -> Rows:
    """Rows of these documents: (n, row_tokens). `encode` turns texts into token ids.

    middle: rearranges its share of the documents that count from end to end.
    """
    pieces: list[Piece] = []
    for start in range(0, len(documents), ENCODED_AT_ONCE):
        batch = documents[start : start + ENCODED_AT_ONCE]
        encoded = iter(encode([text for document in batch for text, _ in document.parts]))
        for document in batch:
            ids = [next(encoded) for _ in document.parts]
            rearranged = None
            if middle is not None and all(counts for _, counts in document.parts):
                rearranged = middle.pieces(
                    document.text, document.digest, encode, separator_id, row_tokens
                )
            pieces += rearranged or _pieces(document, ids, separator_id, row_tokens)
    return best_fit(pieces, separator_id, row_tokens)


def _pieces(
    document: Document, ids: list[list[int]], separator_id: int, row_tokens: int
) -> Iterator[Piece]:
    """What fits a row each; pieces in which nothing counts are left out."""
    if document.together:
        ids = _shortened(ids, row_tokens - 2)
    counts = [counts for _, counts in document.parts]
    flags = [np.full(len(part), flag) for part, flag in zip(ids, counts, strict=True)]
    tokens = np.array([separator_id, *(i for part in ids for i in part), separator_id])
    counted = np.concatenate([[False], *flags, [counts[-1]]]).astype(np.bool_)
    for start in range(0, len(tokens), row_tokens):
        piece = counted[start : start + row_tokens].copy()
        piece[0] = False  # nothing before it predicts it
        if piece.any():
            yield tokens[start : start + row_tokens].astype(np.int64), piece


def _shortened(ids: list[list[int]], most: int) -> list[list[int]]:
    """A prompt and a completion of at most `most` tokens together."""
    prompt, completion = ids
    kept = max(most - len(completion), most // 2)
    prompt = prompt[max(len(prompt) - kept, 0) :]
    return [prompt, completion[: most - len(prompt)]]


def best_fit(pieces: Sequence[Piece], padding_id: int, row_tokens: int) -> Rows:
    """Pieces of at most `row_tokens` tokens in as few rows as best fit finds: (n, row_tokens).

    Rows come in the order of the first piece in each, pieces in their own order.
    """
    members: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, row), sorted
    for i in sorted(range(len(pieces)), key=lambda i: (-len(pieces[i][0]), i)):
        size = len(pieces[i][0])
        place = bisect.bisect_left(room, (size, -1))
        left, row = room.pop(place) if place < len(room) else (row_tokens, len(members))
        if row == len(members):
            members.append([])
        members[row].append(i)
        if left > size:
            bisect.insort(room, (left - size, row))
    members = sorted(sorted(row) for row in members)
    tokens = np.full((len(members), row_tokens), padding_id, dtype=np.int64)
    document = np.zeros((len(members), row_tokens), dtype=np.int32)
    counted = np.zeros((len(members), row_tokens), dtype=np.bool_)
    for row, inside in enumerate(members):
        end = 0
        for number, i in enumerate(inside):
            ids, flags = pieces[i]
            start, end = end, end + len(ids)
            tokens[row, start:end], counted[row, start:end] = ids, flags
            document[row, start:end] = number
        document[row, end:] = len(inside)
    return Rows(tokens, document, counted)
