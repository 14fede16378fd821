"""What every method promises, whichever paper it follows: entering it in METHODS is enough.

Fleets are built from a method's declarations alone, as the loop builds them: the rows it chooses,
what it cuts out for them, the parts it asks for.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.lowrank import Bundle
from coordinator.methods import (
    METHODS,
    MethodOptions,
    ModuleState,
    ModuleUpdate,
    RowMethod,
    UpdateError,
    WeightError,
    make,
)
from coordinator.server_optimizer import make_optimizer
from profiles.model import ModuleShape
from protos.contract import AdapterSpec, Payload
from protos.layout import packed_bytes
from protos.packing import pack
from protos.sketch import initial_down, sketch_rows

RANK = 6
SIZES = (2, 3, 4, 6)  # k of a mixed fleet
AMPLE = 1000  # rows of a side branch that no test fills
VARIANTS = {
    "fslora": [
        {"normalisation": rule, "sketches": how}
        for rule in ("none", "ipw", "coverage")
        for how in ("stratified", "independent")
    ],
    "fed-plora": [{"sketches": "stratified"}, {"sketches": "independent"}],
    "florist": [{"energy": 1.0}, {"energy": 0.9}],
    "flora": [{}, {"side_rank": 2 * RANK}],
    "fedex-lora": [{}, {"side_rank": 2 * RANK}],
    "lora-fair": [{"regularisation": 0.0}, {"regularisation": 0.1}],
}
CASES = [(name, changes) for name in METHODS for changes in VARIANTS.get(name, [{}])]


def label(case):
    return "-".join([case[0], *map(str, case[1].values())])


every_method = pytest.mark.parametrize("case", CASES, ids=label)
every_name = pytest.mark.parametrize("name", METHODS)
versions = pytest.mark.parametrize("version", [0, 1, 2])


def build(case, rank=RANK):
    name, changes = case
    return make(name, MethodOptions(rank=rank, **{"side_rank": AMPLE, **changes}))


def make_spec(out=5, in_=9, rank=RANK, rslora=False):
    shape = ModuleShape("m", out, in_)  # not square: a transposed factor cannot pass
    return AdapterSpec("run", "base", "main", "00", rank, 12.0, rslora, 3, (shape,))


def roomy_spec(method):
    """A layer larger than the rank, unless the budget of a side branch would lose something."""
    return make_spec(20, 31) if getattr(method, "budget", AMPLE) >= AMPLE else make_spec(5, 9)


def initial(spec):
    (shape,) = spec.modules
    up = np.zeros((spec.rank, shape.out_features), np.float32)
    down = initial_down(spec.seed, "m", spec.rank, shape.in_features)
    return ModuleState(Bundle(up, down, spec.scale(spec.rank)))


def make_update(method, spec, state, version, device="a", k=None, *, weight=1.0, size=0.1, place=0):
    """A device that trains at random; `place` is where its sketch begins."""
    k = spec.rank if k is None else k
    (shape,), scale = spec.modules, method.device_scale(spec, k)
    rng = np.random.default_rng([version, *device.encode()])
    rows = np.arange(k)
    if method.rows != "prefix":
        own = device if method.rows == "independent" else ""
        rows = sketch_rows(spec.seed, version, "m", spec.rank, place, k, device_id=own)

    def begin():
        if not method.fresh:
            return method.cut(state, rows, scale)
        drawn = {"round_": version, "device_id": device}
        down = initial_down(spec.seed, "m", k, shape.in_features, **drawn)
        return ModuleState(Bundle(np.zeros((k, shape.out_features), np.float32), down, scale))

    widths = {"up": shape.out_features, "down": shape.in_features, "core": k}
    delta = {
        part: (size * rng.normal(size=(k, widths[part]))).astype(np.float32)
        for part in method.sent(version)
    }
    lift = scale / state.adapter.scale if method.scaling == "common" else 1.0
    return ModuleUpdate(device, rows, begin, delta, weight, lift)


def make_fleet(method, spec, state, version, **changes):
    """Four devices of unequal weight, of unequal k where the method allows it."""
    sizes = [min(k, spec.rank) for k in SIZES] if method.heterogeneous else [spec.rank] * 4
    return [
        make_update(method, spec, state, version, f"device-{i}", k, weight=0.1 + i / 3,
                    place=sum(sizes[:i]), **changes)
        for i, k in enumerate(sizes)
    ]  # fmt: skip


def state_at(method, spec, version):
    """The model after so many rounds of the mixed fleet."""
    state = initial(spec)
    for before in range(version):
        state = method.merge_module(state, make_fleet(method, spec, state, before), before)
    return state


def effective(state):
    """What acts beside the base, (m, n)."""
    side = 0.0 if state.side is None else state.side.dense()
    return state.product.dense() + side


def device_model(method, state, update):
    """What acted beside the base on a device when it had trained: slice and branch, (m, n)."""
    branch = method.branch(state, update.rows)
    return update.trained.product.dense() + (0.0 if branch is None else branch.dense())


def assert_same_bits(a, b):
    assert a.adapter.scale == b.adapter.scale
    for one, other in zip(arrays(a), arrays(b), strict=True):
        assert one.dtype == other.dtype == np.float32
        assert one.tobytes() == other.tobytes()


def arrays(state):
    found = [state.adapter.up, state.adapter.down]
    found += [] if state.core is None else [state.core]
    found += [] if state.side is None else [state.side.up, state.side.down]
    return found


def assert_close(found, wanted, rtol=1e-5):
    """As matrices: relative to the norm of what was wanted."""
    assert np.linalg.norm(found - wanted) <= rtol * (np.linalg.norm(wanted) + 1e-6)


# The merge ---------------------------------------------------------------------------------------


@every_method
@versions
def test_order_of_clients_does_not_change_a_bit(case, version):
    method, spec = build(case), make_spec()
    state = state_at(method, spec, version)
    fleet = make_fleet(method, spec, state, version)
    first = method.merge_module(state, fleet, version)
    for order in itertools.permutations(fleet):
        assert_same_bits(method.merge_module(state, order, version), first)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, RANK), st.floats(0.01, 50)), min_size=1, max_size=6),
    st.sampled_from(CASES),
    st.randoms(use_true_random=False),
)
def test_any_fleet_merges_alike_in_any_order(devices, case, shuffler):
    method, spec = build(case), make_spec(7, 8)
    state = state_at(method, spec, 1)
    fleet = [
        make_update(method, spec, state, 1, f"d{i}", k if method.heterogeneous else RANK,
                    weight=weight, place=i)
        for i, (k, weight) in enumerate(devices)
    ]  # fmt: skip
    first = method.merge_module(state, fleet, 1)
    assert all(np.isfinite(values).all() for values in arrays(first))
    shuffler.shuffle(fleet)
    assert_same_bits(method.merge_module(state, fleet, 1), first)


@every_method
@versions
def test_merging_again_gives_the_same_bits_and_leaves_its_input(case, version):
    method, spec = build(case), make_spec()
    state, before = state_at(method, spec, version), state_at(method, spec, version)
    first = method.merge_module(state, make_fleet(method, spec, state, version), version)
    assert_same_bits(state, before)
    again = build(case)
    fleet = make_fleet(again, spec, before, version)
    assert_same_bits(again.merge_module(before, fleet, version), first)


@every_method
@pytest.mark.parametrize(
    ("out", "in_"),
    [
        (5, 9),
        (9, 5),
        (20, 31),
        (31, 20),
        (8, 8),
        (RANK, 9),
        (9, RANK),
        (RANK, RANK),
        (2, 3),
        (1, 1),
    ],
)
def test_result_has_the_parts_shapes_and_types_that_were_declared(case, out, in_):
    """Whatever the layer's shape; one side as large as the rank is where roles get mixed up."""
    method, spec = build(case), make_spec(out, in_)
    widths, state = {"up": out, "down": in_, "core": RANK}, initial(spec)
    for version in range(3):
        fleet = make_fleet(method, spec, state, version)
        state, before = method.merge_module(state, fleet, version), state
        _assert_declared(method, version + 1, state, before, widths)


