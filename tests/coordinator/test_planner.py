"""Plans respect memory and deadline, cover the rank, and say why."""

import json
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coordinator.planner import (
    HOLD,
    DevicePlan,
    Level,
    PlanError,
    PlanPolicy,
    RoundPlan,
    plan_round,
)
from profiles.cost import Correction
from profiles.device import ComputeProfile, DeviceProfile, GpuProfile
from profiles.link import LinkProfile
from profiles.model import ModelShape, ModuleShape
from protos.contract import AdapterSpec, Payload, from_plain, to_plain
from protos.layout import expected_bytes, packed_bytes

GIB = 2**30
SMALL = ModelShape("llama", 576, 30, 9, 3, 64, 1536, 49152, True)  # SmolLM2-135M
LARGE = ModelShape("qwen2", 3584, 28, 28, 4, 128, 18944, 152064, False)  # Qwen2.5-Coder-7B


def spec_of(shape: ModelShape, rank: int = 32) -> AdapterSpec:
    return AdapterSpec("run", "base", "", "d", rank, 32.0, False, 1, shape.modules(()))


SPEC = spec_of(SMALL)


def policy(**changes: object) -> PlanPolicy:
    plain = PlanPolicy(
        rank=32, precision="nf4", sequence_tokens=256, micro_batch=4, accumulation=1,
        local_steps=8, min_local_steps=2, update_encoding="int8", slice_encoding="bfloat16",
        global_encoding="bfloat16", evaluation_sequences=4, round_s=60.0, max_round_s=3600.0,
    )  # fmt: skip
    return replace(plain, **changes)  # type: ignore[arg-type]


def device(
    up_mbps: float = 50.0, free_gib: float = 6.0, tokens_per_s: float = 2000.0, **changes: object
) -> DeviceProfile:
    plain = DeviceProfile(
        board="x86-64 CPU", cpu="", cores=4, memory_total_bytes=8 * GIB,
        memory_available_bytes=int(free_gib * GIB), disk_free_bytes=GIB, agent_version="0",
        compute=ComputeProfile(
            "d", "nf4", tokens_per_s, 3 * tokens_per_s, GIB // 4, 0, 8, 256, 4
        ),
        link=LinkProfile(up_bps=up_mbps * 1e6, down_bps=2 * up_mbps * 1e6, rtt_s=0.02),
    )  # fmt: skip
    return replace(plain, **changes)  # type: ignore[arg-type]


def plan(
    devices: dict[str, DeviceProfile], most: dict[str, int] | None = None, **changes: object
) -> RoundPlan:
    return plan_round(SMALL, SPEC, policy(**changes), devices, most)


def one(profile: DeviceProfile, most: int | None = None, **changes: object) -> DevicePlan:
    caps = None if most is None else {"a": most}
    (found,) = plan({"a": profile}, caps, **changes).devices
    return found


def test_slower_link_gets_a_smaller_sketch_and_the_sentence_says_so() -> None:
    ranks = [one(device(up_mbps=m), local_steps=2).rank for m in (50, 5, 2, 1.2)]
    assert ranks == sorted(ranks, reverse=True)
    assert ranks[0] == 32 and ranks[-1] < 16
    slow = one(device(up_mbps=1.2), local_steps=2)
    assert f"k={slow.rank}: " in slow.reason
    assert "at 1.2 Mbit/s and fetching" in slow.reason and "left of a 60 s round" in slow.reason
    assert "memory would allow 32" in slow.reason


def test_less_memory_first_costs_speed_then_rank() -> None:
    plans = [one(device(free_gib=g), round_s=3600.0) for g in (8, 2.6, 1.42, 1.35, 1.25)]
    assert [p.rank for p in plans] == sorted((p.rank for p in plans), reverse=True)
    assert not plans[0].checkpointing and plans[0].micro_batch == 4
    assert plans[1].rank == 32 and (plans[1].checkpointing or plans[1].micro_batch < 4)
    assert plans[-1].checkpointing and plans[-1].micro_batch == 1 and plans[-1].rank < 32
    assert all(p.micro_batch * p.accumulation == 4 for p in plans), "the batch changed"


