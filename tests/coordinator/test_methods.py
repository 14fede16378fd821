"""What each method promises beyond what all do (`test_method_conformance`): its paper's own rule,
against dense float64 arithmetic with nothing in common with the code.
"""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest

from coordinator.lowrank import Bundle, stack
from coordinator.methods import (
    METHODS,
    MethodOptions,
    ModuleState,
    ModuleUpdate,
    UnknownMethodError,
    UpdateError,
    flora_na,
    make,
)
from coordinator.truncation import truncate
from profiles.model import ModuleShape
from protos.contract import AdapterSpec
from protos.sketch import sketch_rows

RANK, OUT, IN = 6, 14, 23
NORMALISATIONS = ["none", "ipw", "coverage"]


def method_of(name, rank=RANK, **options):
    return make(name, MethodOptions(rank=rank, **{"side_rank": 500, **options}))


def spec_of(rank=RANK, out=OUT, in_=IN):
    return AdapterSpec(
        "run", "b", "main", "00", rank, 12.0, False, 3, (ModuleShape("m", out, in_),)
    )


def state_of(rank=RANK, out=OUT, in_=IN, seed=0):
    rng = np.random.default_rng(seed)
    up, down = rng.normal(size=(rank, out)), rng.normal(size=(rank, in_))
    return ModuleState(
        Bundle(up.astype(np.float32), down.astype(np.float32), spec_of(rank).scale(rank))
    )


def update_of(
    method, state, device, k=None, *, weight=1.0, rows=None, delta=None, size=0.5, seed=0
):
    """A device with the first k rows, or these, that moves both factors at random."""
    rank, out = state.adapter.up.shape
    k = rank if k is None else k
    rows = np.arange(k) if rows is None else rows
    scale = method.device_scale(spec_of(rank), len(rows))
    rng = np.random.default_rng([seed, *device.encode()])
    widths = {"up": out, "down": state.adapter.down.shape[1]}
    if delta is None:
        delta = {
            part: (size * rng.normal(size=(len(rows), widths[part]))).astype(np.float32)
            for part in widths
        }
    lift = scale / state.adapter.scale if method.scaling == "common" else 1.0
    down = rng.uniform(-1, 1, size=(len(rows), widths["down"])).astype(np.float32)

    def begin():
        if not method.fresh:
            return method.cut(state, rows, scale)
        return ModuleState(Bundle(np.zeros((len(rows), out), np.float32), down, scale))

    return ModuleUpdate(device, rows, begin, delta, weight, lift)


def fleet_of(method, state, sizes=(2, 3, 4, 6), **changes):
    return [
        update_of(method, state, f"d{i}", k, weight=0.2 + i / 3, **changes)
        for i, k in enumerate(sizes)
    ]


def whole_fleet(method, state, count=4, **changes):
    return fleet_of(method, state, (state.adapter.rank,) * count, **changes)


def shares_of(fleet):
    weights = np.array([update.weight for update in fleet])
    return weights / weights.sum()


def factors(update):
    """(s_i, B_i (m, k), A_i (k, n)) of what the device trained, float64, in the papers' letters."""
    trained = update.trained.adapter
    return trained.scale, trained.up.T.astype(np.float64), trained.down.astype(np.float64)


def product(update):
    """s_i B_i A_i."""
    s, b, a = factors(update)
    return s * b @ a


def ideal(fleet):
    return sum(p * product(update) for p, update in zip(shares_of(fleet), fleet, strict=True))


def means(fleet):
    """FedIT's B and A, by a plain loop."""
    p = shares_of(fleet)
    b = sum(w * factors(u)[1] for w, u in zip(p, fleet, strict=True))
    a = sum(w * factors(u)[2] for w, u in zip(p, fleet, strict=True))
    return b, a


def best_of_rank(matrix, rank):
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    return (left[:, :rank] * values[:rank]) @ right[:rank]


def effective(state):
    return state.product.dense() + (0.0 if state.side is None else state.side.dense())


def assert_close(found, wanted, rtol=1e-5):
    assert np.linalg.norm(found - wanted) <= rtol * np.linalg.norm(wanted)


def assert_same_bits(a, b):
    for one, other in ((a.adapter.up, b.adapter.up), (a.adapter.down, b.adapter.down)):
        assert one.tobytes() == other.tobytes()


# Names and options -------------------------------------------------------------------------------


def test_names_that_do_not_exist_are_answered_with_the_nearest_and_with_all():
    with pytest.raises(UnknownMethodError, match=r"did you mean fedit\?.*fslora, fedit, zero-"):
        method_of("fedits")
    with pytest.raises(UnknownMethodError, match="did you mean lora-fair"):
        method_of("LoRA_FAIR")
    with pytest.raises(UnknownMethodError, match=r"does not exist; choose one of fslora"):
        method_of("x")


@pytest.mark.parametrize(
    "options",
    [
        {"rank": 0},
        {"normalisation": "mean"},
        {"sketches": "prefix"},
        {"energy": 0.0},
        {"energy": 1.1},
        {"regularisation": -1.0},
        {"regularisation": float("nan")},
        {"side_rank": -1},
        {"density": 0.0},
        {"prune_keep": 1.0},
        {"prune_penalty": float("inf")},
    ],
    ids=str,
)
def test_options_out_of_range_are_refused_with_what_they_may_be(options):
    with pytest.raises(UnknownMethodError, match=f"{next(iter(options))}.*; use"):
        MethodOptions(**{"rank": RANK, **options})


def test_every_option_belongs_to_a_method():
    taken = set().union(*(method.options for method in METHODS.values()))
    known = {field.name for field in dataclasses.fields(MethodOptions)}
    assert known == taken | {"rank", "optimizer"}


