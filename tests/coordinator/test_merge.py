"""A round's files become the next adapter, and an account of who gave what."""

from __future__ import annotations

import itertools
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest

from coordinator.lowrank import initial_adapter
from coordinator.merge import (
    StoredUpdate,
    adapter_from_factors,
    adapter_to_factors,
    cut_slice,
    merge_round,
    merge_sound,
)
from coordinator.methods import WeightError, make
from profiles.model import ModuleShape
from protos.contract import AdapterSpec, Assignment
from protos.packing import (
    Factors,
    NonFiniteError,
    WrongAssignmentError,
    WrongEncodingError,
    WrongSizeError,
    WrongSpecError,
    pack,
    unpack,
)
from protos.sketch import sketch_rows

RANK = 6
SHAPES = (ModuleShape("q", 5, 9), ModuleShape("down", 12, 7))


def make_spec(modules=SHAPES, **changes):
    facts = {
        "run_id": "run",
        "base": "org/base",
        "base_revision": "main",
        "base_digest": "ab" * 32,
        "rank": RANK,
        "alpha": 12.0,
        "use_rslora": False,
        "seed": 5,
        "modules": modules,
    }
    return AdapterSpec(**(facts | changes))


def make_assignment(device="a", k=RANK, offset=0, round_=1, encoding="float32"):
    return Assignment(
        assignment_id=f"{device}-{round_}",
        run_id="run",
        round=round_,
        device_id=device,
        method="fslora",
        rank=k,
        sketch_offset=offset,
        precision="nf4",
        sequence_tokens=128,
        micro_batch=1,
        accumulation=1,
        checkpointing=False,
        local_steps=1,
        learning_rate=1e-3,
        optimizer="adamw",
        update_encoding=encoding,
        evaluation_sequences=1,
        held_out_share=0.1,
        seed=1,
        deadline_s=60.0,
        reason="",
    )


def make_delta(spec, k, seed, size=0.1):
    rng = np.random.default_rng(seed)
    return {
        m.name: Factors(
            (size * rng.normal(size=(k, m.out_features))).astype(np.float32),
            (size * rng.normal(size=(k, m.in_features))).astype(np.float32),
        )
        for m in spec.modules
    }


def store(folder, spec, assignment, *, weight=1.0, seed=0, size=0.1, delta=None):
    delta = make_delta(spec, assignment.rank, seed, size) if delta is None else delta
    path = folder / f"{assignment.assignment_id}.update"
    path.write_bytes(
        pack(
            spec,
            assignment.rank,
            delta,
            encoding=assignment.update_encoding,
            assignment_digest=assignment.digest,
        )
    )
    return StoredUpdate(assignment.device_id, assignment, path, weight)


def make_adapter(spec, seed=1):
    """An adapter in the middle of a run: up is no longer zero."""
    rng = np.random.default_rng(seed)
    return {
        name: b.scatter_add(np.arange(spec.rank), rng.normal(size=b.up.shape), 0 * b.down)
        for name, b in initial_adapter(spec).items()
    }


def make_fleet(folder, spec, encoding="float32"):
    sizes, offset, fleet = (2, 3, 6), 0, []
    for i, k in enumerate(sizes):
        task = make_assignment(f"device-{i}", k, offset, encoding=encoding)
        fleet.append(store(folder, spec, task, weight=1.0 + i, seed=i))
        offset += k
    return fleet


def assert_same_bits(one, other):
    assert list(one) == list(other)
    for name, bundle in one.items():
        assert bundle.up.tobytes() == other[name].up.tobytes()
        assert bundle.down.tobytes() == other[name].down.tobytes()


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("normalisation", ["none", "coverage"])
def test_error_norms_and_coverage_equal_the_dense_ones(tmp_path, rslora, normalisation):
    spec = make_spec(use_rslora=rslora)
    adapter, fleet = make_adapter(spec), make_fleet(tmp_path, spec)
    result = merge_round(spec, make("fslora", normalisation=normalisation), adapter, fleet)
    p = np.array([1.0, 2.0, 3.0]) / 6
    wrong = right = 0.0
    energy, coverage = np.zeros(3), np.zeros(RANK)
    for module in spec.modules:
        ideal = np.zeros((module.out_features, module.in_features))
        for i, update in enumerate(fleet):
            task = update.assignment
            delta = make_delta(spec, task.rank, i)[module.name]
            rows = sketch_rows(5, 1, module.name, RANK, task.sketch_offset, task.rank)
            up = adapter[module.name].up[rows] + delta.up
            down = adapter[module.name].down[rows] + delta.down
            k = task.rank
            scale = 12 / RANK**0.5 * RANK / k if rslora else 12 / k  # (alpha/s(r)) * r/k: FSLoRA
            ideal += p[i] * scale * up.T.astype(np.float64) @ down
            energy[i] += p[i] ** 2 * float((delta.up**2).sum() + (delta.down**2).sum())
            coverage[rows] += 1 / len(spec.modules)
        wrong += np.square(result.adapter[module.name].dense() - ideal).sum()
        right += np.square(ideal).sum()
    assert result.aggregation_error == pytest.approx((wrong / right) ** 0.5, rel=1e-5)
    norms = np.sqrt(energy)
    assert list(result.norms.values()) == pytest.approx(norms, rel=1e-5)
    assert list(result.share.values()) == pytest.approx(norms / norms.sum(), rel=1e-5)
    np.testing.assert_allclose(result.coverage, coverage)
    assert result.coverage.sum() == pytest.approx(2 + 3 + 6)


