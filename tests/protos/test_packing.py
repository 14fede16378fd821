"""The packed file keeps its promises to both ends, and to whoever it is attacked by."""

from __future__ import annotations

import struct
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from profiles.model import ModuleShape
from protos.contract import AdapterSpec
from protos.packing import (
    CODECS,
    HEADER,
    HEADER_BYTES,
    Factors,
    NonFiniteError,
    PackedReader,
    PackingError,
    WrongAssignmentError,
    WrongEncodingError,
    WrongFormatError,
    WrongShapeError,
    WrongSizeError,
    WrongSpecError,
    open_packed,
    pack,
    packed_bytes,
    unpack,
)

SHAPES = (ModuleShape("q", 12, 5), ModuleShape("down", 7, 20), ModuleShape("thin", 1, 3))
ANSWER = bytes(range(32))
ENCODINGS = list(CODECS)
MOST = 2.0**100  # hypothesis finds the rest of the range in its own test


def make_spec(rank=8, modules=SHAPES, **changes):
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
    }
    return AdapterSpec(**(facts | changes))


def make_factors(spec, k, seed=0):
    rng = np.random.default_rng(seed)
    return {
        m.name: Factors(
            up=rng.normal(size=(k, m.out_features)).astype(np.float32),
            down=rng.normal(size=(k, m.in_features)).astype(np.float32),
        )
        for m in spec.modules
    }


def encode_one(values, encoding, seed=0):
    """Packs and unpacks one (k, 6) block as the up side of a one-module adapter."""
    k, columns = values.shape
    spec = make_spec(rank=k, modules=(ModuleShape("m", columns, 1),))
    factors = {"m": Factors(values, np.zeros((k, 1), np.float32))}
    return unpack(pack(spec, k, factors, encoding=encoding, seed=seed), spec, k)["m"].up


def blocks(limit):
    finite = st.floats(-limit, limit, width=32)
    return arrays(np.float32, st.tuples(st.integers(1, 4), st.just(6)), elements=finite)


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


def test_int8_is_unbiased_over_seeds():
    values = np.random.default_rng(1).normal(size=(3, 6)).astype(np.float32)
    draws = 2000
    mean = sum(encode_one(values, "int8", seed).astype(np.float64) for seed in range(draws)) / draws
    step = np.abs(values).max(axis=1, keepdims=True) / 127
    # Rounding at random has standard deviation at most half a step.
    assert np.all(np.abs(mean - values) < 5 * 0.5 * step / draws**0.5 + 1e-7)


def test_int8_keeps_the_largest_value_of_a_row_whatever_the_noise():
    values = np.random.default_rng(2).normal(size=(4, 6)).astype(np.float32)
    for seed in range(20):
        decoded = encode_one(values, "int8", seed)
        np.testing.assert_allclose(
            np.abs(decoded).max(axis=1), np.abs(values).max(axis=1), rtol=1e-6
        )


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("k", [1, 3, 8])
def test_every_module_returns_in_its_shape_and_the_size_is_known_before(encoding, k):
    spec = make_spec()
    factors = make_factors(spec, k)
    data = pack(spec, k, factors, encoding=encoding, assignment_digest=ANSWER)
    assert len(data) == packed_bytes(spec, k, encoding)
    decoded = unpack(data, spec, k, assignment_digest=ANSWER, encoding=encoding)
    assert list(decoded) == [m.name for m in spec.modules]
    tolerance = {"float32": 0.0, "bfloat16": 2**-8, "int8": 1 / 60}[encoding]
    for name, given_ in factors.items():
        for was, is_ in ((given_.up, decoded[name].up), (given_.down, decoded[name].down)):
            assert is_.dtype == np.float32
            np.testing.assert_allclose(is_, was, atol=tolerance * np.abs(was).max())