# FedIT, FFA-LoRA, RoLoRA, FedSA-LoRA, FLASC: means of whole parts --------------------------------


def test_fedit_is_the_mean_and_misses_the_ideal_by_the_covariance_of_the_factors():
    method, state = method_of("fedit"), state_of()
    fleet = whole_fleet(method, state)
    merged = method.merge_module(state, fleet)
    b, a = means(fleet)
    np.testing.assert_allclose(merged.adapter.up, b.T, atol=1e-6)
    np.testing.assert_allclose(merged.adapter.down, a, atol=1e-6)
    s = state.adapter.scale
    covariance = s * sum(
        p * (factors(u)[1] - b) @ (factors(u)[2] - a)
        for p, u in zip(shares_of(fleet), fleet, strict=True)
    )
    assert_close(ideal(fleet) - effective(merged), covariance, 1e-4)
    assert np.linalg.matrix_rank(covariance) == min(3 * RANK, OUT)


def test_fedit_of_devices_with_the_same_down_is_exact():
    method, state = method_of("fedit"), state_of()
    fleet = whole_fleet(method, state)
    for update in fleet:
        update.delta["down"][:] = fleet[0].delta["down"]
    assert_close(effective(method.merge_module(state, fleet)), ideal(fleet))


@pytest.mark.parametrize("sizes", [(6, 6, 6), (2, 3, 6), (1, 1, 2)])
def test_ffa_lora_averages_the_changes_of_products_exactly_whatever_the_ranks(sizes):
    method, state = method_of("ffa-lora"), state_of()
    fleet = fleet_of(method, state, sizes)
    for update in fleet:
        del update.delta["down"]
    merged = method.merge_module(state, fleet)
    change = sum(
        p * (product(u) - u.begin().product.dense())
        for p, u in zip(shares_of(fleet), fleet, strict=True)
    )
    assert_close(effective(merged) - effective(state), change, 1e-4)
    assert merged.adapter.down.tobytes() == state.adapter.down.tobytes()
    assert method.trained(0) == method.trained(7) == ("up",)


def test_rolora_starts_with_up_and_takes_turns():
    method = method_of("rolora")
    assert [method.sent(version) for version in range(4)] == [("up",), ("down",)] * 2
    state = state_of()
    for version in range(4):
        fleet = whole_fleet(method, state)
        for update in fleet:
            del update.delta["down" if method.sent(version) == ("up",) else "up"]
        merged = method.merge_module(state, fleet)
        assert_close(effective(merged), ideal(fleet))
        state = merged


def test_fedsa_lora_never_learns_any_up():
    method, state = method_of("fedsa-lora"), state_of()
    assert method.sent(0) == ("down",) and method.personal == ("up",)
    assert method.trained(0) == ("up", "down")
    fleet = whole_fleet(method, state)
    for update in fleet:
        del update.delta["up"]
    merged = method.merge_module(state, fleet)
    assert merged.adapter.up.tobytes() == state.adapter.up.tobytes()
    np.testing.assert_allclose(merged.adapter.down, means(fleet)[1], atol=1e-6)
    assert not method.has_global


def test_flasc_is_fedit_of_thinned_files():
    method, state = method_of("flasc", density=0.3), state_of()
    fleet = whole_fleet(method, state)
    assert method.density == 0.3 and not method.heterogeneous
    merged = method.merge_module(state, fleet)
    assert_same_bits(merged, method_of("fedit").merge_module(state, fleet))


# FSLoRA ------------------------------------------------------------------------------------------


def sketched_fleet(method, state, round_=1, sizes=(2, 3, 4, 6), **changes):
    rank, offsets = state.adapter.rank, (0, 2, 5, 9)
    return [
        update_of(method, state, f"d{i}", weight=0.1 + i / 3,
                  rows=sketch_rows(1, round_, "m", rank, o, k), **changes)
        for i, (k, o) in enumerate(zip(sizes, offsets, strict=True))
    ]  # fmt: skip


@pytest.mark.parametrize(("optimizer", "meant"), [("adamw", "coverage"), ("sgd", "none")])
def test_normalisation_follows_the_optimiser_of_the_devices(optimizer, meant):
    assert method_of("fslora", optimizer=optimizer).normalisation == meant
    with pytest.raises(UnknownMethodError, match="adamw or sgd"):
        method_of("fslora", optimizer="lion")
    assert method_of("fslora", optimizer="lion", normalisation="ipw").normalisation == "ipw"


@pytest.mark.parametrize("normalisation", NORMALISATIONS)
@pytest.mark.parametrize("seed", range(8))
def test_fslora_with_every_k_at_r_is_fedit_bit_for_bit(normalisation, seed):
    state, rng = state_of(seed=seed), np.random.default_rng(seed)
    method = method_of("fslora", normalisation=normalisation)
    fleet = [
        update_of(method, state, f"d{i}", weight=float(rng.uniform(0, 1e3)), seed=seed)
        for i in range(1 + seed)
    ]
    merged = method.merge_module(state, fleet)
    assert_same_bits(merged, method_of("fedit").merge_module(state, fleet))
    for name in ("rbla", "zero-padding", "fed-plora"):  # and so are these
        assert_same_bits(method_of(name).merge_module(state, fleet), merged)


