"""Both ends derive the same rows, evenly and for ever."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from profiles.errors import SketchfleetError
from protos.sketch import SketchError, keyed_stream, sketch_rows

Q_PROJ = "model.layers.0.self_attn.q_proj"
GOLDEN_STREAM = [5014200097836117734, 5934329514342815388]


@pytest.mark.parametrize(
    ("arguments", "rows"),
    [
        ((7, 3, Q_PROJ, 16, 5, 6), [1, 5, 7, 8, 11, 13]),
        ((7, 3, Q_PROJ, 16, 14, 6), [3, 4, 10, 12, 14, 15]),
        ((0, 0, "m", 64, 0, 8), [6, 9, 24, 28, 30, 38, 40, 62]),
        ((2**63, 1000, "m", 64, 0, 8), [3, 5, 6, 50, 51, 54, 59, 63]),
    ],
)
def test_rows_never_change_between_releases(arguments, rows):
    """A change here makes old agents and new coordinators train different rows: do not update."""
    assert sketch_rows(*arguments).tolist() == rows


def test_stream_never_changes_between_releases():
    assert keyed_stream("sketch", 7, 3, Q_PROJ).random_raw(2).tolist() == GOLDEN_STREAM


@given(
    rank=st.integers(1, 40),
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=8),
    seed=st.integers(0, 2**63),
    start=st.integers(0, 100),
)
@settings(max_examples=60, deadline=None)
def test_consecutive_blocks_cover_every_row_as_evenly_as_the_sizes_allow(rank, sizes, seed, start):
    counts, offset, total = np.zeros(rank, dtype=int), start, 0
    for k in (min(size, rank) for size in sizes):
        rows = sketch_rows(seed, 2, "m", rank, offset, k)
        assert rows.dtype == np.int64
        assert rows.shape == (k,)
        assert np.all(np.diff(rows) > 0), f"rows {rows} repeat or are not sorted"
        counts[rows] += 1
        offset, total = offset + k, total + k
    assert counts.min() == total // rank
    assert counts.max() == -(-total // rank)


def test_every_row_is_as_likely_as_any_other():
    rank, k, rounds = 8, 3, 3000
    hits = sum(
        np.bincount(sketch_rows(1, round_, "m", rank, 5, k), minlength=rank)
        for round_ in range(rounds)
    )
    sigma = (k / rank * (1 - k / rank) / rounds) ** 0.5
    assert np.abs(hits / rounds - k / rank).max() < 4.5 * sigma


def test_modules_rounds_and_seeds_draw_independently():
    base = sketch_rows(1, 1, "a", 64, 0, 16).tolist()
    others = [
        sketch_rows(*key, 64, 0, 16).tolist() for key in ((1, 1, "b"), (1, 2, "a"), (2, 1, "a"))
    ]
    assert base not in others


def test_offsets_wrap_and_a_full_sketch_is_every_row_in_order():
    assert np.array_equal(sketch_rows(1, 1, "m", 16, 3, 5), sketch_rows(1, 1, "m", 16, 19, 5))
    assert sketch_rows(1, 1, "m", 16, 9, 16).tolist() == list(range(16))


def test_a_caller_cannot_spoil_the_rows_of_the_next():
    first = sketch_rows(1, 1, "m", 16, 0, 4)
    expected = first.copy()
    first[:] = 0
    assert np.array_equal(sketch_rows(1, 1, "m", 16, 0, 4), expected)


@pytest.mark.parametrize("k", [0, -1, 17])
def test_a_size_outside_the_rank_is_refused_by_name(k):
    with pytest.raises(SketchError, match=r"1\.\.16") as refusal:
        sketch_rows(1, 1, "m", 16, 0, k)
    assert isinstance(refusal.value, ValueError)
    assert isinstance(refusal.value, SketchfleetError)
