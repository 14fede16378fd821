"""A round's files become the next model, and an account of who gave what."""

from __future__ import annotations

import itertools
import math
import os
import tracemalloc
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from coordinator import merge as merge_module
from coordinator.lowrank import Bundle
from coordinator.merge import Merger, StoredUpdate
from coordinator.methods import (
    METHODS,
    MethodOptions,
    ModuleState,
    ModuleUpdate,
    UpdateError,
    WeightError,
    make,
)
from coordinator.server_optimizer import Plain, make_optimizer
from coordinator.state import StateFile, StateReader, StateWriter
from profiles.model import ModuleShape
from protos.codecs import NonFiniteError
from protos.contract import AdapterSpec, Assignment, Payload
from protos.layout import WrongAssignmentError, WrongEncodingError, WrongSizeError, WrongSpecError
from protos.packing import pack
from protos.sketch import initial_down, slice_rows
from protos.unpacking import unpack

RANK = 6
SHAPES = (ModuleShape("q", 5, 9), ModuleShape("down", 12, 7))
DENSE = (ModuleShape("norm.weight", 1, 4), ModuleShape("head.weight", 3, 4))
ROUND = 1


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


def method_of(name, **options):
    return make(name, MethodOptions(rank=RANK, **options))


def make_assignment(device="a", k=RANK, offset=0, round_=ROUND, encoding="float32",
                    parts=("up", "down"), rows="stratified", **changes):  # fmt: skip
    return Assignment(
        **{
            "assignment_id": f"{device}-{round_}",
            "run_id": "run",
            "round": round_,
            "device_id": device,
            "method": "fslora",
            "rank": k,
            "rows": rows,
            "sketch_offset": offset,
            "alpha": 12.0,
            "trained": parts,
            "personal": (),
            "keeps_basis": True,
            "keeps_state": False,
            "error_feedback": False,
            "fresh": False,
            "precision": "nf4",
            "sequence_tokens": 128,
            "micro_batch": 1,
            "accumulation": 1,
            "checkpointing": False,
            "local_steps": 1,
            "learning_rate": 1e-3,
            "optimizer": "adamw",
            "update": Payload(k, encoding, parts),
            "evaluation_sequences": 1,
            "held_out_share": 0.1,
            "evaluates_global": False,
            "seed": 1,
            "deadline_s": 60.0,
            "reason": "",
            **changes,
        }
    )


def make_delta(spec, k, seed, size=0.1):
    """Every part that there can be, by tensor."""
    rng = np.random.default_rng(seed)

    def drawn(*shape):
        return (size * rng.normal(size=shape)).astype(np.float32)

    found = {
        m.name: {"up": drawn(k, m.out_features), "down": drawn(k, m.in_features),
                 "core": drawn(k, k)}
        for m in spec.modules
    }  # fmt: skip
    return found | {t.name: {"dense": drawn(t.out_features, t.in_features)} for t in spec.dense}


def store(folder, spec, assignment, *, weight=1.0, seed=0, size=0.1, delta=None, kept=0):
    delta = make_delta(spec, assignment.rank, seed, size) if delta is None else delta
    path = folder / f"{assignment.assignment_id}.update"
    path.write_bytes(pack(spec, assignment.update, delta, assignment_digest=assignment.digest))
    return StoredUpdate(assignment.device_id, assignment, path, weight, kept)


def make_states(spec, seed=1, size=1.0):
    """A model in the middle of a run: up is no longer zero."""
    rng = np.random.default_rng(seed)
    return {
        m.name: ModuleState(Bundle(
            (size * rng.normal(size=(spec.rank, m.out_features))).astype(np.float32),
            initial_down(spec.seed, m.name, spec.rank, m.in_features),
            spec.scale(spec.rank),
        ))
        for m in spec.modules
    }  # fmt: skip


