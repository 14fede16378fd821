"""A cut equals the dense truncated SVD, on every path and on spectra that are hard for it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model

from coordinator import truncation
from coordinator.lowrank import Bundle, LowRankError, norm, stack
from coordinator.truncation import truncate


def make_bundle(rank, m, n, seed=0, scale=1.5):
    rng = np.random.default_rng(seed)
    up, down = rng.normal(size=(rank, m)), rng.normal(size=(rank, n))
    return Bundle(up.astype(np.float32), down.astype(np.float32), scale)


def make_graded(values, m, n, seed=0):
    """A product with about these singular values, through components that are not its vectors."""
    rng = np.random.default_rng(seed)
    left, right, mix = (
        np.linalg.qr(rng.normal(size=(side, len(values))))[0] for side in (m, n, len(values))
    )
    up, down = mix @ (left * values).T, mix @ right.T
    return Bundle(up.astype(np.float32), down.astype(np.float32), 1.0)


def dense_svd(bundle):
    return np.linalg.svd(bundle.dense(), full_matrices=False)


def dense_cut(bundle, rank):
    left, values, right = dense_svd(bundle)
    return (left[:, :rank] * values[:rank]) @ right[:rank]


def distance(bundle, cut):
    return np.linalg.norm(bundle.dense() - cut.bundle.dense()) / np.linalg.norm(bundle.dense())


SHAPES = [(12, 30, 50), (12, 50, 30), (30, 30, 50), (30, 50, 30), (70, 30, 50), (70, 50, 30)]
SHAPES += [(70, 40, 40), (1, 30, 50), (3, 1, 50)]


@pytest.mark.parametrize("rank", [1, 7])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_cut_equals_the_dense_truncated_svd(shape, rank):
    bundle = make_bundle(*shape)
    cut = truncate(bundle, rank)
    values = dense_svd(bundle)[1]
    np.testing.assert_allclose(cut.values, values[: len(cut.values)], rtol=1e-9)
    assert len(cut.values) == min(shape)
    assert (cut.bundle.up.shape, cut.bundle.down.shape) == ((rank, shape[1]), (rank, shape[2]))
    assert cut.bundle.up.dtype == cut.bundle.down.dtype == np.float32
    assert cut.exact
    best = dense_cut(bundle, rank)
    assert np.linalg.norm(cut.bundle.dense() - best) < 1e-6 * norm(bundle)
    assert cut.error == pytest.approx(distance(bundle, cut), abs=1e-6)


@given(
    shape=st.tuples(st.integers(1, 9), st.integers(1, 7), st.integers(1, 7)),
    rank=st.integers(1, 12),
    scale=st.sampled_from([0.25, 1.0, 4.0]),
    own=st.sampled_from([-2.0, 0.5, 3.0]),
)
@settings(max_examples=150, deadline=None)
def test_a_cut_takes_the_scale_of_its_input_and_gives_that_of_its_receiver(shape, rank, scale, own):
    bundle = make_bundle(*shape, seed=rank, scale=own)
    cut = truncate(bundle, rank, scale=scale)
    assert cut.bundle.scale == scale
    np.testing.assert_allclose(
        cut.bundle.dense(), dense_cut(bundle, rank), atol=1e-5 * (1 + norm(bundle))
    )


def test_devices_of_mixed_scale_come_back_as_the_cut_of_their_ideal_mean():
    devices = [make_bundle(r, 20, 30, seed=r, scale=16 / r) for r in (3, 5, 8)]
    weights = [0.5, 0.2, 0.3]
    ideal = sum(w * d.dense() for w, d in zip(weights, devices, strict=True))
    left, values, right = np.linalg.svd(ideal, full_matrices=False)
    for device in devices:
        r = device.rank
        cut = truncate(stack(devices, weights), r, scale=16 / r)
        best = (left[:, :r] * values[:r]) @ right[:r]
        np.testing.assert_allclose(cut.bundle.dense(), best, atol=1e-5 * values[0])


def test_one_spectrum_serves_every_smaller_rank():
    bundle = make_bundle(12, 30, 50)
    whole, part = truncate(bundle, 8).bundle, truncate(bundle, 3).bundle
    np.testing.assert_allclose(whole.up[:3], part.up, atol=1e-5)
    np.testing.assert_allclose(whole.down[:3], part.down, atol=1e-5)


@pytest.mark.parametrize("shape", [(12, 30, 50), (70, 50, 30)])
def test_no_other_update_of_that_rank_is_nearer(shape):
    bundle, rng = make_bundle(*shape), np.random.default_rng(1)
    cut = truncate(bundle, 4)
    error = distance(bundle, cut)
    dense = bundle.dense()
    for step in (1e-3, 1e-2, 0.1, 1.0):
        for _ in range(20):
            up = cut.bundle.up + step * rng.normal(size=cut.bundle.up.shape)
            down = cut.bundle.down + step * rng.normal(size=cut.bundle.down.shape)
            # The best right side for this left one, so only the space spanned can lose.
            down = np.linalg.lstsq(up.T, dense, rcond=None)[0] if step == 1.0 else down
            assert np.linalg.norm(dense - up.T @ down) / norm(bundle) > error - 1e-9


@pytest.mark.parametrize("smallest", [1e-3, 1e-6])
@pytest.mark.parametrize("shape", [(60, 90), (90, 60), (40, 90)])
def test_a_graded_spectrum_is_cut_where_the_dense_one_is(smallest, shape):
    bundle = make_graded(np.geomspace(1, smallest, 40), *shape)
    cut = truncate(bundle, 16)
    values = dense_svd(bundle)[1]
    np.testing.assert_allclose(cut.values, values[:40], rtol=1e-5, atol=3e-8 * values[0])
    assert np.linalg.norm(cut.bundle.dense() - dense_cut(bundle, 16)) < 1e-6 * norm(bundle)
    assert cut.error == pytest.approx(distance(bundle, cut), rel=1e-3)


def test_repeated_singular_values_are_cut_as_well_as_any_choice_among_them():
    bundle = make_graded(np.repeat([3.0, 1.0], 10), 50, 60)
    cut = truncate(bundle, 5)
    expected = (1 - 5 * 9 / (10 * 9 + 10)) ** 0.5
    assert cut.error == pytest.approx(expected, rel=1e-5)
    assert distance(bundle, cut) == pytest.approx(expected, rel=1e-5)
    np.testing.assert_allclose(cut.bundle.up @ cut.bundle.up.T, 3 * np.eye(5), atol=1e-5)


@pytest.mark.parametrize("shape", [(2, 5, 8), (4, 30, 50), (6, 8, 5)])
def test_identical_devices_leave_the_update_of_one(shape):
    once = make_bundle(*shape)
    cut = truncate(stack([once] * 4, [0.1, 0.2, 0.3, 0.4]), shape[0])
    np.testing.assert_allclose(cut.bundle.dense(), once.dense(), atol=1e-5 * norm(once))
    assert cut.kept == min(shape)
    assert cut.error < 1e-6


def test_components_that_repeat_exactly_have_no_values_of_their_own():
    once = make_bundle(5, 40, 60)
    thrice = Bundle(np.tile(once.up, (3, 1)), np.tile(once.down, (3, 1)), 0.5)
    cut = truncate(thrice, 9)
    assert cut.kept == 5
    assert not cut.bundle.up[5:].any()
    np.testing.assert_allclose(cut.bundle.dense(), thrice.dense(), atol=1e-4)


def test_a_rank_beyond_what_there_is_pads_with_zeros():
    for shape in ((2, 5, 8), (9, 5, 3)):
        bundle = make_bundle(*shape)
        cut = truncate(bundle, 7)
        assert cut.kept == min(shape)
        assert cut.bundle.rank == 7
        assert not cut.bundle.up[cut.kept :].any()
        assert not cut.bundle.down[cut.kept :].any()
        assert distance(bundle, cut) < 1e-6


@pytest.mark.parametrize("approximate", [False, True])
@pytest.mark.parametrize("shape", [(3, 5, 8), (9, 5, 8), (0, 5, 8)])
def test_a_zero_update_has_a_zero_cut_without_error(shape, approximate):
    bundle = make_bundle(*shape)
    zero = Bundle(np.zeros_like(bundle.up), bundle.down, 1.0)
    cut = truncate(zero, 2, approximate=approximate)
    assert (cut.kept, cut.error) == (0, 0.0)
    assert cut.bundle.rank == 2
    assert not cut.bundle.up.any()
    assert not cut.bundle.down.any()
    assert not truncate(Bundle(bundle.up, bundle.down, 0.0), 2).bundle.dense().any()


@pytest.mark.parametrize("rank", [6, 30])  # with 60 components, W is formed
def test_what_is_left_after_components_cancel_is_exact(rank):
    big, small = make_bundle(rank, 40, 60, seed=1), make_bundle(3, 40, 60, seed=2)
    for size in (1e-2, 1e-4, 1e-5):
        small = Bundle(small.up, small.down, size)
        rest = stack([big, small, big], [1.0, 1.0, -1.0])
        cut = truncate(rest, 3)
        assert np.linalg.norm(cut.bundle.dense() - small.dense()) < 1e-6 * norm(small)
    nothing = truncate(stack([big, big], [1.0, -1.0]), 3)
    assert (nothing.kept, nothing.error) == (0, 0.0)


def test_a_cut_is_balanced_and_its_signs_are_fixed():
    bundle = make_bundle(4, 30, 50)
    for flipped in (bundle, Bundle(-bundle.up, -bundle.down, bundle.scale)):
        cut = truncate(flipped, 4).bundle
        lengths = np.linalg.norm(cut.up, axis=1)
        np.testing.assert_allclose(lengths, np.linalg.norm(cut.down, axis=1), rtol=1e-5)
        assert np.all(np.diff(lengths) <= 1e-6), "components come largest first"
        assert np.all(cut.up[np.arange(4), np.abs(cut.up).argmax(axis=1)] > 0)
        np.testing.assert_allclose(cut.up, truncate(bundle, 4).bundle.up, atol=1e-5)


def test_the_order_of_devices_does_not_change_a_cut():
    devices = [make_bundle(r, 30, 50, seed=r) for r in (3, 5, 8)]
    one = truncate(stack(devices, [0.5, 0.2, 0.3]), 6).bundle
    other = truncate(stack(devices[::-1], [0.3, 0.2, 0.5]), 6).bundle
    np.testing.assert_allclose(one.up, other.up, atol=1e-5)
    np.testing.assert_allclose(one.down, other.down, atol=1e-5)


def test_the_same_input_gives_the_same_bits():
    bundle = make_bundle(40, 60, 70)
    for approximate in (False, True):
        one, other = (truncate(bundle, 6, approximate=approximate) for _ in range(2))
        np.testing.assert_array_equal(one.bundle.up, other.bundle.up)
        np.testing.assert_array_equal(one.bundle.down, other.bundle.down)
        assert one.error == other.error


@pytest.mark.parametrize("approximate", [False, True])
@pytest.mark.parametrize(
    ("energy", "rank", "kept"),
    [(0.5, 5, 1), (0.55, 5, 2), (0.85, 5, 3), (0.999, 5, 4), (0.999, 2, 2), (1.0, 5, 4)],
)
def test_energy_keeps_the_fewest_components_that_hold_it(energy, rank, kept, approximate):
    squares = np.array([0.52, 0.3, 0.1, 0.08])
    bundle = make_graded(np.sqrt(squares), 30, 40)
    cut = truncate(bundle, rank, energy=energy, approximate=approximate)
    assert cut.kept == kept
    assert cut.bundle.rank == rank
    assert not cut.bundle.up[kept:].any()
    assert cut.error == pytest.approx((1 - squares[:kept].sum()) ** 0.5, abs=1e-3)


@pytest.mark.parametrize("shape", [(120, 150, 200), (150, 200, 120)])
@pytest.mark.parametrize("decay", [0.0, 0.5, 1.0, 2.0])
def test_the_approximate_path_is_near_the_best_and_knows_its_error(shape, decay):
    count, m, n = shape
    count = min(count, m, n)
    bundle = make_graded(np.arange(1, count + 1.0) ** -decay, m, n)
    cut, best = truncate(bundle, 10, approximate=True), truncate(bundle, 10)
    assert not cut.exact
    assert best.exact
    true = distance(bundle, cut)
    assert true <= 1.02 * best.error
    assert cut.error == pytest.approx(true, rel=0.2)
    np.testing.assert_allclose(cut.values[:5], best.values[:5], rtol=0.1)


def test_the_approximate_path_is_exact_where_its_search_spans_everything():
    bundle = make_bundle(9, 40, 60)
    cut = truncate(bundle, 6, approximate=True)
    assert np.linalg.norm(cut.bundle.dense() - dense_cut(bundle, 6)) < 1e-5 * norm(bundle)
    assert cut.error == pytest.approx(distance(bundle, cut), rel=1e-3)


def test_only_a_large_smaller_side_is_approximated_unasked(monkeypatch):
    monkeypatch.setattr(truncation, "EXACT_SIDE", 10)
    assert truncate(make_bundle(10, 30, 40), 3).exact
    assert truncate(make_bundle(30, 10, 40), 3).exact
    assert not truncate(make_bundle(11, 30, 40), 3).exact
    assert truncate(make_bundle(11, 30, 40), 3, approximate=False).exact


def test_columns_beyond_one_block_are_seen(monkeypatch):
    monkeypatch.setattr(truncation, "GRAM_COLUMNS", 16)
    for shape in ((12, 30, 50), (70, 30, 50), (70, 50, 30)):
        bundle = make_bundle(*shape)
        np.testing.assert_allclose(
            truncate(bundle, 5).bundle.dense(), dense_cut(bundle, 5), atol=1e-6 * norm(bundle)
        )


@pytest.mark.parametrize(
    "wrong",
    [
        {"rank": 0},
        {"rank": 2, "scale": 0.0},
        {"rank": 2, "scale": float("nan")},
        {"rank": 2, "scale": float("inf")},
        {"rank": 2, "energy": 0.0},
        {"rank": 2, "energy": 1.1},
        {"rank": 2, "energy": float("nan")},
    ],
)
def test_what_has_no_answer_is_refused(wrong):
    with pytest.raises(LowRankError, match="cannot truncate"):
        truncate(make_bundle(3, 4, 5), **wrong)


@pytest.mark.parametrize("approximate", [False, True])
@pytest.mark.parametrize("shape", [(3, 6, 7), (9, 6, 7)])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_are_refused(shape, approximate, value):
    bundle = make_bundle(*shape)
    bundle.up[1, 2] = value
    with pytest.raises(LowRankError, match="NaN"), np.errstate(invalid="ignore"):
        truncate(bundle, 2, approximate=approximate)


class OneLayer(torch.nn.Module):
    def __init__(self, m, n):
        super().__init__()
        self.layer = torch.nn.Linear(n, m, bias=False)

    def forward(self, x):
        return self.layer(x)


def peft_mix(devices, weights, m, n, **how):
    """The product that PEFT's own mix of these adapters stands for: (m, n) and its scaling."""
    ranks = [device.rank for device in devices]
    names = [f"device{i}" for i in range(len(devices))]
    configs = [LoraConfig(r=r, lora_alpha=16, target_modules=["layer"]) for r in ranks]
    model = get_peft_model(OneLayer(m, n), configs[0], adapter_name=names[0])
    for name, config in zip(names[1:], configs[1:], strict=True):
        model.add_adapter(name, config)
    layer = model.base_model.model.layer
    for name, device in zip(names, devices, strict=True):
        layer.lora_A[name].weight.data = torch.from_numpy(device.down.copy())
        layer.lora_B[name].weight.data = torch.from_numpy(device.up.T.copy())
    model.add_weighted_adapter(names, weights, "mix", **how)
    return layer.get_delta_weight("mix").detach().numpy(), layer.scaling["mix"]


@pytest.mark.parametrize(("m", "n"), [(20, 30), (30, 20), (24, 24)])
def test_peft_mixes_adapters_alike(m, n):
    devices = [make_bundle(r, m, n, seed=r, scale=16 / r) for r in (3, 5, 8)]
    weights = [0.5, 0.2, 0.3]
    ideal = stack(devices, weights)
    whole, scaling = peft_mix(devices, weights, m, n, combination_type="cat")
    assert scaling == 1.0
    np.testing.assert_allclose(ideal.dense(), whole, atol=1e-5 * norm(ideal))
    cut, _ = peft_mix(devices, weights, m, n, combination_type="svd", svd_rank=6)
    np.testing.assert_allclose(truncate(ideal, 6).bundle.dense(), cut, atol=1e-5 * norm(ideal))