def dense_step(fleet, part, columns, normalisation):
    """The oracle: full (r, c) masks, no gathers."""
    weighted, cover = np.zeros((RANK, columns)), np.zeros((RANK, 1))
    for p, update in zip(shares_of(fleet), fleet, strict=True):
        mask = np.zeros((RANK, 1))
        mask[update.rows] = 1
        full = np.zeros((RANK, columns))
        full[update.rows] = update.delta[part]
        gain = RANK / update.k if normalisation == "ipw" else 1
        weighted += p * gain * mask * full
        cover += p * mask
    return weighted / np.where(cover > 0, cover, 1) if normalisation == "coverage" else weighted


@pytest.mark.parametrize("normalisation", NORMALISATIONS)
@pytest.mark.parametrize("count", [1, 2, 4])
def test_scatter_add_equals_the_dense_masked_mean(normalisation, count):
    method, state = method_of("fslora", normalisation=normalisation), state_of()
    fleet = sketched_fleet(method, state)[:count]
    merged = method.merge_module(state, fleet)
    for part, columns in (("up", OUT), ("down", IN)):
        wanted = state.values(part) + dense_step(fleet, part, columns, normalisation)
        np.testing.assert_allclose(merged.values(part), wanted, atol=1e-6)


@pytest.mark.parametrize("name", ["fslora", "fed-plora", "rbla", "raflora"])
def test_rows_that_nobody_holds_stay(name):
    method, state = method_of(name), state_of()
    update = update_of(method, state, "a", 2)
    merged = method.merge_module(state, [update])
    if name == "raflora":
        kept = state.adapter.take(np.arange(2, RANK)).dense()
        assert_close(effective(merged), best_of_rank(product(update) + kept, RANK))
    else:
        np.testing.assert_array_equal(merged.adapter.up[2:], state.adapter.up[2:])
        np.testing.assert_array_equal(merged.adapter.down[2:], state.adapter.down[2:])


def test_a_constant_fleet_is_a_fixed_point_of_coverage_whatever_the_sizes():
    state, goal = state_of(), state_of(seed=9)
    for normalisation in ("coverage", "none"):
        method = method_of("fslora", normalisation=normalisation)
        fleet = sketched_fleet(method, state)[:3]
        for update in fleet:
            for part in ("up", "down"):
                update.delta[part][:] = (goal.values(part) - state.values(part))[update.rows]
        moved = method.merge_module(state, fleet)
        held = np.unique(np.concatenate([update.rows for update in fleet]))
        off = np.abs(moved.adapter.up[held] - goal.adapter.up[held]).max()
        assert off < 1e-6 if normalisation == "coverage" else off > 0.1


@pytest.mark.parametrize("normalisation", NORMALISATIONS)
def test_disjoint_clients_commute(normalisation):
    """Either may be merged first: they touch different rows."""
    method, state = method_of("fslora", normalisation=normalisation), state_of()
    one, other = (
        update_of(method, state, device, rows=sketch_rows(1, 1, "m", RANK, offset, 3))
        for device, offset in (("a", 0), ("b", 3))
    )
    assert not np.intersect1d(one.rows, other.rows).size
    forth = method.merge_module(method.merge_module(state, [one]), [other])
    back = method.merge_module(method.merge_module(state, [other]), [one])
    assert_same_bits(forth, back)


def sgd_rounds(normalisation, gain, rounds):
    """Mean step over rounds when device i holds k_i rows and moves them by gain(k_i) * G."""
    goal = np.random.default_rng(3).normal(size=(RANK, OUT))
    state = ModuleState(
        Bundle(np.zeros((RANK, OUT), np.float32), np.zeros((RANK, IN), np.float32), 1.0)
    )
    method, total = method_of("fslora", normalisation=normalisation), np.zeros((RANK, OUT))
    for round_ in range(rounds):
        fleet, offset = [], 0
        for i, (k, weight) in enumerate(((2, 1.0), (3, 5.0), (6, 2.0))):
            rows = sketch_rows(8, round_, "m", RANK, offset, k)
            delta = {"up": (gain(k) * goal[rows]).astype(np.float32)}
            fleet.append(update_of(method, state, f"d{i}", weight=weight, rows=rows, delta=delta))
            offset += k
        total += method.merge_module(state, fleet).adapter.up
    return total / rounds, goal


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


def test_a_sketchs_scale_is_loras_own_and_under_rslora_is_not():
    for rslora, same in ((False, True), (True, False)):
        spec = dataclasses.replace(spec_of(), use_rslora=rslora)
        scale = method_of("fslora").device_scale(spec, 2)
        assert scale == pytest.approx(spec.scale(RANK) * RANK / 2)
        assert (scale == pytest.approx(spec.scale(2))) is same


# Prefixes: zero-padding, HetLoRA, RBLA, Fed-PLoRA ------------------------------------------------


def padded(update, scale):
    """B (m, r), A (r, n) at the global scale, zeros for rows the device lacks."""
    s, b, a = factors(update)
    lack = RANK - update.k
    return np.pad(b * (s / scale), ((0, 0), (0, lack))), np.pad(a, ((0, lack), (0, 0)))


def test_zero_padding_is_the_dense_padded_mean_under_a_common_alpha():
    method, state = method_of("zero-padding"), state_of()
    fleet = fleet_of(method, state)
    assert len({factors(u)[0] for u in fleet}) == 4, "unequal scales"
    merged = method.merge_module(state, fleet)
    pairs = [padded(u, state.adapter.scale) for u in fleet]
    for i, part in enumerate(("up", "down")):
        wanted = sum(p * pair[i] for p, pair in zip(shares_of(fleet), pairs, strict=True))
        found = merged.values(part).T if part == "up" else merged.values(part)
        np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_a_constant_model_decays_under_padding_and_stays_where_owners_are_averaged():
    """Row j keeps q_j^T of itself after T rounds; RBLA and raFLoRA are the mends."""
    start = state_of()
    for name in ("zero-padding", "rbla", "raflora"):
        method, state = method_of(name), start
        for _ in range(5):
            fleet = fleet_of(method, state, size=0.0)
            state = method.merge_module(state, fleet)
        if name == "zero-padding":
            q = [sum(p for p, k in zip(shares_of(fleet), (2, 3, 4, 6), strict=True) if k > j)
                 for j in range(RANK)]  # fmt: skip
            wanted = np.array(q)[:, None] ** 5 * start.adapter.up
            np.testing.assert_allclose(state.adapter.up, wanted, rtol=1e-5)
        else:
            assert_close(effective(state), effective(start))


