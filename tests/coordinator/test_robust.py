"""Robust merges: against dense arithmetic on lists of owners, and what hostile rows cannot do."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest

from coordinator.config import RunConfig
from coordinator.methods import METHODS, MethodOptions, RowMethod, UnknownMethodError, make
from coordinator.overlap import Overlap
from coordinator.robust import Robust, require_fit, rms_of
from coordinator.robust_rules import CLIP, TRIM, clip_factors, krum_choice
from tests.coordinator.test_method_conformance import (
    RANK,
    assert_same_bits,
    make_fleet,
    make_spec,
    make_update,
    state_at,
)

RULES = ("clip", "trimmed-mean", "median", "geometric-median", "multi-krum")
EVERYWHERE = ("clip", "geometric-median", "multi-krum")
AVERAGING = [
    name for name, m in METHODS.items() if issubclass(m, RowMethod) and name != "flasc"
]  # fmt: skip
every_rule = pytest.mark.parametrize("rule", RULES)
averaging = pytest.mark.parametrize("name", AVERAGING)


def method_of(name):
    return make(name, MethodOptions(rank=RANK))


def merged(rule, method, state, fleet, version=1):
    shares = np.array([u.weight for u in fleet]) / sum(u.weight for u in fleet)
    found = Robust(rule).of(state, fleet, shares)
    return method.merge_module(state, found.updates, version), found


def large_fleet(method, spec, state, version, devices=10):
    sizes = [spec.rank // 2 if i in (0, 4) else spec.rank for i in range(devices)]
    if not method.heterogeneous:
        sizes = [spec.rank] * devices
    return [
        make_update(method, spec, state, version, f"device-{i}", k, weight=1.0 + i % 4, place=i)
        for i, k in enumerate(sizes)
    ]


def step_of(after, before):
    return {p: after.values(p).astype(np.float64) - before.values(p) for p in before.parts}


# What every rule promises ------------------------------------------------------------------------


@every_rule
@averaging
@pytest.mark.parametrize("version", [0, 1])
def test_order_does_not_change_a_bit_nor_does_merging_again(rule, name, version):
    method, spec = method_of(name), make_spec(20, 31)
    state = state_at(method, spec, version)
    fleet = large_fleet(method, spec, state, version, 6)
    first, _ = merged(rule, method, state, fleet, version)
    for order in itertools.islice(itertools.permutations(fleet), 0, 720, 239):
        ordered = sorted(order, key=lambda u: u.device_id)  # as the merger hands them over
        assert_same_bits(merged(rule, method, state, ordered, version)[0], first)


@every_rule
@averaging
def test_identical_clients_merge_to_what_one_of_them_does(rule, name):
    method, spec = method_of(name), make_spec(20, 31)
    state = state_at(method, spec, 1)
    one = make_update(method, spec, state, 1, "a")
    alone, _ = merged("none", method, state, [one])
    same = [replace(one, device_id=f"d{i}", weight=1.0 + i) for i in range(7)]
    after, found = merged(rule, method, state, same)
    for part, step in step_of(after, state).items():
        np.testing.assert_allclose(step, step_of(alone, state)[part], atol=2e-6)
    assert not found.tally.fallen_back
    assert rule == "multi-krum" or (found.tally.factors == 1).all()  # which leaves some out
    single, found = merged(rule, method, state, [one])
    assert_same_bits(single, alone)
    assert rule == "clip" or found.tally.fallen_back == one.k


@every_rule
@averaging
def test_who_has_no_weight_changes_nothing(rule, name):
    method, spec = method_of(name), make_spec(20, 31)
    state = state_at(method, spec, 1)
    fleet = large_fleet(method, spec, state, 1, 6)
    silent = make_update(method, spec, state, 1, "zzz", weight=0.0, size=50.0)
    assert_same_bits(
        merged(rule, method, state, [*fleet, silent])[0], merged(rule, method, state, fleet)[0]
    )


@every_rule
@averaging
def test_two_of_ten_hostile_devices_cannot_pull_the_model_far(rule, name):
    """Without a rule, each of these throws it off by more than honest training moves it."""
    method, spec = method_of(name), make_spec(20, 31)
    state = state_at(method, spec, 1)
    fleet = large_fleet(method, spec, state, 1)
    base = fleet[1].delta  # honest devices agree up to noise
    noise = np.random.default_rng(0)
    for i, u in enumerate(fleet):
        agreed = {p: np.resize(v, u.delta[p].shape) for p, v in base.items()}
        small = {p: v + (0.02 * noise.normal(size=v.shape)).astype("f") for p, v in agreed.items()}
        fleet[i] = replace(u, delta=small, weight=1.0)
    clean, _ = merged("none", method, state, fleet)
    for times in (100.0, -100.0, 1e4):
        bad = [replace(u, delta={p: np.float32(times) * v for p, v in u.delta.items()})
               if i in (2, 5) else u for i, u in enumerate(fleet)]  # fmt: skip
        off = {}
        for tried in (rule, "none"):
            after, _ = merged(tried, method, state, bad)
            off[tried] = sum(
                float(np.linalg.norm(step_of(after, clean)[p])) for p in method.sent(1)
            )
        moved = sum(float(np.linalg.norm(step_of(clean, state)[p])) for p in method.sent(1))
        assert off[rule] < 2 * moved + 0.05 * off["none"] and off[rule] < off["none"] / 5


# Against dense arithmetic ------------------------------------------------------------------------


def owners(fleet, part, row):
    return [
        u.lift * u.delta[part][list(u.rows).index(row)].astype(np.float64)
        if part == "up" else u.delta[part][list(u.rows).index(row)].astype(np.float64)
        for u in fleet if row in u.rows
    ]  # fmt: skip


@pytest.mark.parametrize("rule", ["median", "trimmed-mean"])
def test_rules_by_value_are_numpys_on_the_owners_of_a_row(rule):
    method, spec = method_of("rbla"), make_spec(20, 31)
    state = state_at(method, spec, 1)
    sizes = (6, 6, 5, 5, 4, 3, 3, 2)
    fleet = [
        make_update(method, spec, state, 1, f"d{i}", k, weight=1 + i) for i, k in enumerate(sizes)
    ]
    after, found = merged(rule, method, state, fleet)
    steps = step_of(after, state)
    factors = clip_factors([rms_of(u) for u in fleet])
    fallen = 0
    for part, row in itertools.product(("up", "down"), range(RANK)):
        values = np.sort(np.array(owners(fleet, part, row)), axis=0)
        n = len(values)
        if n < (3 if rule == "median" else 4):
            fallen += 1
            held = [i for i, u in enumerate(fleet) if row in u.rows]
            w = np.array([fleet[i].weight for i in held], np.float64)
            said = np.array(owners(fleet, part, row)) * factors[held][:, None]
            want = (w[:, None] * said).sum(0) / w.sum()
        elif rule == "median":
            want = np.median(values, axis=0)
        else:
            cut = min((n - 1) // 2, math.ceil(TRIM * n - 1e-9))
            want = values[cut : n - cut].mean(axis=0)
        np.testing.assert_allclose(steps[part][row], want, atol=1e-5)
    assert found.tally.fallen_back == fallen // 2 and found.tally.rows == RANK


def test_few_owners_get_the_clipped_mean_and_the_record_says_so():
    method, spec = method_of("fslora"), make_spec(20, 31)
    state = state_at(method, spec, 1)
    fleet = make_fleet(method, spec, state, 1)  # four devices, fewer on most rows
    after, found = merged("trimmed-mean", method, state, fleet)
    clipped, _ = merged("clip", method, state, fleet)
    for part, step in step_of(after, state).items():
        np.testing.assert_allclose(step, step_of(clipped, state)[part], atol=1e-5)
    assert found.tally.fallen_back == found.tally.rows > 0


def test_the_geometric_median_minimises_the_weighted_sum_of_distances():
    method, spec = method_of("fedit"), make_spec(20, 31)
    state = state_at(method, spec, 1)
    fleet = large_fleet(method, spec, state, 1, 7)
    _, found = merged("geometric-median", method, state, fleet)
    scale = {p: np.median([(u.delta[p] ** 2).sum() / u.k for u in fleet]) for p in ("up", "down")}
    points = np.array([
        np.concatenate([u.delta[p].ravel() / np.sqrt(scale[p]) for p in ("up", "down")])
        for u in fleet
    ])  # fmt: skip
    weights = np.array([u.weight for u in fleet])

    def total(centre):
        return (weights * np.linalg.norm(points - centre, axis=1)).sum()

    centre = found.shares @ points
    assert found.shares.sum() == pytest.approx(1)
    draw = np.random.default_rng(3)
    for _ in range(50):
        other = draw.dirichlet(np.ones(7)) @ points
        assert total(centre) <= total(0.9 * centre + 0.1 * other) + 1e-3


def test_multi_krum_is_the_papers_on_whole_updates():
    draw = np.random.default_rng(0)
    points = np.vstack([draw.normal(size=(7, 40)), 5 + draw.normal(size=(3, 40))])
    squared = ((points[:, None] - points[None]) ** 2).sum(-1)
    scores = [np.sort(np.delete(squared[i], i))[: 10 - 3 - 2].sum() for i in range(10)]
    want = set(np.argsort(scores)[:7])
    assert set(np.flatnonzero(krum_choice(squared))) == want == set(range(7))
    few = squared.copy()
    few[0, 1] = few[1, 0] = np.nan  # share no row: neither close nor far
    assert krum_choice(few).sum() == 7


def test_inner_products_and_distances_are_those_on_shared_rows():
    draw = np.random.default_rng(1)
    rows = [np.array([0, 2, 5]), np.array([2, 3]), np.array([4]), np.array([0, 2, 3, 5])]
    values = [draw.normal(size=(len(r), 9)).astype(np.float32) for r in rows]
    overlap = Overlap.of(rows, 6)
    grams = overlap.grams(values)
    pairs, away = overlap.pairs(grams), overlap.distances(grams)
    for i, j in itertools.product(range(4), repeat=2):
        both = sorted(set(rows[i]) & set(rows[j]))
        a, b = (values[d][[list(rows[d]).index(x) for x in both]] for d in (i, j))
        assert pairs[i, j] == pytest.approx(float((a * b).sum()), abs=1e-5)
        if both:
            assert away[i, j] == pytest.approx(((a - b) ** 2).sum() / len(both), abs=1e-5)
        else:
            assert np.isnan(away[i, j])


def test_clipping_is_to_so_many_medians_of_each_part():
    sizes = [{"up": 1.0, "down": 1.0}] * 4 + [{"up": 10.0, "down": 1.0}, {"up": 1.0, "down": 30.0}]
    np.testing.assert_allclose(clip_factors(sizes), [1, 1, 1, 1, CLIP / 10, CLIP / 30])
    assert (clip_factors([{"up": 1.0}, {"up": 100.0}]) == 1).all()  # of two, who is the odd one?
    assert (clip_factors([{"up": 0.0}] * 3 + [{"up": 1.0}]) == 1).all()


def test_tensors_trained_whole_are_merged_robustly_too():
    draw = np.random.default_rng(2)
    said = [draw.normal(size=(3, 5)).astype(np.float32) for _ in range(7)]
    said[3] = said[3] + np.float32(1e6)
    shares = np.full(7, 1 / 7)
    np.testing.assert_allclose(
        Robust("median").dense(said, shares), np.median(said, axis=0), atol=1e-6
    )
    for rule in RULES:
        assert np.abs(Robust(rule).dense(said, shares)).max() < 10


# The configuration -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_rules_are_taken_where_they_mean_something_and_else_refused_with_a_way_out(name):
    method = method_of(name)
    for rule in ("none", *RULES):
        if rule in ("none", "clip") or (
            isinstance(method, RowMethod) and (method.density == 1 or rule in EVERYWHERE)
        ):
            require_fit(rule, method)
        else:
            with pytest.raises(UnknownMethodError, match='use "clip"'):
                require_fit(rule, method)


def test_run_toml_refuses_a_rule_that_the_method_cannot_use():
    sections = {"run": {"name": "x"}, "model": {"base": "b"}}
    assert RunConfig.model_validate(sections).method.robust == "clip"
    bad = sections | {"method": {"name": "flexlora", "robust": "median"}}
    with pytest.raises(ValueError, match="flexlora, which rebuilds its factors"):
        RunConfig.model_validate(bad)