def write_model(folder, spec, states=None, parts=("up", "down")):
    """A reader of these states as files; dense tensors are zeros."""
    states = make_states(spec) if states is None else states
    folder.mkdir()
    writer = StateWriter(spec, parts, lambda role: folder / role)
    for module in spec.modules:
        writer.write(module.name, states[module.name])
    for t in spec.dense:
        writer.write_dense(t.name, (np.zeros((t.out_features, t.in_features), np.float32), {}))
    return StateReader(spec, writer.finish())


class Bench:
    """A merger over files in a folder; `starts` holds models that rounds began with."""

    def __init__(self, folder, spec, method, optimizer=None, starts=()):
        self.folder, self.spec, self.count = folder, spec, itertools.count()
        self.folder.mkdir()
        self.starts = dict(starts)
        self.merger = Merger(
            spec, method, optimizer or Plain(), lambda round_: self.starts[round_], self.new_file
        )

    def new_file(self, role):
        return self.folder / f"{next(self.count)}.{role}"

    def merge(self, current, updates, round_=ROUND, version=ROUND + 1):
        self.starts.setdefault(0, current)
        return self.merger.merge(round_, version, current, updates)

    def merge_sound(self, current, updates):
        return self.merger.merge_sound(ROUND, ROUND + 1, current, updates)

    def states(self, result):
        reader = StateReader(self.spec, result.files)
        return {m.name: reader.module(m.name) for m in self.spec.modules}


@pytest.fixture
def bench(tmp_path):
    count = itertools.count()

    def on(spec, name, *, optimizer=None, starts=(), **options):
        folder = tmp_path / f"merged-{next(count)}"
        return Bench(folder, spec, method_of(name, **options), optimizer, starts)

    return on


@pytest.fixture
def model(tmp_path):
    count = itertools.count()

    def of(spec, states=None, parts=("up", "down")):
        return write_model(tmp_path / f"model-{next(count)}", spec, states, parts)

    return of


def make_fleet(folder, spec, encoding="float32", **changes):
    sizes, offset, fleet = (2, 3, 6), 0, []
    for i, k in enumerate(sizes):
        task = make_assignment(f"device-{i}", k, offset, encoding=encoding, **changes)
        fleet.append(store(folder, spec, task, weight=1.0 + i, seed=i))
        offset += k
    return fleet


def bytes_of(result):
    return {role: file.path.read_bytes() for role, file in result.files.items()}


# --- the account --------------------------------------------------------------------------------


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("normalisation", ["none", "coverage"])
def test_errors_and_coverage_equal_the_dense_ones(tmp_path, bench, model, rslora, normalisation):
    spec = make_spec(use_rslora=rslora)
    before, fleet = make_states(spec), make_fleet(tmp_path, spec)
    on = bench(spec, "fslora", normalisation=normalisation)
    result = on.merge(model(spec, before), fleet)
    after = on.states(result)
    p = np.array([1.0, 2.0, 3.0]) / 6
    wrong = right = 0.0
    coverage = np.zeros(RANK)
    for module in spec.modules:
        ideal = np.zeros((module.out_features, module.in_features))
        for i, update in enumerate(fleet):
            task = update.assignment
            delta = make_delta(spec, task.rank, i)[module.name]
            rows = slice_rows(spec, task, module.name)
            up = before[module.name].adapter.up[rows] + delta["up"]
            down = before[module.name].adapter.down[rows] + delta["down"]
            k = task.rank
            scale = 12 / RANK**0.5 * RANK / k if rslora else 12 / k  # (alpha/s(r)) * r/k: FSLoRA
            ideal += p[i] * scale * up.T.astype(np.float64) @ down
            coverage[rows] += 1 / len(spec.modules)
        off = np.square(after[module.name].adapter.dense() - ideal).sum()
        own = (off / np.square(ideal).sum()) ** 0.5
        assert result.errors[module.name] == pytest.approx(own, rel=1e-5)
        wrong += off
        right += np.square(ideal).sum()
    assert result.error == pytest.approx((wrong / right) ** 0.5, rel=1e-5) and result.exact
    np.testing.assert_allclose(result.coverage, coverage)
    assert result.coverage.sum() == pytest.approx(2 + 3 + 6)