@pytest.mark.parametrize("weight", [None, 1.0])
def test_hetlora_weighs_padded_means_by_the_norms_of_products(weight):
    """With uniform p these are the paper's weights."""
    method, state = method_of("hetlora"), state_of()
    fleet = fleet_of(method, state)
    if weight is not None:
        fleet = [dataclasses.replace(u, weight=weight) for u in fleet]
    merged = method.merge_module(state, fleet)
    sizes = shares_of(fleet) * [np.linalg.norm(product(u)) for u in fleet]
    weights = sizes / sizes.sum()
    pairs = [padded(u, state.adapter.scale) for u in fleet]
    for i, part in enumerate(("up", "down")):
        wanted = sum(w * pair[i] for w, pair in zip(weights, pairs, strict=True))
        found = merged.values(part).T if part == "up" else merged.values(part)
        np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_hetlora_falls_back_to_shares_and_takes_pruned_updates():
    method, state = method_of("hetlora", prune_keep=0.9, prune_penalty=0.5), state_of()
    assert (method.pruning.keep, method.pruning.penalty) == (0.9, 0.5)
    blank = ModuleState(Bundle(0 * state.adapter.up, state.adapter.down, state.adapter.scale))
    fleet = fleet_of(method, blank)
    for update in fleet:
        update.delta["up"][:] = 0  # products of zero
    merged = method.merge_module(blank, fleet)
    plain = method_of("zero-padding").merge_module(blank, fleet)
    assert_same_bits(merged, plain)
    # A device of 4 rows that kept 3 still trained at the scale of 4.
    cut = update_of(method, state, "a", 4)
    kept = dataclasses.replace(
        cut, rows=cut.rows[:3], delta={part: v[:3] for part, v in cut.delta.items()},
        begin=lambda: method.cut(state, np.arange(3), cut.begin().adapter.scale),
    )  # fmt: skip
    merged = method.merge_module(state, [kept])
    np.testing.assert_allclose(merged.adapter.down[:3], cut.trained.adapter.down[:3], atol=1e-6)
    np.testing.assert_allclose(
        merged.adapter.up[:3], cut.trained.adapter.up[:3] * cut.lift, rtol=1e-5
    )
    assert not merged.adapter.up[3:].any()


def test_rbla_is_the_mean_of_each_row_over_its_owners():
    method, state = method_of("rbla"), state_of()
    fleet = fleet_of(method, state, (2, 3, 3, 5))
    merged = method.merge_module(state, fleet)
    pairs = [padded(u, state.adapter.scale) for u in fleet]
    for j in range(5):
        own = [
            (p, pair) for p, pair, u in zip(shares_of(fleet), pairs, fleet, strict=True) if u.k > j
        ]
        total = sum(p for p, _ in own)
        up = sum(p / total * pair[0][:, j] for p, pair in own)
        down = sum(p / total * pair[1][j] for p, pair in own)
        np.testing.assert_allclose(merged.adapter.up[j], up, atol=1e-5)
        np.testing.assert_allclose(merged.adapter.down[j], down, atol=1e-5)


def test_fed_plora_devices_start_from_the_whole_model_and_rows_are_averaged_over_trainers():
    method, state = method_of("fed-plora"), state_of()
    fleet = sketched_fleet(method, state)
    for update in fleet:
        branch = method.branch(state, update.rows)
        rest = 0.0 if branch is None else branch.dense()
        assert_close(update.begin().product.dense() + rest, effective(state))
        assert (branch is None) == (update.k == RANK)
        assert update.begin().adapter.scale == state.adapter.scale, "no r/k"
        side = Bundle(state.adapter.up[:3], state.adapter.down[:3], 1.0)
        beside = method.branch(dataclasses.replace(state, side=side), update.rows).dense()
        assert_close(beside, rest + side.dense())
    merged = method.merge_module(state, fleet)
    for part, columns in (("up", OUT), ("down", IN)):
        wanted = state.values(part) + dense_step(fleet, part, columns, "coverage")
        np.testing.assert_allclose(merged.values(part), wanted, atol=1e-6)


# FlexLoRA, raFLoRA, FLoRIST: products and their truncation ---------------------------------------


def test_flexlora_hands_out_the_best_approximation_at_every_rank_and_scale():
    method, state = method_of("flexlora"), state_of()
    fleet = fleet_of(method, state)
    target = ideal(fleet)
    merged = method.merge_module(state, fleet)
    assert_close(effective(merged), best_of_rank(target, RANK))
    rng = np.random.default_rng(1)
    for k in range(1, RANK + 1):
        scale = method.device_scale(spec_of(), k)
        handed = method.cut(merged, np.arange(k), scale)
        assert handed.adapter.scale == scale
        found = handed.product.dense()
        assert_close(found, best_of_rank(target, k))
        error = np.linalg.norm(found - target)  # Eckart-Young
        for _ in range(20):
            near = Bundle(
                handed.adapter.up + 0.02 * rng.normal(size=(k, OUT)).astype(np.float32),
                handed.adapter.down + 0.02 * rng.normal(size=(k, IN)).astype(np.float32),
                scale,
            )
            assert np.linalg.norm(near.dense() - target) >= error


