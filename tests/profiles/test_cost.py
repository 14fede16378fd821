"""Predicted memory and time agree with the worked examples and move the right way."""

from dataclasses import replace

import pytest

from profiles.cost import (
    CPU_BASELINE_BYTES,
    DISCRETE_CONTEXT_BYTES,
    LocalWork,
    device_peak_bytes,
    peak_memory_bytes,
    round_seconds,
    train_flops_per_token,
)
from profiles.device import ComputeProfile, DeviceProfile, GpuProfile
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
# shape, c, GiB at T=512, T=1024, T=1024 without checkpointing (nf4, r=16, all-linear, chunked loss)
EXAMPLES = {
    "smollm2-135m": (
        shape_of("llama", 576, 30, 9, 3, 1536, 49152, True), 305_280, 0.36, 0.38, 1.17,
    ),
    "smollm2-360m": (
        shape_of("llama", 960, 32, 15, 5, 2560, 49152, True), 542_720, 0.58, 0.61, 2.02,
    ),
    "qwen-0.5b": (QWEN_05, 549_888, 1.09, 1.11, 2.57),
    "deepseek-1.3b": (
        shape_of("llama", 2048, 24, 16, 16, 5504, 32256, False), 936_960, 1.30, 1.42, 3.74,
    ),
    "qwen-1.5b": (QWEN_15, 1_154_048, 1.97, 2.02, 5.06),
    "starcoder2-3b": (
        shape_of("starcoder2", 3072, 30, 24, 2, 12288, 49152, True), 1_489_920, 2.48, 2.61, 5.63,
    ),
    "qwen-3b": (
        shape_of("qwen2", 2048, 36, 16, 2, 11008, 151936, True), 1_870_848, 3.11, 3.19, 8.12,
    ),
    "codellama-7b": (
        shape_of("llama", 4096, 32, 32, 32, 11008, 32016, False), 2_498_560, 4.89, 5.19, 11.37,
    ),
    "qwen-7b": (QWEN_7, 2_523_136, 6.88, 6.98, 13.63),
}  # fmt: skip


def work(c: int = 1_154_048, **changes: object) -> LocalWork:
    plain = LocalWork(
        precision="nf4", rank=16, parameters_per_rank=c, global_rank=16, sequence_tokens=1024,
        micro_batch=1, accumulation=1, local_steps=10, checkpointing=True,
        evaluation_sequences=4, evaluates_global=False, slice_bytes=1_000_000,
        update_bytes=500_000, global_bytes=4_000_000,
    )  # fmt: skip
    return replace(plain, **changes)  # type: ignore[arg-type]


def peak_gib(shape: ModelShape, of: LocalWork, *, on_gpu: bool = True) -> float:
    return peak_memory_bytes(shape, of, baseline_bytes=0, on_gpu=on_gpu) / GIB


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


@pytest.mark.parametrize("name", EXAMPLES)
def test_peak_memory_reproduces_the_worked_examples(name: str) -> None:
    shape, c, short, long, stored = EXAMPLES[name]
    found = [
        peak_gib(shape, work(c, sequence_tokens=512)),
        peak_gib(shape, work(c)),
        peak_gib(shape, work(c, checkpointing=False)),
    ]
    assert found == pytest.approx([short, long, stored], rel=0.02, abs=0.006)


def test_peak_memory_reproduces_the_rank_sweep_and_the_other_precisions() -> None:
    sweep = [peak_gib(QWEN_15, work(rank=r)) for r in (4, 8, 16, 32, 64)]
    assert sweep == pytest.approx([1.79, 1.87, 2.02, 2.31, 2.90], rel=0.01)
    assert peak_gib(QWEN_15, work(precision="int8")) == pytest.approx(2.65, rel=0.01)
    assert peak_gib(QWEN_15, work(precision="bf16")) == pytest.approx(3.93, rel=0.01)


def test_cpu_computes_in_fp32_and_needs_more() -> None:
    for checkpointing in (True, False):
        asked = work(checkpointing=checkpointing)
        assert peak_gib(QWEN_15, asked, on_gpu=False) > peak_gib(QWEN_15, asked)


def test_peak_memory_covers_evaluating_the_whole_adapter() -> None:
    small = work(rank=1, global_rank=256)
    assert peak_gib(QWEN_15, replace(small, evaluates_global=True)) > peak_gib(QWEN_15, small)
    wide = work(rank=16, global_rank=16)
    assert peak_gib(QWEN_15, replace(wide, evaluates_global=True)) == peak_gib(QWEN_15, wide)