def _assert_declared(method, version, merged, state, widths):
    for part in ("up", "down", "core"):
        if part in method.parts(version):
            assert merged.values(part).shape == (RANK, widths[part])
        else:
            assert part == "core" and merged.core is None
    assert merged.adapter.scale == state.adapter.scale
    assert all(values.dtype == np.float32 for values in arrays(merged))
    if merged.side is not None:
        assert merged.side.scale == 1.0
        assert merged.side.up.shape[1] == widths["up"]
        assert merged.side.down.shape[1] == widths["down"]
        assert merged.side.rank <= getattr(method, "budget", 0)


@every_method
@versions
def test_a_single_whole_client_becomes_the_model(case, version):
    method, spec = build(case), make_spec(11, 13)
    state = state_at(method, spec, version)
    update = make_update(method, spec, state, version, weight=17.0)
    merged = method.merge_module(state, [update], version)
    if method.has_global:
        lost = math.sqrt(1 - getattr(method, "energy", 1.0))
        assert_close(effective(merged), device_model(method, state, update), 1e-5 + lost)
    for part in set(method.sent(version)) - {"core"}:
        if not method.has_global:
            wanted = state.values(part) + update.delta[part]
            np.testing.assert_allclose(merged.values(part), wanted, atol=1e-6)


@every_method
@versions
def test_a_single_small_client_moves_its_own_rows_by_what_it_trained(case, version):
    """At the global scale; where rows dilute, those it lacks are gone."""
    method = build(case)
    spec = roomy_spec(method)
    if not method.heterogeneous or getattr(method, "normalisation", "") == "ipw":
        return
    state = state_at(method, spec, version)
    for k in (1, 3, 5):
        update = make_update(method, spec, state, version, k=k)
        merged = method.merge_module(state, [update], version)
        shrink = k / RANK if method.scaling == "sketch" else 1.0
        started, trained = (shrink * s.product.dense() for s in (update.begin(), update.trained))
        wanted = trained if method.dilutes else effective(state) + trained - started
        assert_close(effective(merged), wanted, 1e-5 + math.sqrt(1 - getattr(method, "energy", 1)))


