"""The algebra agrees with dense matrices, on shapes that catch transposes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator import lowrank
from coordinator.lowrank import (
    Bundle,
    LowRankError,
    add_rows,
    error_energy,
    gram,
    gram_blocks,
    inner,
    norm,
    random_signs,
    stack,
)


def make_bundle(rank, m, n, seed=0, scale=1.5):
    rng = np.random.default_rng(seed)
    up, down = rng.normal(size=(rank, m)), rng.normal(size=(rank, n))
    return Bundle(up.astype(np.float32), down.astype(np.float32), scale)


SHAPES = st.tuples(st.integers(1, 9), st.integers(1, 7), st.integers(1, 7))  # R up to beyond m, n
GOLDEN_SIGNS = [-1, -1, 1, -1, 1, 1, 1, -1]


def test_take_is_the_product_over_those_rows():
    bundle, rows = make_bundle(5, 4, 7), np.array([0, 3])
    expected = bundle.scale * bundle.up[rows].T.astype(np.float64) @ bundle.down[rows]
    np.testing.assert_allclose(bundle.take(rows).dense(), expected, atol=1e-12)


def test_take_is_a_copy():
    bundle = make_bundle(5, 4, 7)
    bundle.take(np.arange(5)).up[:] = 0
    assert bundle.up.any()


def test_scatter_add_moves_those_rows_only_and_leaves_the_original():
    bundle, rows = make_bundle(5, 4, 7), np.array([1, 4])
    before = bundle.up.copy()
    moved = bundle.scatter_add(rows, np.ones((2, 4)), np.full((2, 7), 2.0))
    np.testing.assert_array_equal(bundle.up, before)
    np.testing.assert_array_equal(moved.up[[0, 2, 3]], before[[0, 2, 3]])
    np.testing.assert_allclose(moved.up[rows], before[rows] + 1, rtol=1e-6)
    np.testing.assert_allclose(moved.down[rows], bundle.down[rows] + 2, rtol=1e-6)
    assert moved.scale == bundle.scale


def test_scatter_add_refuses_rows_that_repeat():
    with pytest.raises(LowRankError, match="repeat"):
        make_bundle(5, 4, 7).scatter_add(np.array([1, 1]), np.ones((2, 4)), np.ones((2, 7)))


def test_factors_of_different_rank_are_refused():
    with pytest.raises(LowRankError, match="same number"):
        Bundle(np.zeros((2, 4), np.float32), np.zeros((3, 4), np.float32), 1.0)


@given(ranks=st.lists(st.integers(1, 5), min_size=1, max_size=4), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_stack_is_the_weighted_sum_of_products(ranks, seed):
    rng = np.random.default_rng(seed)
    weights = rng.uniform(-1, 1, len(ranks)).tolist()
    bundles = [make_bundle(r, 5, 8, seed + r, scale=16 / r) for r in ranks]
    stacked = stack(bundles, weights)
    expected = sum(w * b.dense() for w, b in zip(weights, bundles, strict=True))
    assert stacked.rank == sum(ranks)
    assert stacked.scale == 1.0
    np.testing.assert_allclose(stacked.dense(), expected, atol=1e-4)


def test_stack_rounds_each_factor_once_after_weight_and_scale():
    bundles = [make_bundle(r, 5, 2000, r, scale=16 / r) for r in (3, 40)]
    stacked = stack(bundles, [0.3, 0.7])
    expected = [w * b.scale * b.up.astype(float) for w, b in zip([0.3, 0.7], bundles, strict=True)]
    np.testing.assert_array_equal(stacked.up, np.concatenate(expected).astype(np.float32))
    np.testing.assert_array_equal(stacked.down, np.concatenate([b.down for b in bundles]))


def test_a_stack_of_nothing_is_refused():
    with pytest.raises(LowRankError, match="no bundle"):
        stack([], [])


@pytest.mark.parametrize("scale", [0.25, 3.0])
def test_another_scale_leaves_the_product_and_down_as_they_are(scale):
    bundle = make_bundle(4, 6, 9)
    moved = bundle.at_scale(scale)
    assert moved.scale == scale
    assert moved.down is bundle.down
    np.testing.assert_allclose(moved.dense(), bundle.dense(), rtol=1e-6, atol=1e-6)
    assert bundle.at_scale(bundle.scale) is bundle


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_a_scale_that_no_product_has_is_refused(scale):
    with pytest.raises(LowRankError, match="positive"):
        make_bundle(2, 3, 4).at_scale(scale)


@pytest.mark.parametrize("precision", [np.float32, np.float64])
@given(
    width=st.sampled_from([1, 7, 300, 1024, 5000, 40000]),
    rows=st.sets(st.integers(0, 39), max_size=40).map(sorted),
    seed=st.integers(0, 9),
)
@settings(max_examples=60, deadline=None)
def test_add_rows_has_the_same_bits_however_rows_lie(precision, width, rows, seed):
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(len(rows), width)).astype(np.float32)
    total = rng.normal(size=(40, width)).astype(precision)
    expected = total.copy()
    expected[rows] += precision(0.137) * values.astype(precision)
    packed = total[rows]
    add_rows(np.array(rows, dtype=np.int64), (total, 0.137, values))
    np.testing.assert_array_equal(total, expected)
    assert total.dtype == precision
    add_rows(np.arange(len(rows)), (packed, 0.137, values))
    np.testing.assert_array_equal(packed, expected[rows])


def test_add_rows_leaves_its_values_alone():
    values = np.ones((3, 5), np.float32)
    add_rows(np.array([0, 1, 3]), (np.zeros((4, 5)), 2.0, values))
    assert np.all(values == 1)


@given(a=SHAPES, rank=st.integers(1, 9))
@settings(max_examples=40, deadline=None)
def test_inner_products_and_norms_equal_the_dense_ones(a, rank):
    one, other = make_bundle(*a, seed=1), make_bundle(rank, a[1], a[2], seed=2, scale=-0.5)
    np.testing.assert_allclose(inner(one, other), np.sum(one.dense() * other.dense()), atol=1e-8)
    np.testing.assert_allclose(norm(one), np.linalg.norm(one.dense()), rtol=1e-9)
    up, down = gram(one, other)
    assert up.shape == down.shape == (a[0], rank)


def test_norm_by_blocks_of_columns_equals_the_dense_one():
    wide = make_bundle(300, 20, 600)
    np.testing.assert_allclose(norm(wide), np.linalg.norm(wide.dense()), rtol=1e-9)


@given(ranks=st.lists(st.integers(1, 6), min_size=1, max_size=3))
@settings(max_examples=20, deadline=None)
def test_gram_blocks_of_several_are_those_of_their_stack(ranks):
    bundles = [make_bundle(r, 5, 8, seed=i, scale=1.0) for i, r in enumerate(ranks)]
    stacked = stack(bundles, [1.0] * len(ranks))
    for several, one, both in zip(
        gram_blocks(*bundles), gram_blocks(stacked), gram(stacked, stacked), strict=True
    ):
        np.testing.assert_array_equal(several, one)
        np.testing.assert_array_equal(several, several.T)
        np.testing.assert_allclose(several, both, atol=1e-12)


def test_gram_blocks_add_up_over_blocks_of_columns():
    wide = make_bundle(3, 2, 2 * lowrank.GRAM_COLUMNS + 5)
    _, down = gram_blocks(wide)
    np.testing.assert_allclose(down, gram(wide, wide)[1], rtol=1e-12)


def test_apply_is_the_product_with_each_row():
    bundle = make_bundle(4, 6, 9)
    vectors = make_bundle(3, 1, 9).down
    np.testing.assert_allclose(bundle.apply(vectors), vectors @ bundle.dense().T, rtol=1e-4)


@given(a=SHAPES, rank=st.integers(1, 12))
@settings(max_examples=60, deadline=None)
def test_error_energy_equals_the_dense_one(a, rank):
    ideal, result = make_bundle(*a, seed=1), make_bundle(rank, a[1], a[2], seed=2, scale=-0.5)
    found = error_energy(ideal, result)
    assert found.exact
    np.testing.assert_allclose(found.off, np.square(ideal.dense() - result.dense()).sum())
    np.testing.assert_allclose(found.target, np.square(ideal.dense()).sum())


@pytest.mark.parametrize("shape", [(300, 20, 600), (300, 600, 20), (40, 300, 500)])
def test_error_energy_is_zero_for_the_same_product_in_other_factors(shape):
    ideal = stack([make_bundle(*shape, seed=s, scale=0.01) for s in (1, 2)], [0.3, 0.7])
    scales = np.exp2(np.random.default_rng(3).integers(-3, 4, ideal.rank))[:, None]
    other = Bundle(
        (ideal.up * scales / 8).astype(np.float32), (ideal.down / scales).astype(np.float32), 8.0
    )
    found = error_energy(ideal, other)
    assert found.off >= 0
    assert (found.off / found.target) ** 0.5 < 1e-6


def test_error_energy_of_a_zero_ideal_is_the_result():
    zero = Bundle(np.zeros((2, 5), np.float32), np.ones((2, 7), np.float32), 2.0)
    result = make_bundle(3, 5, 7)
    found = error_energy(zero, result)
    assert found.target == 0
    np.testing.assert_allclose(found.off, norm(result) ** 2)


def test_random_signs_depend_on_shape_and_key_alone():
    signs = random_signs((40, 333), "a test", 1)
    assert signs.shape == (40, 333)
    assert signs.dtype == np.float32
    assert set(np.unique(signs)) == {-1.0, 1.0}
    assert abs(signs.mean()) < 0.05
    np.testing.assert_array_equal(signs, random_signs((40, 333), "a test", 1))
    assert not np.array_equal(signs, random_signs((40, 333), "a test", 2))
    np.testing.assert_array_equal(random_signs((1, 8), "a test", 1)[0], GOLDEN_SIGNS)