def test_a_single_whole_device_is_merged_without_error(tmp_path, bench, model):
    spec = make_spec()
    before = make_states(spec)
    update = store(tmp_path, spec, make_assignment(), weight=7.0)
    on = bench(spec, "fedit")
    result = on.merge(model(spec, before), [update])
    for name, after in on.states(result).items():
        delta = make_delta(spec, RANK, 0)[name]
        np.testing.assert_allclose(after.adapter.up, before[name].adapter.up + delta["up"],
                                   atol=1e-6)  # fmt: skip
    assert result.error < 1e-6 and max(result.errors.values()) < 1e-6
    assert [c.share for c in result.contributions.values()] == pytest.approx([1.0])
    assert result.coverage.tolist() == [1.0] * RANK


def test_nobody_has_a_share_when_nobody_moved_anything(tmp_path, bench, model):
    spec = make_spec()
    current = model(spec)
    fleet = [store(tmp_path, spec, make_assignment(d), size=0.0) for d in "ab"]
    on = bench(spec, "fslora")
    result = on.merge(current, fleet)
    assert [c.share for c in result.contributions.values()] == [None, None]
    for name, after in on.states(result).items():
        assert after.adapter.up.tobytes() == current.module(name).adapter.up.tobytes()
        assert after.adapter.down.tobytes() == current.module(name).adapter.down.tobytes()


def test_error_is_finite_while_the_adapter_is_still_zero(tmp_path, bench, model):
    spec = make_spec()
    fleet = [store(tmp_path, spec, make_assignment(d), size=0.0) for d in "ab"]
    result = bench(spec, "fedit").merge(model(spec, make_states(spec, size=0.0)), fleet)
    assert result.error == 0.0 and set(result.errors.values()) == {0.0}


def test_a_method_without_a_global_model_has_no_error_to_tell(tmp_path, bench, model):
    spec = make_spec()
    fleet = [store(tmp_path, spec, make_assignment(d, parts=("down",))) for d in "ab"]
    result = bench(spec, "fedsa-lora").merge(model(spec), fleet)
    assert result.error is None and result.errors == {}


@pytest.mark.parametrize("name", sorted(METHODS))
@pytest.mark.parametrize("encoding", ["float32", "int8"])
def test_files_read_as_they_are_merged_give_what_held_updates_give(
    tmp_path, bench, model, name, encoding
):
    """Deltas may share memory where a method says that it streams: none may be seen as another."""
    spec, method = make_spec(), method_of(name)
    current, parts, fleet = model(spec), method.sent(0), []
    for i, k in enumerate((2, 3, 6) if method.heterogeneous else (RANK,) * 3):
        task = make_assignment(
            f"device-{i}", k, 2 * i, parts=parts, encoding=encoding, method=name,
            rows=method.rows, trained=method.trained(0), personal=method.personal,
        )  # fmt: skip
        fleet.append(store(tmp_path, spec, task, weight=1.0 + i, seed=i))
    on = bench(spec, name, starts={ROUND: current})
    merged = on.states(on.merge(current, fleet, version=1))
    for module in spec.modules:
        held, before = [], current.module(module.name)
        for stored in fleet:
            task = stored.assignment
            rows, scale = slice_rows(spec, task, module.name), method.device_scale(spec, task.rank)
            found = unpack(stored.path.read_bytes(), spec, task.update,
                           assignment_digest=task.digest)[module.name]  # fmt: skip
            lift = scale / before.adapter.scale if method.scaling == "common" else 1.0
            begin = partial(on.merger._begin, module.name, stored, rows, scale, ROUND, before)
            held.append(ModuleUpdate(task.device_id, rows, begin, found, stored.weight, lift))
        after = method.merge_module(before, held, ROUND)
        for part in after.parts:
            assert merged[module.name].values(part).tobytes() == after.values(part).tobytes()