@every_method
@versions
def test_identical_clients_become_the_model_and_leave_no_error(case, version):
    method, spec = build(case), make_spec()  # a rank beyond the layer's: nothing is truncated
    state = state_at(method, spec, version)
    update = make_update(method, spec, state, version)
    twins = [dataclasses.replace(update, device_id=f"d{i}", weight=i + 0.3) for i in range(3)]
    merged = method.merge_module(state, twins, version)
    if method.has_global:
        lost = math.sqrt(1 - getattr(method, "energy", 1.0))
        assert_close(effective(merged), device_model(method, state, update), 1e-5 + lost)
    for part in set(method.sent(version)) - {"core"}:
        if not method.has_global:
            wanted = state.values(part) + update.delta[part]
            np.testing.assert_allclose(merged.values(part), wanted, atol=1e-6)


@every_method
@versions
def test_a_client_of_weight_zero_does_not_change_a_bit(case, version):
    method, spec = build(case), make_spec()
    state = state_at(method, spec, version)
    fleet = make_fleet(method, spec, state, version)
    ghost = make_update(method, spec, state, version, "device-1b", weight=0.0, size=9.0)
    alone = method.merge_module(state, fleet, version)
    assert_same_bits(method.merge_module(state, [ghost, *fleet], version), alone)


@every_method
def test_only_the_ratio_of_weights_counts(case):
    method, spec = build(case), make_spec()
    state = state_at(method, spec, 1)
    fleet = make_fleet(method, spec, state, 1)
    scaled = [dataclasses.replace(u, weight=1000 * u.weight) for u in fleet]
    one, other = (method.merge_module(state, updates, 1) for updates in (fleet, scaled))
    assert_close(effective(one), effective(other))


@every_method
@versions
def test_nothing_trained_moves_nothing_unless_the_method_dilutes(case, version):
    """Slices handed out and received unchanged, of all sizes: their scales must cancel."""
    method = build(case)
    spec = roomy_spec(method)
    if method.has_global and getattr(method, "energy", 1.0) == 1.0:
        state = state_at(method, spec, version)
        still = make_fleet(method, spec, state, version, size=0.0)
        merged = method.merge_module(state, still, version)
        if method.dilutes and version:
            shrunk = np.linalg.norm(effective(merged)) / np.linalg.norm(effective(state))
            assert shrunk < 0.99
        else:
            assert_close(effective(merged), effective(state))


@every_method
def test_a_method_is_exact_where_it_says_so(case):
    """The model is the mean of the devices' models in weight space."""
    method = build(case)
    spec = roomy_spec(method)
    for version in (1, 2, 3):
        state = state_at(method, spec, version)
        fleet = [
            make_update(method, spec, state, version, f"d{i}", weight=1 + i, size=0.5)
            for i in range(3)
        ]
        merged = method.merge_module(state, fleet, version)
        ideal = sum(u.weight / 6 * device_model(method, state, u) for u in fleet)
        if method.exact:
            assert_close(effective(merged), ideal)
        elif method.has_global:
            with pytest.raises(AssertionError):  # else it should say so
                assert_close(effective(merged), ideal, 1e-3)