def test_flexlora_is_exact_while_the_ideal_fits_the_rank_and_leaves_the_rest_to_learn():
    method, state = method_of("flexlora"), state_of()
    fleet = fleet_of(method, state, (1, 1, 2))
    merged = method.merge_module(state, fleet)
    assert_close(effective(merged), ideal(fleet))
    spare = merged.adapter
    assert not spare.up[4:].any()
    np.testing.assert_array_equal(spare.down[4:], state.adapter.down[4:])


@pytest.mark.parametrize("sizes", [(2, 3, 4, 6), (2, 2, 5, 5), (1, 3)])
def test_raflora_is_the_dense_sum_over_rank_partitions(sizes):
    method, state = method_of("raflora"), state_of()
    fleet = fleet_of(method, state, sizes)
    target, low = np.zeros((OUT, IN)), 0
    for high in sorted({*sizes, RANK}):
        owners = [(p, u) for p, u in zip(shares_of(fleet), fleet, strict=True) if u.k >= high]
        total = sum(p for p, _ in owners)
        for p, update in owners:
            s, b, a = factors(update)
            target += p / total * s * b[:, low:high] @ a[low:high]
        if not owners:
            target += state.adapter.take(np.arange(low, high)).dense()
        low = high
    assert_close(effective(method.merge_module(state, fleet)), best_of_rank(target, RANK))


def test_raflora_at_equal_ranks_is_flexlora():
    flex, raf, state = method_of("flexlora"), method_of("raflora"), state_of()
    fleet = whole_fleet(flex, state)
    assert_close(
        effective(raf.merge_module(state, fleet)), effective(flex.merge_module(state, fleet))
    )


@pytest.mark.parametrize("energy", [0.3, 0.8, 0.95, 0.999])
def test_florist_keeps_the_fewest_rows_that_hold_the_energy(energy):
    method, state = method_of("florist", energy=energy), state_of()
    fleet = fleet_of(method, state)
    merged = method.merge_module(state, fleet)
    values = np.linalg.svd(ideal(fleet), compute_uv=False)
    held = np.cumsum(values**2) / (values**2).sum()
    kept = min(RANK, 1 + int(np.searchsorted(held, energy)))
    assert_close(effective(merged), best_of_rank(ideal(fleet), kept))
    assert not merged.adapter.up[kept:].any() and not merged.adapter.down[kept:].any()
    assert merged.adapter.up[:kept].any(axis=1).all()


# FLoRA, FedEx-LoRA: the side branch --------------------------------------------------------------


@pytest.mark.parametrize("out", [OUT, 2, 3])
def test_flora_adds_the_stack_of_fresh_adapters_whatever_the_ranks(out):
    """Also where a device's rank is the layer's own width: roles are not told by shapes."""
    method, state = method_of("flora"), state_of(out=out)
    first = fleet_of(method, state)
    one = method.merge_module(state, first)
    assert_close(effective(one) - effective(state), ideal(first))
    second = fleet_of(method, one, seed=1)
    two = method.merge_module(one, second)
    assert_close(effective(two) - effective(state), ideal(first) + ideal(second))
    assert_same_bits(two, state)
    assert two.side.rank == 2 * (2 + 3 + 4 + 6)


def test_flora_beyond_its_budget_keeps_the_largest_components_of_the_whole_branch():
    method, state = method_of("flora", side_rank=5), state_of()
    blank = ModuleState(Bundle(0 * state.adapter.up, state.adapter.down, state.adapter.scale))
    fleet = fleet_of(method, blank)
    one = method.merge_module(blank, fleet)
    assert one.side.rank == 5
    assert_close(one.side.dense(), best_of_rank(ideal(fleet), 5))
    again = fleet_of(method, one, seed=1)
    two = method.merge_module(one, again)
    assert_close(two.side.dense(), best_of_rank(one.side.dense() + ideal(again), 5))
    assert METHODS["flora"](MethodOptions(rank=7)).budget == 28


@pytest.mark.parametrize(("out", "in_"), [(OUT, IN), (IN, OUT), (16, 16), (RANK, IN)])
def test_fedex_lora_is_fedit_and_a_residual_that_makes_it_exact(out, in_):
    """On a square layer a transposed residual would pass every check of shapes."""
    method, state = method_of("fedex-lora"), state_of(out=out, in_=in_)
    total = 0.0
    for round_ in range(3):
        fleet = whole_fleet(method, state, seed=round_)
        merged = method.merge_module(state, fleet)
        side = 0.0 if state.side is None else state.side.dense()
        assert_close(effective(merged), side + ideal(fleet))
        assert_same_bits(merged, method_of("fedit").merge_module(state, fleet))
        total += 3 * RANK
        assert merged.side.rank == total, "(U - 1) r rows a round, not U r"
        state = merged


def test_fedex_lora_beyond_its_budget_keeps_the_best_of_the_residual():
    method, state = method_of("fedex-lora", side_rank=5), state_of()
    fleet = whole_fleet(method, state)
    merged = method.merge_module(state, fleet)
    residual = ideal(fleet) - method_of("fedit").merge_module(state, fleet).product.dense()
    assert_close(merged.side.dense(), best_of_rank(residual, 5), 1e-4)
    alone = method.merge_module(merged, [update_of(method, merged, "a")])
    assert alone.side is merged.side, "a single device leaves no residual"