def test_a_mean_holds_the_values_of_one_update_whatever_their_number(tmp_path, bench, model):
    spec = make_spec((ModuleShape("q", 4000, 4000),))
    current, peaks = model(spec), []
    for count in (45, 90):  # too many for Gram matrices of their errors
        fleet = [store(tmp_path, spec, make_assignment(f"{i:02}")) for i in range(count)]
        on = bench(spec, "fedit")
        tracemalloc.start()
        on.merge(current, fleet)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    one = 4 * RANK * 8000
    assert peaks[1] < peaks[0] + one  # 45 more of them would be 9 MB


# --- the same bits ------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["float32", "bfloat16", "int8"])
def test_order_of_updates_does_not_change_a_bit(tmp_path, bench, model, encoding):
    spec = make_spec(dense=DENSE)
    current, fleet = model(spec), make_fleet(tmp_path, spec, encoding,
                                             parts=("up", "down", "dense"))  # fmt: skip
    late = store(tmp_path, spec, make_assignment("device-1", 2, 4, round_=0, encoding=encoding,
                                                 parts=("up", "down", "dense")))  # fmt: skip
    on = bench(spec, "fslora", optimizer=make_optimizer("momentum"))
    results = [on.merge(current, order) for order in itertools.permutations([*fleet, late])]
    for result in results[1:]:
        assert bytes_of(result) == bytes_of(results[0])
        assert dict(result.contributions) == dict(results[0].contributions)
        assert (result.errors, result.error) == (results[0].errors, results[0].error)


def test_fslora_over_whole_adapters_is_fedit_bit_for_bit(tmp_path, bench, model):
    spec = make_spec()
    current = model(spec)
    fleet = [
        store(tmp_path, spec, make_assignment(f"d{i}", RANK, 3 * i), weight=i + 0.7, seed=i)
        for i in range(3)
    ]
    sketched, whole = (bench(spec, m).merge(current, fleet) for m in ("fslora", "fedit"))
    assert bytes_of(sketched) == bytes_of(whole)


@pytest.mark.parametrize("name", METHODS)
def test_how_many_files_are_held_open_does_not_change_the_bits(
    tmp_path, bench, model, monkeypatch, name
):
    spec = make_spec(tuple(ModuleShape(f"m{i}", 40 + i, 90 - i) for i in range(4)))
    method = method_of(name)
    current = model(spec, parts=method.parts(0))
    fleet = [
        store(tmp_path, spec, make_assignment(d, parts=method.sent(0), rows=method.rows), seed=i)
        for i, d in enumerate("abc")
    ]
    found = []
    for most_open in (256, 1, 0):
        monkeypatch.setattr(merge_module, "MOST_OPEN", most_open)
        found.append(bench(spec, name).merge(current, fleet, ROUND, 1))
    for other in found[1:]:
        assert bytes_of(found[0]) == bytes_of(other)
        for what in ("contributions", "errors", "error"):
            assert getattr(found[0], what) == getattr(other, what)


# --- slices and their rows ----------------------------------------------------------------------


def test_a_slice_goes_out_and_its_delta_comes_home_to_the_same_rows(tmp_path, bench, model):
    """Fetch, train, push, merge: the device's trained rows are the adapter's afterwards."""
    spec, method = make_spec(), method_of("fslora")
    current, task = model(spec), make_assignment("a", 3, 4)
    scale = method.device_scale(spec, 3)

    def cut(reader):
        found = {
            m.name: method.cut(reader.module(m.name), slice_rows(spec, task, m.name), scale)
            for m in spec.modules
        }
        return {n: {"up": s.adapter.up, "down": s.adapter.down} for n, s in found.items()}

    payload = Payload(3, "float32")
    received = unpack(pack(spec, payload, cut(current)), spec, payload)
    trained = {n: {"up": 2 * p["up"], "down": 3 * p["down"]} for n, p in received.items()}
    delta = {n: {part: trained[n][part] - p[part] for part in p} for n, p in received.items()}
    result = bench(spec, "fslora").merge(current, [store(tmp_path, spec, task, delta=delta)])
    for name, part in cut(StateReader(spec, result.files)).items():
        np.testing.assert_allclose(part["up"], trained[name]["up"], rtol=1e-6)
        np.testing.assert_allclose(part["down"], trained[name]["down"], rtol=1e-6)


