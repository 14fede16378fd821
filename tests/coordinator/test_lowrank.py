"""The algebra agrees with dense matrices, on shapes that catch transposes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.lowrank import Bundle, LowRankError, gram, initial_adapter, inner, norm, stack
from profiles.model import ModuleShape
from protos.contract import AdapterSpec


def make_bundle(rank, m, n, seed=0, scale=1.5):
    rng = np.random.default_rng(seed)
    up, down = rng.normal(size=(rank, m)), rng.normal(size=(rank, n))
    return Bundle(up.astype(np.float32), down.astype(np.float32), scale)


def make_spec(rank=4, seed=5):
    modules = (ModuleShape("a", 6, 10), ModuleShape("b", 10, 6))
    return AdapterSpec("run", "org/base", "main", "ab", rank, 16.0, False, seed, modules)


SHAPES = st.tuples(st.integers(1, 9), st.integers(1, 7), st.integers(1, 7))  # R up to beyond m, n
GOLDEN_DOWN = [-0.22231128811836243, 0.08280400186777115, 0.014446545392274857]


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


@given(shape=SHAPES, rank=st.integers(1, 12), scale=st.sampled_from([0.25, 1.0, 4.0]))
@settings(max_examples=80, deadline=None)
def test_truncate_equals_the_dense_truncated_svd(shape, rank, scale):
    bundle = make_bundle(*shape, seed=rank)
    cut = bundle.truncate(rank, scale=scale)
    left, values, right = np.linalg.svd(bundle.dense(), full_matrices=False)
    best = (left[:, :rank] * values[:rank]) @ right[:rank]
    assert (cut.up.shape, cut.down.shape) == ((rank, shape[1]), (rank, shape[2]))
    assert cut.scale == scale
    np.testing.assert_allclose(cut.dense(), best, atol=1e-5 * (1 + values[0]))


def test_truncate_pads_with_zeros_beyond_what_there_is():
    cut = make_bundle(2, 5, 8).truncate(4)
    assert not cut.up[2:].any()
    assert not cut.down[2:].any()


def test_truncate_of_zero_and_of_repeated_components_is_exact():
    zero = Bundle(np.zeros((3, 5), np.float32), make_bundle(3, 5, 8).down, 1.0)
    assert not zero.truncate(2).dense().any()
    once = make_bundle(2, 5, 8)
    twice = stack([once, once], [0.5, 0.5])
    np.testing.assert_allclose(twice.truncate(2).dense(), once.dense(), atol=1e-5)


def test_truncate_balances_both_sides_and_fixes_signs():
    bundle = make_bundle(4, 6, 9)
    cut = bundle.truncate(4)
    lengths = np.linalg.norm(cut.up, axis=1)
    np.testing.assert_allclose(lengths, np.linalg.norm(cut.down, axis=1), rtol=1e-5)
    assert np.all(np.diff(lengths) <= 1e-6), "components come largest first"
    peaks = cut.up[np.arange(4), np.abs(cut.up).argmax(axis=1)]
    assert np.all(peaks > 0)
    flipped = Bundle(-bundle.up, -bundle.down, bundle.scale).truncate(4)
    np.testing.assert_allclose(flipped.up, cut.up, atol=1e-6)


@pytest.mark.parametrize(("rank", "scale"), [(0, 1.0), (2, 0.0), (2, float("nan"))])
def test_truncate_refuses_what_has_no_answer(rank, scale):
    with pytest.raises(LowRankError):
        make_bundle(3, 4, 5).truncate(rank, scale=scale)


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


def test_initial_adapter_changes_nothing_and_follows_the_seed():
    spec = make_spec()
    adapter = initial_adapter(spec)
    assert list(adapter) == ["a", "b"]
    for module in spec.modules:
        bundle = adapter[module.name]
        assert bundle.up.shape == (4, module.out_features)
        assert bundle.down.shape == (4, module.in_features)
        assert not bundle.up.any()
        assert np.abs(bundle.down).max() <= module.in_features**-0.5
        assert bundle.scale == 4.0
        np.testing.assert_array_equal(bundle.down, initial_adapter(spec)[module.name].down)
        assert not np.array_equal(bundle.down, initial_adapter(make_spec(seed=6))[module.name].down)


def test_initial_adapter_is_uniform():
    modules = (ModuleShape("a", 2, 400),)
    spec = AdapterSpec("run", "org/base", "main", "ab", 64, 16.0, False, 1, modules)
    down = initial_adapter(spec)["a"].down.astype(np.float64) * 20  # U(-1, 1)
    assert abs(down.mean()) < 0.02
    assert abs(down.var() - 1 / 3) < 0.01


def test_initial_adapter_never_changes_between_releases():
    first = initial_adapter(make_spec())["a"].down[0, :3]
    np.testing.assert_array_equal(first, np.array(GOLDEN_DOWN, np.float32))
