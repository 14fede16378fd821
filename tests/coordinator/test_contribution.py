"""Shares of a merge and their directions are those that matrices of a layer's size have."""

from dataclasses import replace

import numpy as np
import pytest

from coordinator import contribution
from coordinator.contribution import ContributionMeter, attribute
from coordinator.methods import MethodOptions, make
from coordinator.methods.base import normalised
from coordinator.server_optimizer import make_optimizer
from tests.coordinator.test_method_conformance import (
    CASES,
    build,
    every_method,
    initial,
    make_fleet,
    make_spec,
)

OUT, IN = 20, 31
# The rule with which each adds up changes of rows: what `row_factors` must say of it.
SUMS_OF_CHANGES = [
    case for case in CASES
    if case[0] in ("fedit", "ffa-lora", "rolora", "rbla", "fed-plora", "fslora", "flasc")
]  # fmt: skip


def run_rounds(case, version=1):
    """(method, before, updates, after) of a model that one round has moved already."""
    method, spec = build(case), make_spec(OUT, IN)
    state = initial(spec)
    for v in range(version):
        state = method.merge_module(state, make_fleet(method, spec, state, v), v)
    updates = sorted(make_fleet(method, spec, state, version), key=lambda u: u.device_id)
    return method, state, updates, method.merge_module(state, updates, version)


def account(method, before, updates, after):
    shares = normalised([u.weight for u in updates])
    meter = ContributionMeter(shares, before.adapter.rank)
    meter.add([u.rows for u in updates], attribute(method, before, after, updates, shares))
    return shares, meter.contributions()


def whole(state):
    side = 0 if state.side is None else state.side.dense()
    return state.product.dense() + side


def dense_parts(method, before, updates, after, shares):
    """What each device's changes are on the merged model, (out, in) float64, by linearity."""
    if not method.keeps_basis or after.side is not before.side or (
        (before.core is None) != (after.core is None)
    ):  # fmt: skip
        return [p * (u.trained.product.dense() - u.begin().product.dense())
                for p, u in zip(shares, updates, strict=True)]  # fmt: skip
    middle_up = (before.adapter.up.astype(float) + after.adapter.up) / 2
    middle_down = (before.adapter.down.astype(float) + after.adapter.down) / 2
    factors = method.row_factors(before.adapter.rank, updates, shares)
    found = []
    for share, factor, u in zip(shares, factors, updates, strict=True):
        up, down = np.zeros(before.adapter.up.shape), np.zeros(before.adapter.down.shape)
        if "core" in u.delta:
            core = np.zeros(before.core.shape)
            core[np.ix_(u.rows, u.rows)] = share * u.delta["core"]
            found.append(before.adapter.scale * middle_up.T @ core @ middle_down)
            continue
        if "up" in u.delta:
            up[u.rows] = factor[:, None] * u.lift * u.delta["up"]
        if "down" in u.delta:
            down[u.rows] = factor[:, None] * u.delta["down"]
        found.append(before.adapter.scale * (up.T @ middle_down + middle_up.T @ down))
    return found


@every_method
@pytest.mark.parametrize("version", [0, 1, 2])
def test_they_are_the_dense_ones(case, version):
    method, before, updates, after = run_rounds(case, version)
    if not method.has_global:
        pytest.skip("devices keep a part: there is no merged product")
    shares, found = account(method, before, updates, after)
    merged = whole(after) - whole(before)
    parts = dense_parts(method, before, updates, after, shares)
    inner = np.array([np.vdot(merged, part) for part in parts])
    size = np.linalg.norm(merged)
    for got, want, part in zip(found, inner / inner.sum(), parts, strict=True):
        assert got.norm == pytest.approx(np.linalg.norm(part), rel=1e-3)
        assert got.share == pytest.approx(want, abs=2e-3)
        cosine = np.vdot(merged, part) / (size * np.linalg.norm(part))
        assert got.alignment == pytest.approx(cosine, abs=2e-3)
    assert [c.weight for c in found] == pytest.approx(shares)


@pytest.mark.parametrize("case", SUMS_OF_CHANGES, ids=str)
def test_where_the_merge_is_a_sum_shares_are_of_its_square(case):
    """sum_i D_i = U: the shares sum to 1 without being made to."""
    method, before, updates, after = run_rounds(case)
    shares = normalised([u.weight for u in updates])
    parts = dense_parts(method, before, updates, after, shares)
    np.testing.assert_allclose(sum(parts), whole(after) - whole(before), atol=2e-6)
    found = attribute(method, before, after, updates, shares)
    assert found.inner.sum() == pytest.approx(found.energy, rel=1e-4)


@every_method
def test_shares_sum_to_one_and_the_order_given_does_not_matter(case):
    method, before, updates, after = run_rounds(case)
    _, found = account(method, before, updates, after)
    assert sum(c.share for c in found) == pytest.approx(1, abs=1e-12)
    assert all(-1 <= c.alignment <= 1 for c in found)
    _, back = account(method, before, updates[::-1], after)
    for one, other in zip(found, back[::-1], strict=True):
        assert one.share == pytest.approx(other.share, abs=1e-6)