def test_rows_that_a_device_dropped_are_as_if_it_never_had_them(tmp_path, bench, model):
    """HetLoRA's self-pruning: the device sends all k rows and says how many of them count."""
    spec = make_spec()
    current, delta = model(spec), make_delta(spec, RANK, 3)
    pruned = store(tmp_path, spec, make_assignment("a", rows="prefix"), delta=delta, kept=4)
    head = {n: {p: v[:4] for p, v in parts.items()} for n, parts in delta.items()}
    short = store(tmp_path, spec, make_assignment("b", 4, rows="prefix"), delta=head)
    results = [bench(spec, "rbla").merge(current, [update]) for update in (pruned, short)]
    assert results[0].coverage.tolist() == [1, 1, 1, 1, 0, 0]
    # Devices of k rows have scale alpha / k, and the one that dropped some trained at alpha / 6.
    for module in spec.modules:
        found = [StateReader(spec, r.files).module(module.name).adapter for r in results]
        start = current.module(module.name).adapter
        assert found[0].down.tobytes() == found[1].down.tobytes()
        assert (found[0].up[4:] == start.up[4:]).all()
        np.testing.assert_allclose(found[0].up[:4] - start.up[:4], delta[module.name]["up"][:4],
                                   atol=1e-6)  # fmt: skip


def test_a_device_that_was_handed_a_part_of_the_values_began_with_those(tmp_path, bench, model):
    """FLASC: the mean of the devices' products is of what they trained, not of what stayed here."""
    spec, method = make_spec(), method_of("flasc", density=0.25)
    current, payload = model(spec), Payload(RANK, "float32", density=0.25)
    whole = {m.name: current.module(m.name).adapter for m in spec.modules}
    handed = pack(spec, payload, {n: {"up": b.up, "down": b.down} for n, b in whole.items()})
    (tmp_path / "slice").write_bytes(handed)
    start = (StateFile(tmp_path / "slice", payload),)
    update = replace(store(tmp_path, spec, make_assignment(rows="prefix")), start=start)
    result = bench(spec, method.name, density=0.25).merge(current, [update])
    after, off, target = StateReader(spec, result.files), 0.0, 0.0
    for name, thinned in unpack(handed, spec, payload).items():
        delta = make_delta(spec, RANK, 0)[name]
        up, down = (thinned[p].astype(np.float64) + delta[p] for p in ("up", "down"))
        ideal = 2.0 * up.T @ down
        off += np.square(after.module(name).product.dense() - ideal).sum()
        target += np.square(ideal).sum()
    assert result.error == pytest.approx(math.sqrt(off / target), rel=1e-4) and result.error > 0.1


# --- late updates -------------------------------------------------------------------------------


def test_a_late_update_lands_on_the_rows_of_its_own_round(tmp_path, bench, model):
    spec = make_spec()
    current = model(spec)
    late = store(tmp_path, spec, make_assignment("late", 2, 1, round_=0))
    on = bench(spec, "fslora")
    for name, after in on.states(on.merge(current, [late], round_=3, version=4)).items():
        rows = slice_rows(spec, late.assignment, name)
        start = current.module(name).adapter
        moved = np.flatnonzero((after.adapter.up != start.up).any(1))
        assert moved.tolist() == rows.tolist()
        delta = make_delta(spec, 2, 0)[name]["up"]
        np.testing.assert_allclose(after.adapter.up[rows], start.up[rows] + delta, atol=1e-6)