def test_memory_bound_is_named() -> None:
    base = one(device(), checkpointing=True, micro_batch=1)
    least = one(device(), rank=1, checkpointing=True, micro_batch=1)
    between = (base.predicted_peak_bytes + least.predicted_peak_bytes) // 2
    tight = device(memory_cap_bytes=between)
    found = one(tight, checkpointing=True, micro_batch=1)
    assert 1 < found.rank < 32
    assert f"k={found.rank}: memory of" in found.reason
    assert "round would allow 32" in found.reason


def test_slow_compute_costs_steps_for_rows_take_hardly_any_time() -> None:
    found = one(device(tokens_per_s=100.0), round_s=70.0)
    assert found.rank == 32 and 2 <= found.local_steps < 8
    assert f"{found.local_steps} steps of 8 for time" in found.reason


def test_chosen_round_reaches_the_coverage_and_is_the_smallest() -> None:
    fleet = {f"d{i}": device(up_mbps=1 + i) for i in range(4)}
    found = plan(fleet, round_s=None, coverage=2.0)
    assert sum(p.rank for p in found.devices) >= 64
    assert found.round_s < 3600
    shorter = plan(fleet, round_s=found.round_s - 0.2)
    full_steps = [p.rank for p in shorter.devices if p.local_steps == 8]
    assert sum(full_steps) < 64 or len(full_steps) < 4


def test_chosen_round_never_exceeds_the_longest_nor_waits_for_the_unreachable() -> None:
    fleet = {"fast": device(), "slow": device(up_mbps=0.001, tokens_per_s=1.0)}
    found = plan(fleet, round_s=None, max_round_s=100.0, coverage=5.0)
    assert found.round_s <= 100
    assert [p.device_id for p in found.devices] == ["fast"]
    assert "slow is too slow: rank 1 and 2 steps need" in found.left_out["slow"]


def test_fedit_gives_everybody_the_whole_rank_or_leaves_them_out() -> None:
    fleet = {"a": device(), "b": device(up_mbps=20), "c": device(up_mbps=0.1)}
    found = plan(fleet, varies="nothing")
    assert {p.device_id: p.rank for p in found.devices} == {"a": 32, "b": 32}
    assert "rank 32" in found.left_out["c"]


def test_too_large_a_model_is_left_out_with_the_remedy() -> None:
    large = spec_of(LARGE)
    fleet = {"board": device(free_gib=3.2), "station": device(gpu=card(24))}
    found = plan_round(LARGE, large, policy(max_round_s=1e6, round_s=1e6), fleet)
    assert [p.device_id for p in found.devices] == ["station"]
    why = found.left_out["board"]
    assert why.startswith("board does not fit: needs ")
    assert "at nf4 and rank 1, the device has" in why
    assert why.endswith("use a smaller base or a lower precision")
    with pytest.raises(PlanError, match=r"no device can take part.*board does not fit"):
        plan_round(LARGE, large, policy(), {"board": fleet["board"]})
    with pytest.raises(PlanError, match="no device is ready"):
        plan_round(LARGE, large, policy(), {})


def card(gib: float) -> GpuProfile:
    return GpuProfile("card", int(gib * GIB), int(gib * GIB), "8.9", unified_memory=False)


def test_auto_precision_is_the_most_precise_that_leaves_room() -> None:
    large = spec_of(LARGE)
    picks = []
    for gib in (40, 14, 11):
        fleet = {"a": device(gpu=card(gib), compute=None)}
        asked = policy(precision="auto", round_s=1e6, max_round_s=1e6)
        picks.append(plan_round(LARGE, large, asked, fleet).devices[0].precision)
    assert picks == ["bf16", "int8", "nf4"]


def test_sketches_tile_the_permutation() -> None:
    fleet = {f"d{i}": device(up_mbps=m) for i, m in enumerate((50, 1.2, 2, 1.5, 50))}
    found = plan(fleet, local_steps=2)
    rows = [(p.sketch_offset + j) % 32 for p in found.devices for j in range(p.rank)]
    counts = [rows.count(row) for row in range(32)]
    assert max(counts) - min(counts) <= 1


