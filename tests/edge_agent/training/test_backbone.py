"""Types and attention follow what the hardware multiplies fast."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

from edge_agent.training import backbone
from edge_agent.training.backbone import compute_dtype, flash_attention
from edge_agent.training.workbench import Workbench
from protos.contract import AdapterSpec
from tests.edge_agent.training.rounds import (
    Device,
    K,
    loss_of,
    make_adapter,
    make_assignment,
    report_of,
    run,
)

CARD, PROCESSOR = torch.device("cuda", 0), torch.device("cpu")


@pytest.mark.parametrize(
    ("capability", "dtype"),
    [
        ((6, 1), torch.float32), ((6, 2), torch.float32), ((7, 2), torch.float16),
        ((7, 5), torch.float16), ((8, 0), torch.bfloat16), ((8, 7), torch.bfloat16),
        ((11, 0), torch.bfloat16), ((12, 1), torch.bfloat16),
    ],
)  # fmt: skip
def test_a_card_computes_in_what_it_multiplies_fast(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], dtype: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert compute_dtype(CARD) == dtype


@pytest.mark.parametrize(
    ("can", "dtype"),
    [
        ({}, torch.float32), ({"avx2": True}, torch.float32),
        ({"avx512_bf16": True}, torch.bfloat16), ({"amx_bf16": True}, torch.bfloat16),
    ],
)  # fmt: skip
def test_a_processor_without_bf16_units_computes_in_float32(
    monkeypatch: pytest.MonkeyPatch, can: dict[str, bool], dtype: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: can)
    assert compute_dtype(PROCESSOR) == dtype


@pytest.mark.parametrize(
    ("device", "capability", "dtype", "installed", "want"),
    [
        (CARD, (8, 7), torch.bfloat16, True, True),
        (CARD, (8, 7), torch.bfloat16, False, False),
        (CARD, (7, 5), torch.float16, True, False),
        (CARD, (8, 7), torch.float32, True, False),
        (PROCESSOR, (8, 7), torch.bfloat16, True, False),
    ],
)
def test_flash_attention_is_used_where_it_can_be(
    monkeypatch: pytest.MonkeyPatch, device: torch.device, capability: tuple[int, int],
    dtype: torch.dtype, installed: bool, want: bool,
) -> None:  # fmt: skip
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(transformers.utils, "is_flash_attn_2_available", lambda: installed)
    assert flash_attention(device, dtype) == want


def test_a_model_without_flash_kernels_stays_as_it_was(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def refuse(name: str) -> None:
        raise ValueError(f"Old does not support {name}")

    model: Any = SimpleNamespace(set_attn_implementation=refuse)
    with caplog.at_level("INFO"):
        backbone._use_flash(model)
    assert "no flash attention" in caplog.text


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_round_trains_in_narrow_types(
    device: Device, spec: AdapterSpec, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(backbone, "compute_dtype", lambda _: dtype)
    job = device.job(spec, make_assignment(precision="bf16"), make_adapter(spec, K))
    report = report_of(run(job, Workbench(PROCESSOR)))
    assert loss_of(report, "slice", "trained") < loss_of(report, "slice", "received") - 0.01