@pytest.mark.parametrize("name", ["flexlora", "raflora", "florist"])
def test_where_factors_are_rebuilt_a_late_update_counts_with_the_model_it_was_cut_from(
    tmp_path, bench, model, name
):
    """Its changes mean nothing in today's basis: what it had then enters the mean of products."""
    spec = make_spec()
    then, now = make_states(spec, seed=2), make_states(spec, seed=3)
    late = store(tmp_path, spec, make_assignment("a", 2, round_=0, rows="prefix"), seed=4)
    options = {"energy": 1.0} if name == "florist" else {}
    on = bench(spec, name, starts={0: model(spec, then)}, **options)
    result = on.merge(model(spec, now), [late])
    for module, after in on.states(result).items():
        delta = make_delta(spec, 2, 4)[module]
        rescaled = (12 / RANK) / (12 / 2)  # of up: alpha / r to alpha / k
        up = rescaled * then[module].adapter.up[:2] + delta["up"]
        down = then[module].adapter.down[:2] + delta["down"]
        had = (12 / 2) * up.T.astype(np.float64) @ down
        if name == "raflora":  # rows that nobody holds stay
            rest = now[module].adapter.take(np.arange(2, RANK))
            had += rest.dense()
            nearest = Bundle(*_best(had, RANK), 1.0).dense()
            np.testing.assert_allclose(after.adapter.dense(), nearest, atol=1e-4)
        else:
            np.testing.assert_allclose(after.adapter.dense(), had, atol=1e-5)
            assert result.error < 1e-5


def _best(matrix, rank):
    """The factors of the best approximation of this rank, by a dense SVD."""
    u, s, v = np.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]).T, v[:rank]


def test_a_core_from_before_the_bases_were_fixed_is_left_out_with_a_reason(tmp_path, bench, model):
    spec = make_spec()
    on = bench(spec, "fed-sb")
    first = on.merge(model(spec), [store(tmp_path, spec, make_assignment("a"))])
    current = StateReader(spec, first.files)
    good = store(tmp_path, spec, make_assignment("a", parts=("core",)), seed=2)
    late = store(tmp_path, spec, make_assignment("b", round_=0), seed=3)
    result, dropped = on.merge_sound(current, [good, late])
    assert list(dropped) == ["b-0"] and "before the bases were fixed" in dropped["b-0"]
    assert bytes_of(result) == bytes_of(on.merge(current, [good]))
    assert on.merge_sound(current, [late])[0] is None


# --- dense tensors and the server's optimiser ---------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_dense_tensors_are_averaged_whatever_the_method(tmp_path, bench, model, name):
    spec, method = make_spec(dense=DENSE), method_of(name)
    parts = (*method.sent(0), "dense")
    fleet = [
        store(tmp_path, spec, make_assignment(d, parts=parts, rows=method.rows), weight=w, seed=i)
        for i, (d, w) in enumerate([("a", 1.0), ("b", 3.0)])
    ]
    result = bench(spec, name).merge(model(spec, parts=method.parts(0)), fleet, ROUND, 1)
    for tensor in spec.dense:
        mean = sum(w * make_delta(spec, RANK, i)[tensor.name]["dense"] for i, w in
                   enumerate((0.25, 0.75)))  # fmt: skip
        values, moments = StateReader(spec, result.files).dense(tensor.name)
        np.testing.assert_allclose(values, mean, atol=1e-7)
        assert values.shape == (tensor.out_features, tensor.in_features) and moments == {}


