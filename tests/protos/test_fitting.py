"""A byte budget is kept to the byte, spent well, and gives a hostile device nothing more."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protos.codecs import CODECS, PackingError, squares
from protos.contract import Payload, UpdateBudget
from protos.distortion import (
    DENSITIES,
    ErrorCurve,
    contraction,
    error_at,
    error_curve,
    prior_curve,
    relative_error,
    usable_curves,
)
from protos.fitting import best_expected, fit, least_bytes
from protos.layout import (
    HEADER,
    WrongEncodingError,
    WrongFormatError,
    WrongSizeError,
    chosen_payload,
    expected_bytes,
    layout_of,
)
from protos.packing import pack
from protos.unpacking import open_update, unpack
from tests.edge_agent.training.test_feedback import make_task
from tests.protos.test_packing import make_factors, make_spec, only_named

EVERYTHING = ("bfloat16", "int8", "int4", "int2", "sign")
K = 6
each_encoding = pytest.mark.parametrize("encoding", list(CODECS))


def wide_spec():
    """Large enough that headers and scales are not most of a file."""
    from profiles.model import ModuleShape

    return make_spec(rank=K, modules=(ModuleShape("a", 200, 300), ModuleShape("b", 300, 100)))


def heavy_factors(spec, seed=0):
    """Rows of very different sizes, as updates have."""
    draw = np.random.default_rng(seed)
    return {
        name: {
            part: (values * np.exp(draw.normal(size=(len(values), 1)))).astype(np.float32)
            for part, values in parts.items()
        }
        for name, parts in make_factors(spec, K, seed).items()
    }


def loses(spec, payload, factors, seed):
    """What packing really loses."""
    named = only_named(spec, payload, factors)
    back = unpack(pack(spec, payload, factors, seed=seed), spec, payload)
    lost = sum(squares(v - back[n][p]) for n, parts in named.items() for p, v in parts.items())
    return lost / sum(squares(v) for parts in named.values() for v in parts.values())


@each_encoding
@pytest.mark.parametrize("density", [1.0, 0.25, 0.03])
@pytest.mark.parametrize("fed_back", [False, True], ids=["at random", "nearest"])
def test_the_error_is_known_without_packing(encoding, density, fed_back):
    spec = wide_spec()
    factors = heavy_factors(spec)
    payload = Payload(K, encoding, density=density, group=64 if CODECS[encoding].scaled else 0)
    named = only_named(spec, payload, factors)
    blocks = [values for parts in named.values() for values in parts.values()]
    expected = relative_error(blocks, encoding, payload.group, density, fed_back=fed_back)
    seeds = [None] if fed_back else range(12)
    measured = np.mean([loses(spec, payload, factors, seed) for seed in seeds])
    assert measured == pytest.approx(expected, rel=0.03, abs=1e-9)


@each_encoding
def test_rounding_to_the_nearest_level_loses_less_than_rounding_at_random(encoding):
    values = np.random.default_rng(0).normal(size=(8, 512)).astype(np.float32)
    nearest = relative_error(values, encoding, fed_back=True)
    assert nearest <= relative_error(values, encoding)
    if encoding in ("int8", "int4", "int2"):
        assert nearest < 0.55 * relative_error(values, encoding)


def test_zeros_lose_nothing():
    assert relative_error(np.zeros((3, 8), np.float32), "int2", 0, 0.5) == 0


@settings(max_examples=25, deadline=None)
@given(
    budget=st.integers(500, 60_000), seed=st.integers(0, 5), compressed=st.booleans(),
    parts=st.sampled_from([("up", "down"), ("up", "down", "dense"), ("down",)]),
)  # fmt: skip
def test_a_fitted_update_never_exceeds_its_budget_and_uses_it(budget, seed, compressed, parts):
    spec = wide_spec()
    factors = heavy_factors(spec, seed)
    planned = Payload(K, "int8", parts, compressed=compressed)
    terms = UpdateBudget(budget, EVERYTHING, sparse=True)
    found, curves = fit(spec, planned, terms, factors, fed_back=True)
    data = pack(spec, found.payload, factors, seed=None)
    assert len(data) <= found.size_bytes <= budget
    if not compressed:
        assert len(data) == found.size_bytes
    if found.payload.density < 1:
        assert found.size_bytes > 0.9 * budget - 40, "bytes that could have held values are left"
    assert {c.encoding for c in curves} == set(EVERYTHING)


@pytest.mark.parametrize("bits", [0.3, 1.0, 2.2, 5.0, 12.0])
def test_the_fitted_update_loses_no_more_than_any_fixed_one_of_its_size(bits):
    spec = wide_spec()
    factors = heavy_factors(spec)
    values = K * spec.parameters_per_rank
    terms = UpdateBudget(int(values * bits / 8) + 300, EVERYTHING, sparse=True)
    found, _ = fit(spec, Payload(K, "int8"), terms, factors, fed_back=True)
    mine = loses(spec, found.payload, factors, None)
    assert mine == pytest.approx(found.error, rel=0.1, abs=1e-4)
    for encoding in EVERYTHING:
        for density in DENSITIES[:8]:
            payload = Payload(K, encoding, density=density)
            if len(pack(spec, payload, factors, seed=None)) <= terms.size_bytes:
                assert mine <= 1.03 * loses(spec, payload, factors, None) + 1e-6, payload


def test_bytes_flow_to_the_module_that_moved():
    spec = wide_spec()
    factors = heavy_factors(spec)
    factors["b"] = {part: 30 * values for part, values in factors["b"].items()}
    terms = UpdateBudget(1500, EVERYTHING, sparse=True)
    found, _ = fit(spec, Payload(K, "int8"), terms, factors, fed_back=True)
    back = unpack(pack(spec, found.payload, factors, seed=None), spec, found.payload)
    kept = {n: sum(int((v != 0).sum()) for v in parts.values()) for n, parts in back.items()}
    assert kept["b"] > 10 * kept["a"]


def test_without_feedback_nothing_is_left_out_and_too_few_bytes_are_refused_with_the_least():
    spec = wide_spec()
    factors = heavy_factors(spec)
    planned = Payload(K, "int8")
    terms = UpdateBudget(1000, EVERYTHING[:-1], sparse=False)
    least = least_bytes(spec, planned, terms)
    with pytest.raises(WrongSizeError, match=f"the least takes {least:,}"):
        fit(spec, planned, terms, factors, fed_back=False)
    found, _ = fit(
        spec, planned, dataclasses.replace(terms, size_bytes=least), factors, fed_back=False
    )
    assert found.payload.density == 1
    assert found.size_bytes == least


@settings(max_examples=40, deadline=None)
@given(budget=st.integers(400, 40_000), sparse=st.booleans())
def test_what_is_expected_to_fit_is_of_that_size(budget, sparse):
    spec = wide_spec()
    terms = UpdateBudget(budget, EVERYTHING, sparse)
    found = best_expected(spec, Payload(K, "int8"), terms, lambda e, g: prior_curve(e, g, sparse))
    if found is None:
        assert least_bytes(spec, Payload(K, "int8"), terms) > budget
        return
    assert found.size_bytes <= budget
    assert expected_bytes(spec, found.payload) == pytest.approx(found.size_bytes, rel=0.02)


def test_more_bytes_never_lose_more():
    spec = wide_spec()
    sizes = range(600, 30_000, 600)
    errors = [
        best_expected(
            spec, Payload(K, "int8"), UpdateBudget(size, EVERYTHING, True),
            lambda e, g: prior_curve(e, g, True),
        ).error
        for size in sizes
    ]  # fmt: skip
    assert errors == sorted(errors, reverse=True)


def test_a_curve_goes_through_its_points_and_on_beyond_them():
    values = np.random.default_rng(0).laplace(size=(8, 512)).astype(np.float32)
    curve = error_curve([values], "int4", 0, fed_back=True)
    for density, error in zip(DENSITIES, curve.errors, strict=True):
        assert error_at(curve, density) == pytest.approx(error)
    beyond = [error_at(curve, DENSITIES[-1] / 2**i) for i in range(6)]
    assert beyond == sorted(beyond)
    assert beyond[-1] < 1


def test_curves_that_cannot_be_are_not_used():
    told = (ErrorCurve("int8", 0, ()), ErrorCurve("int4", 0, (-1.0, 0.5)),
            ErrorCurve("int2", 0, (0.1,) * 99), ErrorCurve("sign", 0, (0.3, 0.5)))  # fmt: skip
    assert set(usable_curves(told)) == {("sign", 0)}


def test_what_arrives_of_an_unbiased_and_of_a_fed_back_update():
    assert contraction(0.25, fed_back=True) == 0.75
    assert contraction(0.25, fed_back=False) == 0.8
    assert contraction(1.5, fed_back=True) == 0
    assert contraction(1.5, fed_back=False) == 0.4


# --- what a device may send ---------------------------------------------------------------------


def free_task(**changes):
    terms = UpdateBudget(4000, ("int4", "sign"), sparse=True)
    task = make_task(0, Payload(K, "int4"))
    return dataclasses.replace(task, rank=K, budget=dataclasses.replace(terms, **changes))


def answer(spec, task, payload):
    return pack(spec, payload, heavy_factors(spec), assignment_digest=task.digest, seed=None)


@pytest.mark.parametrize("payload", [
    Payload(K, "int4", density=0.37), Payload(K, "sign"), Payload(K, "sign", group=64),
    Payload(K, "int4", density=0.002, group=64),
], ids=str)  # fmt: skip
def test_an_update_is_read_as_what_it_is(payload):
    spec, task = wide_spec(), free_task()
    data = answer(spec, task, payload)
    reader = open_update(data, spec, task)
    expected = unpack(data, spec, payload, assignment_digest=task.digest)
    for name in reader.names:
        for part, values in reader.module(name).items():
            assert values.tobytes() == expected[name][part].tobytes()
    assert layout_of(spec, reader.payload).kept == layout_of(spec, payload).kept


@pytest.mark.parametrize(
    ("changes", "payload", "error"),
    [
        ({"size_bytes": 700}, Payload(K, "sign"), WrongSizeError),
        ({}, Payload(K, "int2", density=0.1), WrongEncodingError),
        ({"sparse": False}, Payload(K, "int4", density=0.1), WrongSizeError),
        ({}, Payload(K, "int4", density=0.1, group=32), WrongFormatError),
        ({}, Payload(K, "int4", ("up",), density=0.1), PackingError),
        ({}, Payload(K - 1, "sign"), PackingError),
    ],
    ids=["too large", "other encoding", "sparse", "other group", "other parts", "other rows"],
)
def test_an_update_beyond_its_terms_is_refused(changes, payload, error):
    spec, task = wide_spec(), free_task(**changes)
    factors = {n: {p: v[: payload.rank] for p, v in parts.items()}
               for n, parts in heavy_factors(spec).items()}  # fmt: skip
    data = pack(spec, payload, factors, assignment_digest=task.digest, seed=None)
    with pytest.raises(error):
        open_update(data, spec, task)


@pytest.mark.parametrize("kept", [2**62, 10**7, 1])
def test_a_header_that_claims_other_counts_allocates_nothing_and_is_refused(kept):
    spec, task = wide_spec(), free_task()
    data = bytearray(answer(spec, task, Payload(K, "int4", density=0.1)))
    fields = list(HEADER.unpack_from(data))
    fields[7] = kept
    HEADER.pack_into(data, 0, *fields)
    with pytest.raises(PackingError):
        open_update(bytes(data), spec, task)


def test_a_file_of_nothing_is_refused():
    spec, task = wide_spec(), free_task()
    with pytest.raises(WrongSizeError):
        chosen_payload(memoryview(b""), 0, spec, task)
