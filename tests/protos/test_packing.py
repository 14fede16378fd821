"""The packed file keeps its promises to both ends, and to whoever it is attacked by."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import itertools
import math
import os
import struct
import tracemalloc

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from profiles.model import ModuleShape
from protos import codecs
from protos.codecs import CODECS, NonFiniteError, PackingError
from protos.contract import AdapterSpec, Payload
from protos.layout import (
    HEADER,
    HEADER_BYTES,
    WrongAssignmentError,
    WrongEncodingError,
    WrongFormatError,
    WrongShapeError,
    WrongSizeError,
    WrongSpecError,
    expected_bytes,
    packed_bytes,
)
from protos.packing import PackedWriter, pack
from protos.unpacking import PackedReader, open_packed, unpack

SHAPES = (ModuleShape("q", 12, 5), ModuleShape("down", 7, 20), ModuleShape("thin", 1, 3))
DENSE = (ModuleShape("norm.weight", 1, 9), ModuleShape("head.weight", 4, 6))
ANSWER = bytes(range(32))
ENCODINGS = list(CODECS)
BITS = {"float32": 32, "bfloat16": 16, "int8": 8, "int4": 4, "int2": 2, "sign": 1}
SCALED = ("int8", "int4", "int2", "sign")
HIGHEST = {"int8": 127, "int4": 7, "int2": 1.5}  # level, in scales
EVERYTHING = ("up", "down", "core", "dense")
SUBSETS = [
    parts for size in range(1, 5) for parts in itertools.combinations(EVERYTHING, size)
]  # fmt: skip
SPARSE = 0.25
MOST = 2.0**100  # hypothesis finds the rest of the range in its own test

each_encoding = pytest.mark.parametrize("encoding", ENCODINGS)
each_density = pytest.mark.parametrize("density", [1.0, SPARSE], ids=["whole", "sparse"])
each_group = pytest.mark.parametrize("group", [0, 8], ids=["rows", "groups"])
each_scaling = pytest.mark.parametrize(  # groups only where there are scales
    ("encoding", "group"), [(e, g) for e in ENCODINGS for g in (0, 8) if e in SCALED or not g]
)
each_subset = pytest.mark.parametrize("parts", SUBSETS, ids="+".join)


def make_spec(rank=8, modules=SHAPES, dense=DENSE, **changes):
    facts = {
        "run_id": "run",
        "base": "org/base",
        "base_revision": "main",
        "base_digest": "ab" * 32,
        "rank": rank,
        "alpha": 16.0,
        "use_rslora": False,
        "seed": 5,
        "modules": modules,
        "dense": dense,
    }
    return AdapterSpec(**(facts | changes))


def make_factors(spec, k, seed=0):
    """Normal values for every part that a payload may name."""
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return rng.normal(size=shape).astype(np.float32)

    modules = {
        m.name: {"up": draw(k, m.out_features), "down": draw(k, m.in_features), "core": draw(k, k)}
        for m in spec.modules
    }
    return modules | {t.name: {"dense": draw(t.out_features, t.in_features)} for t in spec.dense}


def places(spec, payload):
    """(name, part, rows, columns) of every block in the order of the file."""
    k, found = payload.rank, []
    for m in spec.modules:
        sides = (("up", k, m.out_features), ("down", k, m.in_features), ("core", k, k))
        found += [(m.name, part, *shape) for part, *shape in sides if part in payload.parts]
    if "dense" in payload.parts:
        found += [(t.name, "dense", t.out_features, t.in_features) for t in spec.dense]
    return found


def only_named(spec, payload, factors):
    """The factors that the payload names, in the order of the file."""
    found = {}
    for name, part, *_ in places(spec, payload):
        found.setdefault(name, {})[part] = factors[name][part]
    return found


def thin(spec, payload, factors):
    """The oracle: the ceil(density * D) largest magnitudes over all blocks, the first of equals."""
    named = only_named(spec, payload, factors)
    flat = np.concatenate([values.ravel() for parts in named.values() for values in parts.values()])
    kept = max(1, math.ceil(payload.density * flat.size))
    chosen = np.argsort(-np.abs(flat), kind="stable")[:kept]
    mask = np.zeros(flat.size, dtype=bool)
    mask[chosen] = True
    thinned, start = {}, 0
    for name, parts in named.items():
        thinned[name] = {}
        for part, values in parts.items():
            here = mask[start : start + values.size].reshape(values.shape)
            thinned[name][part] = np.where(here, values, np.float32(0))
            start += values.size
    return thinned


def assert_equal(found, expected):
    assert list(found) == list(expected)
    for name, parts in expected.items():
        assert list(found[name]) == list(parts)
        for part, values in parts.items():
            assert found[name][part].dtype == np.float32
            assert found[name][part].tobytes() == values.tobytes(), f"{name} {part}"


def encode_one(values, encoding, seed=0):
    """Packs and unpacks one (k, 6) block as the up side of a one-module adapter."""
    k, columns = values.shape
    spec = make_spec(rank=k, modules=(ModuleShape("m", columns, 1),))
    payload = Payload(k, encoding, ("up",))
    data = pack(spec, payload, {"m": {"up": values}}, seed=seed)
    return unpack(data, spec, payload)["m"]["up"]


def blocks(limit):
    finite = st.floats(-limit, limit, width=32)
    return arrays(np.float32, st.tuples(st.integers(1, 4), st.just(6)), elements=finite)


# Codecs


@given(values=blocks(3.4028234663852886e38))
@settings(max_examples=80, deadline=None)
def test_float32_comes_back_bit_for_bit(values):
    assert encode_one(values, "float32").tobytes() == values.tobytes()


@given(values=blocks(MOST))
@settings(max_examples=80, deadline=None)
def test_bfloat16_is_the_nearest_and_even_on_ties(values):
    decoded = encode_one(values, "bfloat16")
    normal = np.abs(values) >= np.finfo(np.float32).tiny
    error = np.abs(decoded.astype(np.float64) - values)
    assert np.all(error[normal] <= 2.0**-8 * np.abs(values.astype(np.float64))[normal])
    assert np.all(decoded.view(np.uint32) & 0xFFFF == 0)
    again = encode_one(decoded, "bfloat16")
    assert again.tobytes() == decoded.tobytes(), "a bfloat16 must be its own rounding"


def test_bfloat16_ties_go_to_the_even_neighbour():
    ties = np.array([[1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 1 + 2**-8 + 2**-20, 0.0, -0.0]])
    expected = np.array([[1.0, 1 + 2**-6, -1.0, 1 + 2**-7, 0.0, -0.0]], np.float32)
    assert encode_one(ties.astype(np.float32), "bfloat16").tobytes() == expected.tobytes()


@given(values=blocks(MOST), seed=st.integers(0, 2**32))
@settings(max_examples=80, deadline=None)
def test_int8_error_stays_below_one_step_of_its_row(values, seed):
    decoded = encode_one(values, "int8", seed).astype(np.float64)
    step = np.abs(values.astype(np.float64)).max(axis=1, keepdims=True) / 127
    slack = 1e-6 * step * 127 + 2e-45  # the float32 product; the smallest float32
    assert np.all(np.abs(decoded - values) <= step + slack)
    assert np.all(decoded[values == 0] == 0), "zero must stay zero"


@pytest.mark.parametrize("encoding", list(HIGHEST))
@each_group
def test_rounding_is_unbiased_over_seeds(encoding, group):
    values = np.random.default_rng(1).normal(size=(3, 16)).astype(np.float32)
    codec, draws, total = CODECS[encoding], 3000, np.zeros((3, 16))
    for seed in range(draws):
        coded = codec.encode(values, np.random.Philox(key=seed), group)
        total += codec.decode(memoryview(b"".join(coded)), 3, 16, group)
    step = np.abs(values).max(axis=1, keepdims=True) / HIGHEST[encoding] * 1.01
    # Rounding at random has standard deviation at most half a step.
    assert np.all(np.abs(total / draws - values) < 5 * 0.5 * step / draws**0.5 + 1e-7)


@given(data=st.data())
@settings(max_examples=120, deadline=None)
def test_rounding_errs_by_less_than_a_step_of_its_group(data):
    encoding, group = data.draw(st.sampled_from(list(HIGHEST))), data.draw(st.sampled_from([0, 8]))
    columns = data.draw(st.sampled_from([1, 6, 8, 19]))
    finite = st.floats(-MOST, MOST, width=32)
    values = data.draw(arrays(np.float32, (2, columns), elements=finite))
    codec = CODECS[encoding]
    coded = codec.encode(values, np.random.Philox(key=data.draw(st.integers(0, 99))), group)
    decoded = codec.decode(memoryview(b"".join(coded)), 2, columns, group).astype(np.float64)
    for start in range(0, columns, group or columns):
        own = slice(start, start + (group or columns))
        peak = np.abs(values[:, own].astype(np.float64)).max(axis=1, keepdims=True)
        step = peak / HIGHEST[encoding]
        step *= 1 + 2.0**-6 if group else 1  # a bfloat16 rounded up
        slack = 1e-5 * peak + (1e-40 if group else 1e-43)  # the product; the smallest scales
        assert np.all(np.abs(decoded[:, own] - values[:, own]) <= step + slack)


def test_sign_keeps_signs_and_the_mean_size_of_a_group():
    values = np.random.default_rng(1).normal(size=(3, 20)).astype(np.float32)
    codec = CODECS["sign"]
    for group in (0, 8, 512):  # rows are shorter than a group: one scale of two bytes each
        coded = codec.encode(values, np.random.Philox(key=1), group)
        assert len(coded[0]) == {0: 3 * 4, 8: 3 * 3 * 2, 512: 3 * 2}[group]
        decoded = codec.decode(memoryview(b"".join(coded)), 3, 20, group)
        assert ((decoded >= 0) == (values >= 0)).all()
        for start in range(0, 20, group or 20):
            own = slice(start, start + (group or 20))
            mean = np.abs(values[:, own]).mean(axis=1)
            np.testing.assert_allclose(np.abs(decoded[:, own]).mean(axis=1), mean, rtol=2.0**-7)


def test_int8_keeps_the_largest_value_of_a_row_whatever_the_noise():
    values = np.random.default_rng(2).normal(size=(4, 6)).astype(np.float32)
    for seed in range(20):
        decoded = encode_one(values, "int8", seed)
        np.testing.assert_allclose(
            np.abs(decoded).max(axis=1), np.abs(values).max(axis=1), rtol=1e-6
        )


@pytest.mark.parametrize("shape", [(9, 7), (8, 6), (1, 31), (31, 1)], ids=str)
@pytest.mark.parametrize("name", ["int8", "int4", "int2"])
def test_rounding_is_alike_however_many_rows_at_a_time(shape, monkeypatch, name):
    values = np.random.default_rng(3).normal(size=shape).astype(np.float32)
    found = set()
    for at_once in (1, 14, 20, 1 << 16):
        monkeypatch.setattr(codecs, "AT_ONCE", at_once)
        found.add(b"".join(CODECS[name].encode(values, np.random.Philox(key=1))))
    assert len(found) == 1


def test_encoding_a_large_tensor_takes_little_more_memory_than_its_values():
    values = np.ones((1024, 512), np.float32)
    for codec in CODECS.values():
        tracemalloc.start()
        try:
            codec.encode(values, np.random.Philox(key=1))
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak <= 20 * values.size, f"{codec.name}: {peak / values.size:.1f} bytes a value"


@pytest.mark.parametrize("codec", CODECS.values(), ids=lambda codec: codec.name)
@pytest.mark.parametrize("columns", [5, 16, 33])
@pytest.mark.parametrize("group", [0, 8])
def test_an_encoding_takes_the_bytes_it_says_and_zero_is_zero_bytes(codec, columns, group):
    values = np.random.default_rng(4).normal(size=(3, columns)).astype(np.float32)
    values[1] = 0
    scales, codes = codec.encode(values, np.random.Philox(key=1), group)
    assert len(scales) == codec.scale_bytes(3, columns, group)
    assert len(codes) == codec.code_bytes(3, columns) == 3 * math.ceil(columns * codec.bits / 8)
    rows = np.frombuffer(codes, np.uint8).reshape(3, -1)
    if codec.name not in ("int2", "sign"):  # which have no level zero
        assert not rows[1].any()
    assert rows[0].any()
    decoded = codec.decode(memoryview(bytes(scales) + bytes(codes)), 3, columns, group)
    assert not decoded[1].any()


def test_no_flipped_bit_turns_one_encoding_into_another():
    for one, other in itertools.combinations(CODECS.values(), 2):
        assert (one.wire_id ^ other.wire_id).bit_count() >= 2


# Files


@each_encoding
@each_subset
@pytest.mark.parametrize("k", [1, 3, 8])
def test_every_part_returns_in_its_shape_and_the_size_is_known_before(encoding, parts, k):
    spec, payload = make_spec(), Payload(k, encoding, parts)
    factors = make_factors(spec, k)
    data = pack(spec, payload, factors, assignment_digest=ANSWER)
    assert len(data) == packed_bytes(spec, payload)
    decoded = unpack(data, spec, payload, assignment_digest=ANSWER)
    found = [(name, part, *v.shape) for name, of in decoded.items() for part, v in of.items()]
    assert found == places(spec, payload)
    tolerance = {"float32": 0, "bfloat16": 2**-8, "int8": 1 / 60, "int4": 1 / 6, "int2": 0.7}
    for name, part, *_ in found:
        was, is_ = factors[name][part], decoded[name][part]
        assert is_.dtype == np.float32
        if encoding == "sign":
            assert ((is_ >= 0) == (was >= 0)).all()
        else:
            np.testing.assert_allclose(is_, was, atol=tolerance[encoding] * np.abs(was).max())


def scale_bytes(encoding, group, rows, columns):
    if encoding not in SCALED:
        return 0
    return rows * (2 * math.ceil(columns / group) if group else 4)


@each_scaling
@each_subset
def test_the_size_is_what_the_documentation_says(encoding, parts, group):
    spec, payload = make_spec(), Payload(3, encoding, parts, group=group)
    size = HEADER_BYTES
    for _, _, rows, columns in places(spec, payload):
        size += scale_bytes(encoding, group, rows, columns)
        size += rows * math.ceil(columns * BITS[encoding] / 8)
    assert packed_bytes(spec, payload) == size == expected_bytes(spec, payload)
    assert len(pack(spec, payload, make_factors(spec, 3))) == size
    squeezed = dataclasses.replace(payload, compressed=True)
    table = 8 * len(places(spec, payload))
    assert packed_bytes(spec, squeezed) == size + table
    assert len(pack(spec, squeezed, make_factors(spec, 3))) <= size + table


@each_scaling
@each_subset
@pytest.mark.parametrize("density", [0.999, SPARSE, 1 / 16, 1e-6])
@pytest.mark.parametrize("compressed", [False, True])
def test_a_sparse_file_is_no_larger_than_is_said(encoding, parts, group, density, compressed):
    spec = make_spec()
    payload = Payload(3, encoding, parts, density, group, compressed)
    shapes = [shape for _, _, *shape in places(spec, payload)]
    kept = max(1, math.ceil(density * sum(rows * columns for rows, columns in shapes)))
    most = HEADER_BYTES + math.ceil(kept * BITS[encoding] / 8)
    for rows, columns in shapes:
        most += 8 + 2 + math.ceil(rows * columns / 8) + scale_bytes(encoding, group, rows, columns)
    assert packed_bytes(spec, payload) == most
    data = pack(spec, payload, make_factors(spec, 3))
    assert len(data) <= most
    PackedReader(data, spec, payload)


@pytest.mark.parametrize("density", [0.5, 0.1, 0.01])
@pytest.mark.parametrize("encoding", ["float32", "int8", "int2"])
def test_a_sparse_file_takes_about_what_is_expected(encoding, density):
    spec = make_spec(modules=(ModuleShape("m", 4096, 2048),), dense=())
    payload = Payload(8, encoding, density=density)
    found = len(pack(spec, payload, make_factors(spec, 8)))
    assert abs(found / expected_bytes(spec, payload) - 1) < 0.02


@given(rank=st.integers(1, 64), data=st.data())
@settings(max_examples=60, deadline=None)
def test_bytes_scale_with_k_over_r_exactly(rank, data):
    k, encoding = data.draw(st.integers(1, rank)), data.draw(st.sampled_from(ENCODINGS))
    parts = data.draw(st.sampled_from([("up", "down"), ("up",), ("down",)]))
    spec = make_spec(rank=rank)
    part = packed_bytes(spec, Payload(k, encoding, parts)) - HEADER_BYTES
    whole = packed_bytes(spec, Payload(rank, encoding, parts)) - HEADER_BYTES
    assert part * rank == whole * k


@each_encoding
def test_a_file_split_by_parts_carries_what_one_file_would(encoding):
    spec, factors = make_spec(), make_factors(make_spec(), 4)
    whole = unpack(
        pack(spec, Payload(4, encoding, EVERYTHING), factors, seed=9),
        spec,
        Payload(4, encoding, EVERYTHING),
    )
    for part in EVERYTHING:
        payload = Payload(4, encoding, (part,))
        found = unpack(pack(spec, payload, factors, seed=9), spec, payload)
        assert_equal(found, only_named(spec, payload, whole))


def test_the_order_in_which_parts_are_named_is_not_in_the_file():
    spec, factors = make_spec(), make_factors(make_spec(), 4)
    forwards, backwards = Payload(4, "int8", EVERYTHING), Payload(4, "int8", EVERYTHING[::-1])
    data = pack(spec, forwards, factors)
    assert pack(spec, backwards, factors) == data
    assert_equal(unpack(data, spec, backwards), unpack(data, spec, forwards))


def test_a_branch_may_have_more_rows_than_the_global_adapter():
    """FLoRA stacks the adapters of its devices."""
    spec, payload = make_spec(rank=4), Payload(11, "float32")
    factors = make_factors(spec, 11)
    found = unpack(pack(spec, payload, factors), spec, payload)
    assert_equal(found, only_named(spec, payload, factors))


@each_encoding
@each_density
def test_packing_again_gives_the_same_bytes(encoding, density):
    spec, payload = make_spec(), Payload(4, encoding, EVERYTHING, density)
    factors = make_factors(spec, 4)
    first, second = (pack(spec, payload, factors, seed=9) for _ in range(2))
    assert first == second


@pytest.mark.parametrize(
    ("encoding", "density", "digest"),
    [
        ("float32", 1.0, "34a83ea4f69199a2"),
        ("float32", SPARSE, "9d69d8916c5c0915"),
        ("bfloat16", 1.0, "3eda91c29de0b885"),
        ("bfloat16", SPARSE, "087981696d38231c"),
        ("int8", 1.0, "aeb9b6adc497b569"),
        ("int8", SPARSE, "cd802c072ba565d5"),
        ("int4", 1.0, "b30f0b7b66d2fe5d"),
        ("int4", SPARSE, "86c02b0bfd038926"),
        ("int2", 1.0, "1537ab0586ea9039"),
        ("int2", SPARSE, "045b38b384384b46"),
        ("sign", 1.0, "a36e40c8b9fedd16"),
        ("sign", SPARSE, "dc710cb9b37f5b15"),
    ],
)
def test_bytes_never_change_between_releases(encoding, density, digest):
    """A change here makes old and new releases misread each other: raise VERSION with it."""
    spec, payload = make_spec(), Payload(3, encoding, EVERYTHING, density)
    factors, start = {}, 0
    for name, part, rows, columns in places(spec, payload):
        steps = np.arange(start, start + rows * columns) * 37 % 101 - 50
        factors.setdefault(name, {})[part] = (steps / 64).astype(np.float32).reshape(rows, columns)
        start += rows * columns
    body = pack(spec, payload, factors, seed=7)[HEADER_BYTES:]
    assert hashlib.sha256(body).hexdigest()[:16] == digest


def values_of(spec, **changes):
    """The packed bytes of the same factors without their header."""
    payload = Payload(4, "int8", EVERYTHING)
    return pack(spec, payload, make_factors(spec, 4), **({"seed": 9} | changes))[HEADER_BYTES:]


def test_devices_of_different_seeds_round_differently():
    assert values_of(make_spec(), seed=9) != values_of(make_spec(), seed=10)


@pytest.mark.parametrize(
    ("spec", "changes"),
    [
        (make_spec(), {"assignment_digest": ANSWER}),
        (make_spec(run_id="other"), {}),
        (make_spec(base="/elsewhere", base_revision=""), {}),
    ],
    ids=["assignment", "run name", "model folder"],
)
def test_replayed_plans_give_the_same_bits_under_another_name(spec, changes):
    assert values_of(spec, **changes) == values_of(make_spec())


def test_modules_and_parts_of_equal_values_round_differently():
    a, b, c = (ModuleShape(name, 8, 8) for name in "abc")
    spec = make_spec(modules=(a, b), dense=(c,))
    same = np.random.default_rng(5).normal(size=(8, 8)).astype(np.float32)
    factors = {name: dict.fromkeys(("up", "down", "core"), same) for name in ("a", "b")}
    factors["c"] = {"dense": same}
    data = pack(spec, Payload(8, "int8", EVERYTHING), factors, seed=9)[HEADER_BYTES:]
    block = len(data) // 7
    assert len({data[i * block : (i + 1) * block] for i in range(7)}) == 7


def test_header_is_as_documented():
    spec = make_spec()
    factors = make_factors(spec, 4)
    assert HEADER_BYTES == 92
    data = pack(spec, Payload(4, "int8"), factors, assignment_digest=ANSWER)
    assert HEADER.unpack_from(data) == (b"SKFP", 3, 6, 3, 0, 3, 4, 0, spec.digest, ANSWER)
    data = pack(spec, Payload(4, "bfloat16", ("dense", "core"), 0.5), factors)
    values = len(SHAPES) * 16 + 9 + 24
    kept = math.ceil(values / 2)
    fields = (b"SKFP", 3, 5, 4 | 8, 0, 3, 4, kept, spec.digest, bytes(32))
    assert HEADER.unpack_from(data) == fields
    data = pack(spec, Payload(4, "int4", group=8, compressed=True), factors)
    fields = (b"SKFP", 3, 9, 3, 8, 3, 4, 1 << 63, spec.digest, bytes(32))
    assert HEADER.unpack_from(data) == fields


@each_encoding
@each_density
def test_a_file_is_read_where_asked_one_module_at_a_time(tmp_path, encoding, density):
    spec, payload = make_spec(), Payload(4, encoding, EVERYTHING, density)
    data = pack(spec, payload, make_factors(spec, 4))
    path = tmp_path / "update"
    path.write_bytes(data)
    reader = open_packed(path, spec, payload)
    whole = unpack(data, spec, payload)
    names = ["thin", "head.weight", "q", "thin"]
    assert_equal({n: reader.module(n) for n in names}, {n: whole[n] for n in names})
    with pytest.raises(WrongSpecError):
        reader.module("absent")


@each_encoding
def test_what_is_read_lies_in_the_memory_given(tmp_path, encoding):
    spec, payload = make_spec(), Payload(4, encoding, EVERYTHING)
    data = pack(spec, payload, make_factors(spec, 4))
    path = tmp_path / "update"
    path.write_bytes(data)
    reader, fresh = open_packed(path, spec, payload), PackedReader(data, spec, payload)
    memory = memoryview(bytearray(max(map(reader.stored_bytes, reader.names))))
    for name in reader.names:
        found = reader.module(name, memory)
        assert_equal({name: found}, {name: fresh.module(name)})
        assert reader.measured(name)[1] == fresh.measured(name)[1]
        if encoding == "float32":
            assert all(np.shares_memory(v, np.asarray(memory)) for v in found.values())


def test_a_file_that_shrinks_while_in_use_is_an_error(tmp_path):
    spec, payload = make_spec(), Payload(4, "float32")
    path = tmp_path / "update"
    path.write_bytes(pack(spec, payload, make_factors(spec, 4)))
    reader = open_packed(path, spec, payload)
    os.truncate(path, path.stat().st_size - 4)
    *whole, cut = reader.names
    for name in whole:
        reader.module(name)
    with pytest.raises(WrongSizeError, match="cut while in use"):
        reader.module(cut)


def test_a_module_that_the_file_holds_nothing_of_is_refused_by_name():
    spec, payload = make_spec(), Payload(4, "float32")
    reader = PackedReader(pack(spec, payload, make_factors(spec, 4)), spec, payload)
    with pytest.raises(WrongSpecError, match=r"norm\.weight is not in this file"):
        reader.module("norm.weight")


# Writing by parts


@each_encoding
@each_subset
def test_writing_by_parts_gives_the_bytes_of_packing_at_once(encoding, parts):
    spec, payload = make_spec(), Payload(4, encoding, parts)
    factors = make_factors(spec, 4)
    stream = io.BytesIO()
    writer = PackedWriter(stream, spec, payload, assignment_digest=ANSWER, seed=9)
    for name in factors:  # also those that the payload names no part of
        writer.write(name, factors[name])
    writer.finish()
    assert stream.getvalue() == pack(spec, payload, factors, assignment_digest=ANSWER, seed=9)


def start_writing(payload):
    spec = make_spec()
    return PackedWriter(io.BytesIO(), spec, payload), make_factors(spec, payload.rank)


def test_writing_refuses_what_is_out_of_turn_or_unknown():
    writer, factors = start_writing(Payload(2, "int8", EVERYTHING))
    with pytest.raises(WrongShapeError, match="down up is missing or out of turn"):
        writer.write("down", factors["down"])
    with pytest.raises(WrongShapeError, match=r"norm\.weight dense is missing or out of turn"):
        writer.write("norm.weight", factors["norm.weight"])
    with pytest.raises(WrongShapeError, match="extra is unknown"):
        writer.write("extra", factors["q"])
    writer.write("q", factors["q"])
    with pytest.raises(WrongShapeError, match="q up is missing or out of turn"):
        writer.write("q", factors["q"])


@pytest.mark.parametrize("absent", ["up", "down", "core"])
def test_writing_refuses_a_missing_part(absent):
    writer, factors = start_writing(Payload(2, "int8", EVERYTHING))
    with pytest.raises(WrongShapeError, match=f"q {absent} is missing"):
        writer.write("q", {part: v for part, v in factors["q"].items() if part != absent})


def test_an_incomplete_file_is_never_finished():
    writer, factors = start_writing(Payload(2, "float32", EVERYTHING))
    for name in factors:
        with pytest.raises(WrongShapeError, match=f"parts were not written, first {name}"):
            writer.finish()
        writer.write(name, factors[name])
    writer.finish()


def test_a_refused_part_still_counts_as_not_written():
    writer, factors = start_writing(Payload(2, "float32"))
    for name in ("down", "thin", "thin", "thin"):
        with pytest.raises(WrongShapeError):
            writer.write(name, factors[name])
    with pytest.raises(WrongShapeError, match="6 parts were not written, first q up"):
        writer.finish()
    broken = factors["q"] | {"down": np.full((2, 5), np.nan, np.float32)}
    with pytest.raises(NonFiniteError, match="q down"):
        writer.write("q", broken)
    with pytest.raises(WrongShapeError, match="5 parts were not written, first q down"):
        writer.finish()


def test_a_sparse_file_is_not_written_by_parts():
    with pytest.raises(WrongShapeError, match="use pack"):
        start_writing(Payload(2, "int8", density=0.5))


def test_writing_by_parts_holds_one_module_in_memory(tmp_path):
    modules = tuple(ModuleShape(f"m{i}", 256, 256) for i in range(64))
    spec, payload = make_spec(modules=modules, dense=()), Payload(8, "bfloat16")
    one = make_factors(make_spec(modules=modules[:1], dense=()), 8)["m0"]
    packed_bytes(spec, payload)
    with (tmp_path / "adapter").open("wb") as stream:
        writer = PackedWriter(stream, spec, payload)
        tracemalloc.start()
        try:
            for module in modules:
                writer.write(module.name, one)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        writer.finish()
    assert (tmp_path / "adapter").stat().st_size == packed_bytes(spec, payload)
    assert peak < 4 * (2 * 8 * 256 * 4)


# Sparse files


@each_encoding
@each_subset
@pytest.mark.parametrize("density", [0.9, SPARSE, 1 / 16, 1e-9])
def test_a_sparse_file_is_what_is_left_of_the_largest_over_all_blocks(encoding, parts, density):
    spec, payload = make_spec(), Payload(3, encoding, parts, density)
    factors = make_factors(spec, 3)
    for size, name in enumerate(factors, 1):  # blocks of unlike size share one threshold
        for part in factors[name]:
            factors[name][part] *= size
    expected = thin(spec, payload, factors)
    found = unpack(pack(spec, payload, factors, seed=9), spec, payload)
    if encoding == "float32":
        assert_equal(found, expected)
    # Whatever the encoding: as if the rest had been zero before a file that holds everything.
    # Noise is drawn for what is kept only, so values agree within their steps.
    whole = Payload(3, encoding, parts)
    dense = unpack(pack(spec, whole, expected, seed=9), spec, whole)
    for name, part, *_ in places(spec, payload):
        assert not found[name][part][expected[name][part] == 0].any()
        peak = np.abs(expected[name][part]).max(axis=1, keepdims=True)
        step = 2 * peak / HIGHEST.get(encoding, math.inf) * (1 + 1e-5)
        there = expected[name][part] != 0
        if encoding != "sign":  # whose scale is the mean of what is there
            assert (np.abs(found[name][part] - dense[name][part])[there] <= step.repeat(
                dense[name][part].shape[1], axis=1)[there]).all()  # fmt: skip


@given(data=st.data(), density=st.floats(1e-6, 0.999999))
@settings(max_examples=80, deadline=None)
def test_a_sparse_file_keeps_the_first_of_equals_and_as_many_as_it_says(data, density):
    """Few magnitudes, so that most draws have ties and many zeros."""
    spec, payload = make_spec(), Payload(2, "float32", ("up", "down", "dense"), density)
    magnitudes = st.sampled_from([0.0, 1.0, -1.0, 2.0, -2.0, 1e-40, 3e38])
    factors = {}
    for name, part, rows, columns in places(spec, payload):
        drawn = arrays(np.float32, (rows, columns), elements=magnitudes)
        factors.setdefault(name, {})[part] = data.draw(drawn)
    packed = pack(spec, payload, factors)
    expected = thin(spec, payload, factors)
    assert_equal(unpack(packed, spec, payload), expected)
    values = sum(rows * columns for _, _, rows, columns in places(spec, payload))
    kept = HEADER.unpack_from(packed)[7]
    assert kept == max(1, math.ceil(density * values - 1e-9))
    counts = np.frombuffer(packed, "<u4", 2 * len(places(spec, payload)), HEADER_BYTES)[::2]
    assert counts.sum() == kept


def test_a_sparse_file_of_equal_values_keeps_its_beginning():
    spec, payload = make_spec(dense=()), Payload(2, "float32", density=0.5)
    ones = {
        n: {p: np.ones_like(v) for p, v in of.items()} for n, of in make_factors(spec, 2).items()
    }
    found = unpack(pack(spec, payload, ones), spec, payload)
    flat = np.concatenate([v.ravel() for parts in found.values() for v in parts.values()])
    assert flat.tolist() == [1.0] * (flat.size // 2) + [0.0] * (flat.size // 2)


def test_sparse_int8_takes_its_steps_from_the_values_that_are_kept():
    """A row whose values are all left out has scale zero; the others differ by less than a step."""
    spec, payload = make_spec(), Payload(4, "int8", EVERYTHING, SPARSE)
    factors = make_factors(spec, 4)
    factors["q"]["up"][2] = 1e-6  # never among the largest
    expected = thin(spec, payload, factors)
    found = unpack(pack(spec, payload, factors, seed=3), spec, payload)
    assert not found["q"]["up"][2].any()
    for name, part, *_ in places(spec, payload):
        step = np.abs(expected[name][part]).max(axis=1, keepdims=True) / 127
        assert np.all(np.abs(found[name][part] - expected[name][part]) <= step * (1 + 1e-4))
        assert not found[name][part][expected[name][part] == 0].any()


def test_sparse_int8_is_unbiased_over_seeds():
    spec, payload = make_spec(modules=(), dense=DENSE[1:]), Payload(1, "int8", ("dense",), 0.5)
    factors = make_factors(spec, 1)
    expected = thin(spec, payload, factors)["head.weight"]["dense"]
    draws, total = 2000, np.zeros((4, 6))
    for seed in range(draws):
        packed = pack(spec, payload, factors, seed=seed)
        total += unpack(packed, spec, payload)["head.weight"]["dense"]
    step = np.abs(expected).max(axis=1, keepdims=True) / 127
    assert np.all(np.abs(total / draws - expected) < 5 * 0.5 * step / draws**0.5 + 1e-7)


@each_encoding
def test_density_one_is_not_sparse(encoding):
    spec = make_spec()
    factors = make_factors(spec, 4)
    whole = pack(spec, Payload(4, encoding), factors)
    assert HEADER.unpack_from(whole)[7] == 0
    assert pack(spec, Payload(4, encoding, density=1), factors) == whole
    almost = Payload(4, encoding, density=1 - 1e-12)  # everything is kept, and said to be
    data = pack(spec, almost, factors)
    assert HEADER.unpack_from(data)[7] == 4 * spec.parameters_per_rank
    assert_equal(unpack(data, spec, almost), unpack(whole, spec, Payload(4, encoding)))
    with pytest.raises(WrongSizeError):
        unpack(data, spec, Payload(4, encoding))


def sparse_file(encoding="int8", density=SPARSE, parts=EVERYTHING):
    spec, payload = make_spec(), Payload(3, encoding, parts, density)
    return spec, payload, bytearray(pack(spec, payload, make_factors(spec, 3)))


@each_encoding
def test_every_flipped_bit_of_the_table_is_noticed(encoding):
    spec, payload, data = sparse_file(encoding)
    for byte, bit in itertools.product(range(8 * len(places(spec, payload))), range(8)):
        hostile = bytearray(data)
        hostile[HEADER_BYTES + byte] ^= 1 << bit
        with pytest.raises(PackingError):
            unpack(hostile, spec, payload)


def table_of(counts, honest):
    """The table with other counts and the stored bytes as they were."""
    entries = [n for pair in zip(counts, honest[1::2], strict=True) for n in pair]
    return struct.pack(f"<{len(entries)}I", *entries)


def test_counts_that_do_not_add_up_are_refused_before_anything_is_read():
    spec, payload, data = sparse_file()
    number = len(places(spec, payload))
    kept = HEADER.unpack_from(data)[7]
    honest = struct.unpack_from(f"<{2 * number}I", data, HEADER_BYTES)
    biggest = 2**32 - 1
    claims = [
        [0] * number,
        [kept + 1] + [0] * (number - 1),
        [biggest] * number,
        [biggest, kept + 1] + [0] * (number - 2),  # adds up modulo 2**32
    ]
    for counts in claims:
        data[HEADER_BYTES : HEADER_BYTES + 8 * number] = table_of(counts, honest)
        with pytest.raises(WrongSizeError, match="do not add up"):
            PackedReader(data, spec, payload)


@each_encoding
def test_counts_moved_between_blocks_are_refused(encoding):
    spec, payload, data = sparse_file(encoding)
    number = len(places(spec, payload))
    honest = struct.unpack_from(f"<{2 * number}I", data, HEADER_BYTES)
    counts = honest[::2]
    kept = sum(counts)
    swapped = [counts[-1], *counts[1:-1], counts[0]]
    assert swapped != list(counts)
    one_block = [kept] + [0] * (number - 1)  # more than the block has values
    for counts in (swapped, one_block, one_block[::-1]):
        data[HEADER_BYTES : HEADER_BYTES + 8 * number] = table_of(counts, honest)
        with pytest.raises(PackingError):
            unpack(data, spec, payload)


def test_hostile_counts_allocate_nothing():
    spec, payload, data = sparse_file()
    number, kept = len(places(spec, payload)), HEADER.unpack_from(data)[7]
    honest = struct.unpack_from(f"<{2 * number}I", data, HEADER_BYTES)
    biggest = 2**32 - 1
    claims = [[biggest] * number, [biggest] + [0] * (number - 1), [kept] + [0] * (number - 1)]
    tracemalloc.start()
    try:
        for counts in claims:
            data[HEADER_BYTES : HEADER_BYTES + 8 * number] = table_of(counts, honest)
            with pytest.raises(PackingError):
                unpack(data, spec, payload)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 200_000, f"{peak} bytes were allocated for files of {len(data)} bytes"


def test_packing_sparsely_takes_little_more_memory_than_the_values():
    modules = tuple(ModuleShape(f"m{i}", 512, 512) for i in range(32))
    spec, payload = make_spec(modules=modules, dense=()), Payload(16, "int8", density=1 / 16)
    factors = make_factors(spec, 16)
    equal = {n: {p: np.zeros_like(v) for p, v in of.items()} for n, of in factors.items()}
    values = 16 * spec.parameters_per_rank
    for found in (factors, equal):  # all zero: every value is a tie
        tracemalloc.start()
        try:
            data = pack(spec, payload, found)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < 20 * values, f"{peak / values:.1f} bytes per value"
    assert len(data) < 0.05 * 4 * values


# Compressed files


def compressed_file(encoding="int4", density=1.0, group=0):
    """Values that repeat, so that blocks are shorter as frames."""
    spec = make_spec(modules=(ModuleShape("m", 256, 128), ModuleShape("n", 64, 64)), dense=())
    payload = Payload(4, encoding, density=density, group=group, compressed=True)
    factors = {
        name: {part: np.round(values) for part, values in parts.items()}
        for name, parts in make_factors(spec, 4).items()
    }
    return spec, payload, factors


@each_scaling
@each_density
def test_compression_changes_bytes_and_no_value(encoding, density, group):
    spec, payload, factors = compressed_file(encoding, density, group)
    plain = dataclasses.replace(payload, compressed=False)
    small, whole = (pack(spec, p, factors, seed=9) for p in (payload, plain))
    assert_equal(unpack(small, spec, payload), unpack(whole, spec, plain))
    assert len(small) <= len(whole) + 8 * len(places(spec, payload))
    for one, other in ((small, plain), (whole, payload)):
        with pytest.raises(PackingError):
            unpack(one, spec, other)


def test_what_repeats_is_stored_shorter_and_noise_as_it_is():
    spec, payload, factors = compressed_file("float32")
    zeros = {n: {p: np.zeros_like(v) for p, v in of.items()} for n, of in factors.items()}
    noise = make_factors(spec, 4)
    assert len(pack(spec, payload, zeros)) < packed_bytes(spec, payload) / 20
    most = HEADER_BYTES + 8 * 4 + sum(v.nbytes for of in noise.values() for v in of.values()
                                      if v.shape[1] > 4)  # fmt: skip
    assert 0.9 * most < len(pack(spec, payload, noise)) <= packed_bytes(spec, payload)


def test_a_frame_that_would_take_more_than_its_block_gets_no_memory():
    spec, payload, factors = compressed_file()
    data = bytearray(pack(spec, payload, factors))
    counts = struct.unpack_from("<8I", data, HEADER_BYTES)
    first, begin = counts[1] % (1 << 31), HEADER_BYTES + 8 * 4
    for says_so in (True, False):
        squeeze = zstandard.ZstdCompressor(level=19, write_content_size=says_so)
        block = squeeze.compress(bytes(1 << 23))
        assert len(block) < 4 * 256 // 2
        hostile = data[:HEADER_BYTES] + struct.pack("<2I", counts[0], len(block) | 1 << 31)
        hostile += data[HEADER_BYTES + 8 : begin] + block + data[begin + first :]
        tracemalloc.start()
        try:
            with pytest.raises(PackingError):
                unpack(hostile, spec, payload)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < 2_000_000


def test_a_compressed_file_is_written_by_parts_after_other_bytes():
    spec, payload, factors = compressed_file()
    stream = io.BytesIO(b"before")
    stream.seek(6)
    writer = PackedWriter(stream, spec, payload, assignment_digest=ANSWER, seed=9)
    for name, parts in factors.items():
        writer.write(name, parts)
    writer.finish()
    stream.write(b"after")
    whole = pack(spec, payload, factors, assignment_digest=ANSWER, seed=9)
    assert stream.getvalue() == b"before" + whole + b"after"


# Hostile files


@each_encoding
@each_density
def test_a_file_cut_at_any_byte_or_too_long_is_refused(encoding, density):
    spec, payload = make_spec(), Payload(2, encoding, EVERYTHING, density)
    data = pack(spec, payload, make_factors(spec, 2))
    for length in range(len(data)):
        with pytest.raises(WrongSizeError):
            unpack(data[:length], spec, payload)
    with pytest.raises(WrongSizeError):
        unpack(data + b"\0", spec, payload)


def test_an_empty_file_is_refused_by_name(tmp_path):
    (tmp_path / "empty").touch()
    with pytest.raises(WrongSizeError):
        open_packed(tmp_path / "empty", make_spec(), Payload(2, "float32"))


@each_encoding
@each_density
def test_every_flipped_bit_of_the_header_is_noticed(encoding, density):
    spec, payload = make_spec(), Payload(2, encoding, EVERYTHING, density)
    data = pack(spec, payload, make_factors(spec, 2), assignment_digest=ANSWER)
    for bit in range(8 * HEADER_BYTES):
        hostile = bytearray(data)
        hostile[bit // 8] ^= 1 << bit % 8
        with pytest.raises(PackingError):
            unpack(hostile, spec, payload, assignment_digest=ANSWER)


@given(data=st.binary(max_size=400))
@settings(max_examples=80, deadline=None)
def test_no_bytes_raise_anything_but_a_packing_error(data):
    spec = make_spec()
    for payload in (Payload(3, "float32"), Payload(3, "int8", EVERYTHING, SPARSE)):
        kept = math.ceil(SPARSE * (3 * 48 + 27 + 33)) if payload.density < 1 else 0
        parts, wire_id = (3, 3) if payload.encoding == "float32" else (15, 6)
        head = HEADER.pack(
            b"SKFP", 3, wire_id, parts, 0, len(SHAPES), 3, kept, spec.digest, bytes(32)
        )
        for hostile in (data, head + data):
            with pytest.raises(PackingError):
                unpack(hostile, spec, payload)


@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_mutated_bytes_are_refused_or_finite_in_the_right_shape(data):
    payload = Payload(
        data.draw(st.integers(1, 3)),
        data.draw(st.sampled_from(ENCODINGS)),
        data.draw(st.sampled_from(SUBSETS)),
        data.draw(st.sampled_from([1.0, 0.5, 0.05])),
        compressed=data.draw(st.booleans()),
    )
    spec = make_spec()
    hostile = bytearray(pack(spec, payload, make_factors(spec, payload.rank)))
    first = data.draw(st.sampled_from([0, HEADER_BYTES, HEADER_BYTES]))  # mostly in the body
    spots = st.tuples(st.integers(first, len(hostile) - 1), st.integers(0, 255))
    for spot, byte in data.draw(st.lists(spots, max_size=8)):
        hostile[spot] = byte
    start = data.draw(st.integers(first, len(hostile)))
    noise = data.draw(st.binary(max_size=40))[: len(hostile) - start]
    hostile[start : start + len(noise)] = noise
    try:
        found = unpack(hostile, spec, payload)
    except PackingError:
        return
    shapes = [(name, part, *v.shape) for name, of in found.items() for part, v in of.items()]
    assert shapes == places(spec, payload)
    for parts in found.values():
        assert all(v.dtype == np.float32 and np.isfinite(v).all() for v in parts.values())


@each_density
def test_claimed_sizes_allocate_nothing(density):
    spec, payload = make_spec(), Payload(2, "float32", ("up", "down"), density)
    biggest, kept = 2**32 - 1, HEADER.unpack_from(pack(spec, payload, make_factors(spec, 2)))[7]
    claims = [
        (biggest, biggest, kept),
        (len(SHAPES), biggest, kept),
        (biggest, 2, kept),
        (len(SHAPES), 2, 2**64 - 1),
        (len(SHAPES), 2, kept),  # an honest header over nothing
    ]
    tracemalloc.start()
    try:
        for modules, rows, claimed in claims:
            hostile = HEADER.pack(
                b"SKFP", 3, 3, 3, 0, modules, rows, claimed, spec.digest, bytes(32)
            )
            with pytest.raises(PackingError):
                unpack(hostile + bytes(1000), spec, payload)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 200_000, f"{peak} bytes were allocated for files of 1 092 bytes"


@each_density
def test_reading_one_module_allocates_that_module_only(density):
    spec = make_spec(modules=tuple(ModuleShape(f"m{i}", 256, 256) for i in range(32)))
    payload = Payload(8, "bfloat16", ("up", "down"), density)
    data = pack(spec, payload, make_factors(spec, 8))
    reader = PackedReader(data, spec, payload)
    tracemalloc.start()
    try:
        reader.module("m7")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    one_module = 2 * 8 * 256 * 4
    assert peak < 4 * one_module


AGREED = Payload(2, "float32", ("up", "down"))


@pytest.mark.parametrize(
    ("error", "changes"),
    [
        (WrongSpecError, {"spec": make_spec(run_id="other")}),
        (WrongSpecError, {"spec": make_spec(seed=6)}),
        (WrongSpecError, {"spec": make_spec(dense=DENSE[:1])}),
        (WrongAssignmentError, {"assignment_digest": bytes(32)}),
        (WrongEncodingError, {"payload": Payload(2, "int8")}),
        (WrongEncodingError, {"payload": Payload(2, "float64")}),
        (WrongSizeError, {"payload": Payload(3, "float32")}),
        (WrongShapeError, {"payload": Payload(0, "float32")}),
        (WrongShapeError, {"payload": Payload(-1, "float32")}),
        (WrongFormatError, {"payload": Payload(2, "float32", ("up",))}),
        (WrongFormatError, {"payload": Payload(2, "float32", ("up", "core"))}),
        (WrongFormatError, {"payload": Payload(2, "float32", EVERYTHING)}),
        (WrongShapeError, {"payload": Payload(2, "float32", ())}),
        (WrongShapeError, {"payload": Payload(2, "float32", ("up", "middle"))}),
        (WrongSizeError, {"payload": Payload(2, "float32", density=SPARSE)}),
        (WrongShapeError, {"payload": Payload(2, "float32", density=0.0)}),
        (WrongShapeError, {"payload": Payload(2, "float32", density=-0.5)}),
        (WrongShapeError, {"payload": Payload(2, "float32", density=1.5)}),
        (WrongShapeError, {"payload": Payload(2, "float32", density=math.nan)}),
    ],
)
def test_a_mismatch_is_named(error, changes):
    spec = make_spec()
    data = pack(spec, AGREED, make_factors(spec, 2), assignment_digest=ANSWER)
    agreed = {"spec": spec, "payload": AGREED, "assignment_digest": ANSWER}
    PackedReader(data, **agreed)
    with pytest.raises(error):
        PackedReader(data, **(agreed | changes))


@pytest.mark.parametrize(
    ("offset", "value", "error"),
    [
        (0, b"PK\3\4", WrongFormatError),
        (4, b"\1\0", WrongFormatError),
        (6, b"\4\0", WrongEncodingError),
        (8, b"\1\0", WrongFormatError),
        (8, b"\x13\0", WrongFormatError),
        (10, b"\1\0", WrongFormatError),
        (12, b"\5\0\0\0", WrongSpecError),
        (16, b"\3\0\0\0", WrongSizeError),
        (20, b"\1\0\0\0\0\0\0\0", WrongSizeError),
        (28, b"\0" * 32, WrongSpecError),
        (60, b"\1" * 32, WrongAssignmentError),
    ],
    ids=["magic", "version", "encoding", "parts", "unknown part", "zero", "modules", "rows",
         "kept", "spec", "assignment"],
)  # fmt: skip
def test_a_foreign_file_is_named(offset, value, error):
    spec = make_spec()
    data = bytearray(pack(spec, AGREED, make_factors(spec, 2)))
    data[offset : offset + len(value)] = value
    with pytest.raises(error):
        unpack(data, spec, AGREED)


def test_a_file_of_version_1_is_refused_by_its_number():
    header = struct.pack("<4sHHII32s32s", b"SKFP", 1, 1, 3, 2, make_spec().digest, bytes(32))
    with pytest.raises(WrongFormatError, match="version 1 is not the 3 this side reads"):
        unpack(header + bytes(384), make_spec(), AGREED)


# Values and shapes


@each_encoding
@each_density
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_packing_refuses_values_that_are_not_finite(encoding, density, bad):
    spec, payload = make_spec(), Payload(2, encoding, EVERYTHING, density)
    factors = make_factors(spec, 2)
    factors["down"]["down"][1, 3] = bad
    with pytest.raises(NonFiniteError, match="down down"):
        pack(spec, payload, factors)


def test_packing_refuses_a_double_beyond_float32():
    spec = make_spec()
    factors = make_factors(spec, 2)
    factors["q"]["up"] = np.full((2, 12), 1e39)
    with pytest.raises(NonFiniteError, match="q up"):
        pack(spec, AGREED, factors)


@pytest.mark.parametrize("encoding", ["bfloat16", "int8", "int4", "int2", "sign"])
def test_packing_refuses_values_that_would_overflow_when_decoded(encoding):
    largest = np.full((1, 6), np.finfo(np.float32).max)
    try:
        decoded = encode_one(largest, encoding)
    except NonFiniteError:
        return
    assert np.isfinite(decoded).all()


@pytest.mark.parametrize(
    ("encoding", "poison"),
    [
        ("float32", struct.pack("<f", np.nan)),
        ("float32", struct.pack("<f", np.inf)),
        ("bfloat16", b"\x80\x7f"),
        ("bfloat16", b"\xc0\xff"),
        ("int8", struct.pack("<f", np.nan)),
        ("int8", struct.pack("<f", -np.inf)),
        ("int8", struct.pack("<f", 3e38)),
    ],
)
@each_density
def test_decoding_refuses_values_and_scales_that_are_not_finite(encoding, poison, density):
    spec, payload = make_spec(), Payload(2, encoding, ("up", "down"), density)
    factors = make_factors(spec, 2)
    factors["q"]["up"] += 100  # kept by a sparse file
    data = bytearray(pack(spec, payload, factors))
    start = HEADER_BYTES
    if density < 1:  # after the table and the index, which is what scales and values leave
        stored = struct.unpack_from("<12I", data, HEADER_BYTES)
        coded = scale_bytes(encoding, 0, 2, 12) + stored[0] * BITS[encoding] // 8
        start += 8 * 6 + stored[1] - coded
    data[start : start + len(poison)] = poison
    reader = PackedReader(data, spec, payload)
    with pytest.raises(NonFiniteError, match="q up"):
        reader.module("q")
    reader.module("down")  # others stay readable


@each_density
def test_packing_refuses_wrong_shapes_modules_and_digests(density):
    spec, payload = make_spec(), Payload(2, "float32", EVERYTHING, density)
    factors = make_factors(spec, 2)

    def without(name, part):
        return factors | {name: {p: v for p, v in factors[name].items() if p != part}}

    for wrong in (
        factors | {"q": factors["q"] | {"up": factors["q"]["up"].T}},
        factors | {"norm.weight": {"dense": factors["norm.weight"]["dense"][0]}},
        {name: parts for name, parts in factors.items() if name != "q"},
        {name: parts for name, parts in factors.items() if name != "head.weight"},
        factors | {"extra": factors["q"]},
        make_factors(spec, 3),
        without("q", "core"),
        without("thin", "up"),
        without("head.weight", "dense"),
    ):
        with pytest.raises(WrongShapeError):
            pack(spec, payload, wrong)
    with pytest.raises(WrongEncodingError):
        pack(spec, Payload(2, "int5", density=density), factors)
    with pytest.raises(WrongAssignmentError):
        pack(spec, payload, factors, assignment_digest=b"short")


@each_density
def test_a_file_that_would_hold_nothing_is_refused(density):
    spec = make_spec(dense=())
    for parts in (("dense",), ()):
        with pytest.raises(WrongShapeError):
            packed_bytes(spec, Payload(2, "float32", parts, density))


def test_a_spec_that_names_two_tensors_alike_is_refused():
    """One of them would take the other's place unnoticed."""
    for spec in (make_spec(dense=(ModuleShape("q", 4, 4),)), make_spec(modules=SHAPES * 2)):
        with pytest.raises(WrongShapeError, match="names q twice"):
            packed_bytes(spec, AGREED)
