"""The formula holds what autograd saves, and the probe what the formula cannot know."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from profiles.device import ComputePoint, ComputeProfile, DeviceProfile, GpuProfile
from profiles.memory import (
    CPU_BASELINE_BYTES,
    DISCRETE_CONTEXT_BYTES,
    Machine,
    activation_bytes,
    device_peak_bytes,
    machine_of,
    parts_of,
    peak_memory_bytes,
    reported_peak_bytes,
)
from profiles.model import ModelShape
from profiles.work import Correction, LocalWork

GIB = 2**30
QWEN = ModelShape("qwen2", 1536, 28, 12, 2, 128, 8960, 151936, True)
CARD = Machine(2, on_card=True, shares_host=False)
CPU = Machine(4, on_card=False, shares_host=True)
QV = ("q_proj", "v_proj")
ATTENTION = (*QV, "k_proj", "o_proj")


def work(**changes: Any) -> LocalWork:
    plain = LocalWork(
        precision="nf4", rank=16, parameters_per_rank=1_154_048, global_rank=16,
        sequence_tokens=1024, micro_batch=1, accumulation=1, local_steps=10, checkpointing=True,
        evaluation_sequences=4, evaluates_global=False, slice_bytes=0, update_bytes=0,
        global_bytes=0,
    )  # fmt: skip
    return replace(plain, **changes)


def device(**changes: Any) -> DeviceProfile:
    plain = DeviceProfile(
        board="x86-64 CPU", cpu="", cores=8, memory_total_bytes=16 * GIB,
        memory_available_bytes=12 * GIB, disk_free_bytes=GIB, agent_version="0",
    )  # fmt: skip
    return replace(plain, **changes)


def peak(asked: LocalWork, machine: Machine = CARD) -> int:
    return peak_memory_bytes(QWEN, asked, baseline_bytes=0, machine=machine)


def test_a_local_only_adapter_is_held_while_the_slice_trains_where_host_memory_counts() -> None:
    """One trains after the other: the second costs its values, not another optimiser."""
    asked, beside = work(), work(local_only=True)
    more = peak(beside, CPU) - peak(asked, CPU)
    assert more == pytest.approx(4 * asked.trained_parameters, rel=0.1)
    assert peak(beside, CARD) == peak(asked, CARD)


# --- what autograd keeps ------------------------------------------------------------------------


@pytest.mark.parametrize("targets", [(), QV, ATTENTION], ids=["all", "qv", "attention"])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "starcoder2"])
@pytest.mark.parametrize("width", [4, 2], ids=["fp32", "bf16"])
def test_every_byte_that_autograd_keeps_is_counted(
    kind: str, targets: tuple[str, ...], width: int
) -> None:
    """Two layers less one, per token, by hooks on what is saved."""
    shape = ModelShape(kind, 128, 2, 4, 2, 32, 320, 64, True)
    counted = [_kept_bytes(shape, layers, targets, width) for layers in (1, 2)]
    assert counted[1] - counted[0] == activation_bytes(shape, 8, targets, compute_bytes=width) * 96


def _kept_bytes(shape: ModelShape, layers: int, targets: tuple[str, ...], width: int) -> int:
    import torch
    import transformers
    from peft import LoraConfig, get_peft_model

    config = transformers.AutoConfig.for_model(
        shape.model_type, hidden_size=shape.hidden, num_hidden_layers=layers,
        num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
        intermediate_size=shape.intermediate, vocab_size=shape.vocabulary,
        tie_word_embeddings=True, residual_dropout=0.0, embedding_dropout=0.0,
    )  # fmt: skip
    dtype = torch.float32 if width == 4 else torch.bfloat16
    base: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    base.requires_grad_(False)
    wanted = [m.name for m in replace(shape, layers=layers).modules(targets)]
    lora = LoraConfig(r=8, target_modules=wanted, lora_dropout=0.0, task_type="CAUSAL_LM")
    model = get_peft_model(base, lora).train()
    fixed = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    found: dict[int, int] = {}
    alive = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        alive.append(tensor)  # else its address might be given to another
        if storage.data_ptr() not in fixed:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    rows = torch.randint(shape.vocabulary, (2, 48))
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model.get_base_model().get_decoder()(input_ids=rows, use_cache=False)
    return sum(found.values())


# --- the formula --------------------------------------------------------------------------------


def test_state_is_weight_gradient_and_what_the_optimiser_keeps() -> None:
    trained = 16 * 1_154_048
    state = {name: parts_of(QWEN, work(optimizer=name), CARD).state
             for name in ("adamw", "adamw8bit", "sgd")}  # fmt: skip
    assert state == {"adamw": 16 * trained, "adamw8bit": 10.03125 * trained, "sgd": 8 * trained}
    # Beside a processor what was received lies in the same memory.
    assert parts_of(QWEN, work(), CPU).state == 20 * trained


def test_more_of_anything_takes_more() -> None:
    plain = work(checkpointing=False)
    larger: tuple[dict[str, Any], ...] = (
        {"rank": 32},
        {"micro_batch": 2},
        {"sequence_tokens": 2048},
        {"side_rank": 64},
        {"dense_parameters": 10**7},
        {"precision": "int8"},
        {"precision": "bf16"},
    )
    for machine in (CARD, CPU):
        for changes in larger:
            assert peak(replace(plain, **changes), machine) > peak(plain, machine), changes
        assert peak(work(), machine) < peak(plain, machine)
        assert peak(replace(plain, targets=QV), machine) < peak(plain, machine)
    assert peak(plain, CPU) > peak(plain, CARD)


def test_the_loss_is_of_a_chunk_whatever_the_length() -> None:
    few, many = (parts_of(QWEN, work(sequence_tokens=t), CARD).moving for t in (256, 512))
    assert few > 256 * 10 * QWEN.vocabulary
    assert many - few < 0.1 * few


def test_evaluating_the_whole_adapter_is_covered() -> None:
    small = work(rank=1, global_rank=512)
    assert peak(replace(small, evaluates_global=True)) > peak(small)
    wide = work()
    assert peak(replace(wide, evaluates_global=True)) == peak(wide)


def test_unmeasured_devices_get_an_assumed_baseline() -> None:
    assert device_peak_bytes(QWEN, device(), work()) == peak(work(), CPU) + CPU_BASELINE_BYTES
    card = GpuProfile("RTX 4060", 8 * GIB, 7 * GIB, "8.9", unified_memory=False)
    found = device_peak_bytes(QWEN, device(gpu=card), work())
    assert found == peak(work()) + DISCRETE_CONTEXT_BYTES
    old = device(gpu=replace(card, compute_capability="7.5"))
    assert machine_of(QWEN, old, "nf4").compute_bytes == 4


# --- the probe ----------------------------------------------------------------------------------

PROBE = {"rank": 4, "sequence_tokens": 512, "micro_batch": 4, "precision": "fp32"}


def probed(waste_each: int, waste: int, **changes: Any) -> ComputeProfile:
    """As a device would measure whose libraries hold `waste` and `waste_each` a token more."""
    asked = work(**PROBE, checkpointing=False, local_steps=1)

    def found(micro_batch: int) -> int:
        parts = parts_of(QWEN, replace(asked, micro_batch=micro_batch), CPU, reports=False)
        return int(7 * GIB + parts.state + parts.moving + waste + waste_each * micro_batch * 512)

    plain = ComputeProfile("d", "fp32", 300.0, 1000.0, GIB // 4, found(4), 4, 512, 4,
                           loaded_bytes=7 * GIB,
                           small=ComputePoint(512, 1, 1.0, 0.3, found(1)))  # fmt: skip
    return replace(plain, **changes)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_what_lies_between_two_sizes_is_told_apart(checkpointing: bool) -> None:
    asked = work(precision="fp32", micro_batch=2, checkpointing=checkpointing)
    seen = device(compute=probed(200_000, 50_000_000))
    parts = parts_of(QWEN, asked, CPU)
    expected = 7 * GIB + parts.state + parts.moving + 50_000_000 + 200_000 * 2048
    assert reported_peak_bytes(QWEN, seen, asked) == pytest.approx(expected, rel=1e-6)


def test_a_probe_at_one_size_lays_it_all_on_the_tokens() -> None:
    seen = device(compute=probed(200_000, 0, small=None))
    asked = work(precision="fp32", sequence_tokens=512)
    parts = parts_of(QWEN, asked, CPU)
    expected = 7 * GIB + parts.state + parts.moving + 200_000 * 512
    assert reported_peak_bytes(QWEN, seen, asked) == pytest.approx(expected, rel=1e-6)


def test_another_precision_exchanges_the_base() -> None:
    seen = device(compute=probed(0, 0))
    wide, narrow = (reported_peak_bytes(QWEN, seen, work(precision=p)) for p in ("fp32", "nf4"))
    base = (4 - 0.5159) * QWEN.linear_parameters
    assert wide - narrow == pytest.approx(base, rel=0.02)


def test_whether_a_processor_computes_in_bf16_shows_in_what_the_base_takes() -> None:
    for width in (2, 4):
        held = 0.5159 * QWEN.linear_parameters + width * QWEN.other_parameters
        loaded = GIB // 4 + int(held) + 80 * 2**20  # and what was imported to load it
        seen = probed(0, 0, precision="nf4", loaded_bytes=loaded)
        assert machine_of(QWEN, device(compute=seen), "bf16").compute_bytes == width
    assert machine_of(QWEN, device(compute=probed(0, 0)), "fp32").compute_bytes == 4


def test_what_was_learnt_is_a_factor() -> None:
    seen = device(compute=probed(0, 0))
    plain = device_peak_bytes(QWEN, seen, work())
    assert device_peak_bytes(QWEN, seen, work(), Correction(memory=1.2)) == pytest.approx(
        1.2 * plain, rel=1e-6
    )