# What is refused ---------------------------------------------------------------------------------


@every_method
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("version", [0, 1])
def test_values_that_are_not_finite_are_refused(case, version, bad):
    method, spec = build(case), make_spec()
    state = state_at(method, spec, version)
    for part in method.sent(version):
        fleet = make_fleet(method, spec, state, version)
        fleet[2].delta[part][1, 2] = bad
        with pytest.raises(UpdateError, match="device-2"):
            method.merge_module(state, fleet, version)


@every_method
@pytest.mark.parametrize("version", [0, 1])
def test_sums_beyond_float32_are_refused(case, version):
    method, spec = build(case), make_spec()
    state = state_at(method, spec, version)
    update = make_update(method, spec, state, version)
    if method.fresh:  # nothing is there to be added to; the product of the two exceeds float32
        begun = update.begin()
        begun.adapter.down[:] = 3e38
        update = dataclasses.replace(update, begin=lambda: begun)
    for part in update.delta:
        state.values(part)[:] = update.delta[part][:] = 3e38
    with pytest.raises(UpdateError):
        method.merge_module(state, [update], version)


@every_method
@pytest.mark.parametrize(
    "weights", [(0, 0), (1, -1), (1, np.nan), (np.inf, 1), (1e308, 1e308), ()], ids=str
)
def test_weights_that_make_no_mean_are_refused(case, weights):
    method, spec = build(case), make_spec()
    state = initial(spec)
    updates = [
        make_update(method, spec, state, 0, f"d{i}", weight=w) for i, w in enumerate(weights)
    ]
    with pytest.raises(WeightError):
        method.merge_module(state, updates)


@every_method
@pytest.mark.parametrize("version", [0, 1])
def test_updates_that_do_not_fit_the_module_are_refused(case, version):
    method, spec = build(case), make_spec()
    state = state_at(method, spec, version)
    good = make_update(method, spec, state, version)
    wrong = [
        dataclasses.replace(good, rows=good.rows[:3]),
        dataclasses.replace(good, rows=good.rows + 1),
        dataclasses.replace(good, rows=good.rows * 0),
        dataclasses.replace(good, rows=good.rows[::-1]),
        dataclasses.replace(good, rows=good.rows[:0]),
        dataclasses.replace(good, rows=good.rows[None]),
        dataclasses.replace(good, delta={}),
    ]
    wrong += [
        dataclasses.replace(good, delta={part: values[:, :-1]})
        for part, values in good.delta.items()
    ]
    for update in wrong:
        with pytest.raises(UpdateError):
            method.merge_module(state, [update], version)
    with pytest.raises(UpdateError):
        method.merge_module(state, [dataclasses.replace(good, delta={"dense": np.zeros((1, 1))})])


@every_method
@versions
def test_unequal_devices_are_taken_or_refused_as_declared(case, version):
    method, spec = build(case), make_spec()
    state = state_at(method, spec, version)
    small = make_update(method, spec, state, version, k=3)
    if method.heterogeneous:
        method.merge_module(state, [small], version)
    else:
        with pytest.raises(UpdateError, match="assign k=6"):
            method.merge_module(state, [small], version)


@every_method
@versions
def test_a_late_update_is_added_or_refused(case, version):
    """It was cut from the model of the round before, when other parts may have been trained."""
    method, spec = build(case), make_spec()
    old, new = (state_at(method, spec, v) for v in (version, version + 1))
    late = make_update(method, spec, old, version, "late")
    fresh = make_update(method, spec, new, version + 1, "fresh")
    try:
        merged = method.merge_module(new, [late, fresh], version + 1)
    except UpdateError as refusal:
        assert "late" in str(refusal)
    else:
        assert all(np.isfinite(values).all() for values in arrays(merged))


# Degenerate models -------------------------------------------------------------------------------