def test_a_device_alone_has_all_of_it_and_one_that_moves_nothing_none():
    method, before, updates, _ = run_rounds(("fslora", {"normalisation": "coverage"}))
    alone = updates[-1:]
    _, (found,) = account(method, before, alone, method.merge_module(before, alone, 1))
    assert (found.share, found.alignment) == (1.0, pytest.approx(1.0, abs=1e-3))
    still = replace(updates[0], delta={p: np.zeros_like(v) for p, v in updates[0].delta.items()})
    fleet = [still, updates[-1]]
    _, found = account(method, before, fleet, method.merge_module(before, fleet, 1))
    assert (found[0].share, found[0].alignment, found[0].norm) == (0.0, None, 0.0)


def test_one_that_pulls_the_other_way_has_a_negative_share():
    method, before, updates, _ = run_rounds(("fedit", {}))
    ahead = [replace(u, delta=updates[0].delta) for u in updates[:3]]
    against = replace(updates[3], weight=0.1, delta={p: -v for p, v in updates[0].delta.items()})
    fleet = [*ahead, against]
    _, found = account(method, before, fleet, method.merge_module(before, fleet, 1))
    assert found[3].share < 0 and found[3].alignment < -0.5
    assert sum(c.share for c in found) == pytest.approx(1)


def test_nobody_has_a_share_of_nothing():
    method, before, updates, _ = run_rounds(("fedit", {}))
    still = [replace(u, delta={p: np.zeros_like(v) for p, v in u.delta.items()}) for u in updates]
    _, found = account(method, before, still, before)
    assert {(c.share, c.alignment, c.norm) for c in found} == {(None, None, 0.0)}


def test_an_optimiser_that_goes_the_other_way_leaves_no_shares():
    """Momentum of rounds before may outweigh what everybody says now."""
    method, spec = make("fedit", MethodOptions(rank=6)), make_spec(OUT, IN)
    momentum = make_optimizer("momentum", beta1=0.99)
    before = initial(spec)
    fleet = make_fleet(method, spec, before, 0)
    middle = method.merge_module(before, fleet, 0, momentum)
    back = [replace(u, delta={p: -0.1 * v for p, v in u.delta.items()}) for u in fleet]
    after = method.merge_module(middle, back, 1, momentum)
    _, found = account(method, middle, back, after)
    assert {c.share for c in found} == {None}
    assert all(c.alignment < 0 for c in found)


def test_norms_of_a_large_fleet_are_estimated_without_bias(monkeypatch):
    method, before, updates, after = run_rounds(("fslora", {"normalisation": "coverage"}))
    shares = normalised([u.weight for u in updates])
    exact = attribute(method, before, after, updates, shares)
    monkeypatch.setattr(contribution, "EXACT_COMPONENTS", 0)
    draw, seen = np.random.default_rng(1), []
    for _ in range(300):
        signs = (2 * draw.integers(0, 2, (contribution.PROBES, IN)) - 1).astype(np.float32)
        monkeypatch.setattr(contribution, "_probes", lambda width, signs=signs: signs)
        found = attribute(method, before, after, updates, shares)
        assert found.inner.tolist() == exact.inner.tolist(), "shares are exact all the same"
        seen.append(found.energies)
    np.testing.assert_allclose(np.mean(seen, axis=0), exact.energies, rtol=0.1)


def test_what_exceeds_float32_is_not_told_as_a_figure():
    method, before, updates, _ = run_rounds(("fedit", {}))
    huge = [replace(u, delta={p: 1e25 * v for p, v in u.delta.items()}) for u in updates]
    _, found = account(method, before, huge, method.merge_module(before, huge, 1))
    assert {(c.share, c.alignment, c.norm) for c in found} == {(None, None, None)}


def test_components_say_which_rows_were_trained():
    method, before, updates, after = run_rounds(("fslora", {"normalisation": "coverage"}))
    _, found = account(method, before, updates, after)
    for update, gave in zip(updates, found, strict=True):
        held = [row for row, level in enumerate(gave.components) if level == 255]
        assert held == update.rows.tolist() and len(gave.components) == 6


def test_a_tensor_trained_whole_counts_as_any_weight():
    deltas = [np.array([[1.0, 0.0]], np.float32), np.array([[0.0, 2.0]], np.float32)]
    meter = ContributionMeter(np.array([0.5, 0.5]), 4)
    step = 0.5 * deltas[0] + 0.5 * deltas[1]
    for i, delta in enumerate(deltas):
        meter.add_dense(i, step, delta)
    found = meter.contributions()
    assert [c.share for c in found] == pytest.approx([0.2, 0.8])
    assert [c.norm for c in found] == pytest.approx([0.5, 1.0])
    assert found[0].alignment == pytest.approx(1 / np.sqrt(5))