def test_whole_adapter_is_measured_where_the_link_allows() -> None:
    quick = one(device(), evaluates_global=True)
    assert quick.evaluates_global
    slow = one(device(up_mbps=0.5), evaluates_global=True, local_steps=2)
    assert not slow.evaluates_global
    assert "whole adapter is not evaluated" in slow.reason


def test_evaluate_only_round_moves_and_trains_nothing_else() -> None:
    found = one(device(), evaluates_global=True, local_steps=0)
    assert (found.local_steps, found.evaluates_global, found.predicted.up_bytes) == (0, True, 0)
    assert found.predicted.train_s == 0
    with pytest.raises(PlanError, match="too slow"):
        one(device(up_mbps=0.01), evaluates_global=True, local_steps=0)


def test_rank_multiples_are_kept_but_both_ends_are_allowed() -> None:
    def ranks(**changes: object) -> tuple[int, ...]:
        return tuple(level.rank for level in policy(**changes).levels)

    assert ranks(rank=30, rank_multiple=8, min_rank=2) == (2, 8, 16, 24, 30)
    assert ranks(rank=30, rank_multiple=8, min_rank=2, most_rank=20) == (2, 8, 16, 20)
    assert ranks(rank=30, rank_multiple=8, min_rank=9, most_rank=5) == (5,)
    assert ranks(rank=16, varies="nothing") == ranks(rank=16, min_rank=16) == (16,)


def test_measurement_of_another_base_is_not_used() -> None:
    stale = replace(device(), compute=replace(device().compute, base_digest="other"))  # type: ignore[type-var]
    assert one(stale) == one(device(compute=None))


def test_plan_survives_its_plain_form() -> None:
    found = one(device())
    assert from_plain(DevicePlan, json.loads(json.dumps(to_plain(found)))) == found


# --- what methods vary --------------------------------------------------------------------------


def test_where_density_varies_everybody_gets_all_rows_and_a_slow_link_sends_fewer_values() -> None:
    mbps = {"a": 50.0, "b": 1.2, "c": 0.7}
    fleet = {name: device(up_mbps=rate) for name, rate in mbps.items()}
    found = plan(fleet, varies="density", density=0.5, min_rank=1, local_steps=2)
    assert {p.rank for p in found.devices} == {32}
    dense = {p.device_id: p.density for p in found.devices}
    assert dense["a"] == 0.5 > dense["b"] >= dense["c"]
    for p in found.devices:
        update = Payload(32, "int8", density=p.density)
        assert p.predicted.up_bytes == expected_bytes(SPEC, update)
        slice_ = Payload(32, "bfloat16", density=p.density)
        assert p.predicted.down_bytes == expected_bytes(SPEC, slice_)
    slow = next(p for p in found.devices if p.device_id == "b")
    assert slow.reason.startswith(f"k=32 at {slow.density:g}: sending ")
    assert "memory would allow 32 at 0.5" in slow.reason


@pytest.mark.parametrize(
    ("density", "min_rank", "densities"),
    [
        (0.5, 1, (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2)),
        (0.25, 8, (0.25,)),
        (0.25, 5, (0.25,)),
        (0.3, 4, (0.15, 0.3)),
        (0.25, 32, (0.25,)),  # less than min_rank's share: still what was asked for
        (0.9, 32, (0.9,)),
    ],
)
def test_densities_are_halved_down_to_the_share_of_the_least_rank(
    density: float, min_rank: int, densities: tuple[float, ...]
) -> None:
    levels = policy(varies="density", density=density, min_rank=min_rank).levels
    assert levels == tuple(Level(32, d) for d in densities)


def test_a_device_that_pruned_itself_gets_no_more_rows_than_it_kept() -> None:
    fleet = {"a": device(), "b": device()}
    found = plan(fleet, {"a": 20})
    assert {p.device_id: p.rank for p in found.devices} == {"a": 20, "b": 32}
    assert "k=20: no more rows are wanted; the round takes" in found.devices[0].reason
    assert one(device(), 3, min_rank=8).rank == 3, "its own tail is not given back to it"
    slow = device(up_mbps=1.2)
    assert one(slow, 30, local_steps=2).rank == one(slow, local_steps=2).rank < 30