def test_measured_peak_corrects_the_prediction_within_limits() -> None:
    probe = work(checkpointing=False)
    plain = peak_memory_bytes(QWEN_15, probe, baseline_bytes=GIB // 2, on_gpu=False)
    for factor, taken in ((1.2, 1.2), (0.9, 0.9), (5.0, 2.0), (0.1, 0.5)):
        seen = device(compute=measured(peak_bytes=int(plain * factor)))
        assert device_peak_bytes(QWEN_15, seen, probe) == pytest.approx(plain * taken, rel=1e-6)
    other = device(compute=measured(peak_bytes=plain * 2, precision="int8"))
    assert device_peak_bytes(QWEN_15, other, probe) == plain


def test_unmeasured_devices_get_an_assumed_baseline() -> None:
    bare = peak_memory_bytes(QWEN_15, work(), baseline_bytes=0, on_gpu=False)
    assert device_peak_bytes(QWEN_15, device(), work()) == bare + CPU_BASELINE_BYTES
    bare = peak_memory_bytes(QWEN_15, work(), baseline_bytes=0, on_gpu=True)
    assert device_peak_bytes(QWEN_15, device(gpu=CARD), work()) == bare + DISCRETE_CONTEXT_BYTES


def test_flops_reproduce_the_worked_examples() -> None:
    for shape, gflop in ((QWEN_05, 3.1), (QWEN_15, 9.5), (QWEN_7, 43.0)):
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


def test_more_rank_and_recompute_take_longer_at_the_same_measured_rate() -> None:
    seen = device(compute=measured())
    times = [round_seconds(QWEN_15, seen, work(rank=k)).train_s for k in (1, 16, 64)]
    assert times == sorted(set(times))
    stored = round_seconds(QWEN_15, seen, work(checkpointing=False)).train_s
    assert 1.3 < times[1] / stored < 1.55  # 6N against 4N


def test_unmeasured_compute_falls_back_to_stated_rates() -> None:
    cost = round_seconds(QWEN_05, device(gpu=CARD), work(549_888, rank=1))
    assert 10 * 1024 / cost.train_s == pytest.approx(620, rel=0.1)  # Orin Nano in the table
    slow = round_seconds(QWEN_05, device(cores=2), work(549_888))
    fast = round_seconds(QWEN_05, device(cores=8), work(549_888))
    assert slow.train_s == pytest.approx(4 * fast.train_s)


def test_evaluate_only_work_costs_no_training() -> None:
    asked = work(local_steps=0, evaluates_global=True, slice_bytes=0, update_bytes=0)
    cost = round_seconds(QWEN_15, device(compute=measured()), asked)
    assert cost.train_s == 0
    assert cost.evaluate_s == pytest.approx(4 * 1024 / 1000)
    assert cost.down_bytes == asked.global_bytes


def test_a_frozen_branch_is_held_and_passed_through_but_not_trained() -> None:
    c, rows = 1_154_048, 64
    for asked in (work(), work(local_steps=0, evaluates_global=True)):
        beside = replace(asked, side_rank=rows)
        more = peak_gib(QWEN_15, beside) - peak_gib(QWEN_15, asked)
        assert more == pytest.approx(1.07 * 4 * rows * c / GIB, rel=1e-3)
    for checkpointing, passes in ((False, 4), (True, 6)):
        asked = work(checkpointing=checkpointing)
        more = train_flops_per_token(QWEN_15, replace(asked, side_rank=rows))
        more -= train_flops_per_token(QWEN_15, asked)
        assert more == pytest.approx(passes * rows * c)
        trained = train_flops_per_token(QWEN_15, replace(asked, rank=asked.rank + rows))
        assert more < trained - train_flops_per_token(QWEN_15, asked)


def test_tensors_trained_whole_take_their_gradients_and_moments() -> None:
    head = 151936 * 1536
    more = peak_gib(QWEN_15, work(dense_parameters=head)) - peak_gib(QWEN_15, work())
    assert more == pytest.approx(1.07 * 16 * head / GIB, rel=1e-3)
    measuring = work(local_steps=0, evaluates_global=True)
    assert peak_gib(QWEN_15, replace(measuring, dense_parameters=head)) == peak_gib(
        QWEN_15, measuring
    )


def test_a_measurement_was_made_without_branch_or_dense_tensors() -> None:
    """What a device showed with the plain adapter corrects the prediction of anything else."""
    probe = work(checkpointing=False)
    plain = peak_memory_bytes(QWEN_15, probe, baseline_bytes=GIB // 2, on_gpu=False)
    seen = device(compute=measured(peak_bytes=int(1.2 * plain)))
    asked = replace(probe, side_rank=64, dense_parameters=10**7)
    predicted = peak_memory_bytes(QWEN_15, asked, baseline_bytes=GIB // 2, on_gpu=False)
    assert device_peak_bytes(QWEN_15, seen, asked) == pytest.approx(1.2 * predicted, rel=1e-6)
    slower = round_seconds(QWEN_15, seen, asked).train_s
    assert slower > round_seconds(QWEN_15, seen, probe).train_s
