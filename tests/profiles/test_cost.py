"""Predicted times agree with the worked examples and move the right way."""

from dataclasses import replace

import pytest

from profiles.cost import (
    Correction,
    LocalWork,
    link_variation,
    round_seconds,
    train_flops_per_token,
)
from profiles.device import ComputePoint, ComputeProfile, DeviceProfile, GpuProfile
from profiles.link import LinkProfile
from profiles.model import ModelShape

GIB = 2**30


def shape_of(
    kind: str, h: int, layers: int, heads: int, kv: int, i: int, v: int, tied: bool
) -> ModelShape:
    return ModelShape(kind, h, layers, heads, kv, h // heads, i, v, tied)


QWEN_05 = shape_of("qwen2", 896, 24, 14, 2, 4864, 151936, True)
QWEN_15 = shape_of("qwen2", 1536, 28, 12, 2, 8960, 151936, True)
QWEN_7 = shape_of("qwen2", 3584, 28, 28, 4, 18944, 152064, False)


def work(c: int = 1_154_048, **changes: object) -> LocalWork:
    plain = LocalWork(
        precision="nf4", rank=16, parameters_per_rank=c, global_rank=16, sequence_tokens=1024,
        micro_batch=1, accumulation=1, local_steps=10, checkpointing=True,
        evaluation_sequences=4, evaluates_global=False, slice_bytes=1_000_000,
        update_bytes=500_000, global_bytes=4_000_000,
    )  # fmt: skip
    return replace(plain, **changes)  # type: ignore[arg-type]


def measured(**changes: object) -> ComputeProfile:
    plain = ComputeProfile(
        base_digest="d", precision="nf4", tokens_per_s=300.0, forward_tokens_per_s=1000.0,
        baseline_bytes=GIB // 2, peak_bytes=0, rank=16, sequence_tokens=1024, micro_batch=1,
    )  # fmt: skip
    return replace(plain, **changes)  # type: ignore[arg-type]


def device(**changes: object) -> DeviceProfile:
    plain = DeviceProfile(
        board="x86-64 CPU", cpu="", cores=8, memory_total_bytes=16 * GIB,
        memory_available_bytes=12 * GIB, disk_free_bytes=GIB, agent_version="0",
        link=LinkProfile(up_bps=1e6, down_bps=8e6, rtt_s=0.0),
    )  # fmt: skip
    return replace(plain, **changes)  # type: ignore[arg-type]


CARD = GpuProfile("RTX 4060", 8 * GIB, 7 * GIB, "8.9", unified_memory=False)


def test_flops_reproduce_the_worked_examples() -> None:
    # 6N and the head, which is passed once each way and not recomputed, and attention.
    for shape, gflop in ((QWEN_05, 2.87), (QWEN_15, 9.15), (QWEN_7, 42.2)):
        base = train_flops_per_token(shape, work(rank=0)) / 1e9
        assert base == pytest.approx(gflop, rel=0.03)


def test_round_adds_up_from_measured_rates() -> None:
    asked = work(checkpointing=False, evaluates_global=True)
    cost = round_seconds(QWEN_15, device(compute=measured()), asked)
    assert cost.train_s == pytest.approx(10 * 1024 / 300)
    assert cost.evaluate_s == pytest.approx(3 * 4 * 1024 / 1000)
    assert cost.push_s == pytest.approx(8 * 500_000 / (0.9 * 1e6))
    assert cost.fetch_s == pytest.approx(8 * 5_000_000 / (0.9 * 8e6))
    assert cost.total_s == pytest.approx(
        cost.fetch_s + cost.train_s + cost.evaluate_s + cost.push_s
    )
    assert (cost.up_bytes, cost.down_bytes) == (500_000, 5_000_000)


def test_a_local_only_adapter_costs_the_training_once_more_and_one_evaluation() -> None:
    asked = work(checkpointing=False, evaluates_global=True)
    beside = replace(asked, local_only=True)
    one, two = (round_seconds(QWEN_15, device(compute=measured()), w) for w in (asked, beside))
    assert two.train_s == pytest.approx(2 * one.train_s)
    assert two.evaluate_s == pytest.approx(4 / 3 * one.evaluate_s)
    assert (two.up_bytes, two.down_bytes) == (one.up_bytes, one.down_bytes)


def test_more_rank_and_recompute_take_longer_at_the_same_measured_rate() -> None:
    seen = device(compute=measured())
    times = [round_seconds(QWEN_15, seen, work(rank=k)).train_s for k in (1, 16, 64)]
    assert times == sorted(set(times))
    stored = round_seconds(QWEN_15, seen, work(checkpointing=False)).train_s
    assert 1.3 < times[1] / stored < 1.55  # 6N against 4N


def test_unmeasured_compute_falls_back_to_stated_rates() -> None:
    cost = round_seconds(QWEN_05, device(gpu=CARD), work(549_888, rank=1))
    assert 10 * 1024 / cost.train_s == pytest.approx(
        680, rel=0.1
    )  # 620 when the head was recomputed
    slow = round_seconds(QWEN_05, device(cores=2), work(549_888))
    fast = round_seconds(QWEN_05, device(cores=8), work(549_888))
    assert slow.train_s == pytest.approx(4 * fast.train_s)


def test_evaluate_only_work_costs_no_training() -> None:
    asked = work(local_steps=0, evaluates_global=True, slice_bytes=0, update_bytes=0)
    cost = round_seconds(QWEN_15, device(compute=measured()), asked)
    assert cost.train_s == 0
    assert cost.evaluate_s == pytest.approx(4 * 1024 / 1000)
    assert cost.down_bytes == asked.global_bytes


def test_a_frozen_branch_is_passed_through_but_not_trained() -> None:
    c, rows = 1_154_048, 64
    for checkpointing, passes in ((False, 4), (True, 6)):
        asked = work(checkpointing=checkpointing)
        more = train_flops_per_token(QWEN_15, replace(asked, side_rank=rows))
        more -= train_flops_per_token(QWEN_15, asked)
        assert more == pytest.approx(passes * rows * c)
        trained = train_flops_per_token(QWEN_15, replace(asked, rank=asked.rank + rows))
        assert more < trained - train_flops_per_token(QWEN_15, asked)


def test_two_sizes_tell_what_a_step_costs_however_small() -> None:
    """0.5 s for every pass and 1 ms a token: a step of a quarter takes more than a quarter."""
    small = ComputePoint(256, 1, 0.5 + 0.256, 0.1 + 0.256 / 4, 0)
    seen = measured(tokens_per_s=1024 / (0.5 + 1.024), forward_tokens_per_s=1024 / (0.1 + 0.256))
    of = device(compute=replace(seen, small=small))
    stored = work(local_steps=1, checkpointing=False)
    for tokens in (256, 512, 2048):
        found = round_seconds(QWEN_15, of, replace(stored, sequence_tokens=tokens)).train_s
        assert found == pytest.approx(0.5 + tokens / 1000, rel=0.05)  # attention is of the square
    split = replace(stored, micro_batch=1, accumulation=4, sequence_tokens=256)
    assert round_seconds(QWEN_15, of, split).train_s == pytest.approx(4 * 0.756, rel=0.05)
    again = round_seconds(QWEN_15, of, replace(stored, checkpointing=True)).train_s
    assert 1.3 < again / 1.524 < 1.5
    one = replace(stored, evaluation_sequences=1)
    assert round_seconds(QWEN_15, of, one).evaluate_s == pytest.approx(2 * 0.356, rel=0.01)


def test_sizes_that_make_no_sense_fall_back_to_the_larger() -> None:
    odd = ComputePoint(256, 1, 99.0, 99.0, 0)
    plain, strange = measured(), replace(measured(), small=odd)
    asked = work(checkpointing=False)
    found = [round_seconds(QWEN_15, device(compute=c), asked).train_s for c in (plain, strange)]
    assert found[0] == pytest.approx(found[1])


def test_what_was_learnt_slows_compute_and_widens_the_margin() -> None:
    seen = device(compute=measured())
    plain = round_seconds(QWEN_15, seen, work())
    slow = round_seconds(QWEN_15, seen, work(), Correction(time=2.0, variation=0.5, load_s=3.0))
    assert slow.train_s == pytest.approx(2 * plain.train_s)
    assert (slow.fetch_s, slow.push_s) == (plain.fetch_s, plain.push_s)
    moving, computing = plain.fetch_s + plain.push_s, plain.train_s + plain.evaluate_s
    assert plain.p90_s == pytest.approx(1.256 * moving + 1.128 * computing)
    assert slow.p90_s == pytest.approx(3.0 + 1.256 * moving + 1.64 * 2 * computing)


def test_variation_is_learnt_or_assumed_by_the_kind_of_link() -> None:
    link = LinkProfile(1e6, 1e6, 0.0)
    metered = replace(link, metered=True)
    known = replace(metered, variation=0.1)
    assert [link_variation(x) for x in (None, link, metered, known)] == [0.2, 0.2, 0.5, 0.1]