@every_method
@versions
def test_a_round_that_learned_nothing_leaves_a_model_that_can_learn(case, version):
    """A row of zeros on both sides has no gradient; not all rows may become so."""
    method, spec = build(case), make_spec(20, 31)
    state = initial(spec)
    for before in range(version + 1):
        fleet = make_fleet(method, spec, state, before, size=0.0)
        state = method.merge_module(state, fleet, before)
    assert all(np.isfinite(values).all() for values in arrays(state))
    assert not effective(state).any()
    alive = np.any(state.adapter.up, axis=1) | np.any(state.adapter.down, axis=1)
    assert alive.all()


@every_method
@versions
def test_factors_of_low_rank_or_zero_merge_to_finite_values(case, version):
    method, spec = build(case), make_spec(20, 31)
    state = state_at(method, spec, version)
    for change in (lambda v: v[:1].repeat(len(v), axis=0), np.zeros_like, lambda v: 1e-30 * v):
        fleet = make_fleet(method, spec, state, version)
        for update in fleet:
            for part in update.delta:
                update.delta[part][:] = change(update.delta[part])
        merged = method.merge_module(state, fleet, version)
        assert all(np.isfinite(values).all() for values in arrays(merged))
    dead = ModuleState(
        Bundle(0 * state.adapter.up, 0 * state.adapter.down, state.adapter.scale),
        core=None if state.core is None else 0 * state.core,
    )
    merged = method.merge_module(dead, make_fleet(method, spec, dead, version, size=0.0), version)
    assert all(np.isfinite(values).all() for values in arrays(merged))


# What travels ------------------------------------------------------------------------------------


@every_method
@versions
def test_bytes_are_those_of_what_the_method_sends(case, version):
    method, spec = build(case), make_spec()
    state = state_at(method, spec, version)
    sizes = (2, RANK) if method.heterogeneous else (RANK,)
    for k, encoding in itertools.product(sizes, ("float32", "bfloat16", "int8")):
        update = make_update(method, spec, state, version, k=k)
        up = Payload(k, encoding, method.sent(version), method.density)
        found = [(up, len(pack(spec, up, {"m": update.delta})))]
        for file in method.files(version):
            down = Payload(k, encoding, file, method.density)
            values = {part: update.begin().values(part) for part in file}
            found.append((down, len(pack(spec, down, {"m": values}))))
        for payload, size in found:  # where values are left out, which ones takes some bytes
            most = packed_bytes(spec, payload)
            assert size == most if method.density == 1 else size <= most


@every_method
def test_a_side_branch_has_the_same_rank_in_modules_of_any_shape(case):
    """The modules of a version lie in one file."""
    ranks = set()
    for out, in_ in ((14, 23), (3, 2), (40, 6)):
        method = build(case)
        side = state_at(method, make_spec(out, in_), 3).side
        ranks.add(None if side is None else side.rank)
    assert len(ranks) == 1


@every_method
@versions
def test_what_is_trained_is_sent_or_personal_and_everything_comes_from_somewhere(case, version):
    method = build(case)
    trained, sent, parts = method.trained(version), method.sent(version), method.parts(version)
    assert set(sent) == set(trained) - set(method.personal)
    assert sent and set(trained) <= set(parts)
    assert version or "up" in trained, "while up is zero, nothing else has a gradient"
    travelling = [part for file in method.files(version) for part in file]
    assert len(set(travelling)) == len(travelling), "a part lies in one file"
    if method.fresh:
        assert not travelling
    else:
        assert set(travelling) | set(method.personal) == set(parts)
    assert not set(travelling) & set(method.personal)


@every_method
@versions
def test_the_server_leaves_alone_what_it_was_not_sent(case, version):
    """Personal and frozen parts keep their bits, unless the method rebuilds its factors."""
    method, spec = build(case), make_spec()
    state = state_at(method, spec, version)
    merged = method.merge_module(state, make_fleet(method, spec, state, version), version)
    if method.keeps_basis:
        for part in set(method.parts(version)) - set(method.sent(version)):
            assert merged.values(part).tobytes() == state.values(part).tobytes()


@every_method
@pytest.mark.parametrize("version", [1, 2])
def test_rows_go_on_meaning_the_same_where_the_method_says_so(case, version):
    """A small change of any model is a small step of its rows; else what a device kept is wrong."""
    method, spec = build(case), make_spec(20, 31)
    rng = np.random.default_rng(5)
    up, down, core = (rng.normal(size=(RANK, width)).astype(np.float32) for width in (20, 31, RANK))
    has_core = "core" in method.parts(version)
    state = ModuleState(Bundle(up, down, spec.scale(RANK)), core=core if has_core else None)
    fleet = [make_update(method, spec, state, version, f"d{i}", size=1e-4) for i in range(3)]
    merged = method.merge_module(state, fleet, version)
    moved = max(np.abs(merged.values(p) - state.values(p)).max() for p in state.parts)
    if not method.fresh:  # whose adapter is not used twice
        assert moved < 1e-2 if method.keeps_basis else moved > 0.1


