"""A device's own adapter comes out of its home as a folder that stock PEFT loads."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from edge_agent.training.backbone import load_base
from edge_agent.training.evaluation import evaluate, spread
from edge_agent.training.home import Home, HomeError, write_home
from edge_agent.training.personal import own_adapter
from edge_agent.training.workbench import DataSelection
from protos.contract import AdapterSpec, Assignment, Payload
from protos.peft_folder import write_peft
from tests.edge_agent.training.rounds import (
    NORM,
    Device,
    K,
    loss_of,
    make_adapter,
    make_assignment,
    only,
)

ROOT = Path(__file__).parents[3]


def export_personal(home: Path, spec: AdapterSpec, base: str, out: Path) -> Path:
    adapter = own_adapter(home, spec)
    assert adapter is not None
    return write_peft(adapter, out, base, Path(base) if adapter.dense else None)


def stock_loss(device: Device, spec: AdapterSpec, task: Assignment, folder: Path) -> float:
    """On the held-out rows of the round, with nothing but transformers and PEFT."""
    from peft import PeftModel

    base = load_base(device.base_folder, "fp32", torch.device("cpu"))
    data = DataSelection((str(device.code_folder),))
    warm = device.bench.base(device.base_folder, "fp32", spec)
    rows = device.bench.rows(
        device.base_folder, warm, data, task.sequence_tokens, task.held_out_share
    )
    model: Any = PeftModel.from_pretrained(base.model, str(folder)).eval()
    return evaluate(model, spread(rows.held_out, task.evaluation_sequences), 4).loss


@pytest.mark.parametrize("rslora", [False, True])
def test_the_slice_with_its_personal_parts_loads_as_it_was_trained(
    device: Device, spec: AdapterSpec, tmp_path: Path, rslora: bool
) -> None:
    spec = replace(spec, use_rslora=rslora)
    task = make_assignment(
        personal=("up",), update=Payload(K, "float32", ("down",)), alpha=11.0, learning_rate=0.02
    )
    report, _ = device.round(spec, task, only(make_adapter(spec, K), "down"))
    folder = tmp_path / "out"
    assert export_personal(device.home, spec, str(device.base_folder), folder) == folder
    assert sorted(p.name for p in folder.iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors",
    ]  # fmt: skip
    want = pytest.approx(loss_of(report, "slice", "trained"), rel=1e-5)
    assert stock_loss(device, spec, task, folder) == want


def test_dittos_adapter_goes_before_the_slice_with_core_branch_and_whole_tensors(
    device: Device, spec: AdapterSpec, tmp_path: Path
) -> None:
    whole = replace(spec, dense=(NORM,))
    parts = ("up", "down", "core", "dense")
    task = make_assignment(
        trained=parts, personal=("core",), update=Payload(K, "float32", ("up", "down", "dense")),
        learning_rate=0.02,
    )  # fmt: skip
    report, _ = device.round(
        whole, task, make_adapter(whole, K, parts=parts), side=make_adapter(spec, 3, seed=8),
        personal_weight=1.0,
    )  # fmt: skip
    losses = {s: loss_of(report, s, "trained") for s in ("slice", "personal")}
    assert abs(losses["slice"] - losses["personal"]) > 1e-3, "two adapters to tell apart"
    export_personal(device.home, whole, str(device.base_folder), tmp_path / "out")
    got = stock_loss(device, spec, task, tmp_path / "out")
    assert got == pytest.approx(losses["personal"], rel=1e-5)
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert (config["r"], config["modules_to_save"]) == (K + 3, ["model.norm"])


def test_what_is_of_no_use_is_said_in_a_sentence(spec: AdapterSpec, tmp_path: Path) -> None:
    home = tmp_path / "home"
    write_home(home, Home(residual=make_adapter(spec, spec.rank)), spec)
    assert own_adapter(home, spec) is None
    write_home(home, Home(alpha=16.0, personal=make_adapter(spec, 2)), spec)
    with pytest.raises(HomeError, match="belongs to run run"):
        own_adapter(home, replace(spec, seed=5))
    home.write_bytes(b"rot")
    with pytest.raises(HomeError, match="cannot be read"):
        own_adapter(home, spec)


def test_exporting_needs_no_torch(spec: AdapterSpec, tmp_path: Path) -> None:
    code = "import edge_agent.adapters, protos.export_forms, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_lora_b_carries_the_devices_own_scale(spec: AdapterSpec, tmp_path: Path) -> None:
    adapter = make_adapter(spec, 4)
    write_home(tmp_path / "home", Home(alpha=24.0, personal=adapter), spec)
    export_personal(tmp_path / "home", spec, "org/base", tmp_path / "out")
    tensors = load_file(tmp_path / "out/adapter_model.safetensors")
    name = spec.modules[0].name
    a, b = (tensors[f"base_model.model.{name}.lora_{x}.weight"] for x in "AB")
    assert a.dtype == b.dtype == np.float32
    got = spec.scale(4) * b @ a
    want = 24.0 / 4 * adapter[name]["up"].T @ adapter[name]["down"]
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)