def test_no_device_gets_rows_that_are_of_no_use() -> None:
    assert one(device(), most_rank=5).rank == 5
    assert "no more rows are wanted" in one(device(), most_rank=5).reason
    assert one(device(), 3, most_rank=5).rank == one(device(), 5, most_rank=3).rank == 3


def test_a_branch_beside_the_base_takes_memory_time_and_bytes() -> None:
    plain, beside = one(device()), one(device(), side_rank=64)
    held = 8 * 64 * SPEC.parameters_per_rank  # as it came, and as the base computes
    assert beside.uncorrected_peak_bytes - plain.uncorrected_peak_bytes == pytest.approx(
        1.07 * held, rel=0.01
    )
    branch = packed_bytes(SPEC, Payload(64, "bfloat16"))
    assert beside.predicted.down_bytes - plain.predicted.down_bytes == branch
    assert beside.predicted.up_bytes == plain.predicted.up_bytes
    assert beside.predicted.train_s > plain.predicted.train_s
    slow = device(up_mbps=2)
    assert one(slow, side_rank=16, local_steps=2).rank < one(slow, local_steps=2).rank


@pytest.mark.parametrize(
    ("changes", "files", "branches"),
    [
        # The branch that a device trains beside is the one it evaluates beside.
        # So is the slice of all rows the whole adapter: one file.
        ({}, {"slice": 1}, {"bfloat16": 1}),
        ({"global_encoding": "float32"}, {"slice": 1, "whole": 1}, {"bfloat16": 1, "float32": 1}),
        ({"local_steps": 0}, {"whole": 1}, {"bfloat16": 1}),
        ({"local_steps": 0, "files": ()}, {}, {"bfloat16": 1}),
        ({"files": ()}, {}, {"bfloat16": 1}),
    ],
)
def test_what_is_fetched_to_evaluate_counts_the_branch_once(
    changes: dict[str, object], files: dict[str, int], branches: dict[str, int]
) -> None:
    found = one(device(), evaluates_global=True, side_rank=64, **changes)
    asked = policy(**changes)
    expected = sum(packed_bytes(SPEC, Payload(64, e)) for e in branches)  # type: ignore[arg-type]
    expected += files.get("slice", 0) * packed_bytes(SPEC, Payload(32, asked.slice_encoding))
    expected += files.get("whole", 0) * packed_bytes(SPEC, Payload(32, asked.global_encoding))
    assert found.evaluates_global and found.predicted.down_bytes == expected


def test_the_rows_a_device_does_not_train_are_held_and_fetched_as_a_branch() -> None:
    narrow = device(link=LinkProfile(up_bps=1.2e6, down_bps=50e6, rtt_s=0.02))
    few = one(narrow, local_steps=2, complement=True)
    assert few.rank < 32
    down = packed_bytes(SPEC, Payload(few.rank, "bfloat16"))
    assert few.predicted.down_bytes == down + packed_bytes(SPEC, Payload(32 - few.rank, "bfloat16"))
    alone = one(narrow, most_rank=few.rank, local_steps=2)
    held = 8 * (32 - few.rank) * SPEC.parameters_per_rank
    assert few.uncorrected_peak_bytes - alone.uncorrected_peak_bytes == pytest.approx(
        1.07 * held, rel=0.01
    )
    whole, plain = one(device(), complement=True), one(device())
    assert whole.rank == 32 and whole == plain, "with all rows there is nothing beside them"


def test_updates_of_a_part_take_the_bytes_of_that_part() -> None:
    both, up = one(device()), one(device(), update_parts=("up",), files=(("down",), ("up",)))
    sizes = {parts: packed_bytes(SPEC, Payload(32, "int8", parts)) for parts in
             (("up",), ("up", "down"))}  # fmt: skip
    assert (up.predicted.up_bytes, both.predicted.up_bytes) == tuple(sizes.values())
    # Two files instead of one: a second header.
    assert up.predicted.down_bytes == both.predicted.down_bytes + 92


