"""Plans respect memory and deadline, cover the rank, and say why."""

import json
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coordinator.planner import DevicePlan, PlanError, PlanPolicy, RoundPlan, plan_round
from profiles.device import ComputeProfile, DeviceProfile, GpuProfile
from profiles.link import LinkProfile
from profiles.model import ModelShape
from protos.contract import AdapterSpec, from_plain, to_plain

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


def plan(devices: dict[str, DeviceProfile], **changes: object) -> RoundPlan:
    return plan_round(SMALL, SPEC, policy(**changes), devices)


def one(profile: DeviceProfile, **changes: object) -> DevicePlan:
    (found,) = plan({"a": profile}, **changes).devices
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
    found = plan(fleet, heterogeneous=False)
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
    assert policy(rank=30, rank_multiple=8, min_rank=2).ranks == (2, 8, 16, 24, 30)
    assert policy(rank=16, heterogeneous=False).ranks == (16,)


def test_measurement_of_another_base_is_not_used() -> None:
    stale = replace(device(), compute=replace(device().compute, base_digest="other"))  # type: ignore[type-var]
    assert one(stale) == one(device(compute=None))


def test_plan_survives_its_plain_form() -> None:
    found = one(device())
    assert from_plain(DevicePlan, json.loads(json.dumps(to_plain(found)))) == found


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
)
def test_every_plan_keeps_its_promises(
    fleet: dict[str, DeviceProfile],
    round_s: float | None,
    precision: str,
    evaluates: bool,
    multiple: int,
) -> None:
    asked = policy(
        round_s=round_s, precision=precision, evaluates_global=evaluates, rank_multiple=multiple
    )
    try:
        found = plan_round(SMALL, SPEC, asked, fleet)
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
        assert p.rank in asked.ranks
        assert asked.min_local_steps <= p.local_steps <= asked.local_steps
        assert p.micro_batch * p.accumulation == asked.micro_batch * asked.accumulation
        assert p.sketch_offset == offset % asked.rank
        assert p.reason.startswith(f"k={p.rank}: ")
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
