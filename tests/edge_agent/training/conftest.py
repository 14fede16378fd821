"""A tiny random Llama with a byte-level tokenizer, and a folder of synthetic code."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from edge_agent.training.workbench import Workbench
from profiles.model import base_digest, read_shape
from protos.contract import AdapterSpec
from tests.edge_agent.training.rounds import Device
from tests.tiny_base import write_base

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base"), hidden=64, intermediate=128)


@pytest.fixture(scope="session")
def spec(base_folder: Path) -> AdapterSpec:
    return AdapterSpec(
        run_id="run",
        base="tiny",
        base_revision="",
        base_digest=base_digest(base_folder),
        rank=8,
        alpha=16.0,
        use_rslora=False,
        seed=1,
        modules=read_shape(base_folder).modules(()),
    )


@pytest.fixture(scope="session")
def bench() -> Workbench:
    """One warm workbench: tests that need another precision come back to fp32 by a reload."""
    return Workbench(torch.device("cpu"))


@pytest.fixture(scope="session")
def code_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("code")
    for i in range(40):
        body = "\n".join(f"    total += values[{j}] * {i}" for j in range(12))
        text = f"def weigh_{i}(values):\n    total = {i}\n{body}\n    return total\n"
        (folder / f"weigh_{i}.py").write_text(text)
    (folder / "notes.json").write_text(json.dumps({"not": "code"}))
    return folder


@pytest.fixture
def device(tmp_path: Path, base_folder: Path, code_folder: Path, bench: Workbench) -> Device:
    return Device(tmp_path, base_folder, code_folder, bench)
