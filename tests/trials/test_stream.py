"""One stream of tokens, as in pretraining."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from edge_agent.training.corpus import scan
from trials.stream import pack, tokenise


def encode(texts: list[str]) -> list[list[int]]:
    return [list(t.encode()) for t in texts]


def test_rows_are_the_stream_cut_and_the_tail_dropped() -> None:
    rows = pack([[1, 2, 3], [4, 5]], separator_id=0, sequence_tokens=3)
    np.testing.assert_array_equal(rows, [[0, 1, 2], [3, 0, 4]])
    assert pack([], 0, 4).shape == (0, 4)


def test_tokenise_stops_at_the_sequences_asked_for(tmp_path: Path) -> None:
    for i in range(9):
        (tmp_path / f"{i}.py").write_text(f"x = {i}\n" * 9)
    files = scan([str(tmp_path)]).files
    rows = tokenise(files, encode, 0, 16, max_sequences=3)
    assert rows.shape == (3, 16)
    np.testing.assert_array_equal(rows, tokenise(files, encode, 0, 16)[:3])
