"""Both ends derive the same rows and the same draws, evenly and for ever."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from profiles.errors import SketchfleetError
from profiles.model import ModuleShape
from protos.contract import AdapterSpec, Assignment, Payload
from protos.sketch import SketchError, initial_down, keyed_stream, sketch_rows, slice_rows

Q_PROJ = "model.layers.0.self_attn.q_proj"
ROW_CHOICES = ["prefix", "stratified", "independent"]
GOLDEN_STREAM = [5014200097836117734, 5934329514342815388]

SPEC = AdapterSpec(
    "run", "org/base", "main", "ab" * 32, 16, 16.0, False, 7, (ModuleShape(Q_PROJ, 8, 8),)
)


def make_task(rows, k=6, **changes):
    facts = {
        "assignment_id": "run/3/dev-a", "run_id": "run", "round": 3, "device_id": "dev-a",
        "method": "fslora", "rank": k, "rows": rows, "sketch_offset": 5, "alpha": 16.0,
        "trained": ("up", "down"), "personal": (), "keeps_basis": True, "keeps_state": False,
        "error_feedback": False,
        "fresh": False, "precision": "fp32", "sequence_tokens": 8, "micro_batch": 1,
        "accumulation": 1, "checkpointing": False, "local_steps": 1, "learning_rate": 1e-3,
        "optimizer": "adamw", "update": Payload(k, "int8"), "evaluation_sequences": 1,
        "held_out_share": 0.1, "evaluates_global": False, "seed": 1, "deadline_s": 60.0,
        "reason": "",
    }  # fmt: skip
    return Assignment(**(facts | changes))


def rows_of(rows, k=6, module=Q_PROJ, **changes):
    return slice_rows(SPEC, make_task(rows, k, **changes), module).tolist()


@pytest.mark.parametrize(
    ("arguments", "rows"),
    [
        ((7, 3, Q_PROJ, 16, 5, 6), [1, 5, 7, 8, 11, 13]),
        ((7, 3, Q_PROJ, 16, 14, 6), [3, 4, 10, 12, 14, 15]),
        ((0, 0, "m", 64, 0, 8), [6, 9, 24, 28, 30, 38, 40, 62]),
        ((2**63, 1000, "m", 64, 0, 8), [3, 5, 6, 50, 51, 54, 59, 63]),
    ],
)
def test_rows_never_change_between_releases(arguments, rows):
    """A change here makes old agents and new coordinators train different rows: do not update."""
    assert sketch_rows(*arguments).tolist() == rows


@pytest.mark.parametrize(
    ("device", "rows"), [("dev-a", [4, 6, 9, 11, 12, 15]), ("dev-b", [1, 2, 3, 4, 9, 10])]
)
def test_rows_of_a_device_never_change_between_releases(device, rows):
    assert sketch_rows(7, 3, Q_PROJ, 16, 5, 6, device_id=device).tolist() == rows


def test_stream_never_changes_between_releases():
    assert keyed_stream("sketch", 7, 3, Q_PROJ).random_raw(2).tolist() == GOLDEN_STREAM


@given(
    rank=st.integers(1, 40),
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=8),
    seed=st.integers(0, 2**63),
    start=st.integers(0, 100),
)
@settings(max_examples=60, deadline=None)
def test_consecutive_blocks_cover_every_row_as_evenly_as_the_sizes_allow(rank, sizes, seed, start):
    counts, offset, total = np.zeros(rank, dtype=int), start, 0
    for k in (min(size, rank) for size in sizes):
        rows = sketch_rows(seed, 2, "m", rank, offset, k)
        assert rows.dtype == np.int64
        assert rows.shape == (k,)
        assert np.all(np.diff(rows) > 0), f"rows {rows} repeat or are not sorted"
        counts[rows] += 1
        offset, total = offset + k, total + k
    assert counts.min() == total // rank
    assert counts.max() == -(-total // rank)


def test_every_row_is_as_likely_as_any_other():
    rank, k, rounds = 8, 3, 3000
    hits = sum(
        np.bincount(sketch_rows(1, round_, "m", rank, 5, k), minlength=rank)
        for round_ in range(rounds)
    )
    sigma = (k / rank * (1 - k / rank) / rounds) ** 0.5
    assert np.abs(hits / rounds - k / rank).max() < 4.5 * sigma


def test_modules_rounds_and_seeds_draw_independently():
    base = sketch_rows(1, 1, "a", 64, 0, 16).tolist()
    others = [
        sketch_rows(*key, 64, 0, 16).tolist() for key in ((1, 1, "b"), (1, 2, "a"), (2, 1, "a"))
    ]
    assert base not in others


def test_offsets_wrap_and_a_full_sketch_is_every_row_in_order():
    assert np.array_equal(sketch_rows(1, 1, "m", 16, 3, 5), sketch_rows(1, 1, "m", 16, 19, 5))
    assert sketch_rows(1, 1, "m", 16, 9, 16).tolist() == list(range(16))


def test_a_caller_cannot_spoil_the_rows_of_the_next():
    first = sketch_rows(1, 1, "m", 16, 0, 4)
    expected = first.copy()
    first[:] = 0
    assert np.array_equal(sketch_rows(1, 1, "m", 16, 0, 4), expected)


@pytest.mark.parametrize("k", [0, -1, 17])
def test_a_size_outside_the_rank_is_refused_by_name(k):
    with pytest.raises(SketchError, match=r"1\.\.16") as refusal:
        sketch_rows(1, 1, "m", 16, 0, k)
    assert isinstance(refusal.value, ValueError)
    assert isinstance(refusal.value, SketchfleetError)


def test_a_prefix_is_the_first_rows_for_everyone_and_always():
    expected = list(range(6))
    for changes in ({}, {"round": 4}, {"device_id": "dev-b"}, {"sketch_offset": 11}):
        assert rows_of("prefix", **changes) == expected


def test_stratified_rows_are_blocks_of_one_permutation_for_all_devices():
    assert rows_of("stratified") == sketch_rows(7, 3, Q_PROJ, 16, 5, 6).tolist()
    assert rows_of("stratified", device_id="dev-b") == rows_of("stratified")
    rest = rows_of("stratified", k=10, device_id="dev-b", sketch_offset=11)
    assert sorted(rows_of("stratified") + rest) == list(range(16))


def test_independent_rows_are_a_permutation_of_the_devices_own():
    mine = rows_of("independent")
    assert mine == sketch_rows(7, 3, Q_PROJ, 16, 5, 6, device_id="dev-a").tolist()
    assert mine == rows_of("independent"), "both ends must derive the same rows"
    others = [
        rows_of("stratified"),
        rows_of("independent", device_id="dev-b"),
        rows_of("independent", round=4),
        rows_of("independent", module="other"),
    ]
    assert mine not in others


@pytest.mark.parametrize("rows", ["stratified", "independent"])
def test_every_row_is_in_a_slice_as_often_as_k_over_r(rows):
    k, rounds = 6, 3000
    hits = np.zeros(16)
    for round_ in range(rounds):
        hits[rows_of(rows, k, round=round_)] += 1
    sigma = (k / 16 * (1 - k / 16) / rounds) ** 0.5
    assert np.abs(hits / rounds - k / 16).max() < 4.5 * sigma


def test_independent_devices_meet_in_a_row_by_chance_alone():
    """k^2 / r rows in common on average, whatever their offsets; stratified ones need not."""
    k, rounds, common = 8, 1000, 0
    for round_ in range(rounds):
        mine = rows_of("independent", k, round=round_, sketch_offset=0)
        theirs = rows_of("independent", k, round=round_, sketch_offset=8, device_id="dev-b")
        common += len(set(mine) & set(theirs))
    # The number in common is hypergeometric, variance k (k/r) (1 - k/r) (r-k)/(r-1).
    sigma = (k * 0.5 * 0.5 * 8 / 15 / rounds) ** 0.5
    assert abs(common / rounds - k * k / 16) < 4.5 * sigma


@pytest.mark.parametrize("rows", ROW_CHOICES)
@pytest.mark.parametrize("k", [1, 5, 16])
def test_a_slice_is_sorted_and_all_of_it_is_everything(rows, k):
    found = slice_rows(SPEC, make_task(rows, k), Q_PROJ)
    assert found.dtype == np.int64
    assert found.shape == (k,)
    assert np.all(np.diff(found) > 0)
    assert found.min() >= 0
    assert found.max() < 16
    if k == 16:
        assert found.tolist() == list(range(16))


@pytest.mark.parametrize("rows", ROW_CHOICES)
@pytest.mark.parametrize("k", [0, -1, 17])
def test_a_slice_outside_the_rank_is_refused_by_name(rows, k):
    with pytest.raises(SketchError, match=r"1\.\.16"):
        rows_of(rows, k)


def test_the_start_of_a_run_never_changes_between_releases():
    expected = [[-0.24484902620315552, -0.5030086636543274, 0.1226329579949379],
                [-0.3845282196998596, -0.5607866644859314, 0.3520043194293976]]  # fmt: skip
    assert initial_down(7, Q_PROJ, 2, 3).tolist() == expected
    assert initial_down(7, Q_PROJ, 2, 3, round_=3).tolist() == expected, "one start for all rounds"


def test_a_fresh_start_never_changes_between_releases():
    expected = [[0.27046048641204834, 0.4574643671512604, 0.34105613827705383],
                [-0.12068399041891098, -0.4843410849571228, -0.2760532796382904]]  # fmt: skip
    assert initial_down(7, Q_PROJ, 2, 3, round_=3, device_id="dev-a").tolist() == expected


def test_a_fresh_start_is_keyed_by_device_round_module_and_seed():
    def fresh(seed=7, module=Q_PROJ, round_=3, device_id="dev-a"):
        return initial_down(seed, module, 4, 8, round_=round_, device_id=device_id).tobytes()

    assert fresh() == fresh()
    others = [
        fresh(seed=8), fresh(module="other"), fresh(round_=4), fresh(device_id="dev-b"),
        fresh(device_id=""), initial_down(8, Q_PROJ, 4, 8).tobytes(),
        initial_down(7, "other", 4, 8).tobytes(),
    ]  # fmt: skip
    assert len({fresh(), *others}) == 1 + len(others)


@pytest.mark.parametrize("device", ["", "dev-a"], ids=["initial", "fresh"])
def test_a_start_is_uniform_within_the_bound_of_peft(device):
    features = 400
    down = initial_down(1, "a", 64, features, round_=2, device_id=device)
    assert down.shape == (64, features)
    assert down.dtype == np.float32
    assert np.abs(down).max() <= features**-0.5
    unit = down.astype(np.float64) * features**0.5  # U(-1, 1)
    assert abs(unit.mean()) < 0.02
    assert abs(unit.var() - 1 / 3) < 0.01
    assert unit.min() < -0.999
    assert unit.max() > 0.999
