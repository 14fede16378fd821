"""The logged error is the distance from the mean of products, exact or estimated without bias."""

from dataclasses import replace

import numpy as np
import pytest

from coordinator import aggregation_error
from coordinator.aggregation_error import ErrorMeter, measure
from coordinator.lowrank import Bundle, ErrorEnergy
from coordinator.merge import Merger, StoredUpdate
from coordinator.methods import METHODS, MethodOptions, ModuleState, ModuleUpdate, make
from coordinator.methods.base import normalised
from coordinator.server_optimizer import Plain
from coordinator.state import StateFile, StateReader, write_initial
from profiles.model import ModuleShape
from protos.contract import AdapterSpec, Assignment, Payload
from protos.packing import pack

R, M, N = 6, 30, 40
RANKS = (6, 4, 2)
SHARED = [name for name in METHODS if make(name, MethodOptions(rank=R)).has_global]


def make_fleet(name, seed=0):
    """(method, module, updates): three devices of unequal rank where the method allows it."""
    draw = np.random.default_rng(seed)

    def drawn(*shape, size=1.0):
        return (size * draw.normal(size=shape)).astype(np.float32)

    method = make(name, MethodOptions(rank=R, side_rank=18))
    before = ModuleState(Bundle(drawn(R, M), drawn(R, N), 2.0))
    updates = []
    for device, wanted in enumerate(RANKS):
        k = wanted if method.heterogeneous else R
        rows = np.arange(k)
        scale = {"common": 2.0 * R / k, "sketch": 2.0 * R / k, "constant": 2.0}[method.scaling]
        start = method.cut(before, rows, scale)
        delta = {p: drawn(*start.values(p).shape, size=0.3) for p in method.sent(0)}
        lift = scale / 2.0 if method.scaling == "common" else 1.0
        updates.append(ModuleUpdate(
            f"device-{device}", rows, lambda start=start: start, delta, 1.0 + device, lift
        ))  # fmt: skip
    return method, before, updates


def dense_error(method, before, after, updates, shares):
    """(off, target) with matrices of the layer's size."""

    def beside(state):
        return np.zeros((M, N)) if state.side is None else state.side.dense()

    ideal = sum(
        share * method.contribution(before, u).dense()
        for share, u in zip(shares, updates, strict=True)
    )
    merged = after.product.dense() + beside(after) - beside(before)
    return np.square(ideal - merged).sum(), np.square(ideal).sum()


def merged(name, seed=0):
    method, before, updates = make_fleet(name, seed)
    shares = normalised([u.weight for u in updates])
    return method, before, method.merge_module(before, updates), updates, shares


@pytest.mark.parametrize("name", SHARED)
def test_the_error_is_the_dense_one(name):
    found = measure(*(facts := merged(name)))
    off, target = dense_error(*facts)
    assert found.exact
    assert found.target == pytest.approx(target, rel=1e-5)
    assert found.off == pytest.approx(off, rel=1e-4, abs=1e-9 * target)


@pytest.mark.parametrize("name", SHARED)
def test_the_estimate_is_the_error_on_average(name, monkeypatch):
    monkeypatch.setattr(aggregation_error, "EXACT_COMPONENTS", 0)
    facts = merged(name)
    off, target = dense_error(*facts)
    draw = np.random.default_rng(1)
    offs, targets = [], []
    for _ in range(400):
        signs = (2 * draw.integers(0, 2, (aggregation_error.PROBES, N)) - 1).astype(np.float32)
        monkeypatch.setattr(aggregation_error, "_probes", lambda width, signs=signs: signs)
        found = measure(*facts)
        assert not found.exact
        offs.append(found.off)
        targets.append(found.target)
    assert np.mean(targets) == pytest.approx(target, rel=0.1)
    assert np.mean(offs) == pytest.approx(off, rel=0.1, abs=1e-9 * target)


def test_late_updates_are_estimated_from_where_they_began(monkeypatch):
    method, before, after, updates, shares = merged("fedit")
    older = ModuleState(Bundle(2 * before.adapter.up, before.adapter.down, 2.0))
    late = replace(updates[0], begin=lambda: older, on_time=False)
    facts = (method, before, after, [late, *updates[1:]], shares)
    off, _ = dense_error(*facts)
    monkeypatch.setattr(aggregation_error, "EXACT_COMPONENTS", 0)
    monkeypatch.setattr(aggregation_error, "_probes", lambda width: np.eye(N, dtype=np.float32))
    # All unit vectors instead of signs: their images are the whole matrix.
    assert measure(*facts).off * aggregation_error.PROBES == pytest.approx(off, rel=1e-4)


def test_a_sparse_slice_is_measured_from_what_was_received(tmp_path):
    """FLASC's devices begin with the largest values only; the rest of the adapter is not theirs."""
    spec = AdapterSpec("run", "b", "", "0" * 64, R, 12.0, False, 1, (ModuleShape("q", M, N),))
    method = make("flasc", MethodOptions(rank=R, density=0.2))
    draw = np.random.default_rng(3)
    files = write_initial(spec, method, tmp_path.joinpath)
    model = StateReader(spec, files)
    before = model.module("q")
    received = {
        "up": np.zeros((R, M), np.float32),
        "down": np.where(np.abs(before.adapter.down) > 0.12, before.adapter.down, 0),
    }
    payload, sent = Payload(R, "float32"), Payload(R, "float32", density=0.2)
    (tmp_path / "slice").write_bytes(pack(spec, payload, {"q": received}))
    delta = {p: draw.normal(size=v.shape).astype(np.float32) for p, v in received.items()}
    task = Assignment(
        "a", "run", 0, "ash", "flasc", R, "prefix", 0, 12.0, ("up", "down"), (), True, False,
        False, False, "nf4", 64, 1, 1, False, 1, 1e-3, "adamw", sent, 1, 0.1, False, 1, 1.0, "",
    )  # fmt: skip
    (tmp_path / "update").write_bytes(pack(spec, sent, {"q": delta}, assignment_digest=task.digest))
    started = (StateFile(tmp_path / "slice", payload),)
    update = StoredUpdate("ash", task, tmp_path / "update", 1.0, start=started)
    merger = Merger(spec, method, Plain(), lambda at: model, lambda role: tmp_path / f"new-{role}")
    result = merger.merge(0, 1, model, [update])
    after = StateReader(spec, result.files).module("q")
    change_up = after.adapter.up.astype(np.float64) - before.adapter.up
    change_down = after.adapter.down.astype(np.float64) - before.adapter.down
    own = 2.0 * (received["up"] + change_up).T @ (received["down"] + change_down)
    error = np.linalg.norm(after.product.dense() - own) / np.linalg.norm(own)
    assert error > 0.01, "the test needs values that were left out"
    assert result.error == pytest.approx(error, rel=1e-4)


def test_overall_error_weighs_layers_by_their_energy():
    meter = ErrorMeter()
    assert meter.overall is None
    meter.add("a", ErrorEnergy(1.0, 4.0, True))
    meter.add("b", ErrorEnergy(0.0, 12.0, False))
    assert meter.errors == {"a": pytest.approx(0.5), "b": 0.0}
    assert meter.overall == pytest.approx(0.25)
    assert not meter.exact
