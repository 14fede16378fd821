"""What every method promises, and what FSLoRA promises beyond it.

A method that is entered in METHODS inherits the first half.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from coordinator.lowrank import Bundle
from coordinator.methods import (
    METHODS,
    ModuleUpdate,
    UnknownMethodError,
    UpdateError,
    WeightError,
    make,
)
from protos.packing import Factors
from protos.sketch import sketch_rows

RANK, OUT, IN = 6, 5, 9  # not square: a transposed factor cannot pass
NORMALISATIONS = ["none", "ipw", "coverage"]
ALL = [
    pytest.param(name, normalisation, id=f"{name}-{normalisation}")
    for name in METHODS
    for normalisation in (NORMALISATIONS if name == "fslora" else ["auto"])
]
every_method = pytest.mark.parametrize(("name", "normalisation"), ALL)


def make_current(rank=RANK, out=OUT, in_=IN, seed=0):
    rng = np.random.default_rng(seed)
    up, down = rng.normal(size=(rank, out)), rng.normal(size=(rank, in_))
    return Bundle(up.astype(np.float32), down.astype(np.float32), 2.0)


def make_update(device, k=RANK, *, weight=1.0, offset=0, seed=None, current=None, delta=None):
    current = make_current() if current is None else current
    rng = np.random.default_rng(sum(map(ord, device)) if seed is None else seed)
    rows = sketch_rows(1, 1, "m", current.rank, offset, k)
    if delta is None:
        delta = Factors(
            rng.normal(size=(k, current.up.shape[1])).astype(np.float32),
            rng.normal(size=(k, current.down.shape[1])).astype(np.float32),
        )
    return ModuleUpdate(device, rows, delta, weight, k)


def make_fleet(method, **changes):
    """Four devices of unequal weight; unequal k where the method allows it."""
    sizes = (2, 3, 4, 6) if method.heterogeneous else (RANK,) * 4
    offsets = (0, 2, 5, 9)
    return [
        make_update(f"device-{i}", k, weight=0.1 + i / 3, offset=o, **changes)
        for i, (k, o) in enumerate(zip(sizes, offsets, strict=True))
    ]


def assert_same_bits(a, b):
    assert a.scale == b.scale
    assert a.up.tobytes() == b.up.tobytes()
    assert a.down.tobytes() == b.down.tobytes()


@every_method
def test_order_of_clients_does_not_change_a_bit(name, normalisation):
    method, current = make(name, normalisation=normalisation), make_current()
    fleet = make_fleet(method)
    first = method.merge_module(current, fleet)
    for order in itertools.permutations(fleet):
        assert_same_bits(method.merge_module(current, order), first)


@every_method
def test_merging_again_gives_the_same_bits_and_leaves_its_input(name, normalisation):
    method, current = make(name, normalisation=normalisation), make_current()
    fleet = make_fleet(method)
    first = method.merge_module(current, fleet)
    assert_same_bits(current, make_current())
    again = make(name, normalisation=normalisation)
    assert_same_bits(again.merge_module(current, make_fleet(again)), first)


@every_method
def test_result_keeps_shape_type_and_scale(name, normalisation):
    method, current = make(name, normalisation=normalisation), make_current()
    merged = method.merge_module(current, make_fleet(method))
    assert (merged.up.shape, merged.down.shape) == ((RANK, OUT), (RANK, IN))
    assert merged.up.dtype == merged.down.dtype == np.float32
    assert merged.scale == current.scale


@every_method
def test_a_single_whole_client_becomes_the_adapter(name, normalisation):
    method, current = make(name, normalisation=normalisation), make_current()
    update = make_update("only", weight=17.0)
    merged = method.merge_module(current, [update])
    np.testing.assert_allclose(merged.up, current.up + update.delta.up, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(merged.down, current.down + update.delta.down, rtol=1e-6, atol=1e-6)


@every_method
def test_identical_clients_become_the_adapter_and_leave_no_error(name, normalisation):
    method, current = make(name, normalisation=normalisation), make_current()
    fleet = [make_update(f"twin-{i}", weight=i + 0.3, seed=4) for i in range(3)]
    merged = method.merge_module(current, fleet)
    ideal = Bundle(current.up + fleet[0].delta.up, current.down + fleet[0].delta.down, 2.0)
    np.testing.assert_allclose(merged.dense(), ideal.dense(), atol=1e-5)


@every_method
def test_a_client_of_weight_zero_does_not_change_a_bit(name, normalisation):
    method, current = make(name, normalisation=normalisation), make_current()
    fleet = make_fleet(method)
    ghost = make_update("device-1b", weight=0.0)
    with_ghost = method.merge_module(current, [*fleet, ghost])
    np.testing.assert_array_equal(with_ghost.up, method.merge_module(current, fleet).up)


@every_method
def test_only_the_ratio_of_weights_counts(name, normalisation):
    method, current = make(name, normalisation=normalisation), make_current()
    fleet = make_fleet(method)
    scaled = [ModuleUpdate(u.device_id, u.rows, u.delta, 1000 * u.weight, u.k) for u in fleet]
    one, other = (method.merge_module(current, updates) for updates in (fleet, scaled))
    np.testing.assert_allclose(one.up, other.up, rtol=1e-5, atol=1e-6)


@every_method
def test_nothing_trained_moves_nothing(name, normalisation):
    method, current = make(name, normalisation=normalisation), make_current()
    still = [
        ModuleUpdate(u.device_id, u.rows, Factors(0 * u.delta.up, 0 * u.delta.down), u.weight, u.k)
        for u in make_fleet(method)
    ]
    assert_same_bits(method.merge_module(current, still), current)


@every_method
@pytest.mark.parametrize(
    ("out", "in_"), [(RANK, 9), (9, RANK), (3, 4)], ids=["m=r", "n=r", "small"]
)
def test_a_rank_as_large_as_the_layer_is_ordinary(name, normalisation, out, in_):
    method, current = make(name, normalisation=normalisation), make_current(RANK, out, in_)
    merged = method.merge_module(current, make_fleet(method, current=current))
    assert (merged.up.shape, merged.down.shape) == ((RANK, out), (RANK, in_))


@every_method
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("side", ["up", "down"])
def test_values_that_are_not_finite_are_refused(name, normalisation, bad, side):
    method = make(name, normalisation=normalisation)
    fleet = make_fleet(method)
    getattr(fleet[2].delta, side)[1, 2] = bad
    with pytest.raises(UpdateError, match="device-2"):
        method.merge_module(make_current(), fleet)


@every_method
def test_a_sum_beyond_float32_is_refused(name, normalisation):
    huge = Factors(np.full((RANK, OUT), 3e38, np.float32), np.zeros((RANK, IN), np.float32))
    method, current = make(name, normalisation=normalisation), make_current()
    raised = Bundle(huge.up.copy(), current.down, current.scale)
    with pytest.raises(UpdateError, match="float32"):
        method.merge_module(raised, [make_update("a", delta=huge)])


@every_method
@pytest.mark.parametrize(
    "weights", [(0, 0), (1, -1), (1, np.nan), (np.inf, 1), (1e308, 1e308), ()], ids=str
)
def test_weights_that_make_no_mean_are_refused(name, normalisation, weights):
    updates = [make_update(f"d{i}", weight=weight) for i, weight in enumerate(weights)]
    with pytest.raises(WeightError):
        make(name, normalisation=normalisation).merge_module(make_current(), updates)


@every_method
def test_updates_that_do_not_fit_the_module_are_refused(name, normalisation):
    method, good = make(name, normalisation=normalisation), make_update("a")
    turned = Factors(good.delta.down, good.delta.up)
    wrong = [
        ModuleUpdate("a", good.rows, turned, 1.0, RANK),
        ModuleUpdate("a", good.rows[:3], good.delta, 1.0, RANK),
        ModuleUpdate("a", good.rows + 1, good.delta, 1.0, RANK),
        ModuleUpdate("a", good.rows * 0, good.delta, 1.0, RANK),
        ModuleUpdate("a", good.rows[:0], good.delta, 1.0, 0),
    ]
    for update in wrong:
        with pytest.raises(UpdateError):
            method.merge_module(make_current(), [update])


def test_methods_are_named_as_in_the_table_and_say_whether_k_may_differ():
    assert {name: make(name).name for name in METHODS} == {name: name for name in METHODS}
    assert make("fslora").heterogeneous
    assert not make("fedit").heterogeneous


def test_names_that_do_not_exist_are_answered_with_those_that_do():
    with pytest.raises(UnknownMethodError, match="fslora, fedit"):
        make("fedavg")
    with pytest.raises(UnknownMethodError, match="coverage"):
        make("fslora", normalisation="mean")
    with pytest.raises(UnknownMethodError, match="adamw or sgd"):
        make("fslora", optimizer="lion")


@pytest.mark.parametrize(("optimizer", "meant"), [("adamw", "coverage"), ("sgd", "none")])
def test_normalisation_follows_the_optimiser_of_the_devices(optimizer, meant):
    assert make("fslora", optimizer=optimizer).normalisation == meant


def test_fedit_refuses_partial_adapters_and_says_what_to_do():
    with pytest.raises(UpdateError, match="fslora"):
        make("fedit").merge_module(make_current(), [make_update("a", 3)])


def test_fedit_misses_the_ideal_update_by_the_covariance_of_the_factors():
    current, fleet = make_current(), make_fleet(make("fedit"))
    merged = make("fedit").merge_module(current, fleet)
    weights = np.array([u.weight for u in fleet])
    p = weights / weights.sum()
    ups = [current.up.astype(np.float64) + u.delta.up for u in fleet]
    downs = [current.down.astype(np.float64) + u.delta.down for u in fleet]
    up, down = (sum(w * f for w, f in zip(p, fs, strict=True)) for fs in (ups, downs))
    ideal = sum(w * b.T @ a for w, b, a in zip(p, ups, downs, strict=True))
    covariance = sum(w * (b - up).T @ (a - down) for w, b, a in zip(p, ups, downs, strict=True))
    np.testing.assert_allclose(merged.dense(), 2.0 * (ideal - covariance), atol=1e-4)


# FSLoRA ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalisation", NORMALISATIONS)
@pytest.mark.parametrize("seed", range(8))
def test_fslora_with_every_k_at_r_is_fedit_bit_for_bit(normalisation, seed):
    current, rng = make_current(seed=seed), np.random.default_rng(seed)
    fleet = [
        make_update(f"d{i}", weight=float(rng.uniform(0, 1e3)), seed=int(rng.integers(2**31)))
        for i in range(1 + seed)
    ]
    sketched = make("fslora", normalisation=normalisation).merge_module(current, fleet)
    assert_same_bits(sketched, make("fedit").merge_module(current, fleet))


def dense_step(updates, side, columns, normalisation):
    """The oracle: full (r, c) masks, no gathers."""
    total = sum(u.weight for u in updates)
    weighted, cover = np.zeros((RANK, columns)), np.zeros((RANK, 1))
    for u in updates:
        mask = np.zeros((RANK, 1))
        mask[u.rows] = 1
        full = np.zeros((RANK, columns))
        full[u.rows] = getattr(u.delta, side)
        gain = RANK / u.k if normalisation == "ipw" else 1
        weighted += u.weight / total * gain * mask * full
        cover += u.weight / total * mask
    return weighted / np.where(cover > 0, cover, 1) if normalisation == "coverage" else weighted


@pytest.mark.parametrize("normalisation", NORMALISATIONS)
@pytest.mark.parametrize("count", [1, 2, 4])
def test_scatter_add_equals_the_dense_masked_mean(normalisation, count):
    method, current = make("fslora", normalisation=normalisation), make_current()
    fleet = make_fleet(method)[:count]
    merged = method.merge_module(current, fleet)
    up, down = (dense_step(fleet, s, c, normalisation) for s, c in (("up", OUT), ("down", IN)))
    np.testing.assert_allclose(merged.up, current.up + up, atol=1e-6)
    np.testing.assert_allclose(merged.down, current.down + down, atol=1e-6)


@pytest.mark.parametrize("normalisation", NORMALISATIONS)
def test_rows_that_nobody_holds_keep_their_bits(normalisation):
    current, update = make_current(), make_update("a", 2, offset=3)
    merged = make("fslora", normalisation=normalisation).merge_module(current, [update])
    others = np.setdiff1d(np.arange(RANK), update.rows)
    np.testing.assert_array_equal(merged.up[others], current.up[others])
    np.testing.assert_array_equal(merged.down[others], current.down[others])


def test_a_constant_fleet_is_a_fixed_point_of_coverage_whatever_the_sizes():
    """Zero-padded means fail this: rows that few hold would be diluted."""
    current = make_current()
    goal = make_current(seed=9)
    fleet = []
    for i, (k, offset) in enumerate(((2, 0), (4, 2), (3, 5))):
        rows = sketch_rows(1, 1, "m", RANK, offset, k)
        delta = Factors(goal.up[rows] - current.up[rows], goal.down[rows] - current.down[rows])
        fleet.append(ModuleUpdate(f"d{i}", rows, delta, 1.0 + i, k))
    merged = make("fslora", normalisation="coverage").merge_module(current, fleet)
    np.testing.assert_allclose(merged.up, goal.up, atol=1e-6)
    diluted = make("fslora", normalisation="none").merge_module(current, fleet)
    assert np.abs(diluted.up - goal.up).max() > 0.1


@pytest.mark.parametrize("normalisation", NORMALISATIONS)
def test_disjoint_clients_commute(normalisation):
    """Either may be merged first: they touch different rows."""
    method, current = make("fslora", normalisation=normalisation), make_current()
    one, other = make_update("a", 3, offset=0), make_update("b", 3, offset=3)
    assert not np.intersect1d(one.rows, other.rows).size
    forth = method.merge_module(method.merge_module(current, [one]), [other])
    back = method.merge_module(method.merge_module(current, [other]), [one])
    assert_same_bits(forth, back)


def sgd_rounds(normalisation, gain, rounds):
    """Mean step over rounds when device i holds k_i rows and moves them by gain(k_i) * G."""
    rng = np.random.default_rng(3)
    goal_up, goal_down = rng.normal(size=(RANK, OUT)), rng.normal(size=(RANK, IN))
    current = Bundle(np.zeros((RANK, OUT), np.float32), np.zeros((RANK, IN), np.float32), 1.0)
    method, total = make("fslora", normalisation=normalisation), np.zeros((RANK, OUT))
    for round_ in range(rounds):
        fleet, offset = [], 0
        for i, (k, weight) in enumerate(((2, 1.0), (3, 5.0), (6, 2.0))):
            rows = sketch_rows(8, round_, "m", RANK, offset, k)
            up, down = gain(k) * goal_up[rows], gain(k) * goal_down[rows]
            delta = Factors(up.astype(np.float32), down.astype(np.float32))
            fleet.append(ModuleUpdate(f"d{i}", rows, delta, weight, k))
            offset += k
        total += method.merge_module(current, fleet).up
    return total / rounds, goal_up


def test_plain_mean_is_unbiased_for_sgd_whose_gradient_carries_r_over_k():
    mean, goal = sgd_rounds("none", lambda k: RANK / k, 3000)
    np.testing.assert_allclose(mean, goal, rtol=0.08)


def test_ipw_is_unbiased_for_adam_whose_step_has_lost_r_over_k():
    mean, goal = sgd_rounds("ipw", lambda k: 1.0, 3000)
    np.testing.assert_allclose(mean, goal, rtol=0.08)


def test_coverage_would_compensate_sgd_twice():
    """Why coverage is not the default there: the expected step is too long."""
    mean, goal = sgd_rounds("coverage", lambda k: RANK / k, 500)
    assert np.linalg.norm(mean) > 1.2 * np.linalg.norm(goal)