def test_momentum_is_kept_in_files_of_its_own_and_carries_on(tmp_path, bench, model):
    spec = make_spec(dense=DENSE)
    current = model(spec)
    parts = ("up", "down", "dense")
    on = bench(spec, "fedit", optimizer=make_optimizer("momentum", learning_rate=0.5, beta1=0.9))
    one = store(tmp_path, spec, make_assignment("a", parts=parts), seed=1)
    first = on.merge(current, [one])
    assert sorted(first.files) == ["adapter", "moment.first"]
    still = store(tmp_path, spec, make_assignment("b", parts=parts), size=0.0)
    second = on.merge(StateReader(spec, first.files), [still])
    delta = make_delta(spec, RANK, 1)
    readers = [current, *(StateReader(spec, result.files) for result in (first, second))]
    for name in (m.name for m in spec.modules):
        for part in ("up", "down"):
            at = [reader.module(name).values(part) for reader in readers]
            np.testing.assert_allclose(at[1] - at[0], 0.5 * delta[name][part], atol=1e-6)
            np.testing.assert_allclose(at[2] - at[1], 0.45 * delta[name][part], atol=1e-6)
    for tensor in spec.dense:
        values, moments = StateReader(spec, second.files).dense(tensor.name)
        moved = delta[tensor.name]["dense"]
        np.testing.assert_allclose(values, 0.95 * moved, atol=1e-6)
        np.testing.assert_allclose(moments["first"], 0.9 * moved, atol=1e-6)


def test_moments_of_a_part_that_rests_wait_for_its_turn(tmp_path, bench, model):
    """RoLoRA's factors take turns: what was learnt of up is not forgotten while down moves."""
    spec = make_spec()
    on = bench(spec, "rolora", optimizer=make_optimizer("adam", learning_rate=0.01))
    first = on.merge(model(spec), [store(tmp_path, spec, make_assignment("a", parts=("up",)))])
    turn = store(tmp_path, spec, make_assignment("b", parts=("down",)))
    second = on.merge(StateReader(spec, first.files), [turn])
    for module in spec.modules:
        before, after = (StateReader(spec, r.files).module(module.name) for r in (first, second))
        for moment in ("first", "second"):
            kept = [state.moments["up"][moment] for state in (before, after)]
            assert kept[0].any() and kept[0].tobytes() == kept[1].tobytes()
            assert not before.moments["down"][moment].any()
            assert after.moments["down"][moment].any()


# --- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"rank": 3}, WrongAssignmentError),
        ({"seed": 2}, WrongAssignmentError),
        ({"update": Payload(RANK, "int8")}, WrongEncodingError),
    ],
)
def test_an_update_for_another_assignment_is_refused(tmp_path, bench, model, changes, error):
    spec = make_spec()
    update = store(tmp_path, spec, make_assignment())
    other = replace(update, assignment=replace(update.assignment, **changes))
    with pytest.raises(error):
        bench(spec, "fslora").merge(model(spec), [other])


def test_an_update_for_another_run_a_cut_one_and_a_poisoned_one_are_refused(tmp_path, bench, model):
    spec, other = make_spec(), make_spec(run_id="other")
    current, update = model(spec), store(tmp_path, spec, make_assignment())
    data = update.path.read_bytes()
    with pytest.raises(WrongSpecError):
        bench(other, "fslora").merge(model(other), [update])
    on = bench(spec, "fslora")
    update.path.write_bytes(data[:-1])
    with pytest.raises(WrongSizeError):
        on.merge(current, [update])
    update.path.write_bytes(data[:-4] + b"\0\0\xc0\x7f")
    with pytest.raises(UpdateError, match="not finite"):  # of a mean, where it is summed
        on.merge(current, [update])
    with pytest.raises(NonFiniteError):
        bench(spec, "flexlora").merge(current, [update])
    assert not list(on.folder.iterdir()), "a merge that failed was to leave nothing behind"


def test_a_round_without_updates_or_weight_is_refused(tmp_path, bench, model):
    spec = make_spec()
    nothing = store(tmp_path, spec, make_assignment(), weight=0.0)
    for updates in ([], [nothing]):
        with pytest.raises(WeightError):
            bench(spec, "fslora").merge(model(spec), updates)


def huge(spec, seed):
    found = make_delta(spec, RANK, seed)
    return {n: {**parts, "up": np.full_like(parts["up"], 3e38)} for n, parts in found.items()}


