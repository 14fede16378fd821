"""Places of kept values: what goes in comes out, in few bits, and nothing else comes out."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protos import gaps


@given(data=st.data(), size=st.integers(1, 3000))
@settings(max_examples=200, deadline=None)
def test_places_come_back(data, size):
    kept = np.array(sorted(data.draw(st.sets(st.integers(0, size - 1)))), dtype=np.int64)
    coded = gaps.encode(kept, size)
    assert len(coded) <= 1 + gaps.bitmap_bytes(size)
    np.testing.assert_array_equal(gaps.decode(memoryview(coded), len(kept), size), kept)


@pytest.mark.parametrize("kept", [[], [0], [9], list(range(10))], ids=str)
def test_the_ends_of_a_block_come_back(kept):
    places = np.array(kept, dtype=np.int64)
    coded = gaps.encode(places, 10)
    np.testing.assert_array_equal(gaps.decode(memoryview(coded), len(kept), 10), places)


@pytest.mark.parametrize("density", [0.4, 0.25, 1 / 16, 0.01, 1e-3])
def test_a_fair_draw_takes_little_more_than_its_entropy(density):
    size = 200_000
    kept = np.flatnonzero(np.random.default_rng(0).random(size) < density)
    p = len(kept) / size
    entropy = -sum(q * math.log2(q) for q in (p, 1 - p)) * size / 8
    assert len(gaps.encode(kept, size)) <= 1.031 * entropy + 3


def test_dense_places_are_a_bitmap():
    kept = np.flatnonzero(np.random.default_rng(0).random(1000) < 0.5)
    assert gaps.encode(kept, 1000)[0] == gaps.BITMAP


@given(data=st.binary(min_size=0, max_size=40), count=st.integers(0, 60))
@settings(max_examples=400, deadline=None)
def test_any_bytes_are_refused_or_as_many_places_in_order(data, count):
    try:
        kept = gaps.decode(memoryview(data), count, 200)
    except gaps.GapError:
        return
    assert len(kept) == count
    assert all(0 <= place < 200 for place in kept)
    assert (np.diff(kept) > 0).all()


@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_an_index_that_is_cut_or_longer_is_refused(data):
    size = 500
    kept = np.array(sorted(data.draw(st.sets(st.integers(0, size - 1), min_size=1))), np.int64)
    coded = gaps.encode(kept, size)
    wrong = coded[:-1] if data.draw(st.booleans()) else coded + b"\0"
    with pytest.raises(gaps.GapError):
        gaps.decode(memoryview(wrong), len(kept), size)