def test_dense_tensors_travel_and_are_trained_with_every_k() -> None:
    head = ModuleShape("lm_head.weight", 49152, 576)
    spec = replace(SPEC, dense=(head,))
    parts = {"update_parts": ("up", "down", "dense"), "files": (("up", "down"), ("dense",))}
    asked = policy(**parts, round_s=600.0)
    (found,) = plan_round(SMALL, spec, asked, {"a": device()}).devices
    plain = one(device(), round_s=600.0)
    assert found.rank == plain.rank == 32
    trained = 20 * 49152 * 576  # weight, gradient, two moments and what came, float32
    assert found.uncorrected_peak_bytes > plain.uncorrected_peak_bytes + trained
    assert found.predicted.up_bytes > plain.predicted.up_bytes + 49152 * 576
    with pytest.raises(PlanError, match="too slow"):
        plan_round(SMALL, spec, policy(**parts, min_local_steps=8), {"a": device(up_mbps=1.2)})


fleets = st.dictionaries(
    st.sampled_from([f"d{i}" for i in range(6)]),
    st.builds(
        device,
        up_mbps=st.floats(0.05, 100),
        free_gib=st.floats(0.5, 8),
        tokens_per_s=st.floats(5, 5000),
    ),
    min_size=1,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    fleets,
    st.sampled_from([None, 5.0, 60.0, 600.0]),
    st.sampled_from(["auto", "nf4", "bf16"]),
    st.booleans(),
    st.sampled_from([1, 4]),
    st.sampled_from(["rank", "density", "nothing"]),
    st.dictionaries(st.sampled_from(["d0", "d1"]), st.integers(1, 32)),
    st.booleans(),
    st.sampled_from([0, 40]),
)
def test_every_plan_keeps_its_promises(
    fleet: dict[str, DeviceProfile],
    round_s: float | None,
    precision: str,
    evaluates: bool,
    multiple: int,
    varies: str,
    most: dict[str, int],
    complement: bool,
    side_rank: int,
) -> None:
    asked = policy(
        round_s=round_s, precision=precision, evaluates_global=evaluates, rank_multiple=multiple,
        varies=varies, density=0.25 if varies == "density" else 1.0, side_rank=side_rank,
        complement=complement and varies == "rank",
    )  # fmt: skip
    most = most if varies == "rank" else {}
    try:
        found = plan_round(SMALL, SPEC, asked, fleet, most)
    except PlanError:
        return
    planned = [p.device_id for p in found.devices]
    assert planned == sorted(planned)
    assert set(planned) | set(found.left_out) == set(fleet)
    assert not set(planned) & set(found.left_out)
    assert 0 < found.round_s <= asked.max_round_s
    offset = 0
    for p in found.devices:
        assert p.predicted_peak_bytes <= fleet[p.device_id].trainer_bytes
        assert p.predicted.total_s <= found.round_s + 1e-9
        own = replace(asked, most_rank=most.get(p.device_id))
        assert Level(p.rank, p.density) in own.levels
        assert p.rank <= most.get(p.device_id, 32)
        assert asked.min_local_steps <= p.local_steps <= asked.local_steps
        assert p.micro_batch * p.accumulation == asked.micro_batch * asked.accumulation
        assert p.sketch_offset == offset % asked.rank
        assert p.reason.startswith(f"k={p.rank}")
        offset += p.rank


def brings(profile: DeviceProfile, **changes: object) -> float:
    """Share of the rank times share of the steps; nothing if it cannot take part."""
    try:
        found = one(profile, coverage=0.03, **changes)
    except PlanError:
        return 0.0
    return found.rank / 32 * found.local_steps / 8


@settings(max_examples=40, deadline=None)
@given(st.floats(0.1, 50), st.floats(0.1, 1), st.floats(1.7, 6))
def test_a_slower_link_never_brings_more(mbps: float, slower: float, gib: float) -> None:
    best = brings(device(up_mbps=mbps, free_gib=gib), round_s=120.0)
    assert brings(device(up_mbps=mbps * slower, free_gib=gib), round_s=120.0) <= best + 1e-9