@pytest.mark.parametrize("name", ["fedex-lora", "lora-fair", "flora-na"])
def test_a_late_whole_update_counts_as_its_change_on_todays_model(name):
    """As in a mean of changes; else the fit would be to a mean that is not the one taken."""
    method, old, state = method_of(name), state_of(), state_of(seed=1)
    fleet = whole_fleet(method, state)
    late = update_of(method, old, "d1", weight=fleet[1].weight)
    np.testing.assert_array_equal(late.delta["up"], fleet[1].delta["up"])
    mixed = method.merge_module(state, [fleet[0], late, *fleet[2:]])
    assert_close(effective(mixed), effective(method.merge_module(state, fleet)))


def peft_layer(fleet, combination, **extra):
    """PEFT's own merge of the devices' adapters, as a dense matrix."""
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    out, in_ = fleet[0].trained.adapter.up.shape[1], fleet[0].trained.adapter.down.shape[1]
    model = torch.nn.Sequential(torch.nn.Linear(in_, out, bias=False))
    wrapped = None
    for update in fleet:
        s, b, a = factors(update)
        config = peft.LoraConfig(r=update.k, lora_alpha=s * update.k, target_modules=["0"])
        if wrapped is None:
            wrapped = peft.get_peft_model(model, config, adapter_name=update.device_id)
        else:
            wrapped.add_adapter(update.device_id, config)
        layer = wrapped.base_model.model[0]
        layer.lora_B[update.device_id].weight.data = torch.tensor(b, dtype=torch.float32)
        layer.lora_A[update.device_id].weight.data = torch.tensor(a, dtype=torch.float32)
    names = [update.device_id for update in fleet]
    wrapped.add_weighted_adapter(names, shares_of(fleet).tolist(), "merged", combination, **extra)
    return layer.get_delta_weight("merged").detach().numpy().astype(np.float64)


def test_flora_is_pefts_cat():
    method, state = method_of("flora"), state_of()
    fleet = fleet_of(method, state)
    merged = method.merge_module(state, fleet)
    assert_close(merged.side.dense(), peft_layer(fleet, "cat"))


def test_flexlora_is_pefts_svd():
    method, state = method_of("flexlora"), state_of()
    fleet = fleet_of(method, state)
    merged = method.merge_module(state, fleet)
    assert_close(effective(merged), peft_layer(fleet, "svd", svd_rank=RANK))


# LoRA-FAIR ---------------------------------------------------------------------------------------


def fair_parts(regularisation, seed=0):
    """(merged B, its A, mean B, mean A, sum p_i B_i A_i) of a fleet."""
    method, state = method_of("lora-fair", regularisation=regularisation), state_of()
    fleet = whole_fleet(method, state, seed=seed)
    merged = method.merge_module(state, fleet).adapter
    b, a = means(fleet)
    return merged.up.T.astype(np.float64), merged.down, b, a, ideal(fleet) / state.adapter.scale


@pytest.mark.parametrize("regularisation", [0.0, 0.01, 1.0, 100.0])
def test_lora_fair_is_where_the_gradient_of_its_objective_is_zero(regularisation):
    """By autograd, with no closed form: ||B A - target||^2 + lambda ||B - mean B||^2."""
    torch = pytest.importorskip("torch")
    found, down, b, a, target = fair_parts(regularisation)
    np.testing.assert_allclose(down, a, atol=1e-6)

    def gradient(at):
        x = torch.tensor(at, requires_grad=True)
        fit = torch.linalg.norm(x @ torch.tensor(a) - torch.tensor(target)) ** 2
        (fit + regularisation * torch.linalg.norm(x - torch.tensor(b)) ** 2).backward()
        return np.linalg.norm(x.grad.numpy())

    assert gradient(found) < 1e-4 * gradient(b)


def test_lora_fair_is_fedit_for_large_lambda_and_least_squares_for_none():
    found, _, b, _, _ = fair_parts(1e12)
    np.testing.assert_allclose(found, b, atol=1e-5)
    found, _, b, a, target = fair_parts(0.0)
    np.testing.assert_allclose(found, np.linalg.lstsq(a.T, target.T)[0].T, atol=1e-4)
    assert np.linalg.norm(found @ a - target) < np.linalg.norm(b @ a - target)


def test_lora_fair_without_lambda_takes_dependent_rows():
    method, state = method_of("lora-fair", regularisation=0.0), state_of()
    state.adapter.down[1] = state.adapter.down[0]
    fleet = whole_fleet(method, state)
    for update in fleet:
        update.delta["down"][1] = update.delta["down"][0]
    merged = method.merge_module(state, fleet)
    b, a = means(fleet)
    target = ideal(fleet) / state.adapter.scale
    found = merged.adapter.up.T.astype(np.float64)
    best = np.linalg.lstsq(a.T, target.T)[0].T
    error, least = (np.linalg.norm(x @ a - target) for x in (found, best))
    assert error == pytest.approx(least, rel=1e-4)
    assert np.linalg.norm(found - b) < 10 * np.linalg.norm(b), "of many solutions a near one"


# FLoRA-NA ----------------------------------------------------------------------------------------


def na_case(rank, out, in_, count, drift, seed):
    method, state = method_of("flora-na", rank), state_of(rank, out, in_, seed)
    return method, state, whole_fleet(method, state, count, size=drift, seed=seed)


NA_CASES = [
    (4, 64, 96, 3, 0.05), (4, 64, 96, 3, 1.0), (4, 64, 96, 10, 0.5), (2, 12, 10, 4, 2.0),
    (1, 6, 5, 3, 3.0), (6, 6, 23, 5, 0.5), (3, 9, 2, 4, 1.0), (4, 20, 20, 2, 1e-3),
]  # fmt: skip