@pytest.fixture
def brink(model):
    """A model at the edge of float32: one step further is infinite."""

    def of(spec):
        states = {
            n: replace(s, adapter=replace(s.adapter, up=np.full_like(s.adapter.up, 3e38)))
            for n, s in make_states(spec).items()
        }
        return model(spec, states)

    return of


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_one_update_that_no_merge_survives_does_not_stop_the_others(tmp_path, bench, brink):
    spec = make_spec()
    current = brink(spec)
    good = store(tmp_path, spec, make_assignment("good"), seed=1)
    bad = store(tmp_path, spec, make_assignment("bad"), delta=huge(spec, 2))
    on = bench(spec, "fedit")
    result, dropped = on.merge_sound(current, [good, bad])
    assert list(dropped) == ["bad-1"] and "far too large" in dropped["bad-1"]
    assert bytes_of(result) == bytes_of(on.merge(current, [good]))
    assert on.merge_sound(current, [bad])[0] is None


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_the_sound_ones_count_even_if_all_weight_was_with_the_others(tmp_path, bench, brink):
    """AFL may leave a device no weight; its update is no worse for that."""
    spec = make_spec()
    current = brink(spec)
    light = [store(tmp_path, spec, make_assignment(d), weight=0.0, seed=i)
             for i, d in enumerate("ab")]  # fmt: skip
    bad = store(tmp_path, spec, make_assignment("c"), delta=huge(spec, 2))
    on = bench(spec, "fedit")
    result, dropped = on.merge_sound(current, [*light, bad])
    assert list(dropped) == ["c-1"], "no weight is no fault"
    alike = [replace(update, weight=1.0) for update in light]
    assert bytes_of(result) == bytes_of(on.merge(current, alike))


# --- what it takes ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fslora", "flexlora", "fedex-lora"])
def test_memory_is_that_of_one_module_however_many_there_are(tmp_path, name):
    def peak(count):
        spec = make_spec(tuple(ModuleShape(f"m{i}", 256, 192) for i in range(count)))
        folder = tmp_path / f"{count}"
        folder.mkdir()
        fleet = [store(folder, spec, make_assignment(f"d{i}", rows="prefix"), seed=i)
                 for i in range(6)]  # fmt: skip
        current = write_model(folder / "model", spec)
        on = Bench(folder / "merged", spec, method_of(name))
        on.merge(current, fleet[:1])  # caches of layout and rows
        tracemalloc.start()
        try:
            on.merge(current, fleet)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    small, large = peak(6), peak(24)
    assert large < 1.3 * small
    at_once = 4 * RANK * (256 + 192) * len(os.sched_getaffinity(0))  # a module for each processor
    assert large < 100 * at_once, f"{large / at_once:.0f} times what is merged at once"


@pytest.mark.parametrize("name", ["fslora", "zero-padding", "ffa-lora"])
def test_the_bits_do_not_depend_on_how_many_modules_merge_at_once(
    tmp_path, bench, model, monkeypatch, name
):
    spec = make_spec(tuple(ModuleShape(f"m{i}", 40 + i, 24) for i in range(9)))
    current = model(spec)
    fleet = [store(tmp_path, spec, make_assignment(f"d{i}", rows="prefix"), seed=i)
             for i in range(5)]  # fmt: skip
    found = []
    for processors in (1, 2, 7):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid, n=processors: set(range(n)))
        found.append(bytes_of(bench(spec, name).merge(current, fleet)))
    assert found[0] == found[1] == found[2]


def test_discounts_reach_the_mean(tmp_path, bench, model):
    spec = make_spec()
    current = model(spec)
    fleet = [store(tmp_path, spec, make_assignment(d), weight=w, seed=i)
             for i, (d, w) in enumerate([("a", 1.0), ("b", 1 / math.sqrt(2))])]  # fmt: skip
    on = bench(spec, "fedit")
    share = 1 / (1 + 1 / math.sqrt(2))
    for name, after in on.states(on.merge(current, fleet)).items():
        ups = [make_delta(spec, RANK, i)[name]["up"] for i in range(2)]
        mean = share * ups[0] + (1 - share) * ups[1]
        moved = after.adapter.up - current.module(name).adapter.up
        np.testing.assert_allclose(moved, mean, atol=1e-6)
