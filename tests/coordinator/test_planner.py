"""Plans respect memory and deadline, cover the rank, and say why."""

import json
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coordinator.planner import DevicePlan, Level, PlanError, PlanPolicy, RoundPlan, plan_round
from profiles.device import ComputeProfile, DeviceProfile, GpuProfile
from profiles.link import LinkProfile
from profiles.model import ModelShape, ModuleShape
from protos.contract import AdapterSpec, Payload, from_plain, to_plain
from protos.packing import packed_bytes

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
    assert plans[1].checkpointing
    assert (plans[2].micro_batch, plans[2].rank) == (2, 32)
    assert plans[-1].micro_batch == 1 and plans[-1].rank < 8
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


def test_slow_compute_costs_rank_then_steps() -> None:
    found = one(device(tokens_per_s=100.0), round_s=70.0)
    assert (found.rank, found.local_steps < 8) == (1, True)
    assert found.local_steps >= 2
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
        assert p.predicted.up_bytes == packed_bytes(SPEC, update)
        slice_ = Payload(32, "bfloat16", density=p.density)
        assert p.predicted.down_bytes == packed_bytes(SPEC, slice_)
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
    held = 4 * 64 * SPEC.parameters_per_rank
    assert beside.predicted_peak_bytes - plain.predicted_peak_bytes == pytest.approx(
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
        ({}, {"slice": 1, "whole": 1}, {"bfloat16": 1}),
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
    held = 4 * (32 - few.rank) * SPEC.parameters_per_rank
    assert few.predicted_peak_bytes - alone.predicted_peak_bytes == pytest.approx(
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
    trained = 16 * 49152 * 576  # weight, gradient and two moments, float32
    assert found.predicted_peak_bytes - plain.predicted_peak_bytes == pytest.approx(
        1.07 * trained, rel=0.01
    )
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


@settings(max_examples=40, deadline=None)
@given(st.floats(0.1, 50), st.floats(0.1, 1), st.floats(1.7, 6))
def test_a_slower_link_never_gets_a_larger_sketch(mbps: float, slower: float, gib: float) -> None:
    def rank(profile: DeviceProfile) -> int:
        try:
            return one(profile, round_s=120.0).rank
        except PlanError:
            return 0

    best = rank(device(up_mbps=mbps, free_gib=gib))
    assert rank(device(up_mbps=mbps * slower, free_gib=gib)) <= best


@settings(max_examples=40, deadline=None)
@given(st.floats(1.0, 6), st.floats(0.5, 1))
def test_less_memory_never_allows_a_larger_sketch(gib: float, less: float) -> None:
    def rank(profile: DeviceProfile) -> int:
        try:
            return one(profile, round_s=1e5, max_round_s=1e5).rank
        except PlanError:
            return 0

    assert rank(device(free_gib=gib * less)) <= rank(device(free_gib=gib))