@every_method
@versions
@pytest.mark.parametrize("rslora", [False, True])
def test_what_a_device_is_handed_is_what_the_scaling_says(case, version, rslora):
    method, spec = build(case), make_spec(20, 31, rslora=rslora)
    state = state_at(method, spec, version)
    for k in (2, 3, RANK):
        update = make_update(method, spec, state, version, k=k)
        if method.fresh or (k < RANK and not method.heterogeneous):
            continue
        rows, handed = update.rows, update.begin().product.dense()
        keep = np.zeros((RANK, 1), np.float32)
        keep[rows] = 1
        core = state.core if state.core is None else keep.T * state.core
        masked = ModuleState(
            Bundle(keep * state.adapter.up, keep * state.adapter.down, state.adapter.scale),
            core=core,
        )
        gain = RANK / k if method.scaling == "sketch" else 1.0
        assert_close(handed, gain * masked.product.dense())
        if method.complement:  # what a device starts from is the whole model
            branch = method.branch(state, rows)
            beside = 0.0 if branch is None else branch.dense()
            assert branch is None or branch.scale == 1.0
            assert_close(handed + beside, effective(state))
        else:
            assert method.branch(state, rows) is state.side


@every_method
@versions
def test_a_contribution_is_what_the_device_had_beside_base_and_side(case, version):
    """The ideal that errors are measured against is made of contributions."""
    method, spec = build(case), make_spec(20, 31)
    state = state_at(method, spec, version)
    side = 0.0 if state.side is None else state.side.dense()
    for update in make_fleet(method, spec, state, version):
        given = method.contribution(state, update)
        assert_close(given.dense() + side, device_model(method, state, update))


# The server's optimiser --------------------------------------------------------------------------


@every_method
@versions
def test_a_server_optimiser_steps_for_methods_that_keep_their_rows_only(case, version):
    method, spec = build(case), make_spec()
    state = state_at(method, spec, version)
    fleet = make_fleet(method, spec, state, version)
    plain = method.merge_module(state, fleet, version)
    assert_same_bits(method.merge_module(state, fleet, version, make_optimizer("plain")), plain)
    half = method.merge_module(state, fleet, version, make_optimizer("plain", learning_rate=0.5))
    momentum = make_optimizer("momentum", beta1=0.5)
    first = method.merge_module(state, fleet, version, momentum)
    second = method.merge_module(
        dataclasses.replace(state, moments=first.moments), fleet, version, momentum
    )
    if isinstance(method, RowMethod):
        assert method.keeps_basis
        assert set(first.moments) == set(method.sent(version))
        for part in method.sent(version):
            step = plain.values(part) - state.values(part)
            for merged, times in ((half, 0.5), (first, 1.0), (second, 1.5)):
                moved = merged.values(part) - state.values(part)
                np.testing.assert_allclose(moved, times * step, atol=1e-5)
    else:
        assert_same_bits(half, plain)
        assert_same_bits(first, plain)
        assert not first.moments


# Size and form -----------------------------------------------------------------------------------


@every_method
def test_no_matrix_of_the_layers_size_is_formed(case):
    """Peak memory of a merge is that of a few adapters, far below one (m, n) matrix."""
    method, spec = build(case, 4), make_spec(3000, 2000, rank=4)
    for version in (0, 1):
        state = state_at(method, spec, version)
        fleet = make_fleet(method, spec, state, version)
        tracemalloc.start()
        method.merge_module(state, fleet, version)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 3000 * 2000 * 4 / 4


@every_name
def test_a_method_names_itself_its_paper_and_its_options(name):
    method = METHODS[name]
    assert method.name == name
    assert "arXiv" in method.paper
    assert method.__doc__
    assert set(method.options) <= {field.name for field in dataclasses.fields(MethodOptions)}
    assert not {"rank", "optimizer"} & set(method.options)


def test_variants_are_of_methods_that_exist_and_change_what_those_take():
    for name, variants in VARIANTS.items():
        for changes in variants:
            assert set(changes) <= set(METHODS[name].options)