@settings(max_examples=40, deadline=None)
@given(st.floats(20, 5000), st.floats(0.1, 1), st.floats(20, 300))
def test_slower_compute_and_shorter_rounds_never_bring_more(
    rate: float, less: float, round_s: float
) -> None:
    best = brings(device(tokens_per_s=rate), round_s=round_s)
    assert brings(device(tokens_per_s=rate * less), round_s=round_s) <= best + 1e-9
    assert brings(device(tokens_per_s=rate), round_s=round_s * less) <= best + 1e-9


@settings(max_examples=40, deadline=None)
@given(st.floats(1.0, 6), st.floats(0.5, 1))
def test_less_memory_never_allows_a_larger_sketch(gib: float, less: float) -> None:
    long = {"round_s": 1e5, "max_round_s": 1e5}
    assert brings(device(free_gib=gib * less), **long) <= brings(device(free_gib=gib), **long)


@settings(max_examples=10, deadline=None)
@given(fleets, st.sampled_from(["fastest", "fairest", "cheapest"]), st.randoms())
def test_the_order_of_devices_does_not_matter(
    fleet: dict[str, DeviceProfile], aim: str, random: object
) -> None:
    names = list(fleet)
    random.shuffle(names)  # type: ignore[attr-defined]
    found = []
    for order in (list(fleet), names):
        try:
            found.append(plan({name: fleet[name] for name in order}, round_s=None, aim=aim))
        except PlanError as error:
            found.append(error.plan)
    assert found[0] == found[1]


@settings(max_examples=25, deadline=None)
@given(fleets, st.sampled_from([0.5, 1.0, 2.0]), st.sampled_from(["fastest", "cheapest"]))
def test_the_rank_is_covered_wherever_the_longest_round_would_cover_it(
    fleet: dict[str, DeviceProfile], coverage: float, aim: str
) -> None:
    def rows(**changes: object) -> float:
        try:
            return sum(p.rank for p in plan(fleet, coverage=coverage, **changes).devices) / 32
        except PlanError:
            return 0.0

    possible = rows(round_s=3600.0)
    assert rows(round_s=None, aim=aim) >= min(coverage, possible) - 1e-9


# --- what the planner may choose ----------------------------------------------------------------


def test_what_run_toml_leaves_open_is_chosen_for_each_device() -> None:
    open_ = {"sequence_tokens": "auto", "update_encoding": "auto", "precision": "auto"}
    quick = one(device(), **open_, round_s=600.0, max_round_s=600.0)
    assert (quick.sequence_tokens, quick.update_encoding) == (1024, "bfloat16")
    assert "updates in bfloat16" in quick.reason
    slow = one(device(up_mbps=0.6), **open_, local_steps=2)
    assert slow.update_encoding == "int8"
    narrow = one(device(free_gib=1.5), **open_, round_s=600.0, checkpointing=False)
    assert narrow.sequence_tokens * narrow.micro_batch * narrow.accumulation == 1024 * 4
    fixed = one(device(up_mbps=0.6), local_steps=2)
    assert (fixed.sequence_tokens, fixed.update_encoding, fixed.precision) == (256, "int8", "nf4")


def test_a_chosen_round_is_long_enough_for_nine_of_ten() -> None:
    fleet = {f"d{i}": device(up_mbps=2 + i, tokens_per_s=400) for i in range(3)}
    found = plan(fleet, round_s=None)
    for p in found.devices:
        c = p.predicted
        assert c.total_s < c.p90_s <= found.round_s
        expected = (c.fetch_s + c.push_s) * (1 + 1.28 * 0.2)
        expected += (c.train_s + c.evaluate_s) * (1 + 1.28 * 0.1)
        assert c.p90_s == pytest.approx(expected)
    metered = LinkProfile(up_bps=2e6, down_bps=4e6, rtt_s=0.02, metered=True)
    known = replace(metered, variation=0.05)
    waste = [one(device(link=x), round_s=600.0).predicted for x in (metered, known)]
    assert waste[0].p90_s - waste[0].total_s > 3 * (waste[1].p90_s - waste[1].total_s)