@pytest.mark.parametrize("case", NA_CASES, ids=str)
@pytest.mark.parametrize("seed", range(5))
def test_flora_na_lies_between_the_best_approximation_and_fedit(case, seed):
    _, state, fleet = na_case(*case, seed)
    target = ideal(fleet)

    def error(name):
        merged = method_of(name, case[0]).merge_module(state, fleet)
        return np.linalg.norm(effective(merged) - target) / np.linalg.norm(target)

    assert error("flexlora") <= error("flora-na") + 1e-6
    assert error("flora-na") <= error("fedit")


def na_inputs(case, seed):
    _, _, fleet = na_case(*case, seed)
    return fleet, [update.trained.adapter for update in fleet], shares_of(fleet)


def na_objective(fleet, u, v):
    """Dense: ||(sum u_i B_i)(sum v_i A_i) - sum p_i B_i A_i||^2."""
    b = sum(w * factors(x)[1] for w, x in zip(u, fleet, strict=True))
    a = sum(w * factors(x)[2] for w, x in zip(v, fleet, strict=True))
    wanted = sum(
        w * factors(x)[1] @ factors(x)[2] for w, x in zip(shares_of(fleet), fleet, strict=True)
    )
    return float(np.linalg.norm(b @ a - wanted) ** 2)


@pytest.mark.parametrize("case", NA_CASES[1:5], ids=str)
def test_flora_na_improves_with_every_sweep_and_stays_bounded(case, monkeypatch):
    fleet, bundles, p = na_inputs(case, 2)
    objectives = [na_objective(fleet, p, p)]
    for sweeps in range(1, 8):
        monkeypatch.setattr(flora_na, "SWEEPS", sweeps)
        u, v = flora_na.fitted(bundles, p)
        objectives.append(na_objective(fleet, u, v))
        assert v.sum() == pytest.approx(1)
        assert np.abs(u).sum() * np.abs(v).sum() <= flora_na.LIMIT * (1 + 1e-9)
    slack = 1e-9 * objectives[0]
    assert all(later <= earlier + slack for earlier, later in itertools.pairwise(objectives))
    assert objectives[-1] < objectives[0]


def test_flora_na_bounds_what_a_device_can_be_amplified_by():
    """Two devices that all but cancel would be fitted by large weights of opposite sign."""
    rng, bound = np.random.default_rng(0), []
    b, c, a, d = (rng.normal(size=(2, width)) for width in (8, 8, 9, 9))
    bundles = [
        Bundle(up.astype(np.float32), down.astype(np.float32), 1.0)
        for up, down in ((b, a), (b + 0.05 * c, 5 * d), (b - 0.05 * c, -5 * d))
    ]
    p = np.full(3, 1 / 3)
    for limit in (1e9, 2.0, 1.2):
        flora_na.LIMIT, kept = limit, flora_na.LIMIT
        try:
            found = flora_na.fitted(bundles, p)
        finally:
            flora_na.LIMIT = kept
        u, v = found if found is not None else (p, p)
        bound.append(np.abs(u).sum() * np.abs(v).sum())
    assert bound[0] > 2.1
    assert bound[1:] == [pytest.approx(2.0), pytest.approx(1.2)]


@pytest.mark.parametrize("case", NA_CASES[:6], ids=str)
def test_flora_nas_gram_objective_is_the_dense_one(case):
    fleet, bundles, p = na_inputs(case, 3)
    rng = np.random.default_rng(0)
    u, v = rng.normal(size=len(p)), rng.normal(size=len(p))
    ups, downs = (flora_na._blocks(g, len(p)) for g in flora_na.gram_blocks(*bundles))
    target = na_objective(fleet, 0 * u, 0 * v)
    for near, far, x, y in ((ups, downs, u, v), (downs, ups, v, u)):
        value, _, _ = flora_na._half(near, far, x, y, p)
        assert value + target == pytest.approx(na_objective(fleet, u, v), rel=1e-10)


@pytest.mark.parametrize("case", NA_CASES[1:5], ids=str)
def test_flora_na_is_as_good_as_gradient_descent_from_many_starts(case):
    torch = pytest.importorskip("torch")
    fleet, bundles, p = na_inputs(case, 1)
    b = torch.tensor(np.stack([factors(x)[1] for x in fleet]))
    a = torch.tensor(np.stack([factors(x)[2] for x in fleet]))
    wanted, best = torch.einsum("i,imr,irn->mn", torch.tensor(p), b, a), np.inf
    rng = np.random.default_rng(0)
    for start in range(8):
        noise = 0.5 * (start > 0)
        u, v = (torch.tensor(p + noise * rng.normal(size=len(p)), requires_grad=True) for _ in "uv")
        descent = torch.optim.LBFGS([u, v], max_iter=300, line_search_fn="strong_wolfe")

        def loss(u=u, v=v, descent=descent):
            descent.zero_grad()
            found = torch.einsum("i,imr->mr", u, b) @ torch.einsum("i,irn->rn", v, a)
            value = ((found - wanted) ** 2).sum()
            value.backward()
            return value

        descent.step(loss)
        best = min(best, float(loss().detach()))
    assert na_objective(fleet, *flora_na.fitted(bundles, p)) <= best * 1.001


def test_flora_na_of_parallel_devices_is_fedit_bit_for_bit():
    method, state = method_of("flora-na"), state_of()
    update = update_of(method, state, "a")
    twins = [dataclasses.replace(update, device_id=f"d{i}", weight=1.0 + i) for i in range(4)]
    fedit = method_of("fedit").merge_module(state, twins)
    assert_same_bits(method.merge_module(state, twins), fedit)


# Fed-SB ------------------------------------------------------------------------------------------