@given(rank=st.integers(1, 64), data=st.data())
@settings(max_examples=60, deadline=None)
def test_bytes_scale_with_k_over_r_exactly(rank, data):
    k, encoding = data.draw(st.integers(1, rank)), data.draw(st.sampled_from(ENCODINGS))
    spec = make_spec(rank=rank)
    part = packed_bytes(spec, k, encoding) - HEADER_BYTES
    whole = packed_bytes(spec, rank, encoding) - HEADER_BYTES
    assert part * rank == whole * k


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_packing_again_gives_the_same_bytes(encoding):
    spec = make_spec()
    factors = make_factors(spec, 4)
    first, second = (pack(spec, 4, factors, encoding=encoding, seed=9) for _ in range(2))
    assert first == second


def values_of(spec, **changes):
    """The packed bytes of the same factors without their header."""
    facts = {"encoding": "int8", "seed": 9} | changes
    return pack(spec, 4, make_factors(spec, 4), **facts)[HEADER_BYTES:]


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


def test_modules_and_sides_of_equal_values_round_differently():
    spec = make_spec(modules=(ModuleShape("a", 6, 6), ModuleShape("b", 6, 6)))
    same = np.linspace(0.1, 1, 24, dtype=np.float32).reshape(4, 6)
    factors = {name: Factors(same, same) for name in ("a", "b")}
    data = pack(spec, 4, factors, encoding="int8", seed=9)[HEADER_BYTES:]
    block = len(data) // 4
    assert len({data[i * block : (i + 1) * block] for i in range(4)}) == 4


def test_header_is_as_documented():
    spec = make_spec()
    data = pack(spec, 4, make_factors(spec, 4), encoding="int8", assignment_digest=ANSWER)
    assert HEADER_BYTES == 80
    assert HEADER.unpack_from(data) == (b"SKFP", 1, 4, 3, 4, spec.digest, ANSWER)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_file_is_read_through_a_map_one_module_at_a_time(tmp_path, encoding):
    spec = make_spec()
    data = pack(spec, 4, make_factors(spec, 4), encoding=encoding)
    path = tmp_path / "update"
    path.write_bytes(data)
    reader = open_packed(path, spec, 4)
    assert reader.encoding == encoding
    whole = unpack(data, spec, 4)
    for name in ("thin", "q"):
        assert reader.module(name).up.tobytes() == whole[name].up.tobytes()
        assert reader.module(name).down.tobytes() == whole[name].down.tobytes()
    with pytest.raises(WrongSpecError):
        reader.module("absent")


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_file_cut_at_any_byte_or_too_long_is_refused(encoding):
    spec = make_spec()
    data = pack(spec, 2, make_factors(spec, 2), encoding=encoding)
    for length in range(len(data)):
        with pytest.raises(WrongSizeError):
            unpack(data[:length], spec, 2)
    with pytest.raises(WrongSizeError):
        unpack(data + b"\0", spec, 2)