def test_a_slow_device_does_not_hold_up_the_others_but_is_not_left_out() -> None:
    alike = {f"d{i}": device() for i in range(5)}
    alone = plan(alike, round_s=None)
    both = plan(alike | {"slow": device(tokens_per_s=60)}, round_s=None)
    slow = next(p for p in both.devices if p.device_id == "slow")
    whole = one(device(tokens_per_s=60), round_s=3600.0).predicted.total_s
    assert slow.local_steps < 8, "everybody waits for its eighth step"
    assert alone.round_s <= both.round_s < whole


# --- bytes --------------------------------------------------------------------------------------


def test_a_metered_link_sends_half_and_the_sentence_says_so() -> None:
    link = device().link
    assert link is not None
    plain, metered = (one(device(link=replace(link, metered=m))) for m in (False, True))
    assert (plain.rank, metered.rank) == (32, 16)
    assert "the link is metered, so 50% of the rank at most is sent" in metered.reason


def test_a_byte_budget_is_spread_over_the_rounds_left_and_never_exceeded() -> None:
    link = device().link
    assert link is not None

    def within(budget: int, rounds_left: int) -> DevicePlan:
        limited = device(link=replace(link, budget_bytes=budget))
        return one(limited, rounds_left=rounds_left)

    whole = one(device()).predicted
    needs = whole.up_bytes + whole.down_bytes
    assert within(needs, 1).rank == 32
    half = within(needs, 2)
    moved = half.predicted.up_bytes + half.predicted.down_bytes
    assert half.rank < 32 and moved <= needs // 2
    assert f"k={half.rank}: {moved / 1e6:.3g} MB both ways of the" in half.reason
    assert f"budget of {needs / 1e6:.3g} MB leaves to this round; k={half.rank + 1}" in half.reason
    assert within(needs, 10**6).rank == 1, "fewer rounds rather than none"
    with pytest.raises(PlanError, match=r"may move 0.001 MB more today, the least part takes"):
        within(1000, 1)


def test_files_that_rest_are_not_fetched_again() -> None:
    parts = {"files": (("down",), ("up",)), "update_parts": ("up",)}
    moving = one(device(), **parts).predicted.down_bytes
    resting = one(device(), **parts, resting=(("down",),)).predicted.down_bytes
    assert moving - resting == packed_bytes(SPEC, Payload(32, "bfloat16", ("down",)))


# --- policies -----------------------------------------------------------------------------------

UNEQUAL = {"a": device(), "b": device(up_mbps=3), "c": device(tokens_per_s=150)}


def test_the_fairest_plan_gives_everybody_the_same_share_and_steps() -> None:
    found = plan(UNEQUAL, aim="fairest")
    assert len({(p.rank, p.local_steps) for p in found.devices}) == 1
    assert len(found.devices) == 3
    assert all("as much as everybody" in p.reason for p in found.devices)
    free = plan(UNEQUAL, aim="fairest", round_s=None)
    assert len({(p.rank, p.local_steps) for p in free.devices}) == 1


def test_the_cheapest_plan_covers_the_rank_in_the_fewest_bytes() -> None:
    cheap, fast = (plan(UNEQUAL, aim=aim) for aim in ("cheapest", "fastest"))
    moved = [sum(p.predicted.up_bytes for p in x.devices) for x in (cheap, fast)]
    assert moved[0] < 0.5 * moved[1]
    assert 32 <= sum(p.rank for p in cheap.devices) < 32 + 3
    assert all("the fewest bytes that cover" in p.reason for p in cheap.devices)
    auto = plan(UNEQUAL, aim="cheapest", update_encoding="auto")
    assert {p.update_encoding for p in auto.devices} == {"int8"}


# --- what was learnt, and what stays ------------------------------------------------------------


def again(
    fleet: dict[str, DeviceProfile], before: RoundPlan, time: float, memory: float = 1.0,
    **changes: object,
) -> RoundPlan:  # fmt: skip
    corrections = {name: Correction(time=time, memory=memory) for name in fleet}
    return plan_round(
        SMALL, SPEC, policy(**changes), fleet, corrections=corrections,
        before={p.device_id: p for p in before.devices}, before_s=before.round_s,
    )  # fmt: skip