def bases_of(method, state, sizes=(6, 6, 6)):
    """The module after the round that finds the bases."""
    return method.merge_module(state, fleet_of(method, state, sizes))


def core_update(method, state, device, k, weight=1.0):
    rng = np.random.default_rng([9, *device.encode()])
    delta = {"core": rng.normal(size=(k, k)).astype(np.float32)}
    return update_of(method, state, device, k, weight=weight, delta=delta)


def test_fed_sb_takes_its_bases_from_the_singular_vectors_of_the_first_mean():
    method, state = method_of("fed-sb"), state_of()
    fleet = fleet_of(method, state)
    merged = method.merge_module(state, fleet)
    left, values, right = np.linalg.svd(ideal(fleet))
    assert_close(effective(merged), best_of_rank(ideal(fleet), RANK))
    for basis, wanted in ((merged.adapter.up, left.T), (merged.adapter.down, right)):
        np.testing.assert_allclose(basis @ basis.T, np.eye(RANK), atol=1e-5)
        np.testing.assert_allclose(np.abs(np.sum(basis * wanted[:RANK], axis=1)), 1, atol=1e-4)
    core = np.abs(merged.core) * merged.adapter.scale
    np.testing.assert_allclose(core, np.diag(values[:RANK]), atol=1e-4 * values[0])


def test_fed_sb_averages_whole_cores_exactly_and_leaves_the_bases():
    method = method_of("fed-sb")
    state = bases_of(method, state_of())
    assert method.sent(1) == ("core",) and method.parts(1)[-1] == "core"
    fleet = [core_update(method, state, f"d{i}", RANK, 1.0 + i) for i in range(3)]
    merged = method.merge_module(state, fleet, 1)
    wanted = sum(p * u.trained.core for p, u in zip(shares_of(fleet), fleet, strict=True))
    np.testing.assert_allclose(merged.core, wanted, atol=1e-6)
    models = sum(
        p * u.trained.product.dense() for p, u in zip(shares_of(fleet), fleet, strict=True)
    )
    assert_close(effective(merged), models)
    assert_same_bits(merged, state)


def test_fed_sb_averages_each_entry_of_leading_blocks_over_those_who_hold_it():
    method = method_of("fed-sb")
    state = bases_of(method, state_of())
    fleet = [core_update(method, state, f"d{k}", k, 1.0 + k) for k in (2, 3, 5)]
    merged = method.merge_module(state, fleet, 1)
    for i, j in itertools.product(range(RANK), repeat=2):
        own = [u for u in fleet if u.k > max(i, j)]
        total = sum(u.weight for u in own)
        change = sum(u.weight * u.delta["core"][i, j] for u in own) / total if own else 0.0
        assert merged.core[i, j] == pytest.approx(state.core[i, j] + change, abs=1e-6)
    for update in fleet:  # a block is the same function at the device's own scale
        s, b, a = factors(update)
        handed = s * b @ update.begin().core.T.T @ a
        k = update.k
        whole = state.adapter.scale * (
            state.adapter.up[:k].T.astype(float) @ state.core[:k, :k] @ state.adapter.down[:k]
        )
        assert_close(handed, whole)


@pytest.mark.parametrize(("out", "in_"), [(OUT, IN), (RANK, IN), (4, IN), (OUT, 3)])
def test_fed_sbs_bases_are_complete_where_the_first_mean_has_few_components(out, in_):
    """Every entry of the core must have a gradient, as far as the layer has directions."""
    method, state = method_of("fed-sb"), state_of(out=out, in_=in_)
    for sizes in ((2,), (1, 2)):
        fleet = fleet_of(method, state, sizes)
        merged = method.merge_module(state, fleet)
        assert_close(effective(merged), ideal(fleet))
        for basis, width in ((merged.adapter.up, out), (merged.adapter.down, in_)):
            values = np.linalg.svd(basis.astype(float), compute_uv=False)
            np.testing.assert_allclose(values[: min(RANK, width)], 1, atol=1e-5)
            if width > 2 * RANK:  # completed by directions of many features, not by single ones
                assert np.abs(basis[sum(sizes) :]).max() < 0.8
    still = method.merge_module(state, fleet_of(method, state, (2,), size=0.0))
    assert_close(effective(still), state.adapter.take(np.arange(2)).dense())


def test_fed_sb_refuses_factors_once_the_bases_are_fixed_and_cores_before():
    method, state = method_of("fed-sb"), state_of()
    fixed = bases_of(method, state)
    with pytest.raises(UpdateError, match="late is from before"):
        method.merge_module(fixed, [update_of(method, state, "late")], 1)
    early = core_update(method, fixed, "early", RANK)
    with pytest.raises(UpdateError, match="core"):
        method.merge_module(state, [early])


# The sandwich of all -----------------------------------------------------------------------------


def test_errors_are_ordered_as_the_mathematics_says():
    """Exact methods, then the best of rank r, then those that fit fewer numbers, then FedIT."""
    state = state_of()
    fleet = whole_fleet(method_of("fedit"), state, size=1.0)
    target = ideal(fleet)

    def error(name, **options):
        merged = method_of(name, **options).merge_module(state, fleet)
        return np.linalg.norm(effective(merged) - target) / np.linalg.norm(target)

    assert error("fedex-lora") < 1e-6
    best = error("flexlora")
    stacked = stack([update.trained.product for update in fleet], shares_of(fleet).tolist())
    assert best == pytest.approx(truncate(stacked, RANK).error, rel=1e-4)
    assert best < error("lora-fair", regularisation=0.0) < error("fedit")
    assert best < error("flora-na") < error("fedit")