def test_a_single_whole_device_is_merged_without_error(tmp_path):
    spec = make_spec()
    adapter = make_adapter(spec)
    update = store(tmp_path, spec, make_assignment(), weight=7.0)
    result = merge_round(spec, make("fedit"), adapter, [update])
    for name, delta in make_delta(spec, RANK, 0).items():
        np.testing.assert_allclose(result.adapter[name].up, adapter[name].up + delta.up, atol=1e-6)
    assert result.aggregation_error < 1e-6
    assert result.share == {"a": 1.0}
    assert result.coverage.tolist() == [1.0] * RANK


@pytest.mark.parametrize("encoding", ["float32", "bfloat16", "int8"])
def test_order_of_updates_does_not_change_a_bit(tmp_path, encoding):
    spec = make_spec()
    adapter, fleet = make_adapter(spec), make_fleet(tmp_path, spec, encoding)
    late = store(tmp_path, spec, make_assignment("device-1", 2, 4, round_=0, encoding=encoding))
    results = [
        merge_round(spec, make("fslora"), adapter, order)
        for order in itertools.permutations([*fleet, late])
    ]
    for result in results[1:]:
        assert_same_bits(result.adapter, results[0].adapter)
        assert result.norms == results[0].norms
        assert result.aggregation_error == results[0].aggregation_error


def test_fslora_over_whole_adapters_is_fedit_bit_for_bit(tmp_path):
    spec = make_spec()
    adapter = make_adapter(spec)
    fleet = [
        store(tmp_path, spec, make_assignment(f"d{i}", RANK, 3 * i), weight=i + 0.7, seed=i)
        for i in range(3)
    ]
    sketched, whole = (merge_round(spec, make(m), adapter, fleet) for m in ("fslora", "fedit"))
    assert_same_bits(sketched.adapter, whole.adapter)


def test_a_late_update_lands_on_the_rows_of_its_own_round(tmp_path):
    spec = make_spec()
    adapter = make_adapter(spec)
    late = store(tmp_path, spec, make_assignment("late", 2, 1, round_=3))
    result = merge_round(spec, make("fslora"), adapter, [late])
    for module in spec.modules:
        rows = sketch_rows(spec.seed, 3, module.name, RANK, 1, 2)
        moved = np.flatnonzero((result.adapter[module.name].up != adapter[module.name].up).any(1))
        assert moved.tolist() == rows.tolist()


def test_a_late_and_a_fresh_update_of_one_device_are_one_share(tmp_path):
    spec = make_spec()
    updates = [
        store(tmp_path, spec, make_assignment("a", 2, 0, round_=1), seed=1),
        store(tmp_path, spec, make_assignment("a", 2, 2, round_=2), seed=2),
        store(tmp_path, spec, make_assignment("b", 4, 4, round_=2), seed=3),
    ]
    result = merge_round(spec, make("fslora"), make_adapter(spec), updates)
    assert list(result.share) == ["a", "b"]
    assert sum(result.share.values()) == pytest.approx(1.0)


def test_shares_are_equal_when_nobody_moved_anything(tmp_path):
    spec = make_spec()
    adapter = make_adapter(spec)
    fleet = [store(tmp_path, spec, make_assignment(d), size=0.0) for d in "ab"]
    result = merge_round(spec, make("fslora"), adapter, fleet)
    assert result.share == {"a": 0.5, "b": 0.5}
    assert_same_bits(result.adapter, adapter)


def test_error_is_finite_while_the_adapter_is_still_zero(tmp_path):
    spec = make_spec()
    fleet = [store(tmp_path, spec, make_assignment(d), size=0.0) for d in "ab"]
    result = merge_round(spec, make("fedit"), initial_adapter(spec), fleet)
    assert result.aggregation_error == 0.0


