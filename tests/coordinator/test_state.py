"""Versions of the global model: written and read module by module, whole or not at all."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coordinator.lowrank import Bundle
from coordinator.methods import METHODS, MethodOptions, ModuleState, make
from coordinator.state import (
    ADAPTER,
    MOMENT,
    SIDE,
    StateFile,
    StateReader,
    StateWriter,
    write_initial,
)
from profiles.model import ModuleShape
from protos.codecs import PackingError
from protos.contract import AdapterSpec, Payload
from protos.layout import WrongShapeError, packed_bytes
from protos.sketch import initial_down

MODULES = (ModuleShape("q", 5, 9), ModuleShape("down", 12, 7))
DENSE = (ModuleShape("norm.weight", 1, 4), ModuleShape("head.weight", 3, 4))
RANK = 4


def make_spec(**changes):
    plain = AdapterSpec("run", "base", "", "ab" * 32, RANK, 8.0, False, 5, MODULES)
    return dataclasses.replace(plain, **changes)


def drawn(rng, *shape):
    return rng.normal(size=shape).astype(np.float32)


def make_state(spec, module, seed=0, *, side=0, core=False, moments=()):
    """A module in the middle of a run. moments: (part, name) of those that are kept."""
    rng = np.random.default_rng([seed, module.out_features])
    m, n = module.out_features, module.in_features
    shapes = {"up": (RANK, m), "down": (RANK, n), "core": (RANK, RANK)}
    kept = {}
    for part, name in moments:
        kept.setdefault(part, {})[name] = drawn(rng, *shapes[part])
    return ModuleState(
        Bundle(drawn(rng, RANK, m), drawn(rng, RANK, n), spec.scale(RANK)),
        Bundle(drawn(rng, side, m), drawn(rng, side, n), 1.0) if side else None,
        drawn(rng, RANK, RANK) if core else None,
        kept,
    )


def write(folder, spec, states, parts=("up", "down"), dense=None):
    folder.mkdir(exist_ok=True)
    writer = StateWriter(spec, parts, lambda role: folder / role)
    for module in spec.modules:
        writer.write(module.name, states[module.name])
    for tensor in spec.dense:
        writer.write_dense(tensor.name, dense[tensor.name])
    return writer.finish()


def assert_same(one, other):
    """The same bits in everything that two states hold; absent moments are zeros."""
    for bundle, twin in ((one.adapter, other.adapter), (one.side, other.side)):
        assert (bundle is None) == (twin is None)
        if bundle is not None:
            assert bundle.up.tobytes() == twin.up.tobytes()
            assert bundle.down.tobytes() == twin.down.tobytes()
            assert bundle.scale == twin.scale
    assert (one.core is None) == (other.core is None)
    assert one.core is None or one.core.tobytes() == other.core.tobytes()
    for state, twin in itertools.permutations((one, other)):
        for part, kept in state.moments.items():
            for name, values in kept.items():
                found = twin.moments.get(part, {}).get(name, np.zeros_like(values))
                assert values.tobytes() == found.tobytes()


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    side=st.integers(0, 9),
    core=st.booleans(),
    rslora=st.booleans(),
    moments=st.sets(st.tuples(st.sampled_from(["up", "down"]), st.sampled_from(["first", "m2"]))),
    seed=st.integers(0, 99),
)
def test_what_is_written_is_read_back_bit_for_bit(
    tmp_path_factory, side, core, rslora, moments, seed
):
    spec = make_spec(use_rslora=rslora)
    of = {"side": side, "core": core, "moments": sorted(moments)}
    states = {m.name: make_state(spec, m, seed, **of) for m in spec.modules}
    parts = ("up", "down", "core") if core else ("up", "down")
    files = write(tmp_path_factory.mktemp("state"), spec, states, parts)
    assert set(files) == {
        ADAPTER,
        *([SIDE] if side else []),
        *(MOMENT + name for _, name in moments),
    }
    reader = StateReader(spec, files)
    for name, state in states.items():
        assert_same(state, reader.module(name))
    assert reader.module("q").adapter.scale == (4.0 if rslora else 2.0)


def test_files_hold_float32_and_nothing_else(tmp_path):
    """Versions are what everything starts from: what they lose, the run has lost."""
    spec = make_spec(dense=DENSE)
    zeros = {t.name: np.zeros((t.out_features, t.in_features), np.float32) for t in spec.dense}
    states = {m.name: make_state(spec, m, side=3) for m in spec.modules}
    dense = {name: (values, {}) for name, values in zeros.items()}
    files = write(tmp_path, spec, states, dense=dense)
    assert files[ADAPTER].payload == Payload(RANK, "float32", ("up", "down", "dense"))
    assert files[SIDE].payload == Payload(3, "float32")
    for file in files.values():
        assert file.path.stat().st_size == packed_bytes(spec, file.payload)


@pytest.mark.parametrize("moments", [(), (("up", "first"),)])
def test_dense_tensors_and_their_moments_are_read_back(tmp_path, moments):
    spec, rng = make_spec(dense=DENSE), np.random.default_rng(1)
    states = {m.name: make_state(spec, m, moments=moments) for m in spec.modules}
    dense = {
        t.name: (
            drawn(rng, t.out_features, t.in_features),
            {name: drawn(rng, t.out_features, t.in_features) for _, name in moments},
        )
        for t in spec.dense
    }
    reader = StateReader(spec, write(tmp_path, spec, states, dense=dense))
    for name, (values, kept) in dense.items():
        found, found_kept = reader.dense(name)
        assert found.tobytes() == values.tobytes()
        assert {n: v.tobytes() for n, v in found_kept.items()} == {
            n: v.tobytes() for n, v in kept.items()
        }


# --- version 0 ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_every_method_begins_as_peft_does(tmp_path, name):
    """Up zero and down as drawn: the first adapter changes nothing, and everybody can draw it."""
    spec, method = make_spec(dense=DENSE), make(name, MethodOptions(rank=RANK))
    files = write_initial(spec, method, lambda role: tmp_path / role)
    assert list(files) == [ADAPTER]
    reader = StateReader(spec, files)
    for module in spec.modules:
        state = reader.module(module.name)
        assert not state.adapter.up.any() and state.side is None and not state.moments
        draw = initial_down(spec.seed, module.name, RANK, module.in_features)
        assert state.adapter.down.tobytes() == draw.tobytes()
        assert np.abs(draw).max() <= module.in_features**-0.5
    assert all(not reader.dense(t.name)[0].any() for t in spec.dense)


def test_the_first_version_depends_on_the_seed_alone(tmp_path):
    method = make("fedit", MethodOptions(rank=RANK))

    def first(folder, **changes):
        (tmp_path / folder).mkdir()
        spec = make_spec(**changes)
        files = write_initial(spec, method, lambda role: tmp_path / folder / role)
        return [StateReader(spec, files).module(m.name).adapter.down for m in MODULES]

    once, again, other = first("a"), first("b", run_id="another"), first("c", seed=6)
    assert all(map(np.array_equal, once, again))
    assert not any(map(np.array_equal, once, other))


# --- useful rows --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dead", "useful"),
    [
        ({"q": [], "down": []}, 4),
        ({"q": [2, 3], "down": [3]}, 3),
        ({"q": [1, 2, 3], "down": [1, 2, 3]}, 1),
        ({"q": [0, 1], "down": [0, 1]}, 4),
        ({"q": [0, 1, 2, 3], "down": [2, 3]}, 2),
        ({"q": [0, 1, 2, 3], "down": [0, 1, 2, 3]}, 1),
    ],
)
def test_rows_that_are_zero_on_both_sides_of_every_module_are_of_no_use(tmp_path, dead, useful):
    spec = make_spec()
    states = {m.name: make_state(spec, m) for m in spec.modules}
    for name, rows in dead.items():
        states[name].adapter.up[rows] = 0
        states[name].adapter.down[rows] = 0
    assert StateReader(spec, write(tmp_path, spec, states)).useful_rank() == useful


def test_a_row_that_is_zero_on_one_side_can_still_learn(tmp_path):
    spec = make_spec()
    states = {m.name: make_state(spec, m) for m in spec.modules}
    for state in states.values():
        state.adapter.up[:] = 0
    assert StateReader(spec, write(tmp_path, spec, states)).useful_rank() == RANK


# --- what goes wrong ----------------------------------------------------------------------------


def test_an_abandoned_version_leaves_no_file(tmp_path):
    spec = make_spec()
    writer = StateWriter(spec, ("up", "down"), lambda role: tmp_path / role)
    writer.write("q", make_state(spec, MODULES[0], side=2, moments=[("up", "first")]))
    assert len(list(tmp_path.iterdir())) == 3
    writer.abandon()
    writer.abandon()
    assert list(tmp_path.iterdir()) == []


def test_modules_out_of_turn_and_missing_ones_are_refused(tmp_path):
    spec = make_spec()
    writer = StateWriter(spec, ("up", "down"), lambda role: tmp_path / role)
    with pytest.raises(WrongShapeError, match="out of turn"):
        writer.write("down", make_state(spec, MODULES[1]))
    writer.write("q", make_state(spec, MODULES[0]))
    with pytest.raises(WrongShapeError, match="were not written"):
        writer.finish()


def test_a_branch_of_another_rank_in_a_later_module_is_refused(tmp_path):
    spec = make_spec()
    writer = StateWriter(spec, ("up", "down"), lambda role: tmp_path / role)
    writer.write("q", make_state(spec, MODULES[0], side=2))
    with pytest.raises(WrongShapeError):
        writer.write("down", make_state(spec, MODULES[1], side=3))


def test_a_damaged_version_is_told(tmp_path):
    spec = make_spec()
    files = write(tmp_path, spec, {m.name: make_state(spec, m) for m in spec.modules})
    path = files[ADAPTER].path
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(PackingError, match="transfer was cut or the file is damaged"):
        StateReader(spec, files).module("q")
    gone = {ADAPTER: StateFile(tmp_path / "gone", files[ADAPTER].payload)}
    with pytest.raises(OSError, match="gone"):
        StateReader(spec, gone).module("q")