def asked(found: RoundPlan) -> dict[str, tuple[object, ...]]:
    return {
        p.device_id: (p.rank, p.local_steps, p.micro_batch, p.checkpointing, p.precision)
        for p in found.devices
    }


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(0.85, 1.15), min_size=1, max_size=6), st.sampled_from([None, 60.0]))
def test_noise_does_not_change_what_devices_are_asked(
    factors: list[float], round_s: float | None
) -> None:
    fleet = UNEQUAL | {"d": device(up_mbps=1.5, tokens_per_s=300)}
    first = found = plan(fleet, round_s=round_s)
    for factor in factors:
        found = again(fleet, found, factor, round_s=round_s)
        assert asked(found) == asked(first)
        assert found.round_s == first.round_s


def test_a_real_change_does() -> None:
    fleet = {"c": device(tokens_per_s=150)}
    first = plan(fleet)
    slower = again(fleet, first, 2.0)
    assert slower.devices[0].local_steps < first.devices[0].local_steps
    faster = again(fleet, slower, 0.7)
    assert faster.devices[0].local_steps > slower.devices[0].local_steps
    assert all(p.predicted.total_s <= HOLD * 60 for p in (*slower.devices, *faster.devices))


def test_memory_that_is_short_now_is_heeded_at_once_and_growing_back_wants_room() -> None:
    fleet = {"a": device(free_gib=1.9)}
    short = {"round_s": 3600.0, "checkpointing": True, "micro_batch": 1, "coverage": 0.5}
    first = plan(fleet, **short)
    needs = first.devices[0].predicted_peak_bytes
    fleet = {"a": device(memory_cap_bytes=int(0.97 * needs))}
    less = again(fleet, first, 1.0, **short)
    assert less.devices[0].predicted_peak_bytes <= 0.97 * needs
    assert less.devices[0].rank < first.devices[0].rank
    fleet = {"a": device(memory_cap_bytes=int(1.02 * needs))}
    same = again(fleet, less, 1.0, **short)
    assert asked(same) == asked(less)
    assert "as in the round before, no change is clear enough" in same.devices[0].reason


def test_a_device_that_ran_out_is_trusted_with_less_and_told_why() -> None:
    tight = device(free_gib=1.6)
    note = "80% of its memory since it ran out once, more after 2 good rounds"
    burnt = {"a": Correction(memory_share=0.8, note=note)}
    first = one(tight, round_s=3600.0)
    (second,) = plan_round(
        SMALL, SPEC, policy(round_s=3600.0), {"a": tight}, corrections=burnt
    ).devices
    assert second.predicted_peak_bytes <= 0.8 * tight.trainer_bytes
    assert second.predicted_peak_bytes < first.predicted_peak_bytes
    assert note in second.reason
    tiny = {"a": device(free_gib=1.2)}
    hopeless = {"a": Correction(memory_share=0.1, note=note)}
    with pytest.raises(PlanError, match="a does not fit") as caught:
        plan_round(SMALL, SPEC, policy(), tiny, corrections=hopeless)
    assert caught.value.plan.unfit == frozenset(), "it may try again once it is trusted again"


def test_a_device_that_failed_gets_fewer_steps_and_is_told_why() -> None:
    weak = {"a": Correction(work_share=0.5, note="50% of the steps since it failed once")}
    (found,) = plan_round(SMALL, SPEC, policy(), {"a": device()}, corrections=weak).devices
    assert (found.rank, found.local_steps) == (32, 4)
    assert "4 steps of 8 50% of the steps since it failed once" in found.reason


def test_where_everybody_is_too_slow_the_sentence_names_the_longest_round() -> None:
    fleet = {"a": device(tokens_per_s=0.01), "b": device(tokens_per_s=0.01)}
    with pytest.raises(PlanError) as told:
        plan(fleet, max_round_s=600.0, round_s=None)
    assert all("the round is 600 s" in why for why in told.value.plan.left_out.values())