def test_a_slice_goes_out_and_its_delta_comes_home_to_the_same_rows(tmp_path):
    """Fetch, train, push, merge: the device's trained rows are the adapter's afterwards."""
    spec = make_spec()
    adapter, task = make_adapter(spec), make_assignment("a", 3, 4, round_=9)
    sent = pack(spec, 3, cut_slice(spec, adapter, 9, 4, 3), encoding="float32")
    received = unpack(sent, spec, 3)
    trained = {name: Factors(2 * part.up, 3 * part.down) for name, part in received.items()}
    delta = {
        name: Factors(trained[name].up - part.up, trained[name].down - part.down)
        for name, part in received.items()
    }
    update = store(tmp_path, spec, task, delta=delta)
    merged = merge_round(spec, make("fslora"), adapter, [update]).adapter
    for name, part in cut_slice(spec, merged, 9, 4, 3).items():
        np.testing.assert_allclose(part.up, trained[name].up, rtol=1e-6)
        np.testing.assert_allclose(part.down, trained[name].down, rtol=1e-6)


def test_the_whole_adapter_travels_and_returns_bit_for_bit():
    spec = make_spec()
    adapter = make_adapter(spec)
    data = pack(spec, RANK, adapter_to_factors(adapter), encoding="float32")
    back = adapter_from_factors(spec, unpack(data, spec, RANK))
    assert_same_bits(back, adapter)
    assert {b.scale for b in back.values()} == {spec.scale(RANK)} == {2.0}


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"rank": 3}, WrongAssignmentError),
        ({"seed": 2}, WrongAssignmentError),
        ({"update_encoding": "int8"}, WrongEncodingError),
    ],
)
def test_an_update_for_another_assignment_is_refused(tmp_path, changes, error):
    spec = make_spec()
    update = store(tmp_path, spec, make_assignment())
    other = replace(update, assignment=replace(update.assignment, **changes))
    with pytest.raises(error):
        merge_round(spec, make("fslora"), make_adapter(spec), [other])


def test_an_update_for_another_run_a_cut_one_and_a_poisoned_one_are_refused(tmp_path):
    spec = make_spec()
    adapter, update = make_adapter(spec), store(tmp_path, spec, make_assignment())
    data = update.path.read_bytes()
    with pytest.raises(WrongSpecError):
        merge_round(make_spec(run_id="other"), make("fslora"), adapter, [update])
    update.path.write_bytes(data[:-1])
    with pytest.raises(WrongSizeError):
        merge_round(spec, make("fslora"), adapter, [update])
    update.path.write_bytes(data[:-4] + b"\0\0\xc0\x7f")
    with pytest.raises(NonFiniteError):
        merge_round(spec, make("fslora"), adapter, [update])


def test_a_round_without_updates_or_weight_is_refused(tmp_path):
    spec = make_spec()
    nothing = store(tmp_path, spec, make_assignment(), weight=0.0)
    for updates in ([], [nothing]):
        with pytest.raises(WeightError):
            merge_round(spec, make("fslora"), make_adapter(spec), updates)


def test_memory_grows_with_one_module_not_with_the_model(tmp_path):
    """Twice the modules must not take twice the memory beyond the adapter itself."""

    def peak(count):
        spec = make_spec(tuple(ModuleShape(f"m{i}", 256, 192) for i in range(count)))
        folder = tmp_path / str(count)
        folder.mkdir()
        fleet = [store(folder, spec, make_assignment(f"d{i}"), seed=i) for i in range(6)]
        adapter = initial_adapter(spec)
        merge_round(spec, make("fslora"), adapter, fleet[:1])  # caches of layout and rows
        tracemalloc.start()
        try:
            result = merge_round(spec, make("fslora"), adapter, fleet)
            held = sum(b.up.nbytes + b.down.nbytes for b in result.adapter.values())
            return tracemalloc.get_traced_memory()[1] - held
        finally:
            tracemalloc.stop()

    assert peak(24) < 1.3 * peak(6)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_one_update_that_no_merge_survives_does_not_stop_the_others(tmp_path):
    spec = make_spec()
    adapter = {
        name: b.scatter_add(np.arange(RANK), np.full(b.up.shape, 3e38), 0 * b.down)
        for name, b in initial_adapter(spec).items()
    }
    good = store(tmp_path, spec, make_assignment("good"), seed=1)
    huge = {
        n: Factors(np.full_like(f.up, 3e38), f.down) for n, f in make_delta(spec, RANK, 2).items()
    }
    bad = store(tmp_path, spec, make_assignment("bad"), delta=huge)
    method = make("fedit")
    result, dropped = merge_sound(spec, method, adapter, [good, bad])
    assert list(dropped) == ["bad-1"] and "far too large" in dropped["bad-1"]
    assert_same_bits(result.adapter, merge_round(spec, method, adapter, [good]).adapter)
    assert merge_sound(spec, method, adapter, [bad])[0] is None