def test_an_empty_file_is_refused_by_name(tmp_path):
    (tmp_path / "empty").touch()
    with pytest.raises(WrongSizeError):
        open_packed(tmp_path / "empty", make_spec(), 2)


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("expected", [True, False], ids=["agreed", "any"])
def test_every_flipped_bit_of_the_header_is_noticed(encoding, expected):
    spec = make_spec()
    data = pack(spec, 2, make_factors(spec, 2), encoding=encoding, assignment_digest=ANSWER)
    for bit in range(8 * HEADER_BYTES):
        hostile = bytearray(data)
        hostile[bit // 8] ^= 1 << bit % 8
        with pytest.raises(PackingError):
            unpack(
                hostile, spec, 2, assignment_digest=ANSWER, encoding=encoding if expected else None
            )


@given(data=st.binary(max_size=400))
@settings(max_examples=80, deadline=None)
def test_no_bytes_raise_anything_but_a_packing_error(data):
    spec = make_spec()
    tail = HEADER.pack(b"SKFP", 1, 1, len(SHAPES), 2, spec.digest, bytes(32))
    for hostile in (data, tail + data):
        with pytest.raises(PackingError):
            unpack(hostile, spec, 3)


def test_claimed_sizes_allocate_nothing():
    spec = make_spec()
    biggest = 2**32 - 1
    claims = [(biggest, biggest), (len(SHAPES), biggest), (biggest, 2)]
    packed_bytes(spec, 2, "float32")
    tracemalloc.start()
    try:
        for modules, rows in claims:
            hostile = HEADER.pack(b"SKFP", 1, 1, modules, rows, spec.digest, bytes(32))
            with pytest.raises(PackingError):
                unpack(hostile + bytes(1000), spec, 2)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 200_000, f"{peak} bytes were allocated for files of 1 080 bytes"


def test_reading_one_module_allocates_that_module_only():
    spec = make_spec(modules=tuple(ModuleShape(f"m{i}", 256, 256) for i in range(16)))
    data = pack(spec, 8, make_factors(spec, 8), encoding="bfloat16")
    reader = PackedReader(data, spec, 8)
    tracemalloc.start()
    try:
        reader.module("m7")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    one_module = 2 * 8 * 256 * 4
    assert peak < 4 * one_module


@pytest.mark.parametrize(
    ("error", "changes"),
    [
        (WrongSpecError, {"spec": make_spec(run_id="other")}),
        (WrongSpecError, {"spec": make_spec(seed=6)}),
        (WrongAssignmentError, {"assignment_digest": bytes(32)}),
        (WrongEncodingError, {"encoding": "int8"}),
        (WrongEncodingError, {"encoding": "float64"}),
        (WrongSizeError, {"k": 3}),
        (WrongShapeError, {"k": 0}),
        (WrongShapeError, {"k": 9}),
    ],
)
def test_a_mismatch_is_named(error, changes):
    spec = make_spec()
    data = pack(spec, 2, make_factors(spec, 2), encoding="float32", assignment_digest=ANSWER)
    agreed = {"spec": spec, "k": 2, "assignment_digest": ANSWER, "encoding": "float32"} | changes
    with pytest.raises(error):
        PackedReader(data, **agreed)


@pytest.mark.parametrize(
    ("offset", "value", "error"),
    [
        (0, b"PK\3\4", WrongFormatError),
        (4, b"\2\0", WrongFormatError),
        (6, b"\3\0", WrongEncodingError),
    ],
    ids=["magic", "version", "encoding"],
)
def test_a_foreign_file_is_named(offset, value, error):
    spec = make_spec()
    data = bytearray(pack(spec, 2, make_factors(spec, 2), encoding="float32"))
    data[offset : offset + len(value)] = value
    with pytest.raises(error):
        unpack(data, spec, 2)


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_packing_refuses_values_that_are_not_finite(encoding, bad):
    spec = make_spec()
    factors = make_factors(spec, 2)
    factors["down"].down[1, 3] = bad
    with pytest.raises(NonFiniteError, match="down down"):
        pack(spec, 2, factors, encoding=encoding)


@pytest.mark.parametrize("encoding", ["bfloat16", "int8"])
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
def test_decoding_refuses_values_and_scales_that_are_not_finite(encoding, poison):
    spec = make_spec()
    data = bytearray(pack(spec, 2, make_factors(spec, 2), encoding=encoding))
    data[HEADER_BYTES : HEADER_BYTES + len(poison)] = poison
    reader = PackedReader(data, spec, 2)
    with pytest.raises(NonFiniteError):
        reader.module("q")
    reader.module("down")  # others stay readable


def test_packing_refuses_wrong_shapes_modules_and_digests():
    spec = make_spec()
    factors = make_factors(spec, 2)
    turned = factors | {"q": Factors(factors["q"].up.T, factors["q"].down)}
    lacking = {name: part for name, part in factors.items() if name != "q"}
    for wrong in (turned, lacking, factors | {"extra": factors["q"]}, make_factors(spec, 3)):
        with pytest.raises(WrongShapeError):
            pack(spec, 2, wrong, encoding="float32")
    with pytest.raises(WrongEncodingError):
        pack(spec, 2, factors, encoding="int4")
    with pytest.raises(WrongAssignmentError):
        pack(spec, 2, factors, encoding="float32", assignment_digest=b"short")
