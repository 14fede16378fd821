"""The model that is shipped: a hundred prompts of real source, token by token as torch."""

from __future__ import annotations

import pytest

from benchmarks.inference import NANO, greedy_differences, train_adapter
from edge_agent.inference import Engine
from edge_agent.inference_adapter import read_peft, write_adapter
from edge_agent.training.backbone import load_base
from edge_agent.training.export import export_base
from profiles.model import base_digest


@pytest.mark.slow
def test_a_hundred_prompts_go_on_as_with_torch(tmp_path):
    import torch

    export_base(str(NANO), tmp_path / "float32", "float32")
    base = load_base(NANO, "fp32", torch.device("cpu"))
    peft = train_adapter(base, tmp_path / "peft", steps=10, seed=0)
    file = write_adapter(read_peft(peft), base_digest(NANO), tmp_path / "adapters")
    engine = Engine.open(tmp_path / "float32", threads=1)
    assert greedy_differences(base, engine, peft, file, 100) == []
