"""The trained adapter as a standard PEFT folder that `PeftModel.from_pretrained` loads.

Knows PEFT's file names and keys. It needs no torch, and knows nothing of runs or stores: the
adapter comes in as bundles.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coordinator.lowrank import Bundle
from profiles.errors import MissingExtraError, SketchfleetError
from protos.contract import AdapterSpec

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
CARD_FILE = "README.md"


class ExportError(SketchfleetError):
    """The adapter cannot be written as a PEFT folder."""


def export_peft(
    spec: AdapterSpec, adapter: Mapping[str, Bundle], folder: Path, base_name: str
) -> Path:
    """Writes `folder` with adapter_config.json, adapter_model.safetensors and a model card.

    `adapter`: one bundle per module of the spec, all of one rank r: up (r, out), down (r, in);
    weights are written float32 as lora_B (out, r) and lora_A (r, in). `base_name`: what users
    load as the base, a hub id or folder name. The folder appears whole or not at all. Raises
    `ExportError` when it exists or the adapter does not fit the spec.
    """
    try:
        from safetensors.numpy import save_file
    except ImportError as error:
        raise MissingExtraError("safetensors", "coordinator") from error
    if folder.exists():
        raise ExportError(f"{folder} already exists; name a new folder or remove it first")
    rank = _common_rank(spec, adapter)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    except OSError as error:
        raise ExportError(
            f"{folder} cannot be made ({error.strerror}); choose another place"
        ) from error
    try:
        save_file(_tensors(spec, adapter, rank), part / WEIGHTS_FILE, metadata={"format": "pt"})
        config = json.dumps(_config(spec, rank, base_name), indent=2, sort_keys=True)
        (part / CONFIG_FILE).write_text(config + "\n")
        (part / CARD_FILE).write_text(_card(spec, rank, base_name))
        part.chmod(0o755)  # temporary folders are for their owner only
        part.rename(folder)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    return folder


def _common_rank(spec: AdapterSpec, adapter: Mapping[str, Bundle]) -> int:
    """The rank all bundles share. Raises `ExportError`."""
    named = {m.name for m in spec.modules}
    if odd := sorted(named ^ adapter.keys()):
        raise ExportError(
            f"adapter and run differ in {len(odd)} modules, first {odd[0]}; export with its own run"
        )
    ranks = {adapter[name].up.shape[0] for name in named}
    if len(ranks) != 1:
        raise ExportError(f"modules have ranks {sorted(ranks)}; truncate them to one rank first")
    rank = int(ranks.pop())
    for m in spec.modules:
        got = (adapter[m.name].up.shape, adapter[m.name].down.shape)
        want = ((rank, m.out_features), (rank, m.in_features))
        if got != want:
            raise ExportError(f"{m.name} has factors of shape {got}, the run says {want}")
    return rank


def _tensors(
    spec: AdapterSpec, adapter: Mapping[str, Bundle], rank: int
) -> dict[str, NDArray[np.float32]]:
    tensors = {}
    for m in spec.modules:
        bundle = adapter[m.name]
        # PEFT derives one scale from the config; a bundle with another carries the rest in B.
        rest = bundle.scale / spec.scale(rank)
        up = bundle.up if rest == 1.0 else bundle.up * rest
        key = f"base_model.model.{m.name}"
        tensors[f"{key}.lora_A.weight"] = np.ascontiguousarray(bundle.down, dtype=np.float32)
        tensors[f"{key}.lora_B.weight"] = np.ascontiguousarray(up.T, dtype=np.float32)
    return tensors


def _config(spec: AdapterSpec, rank: int, base_name: str) -> dict[str, Any]:
    return {
        "base_model_name_or_path": base_name,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": spec.device_alpha(rank),
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "revision": spec.base_revision or None,
        "target_modules": [m.name for m in spec.modules],
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": spec.use_rslora,
    }


def _card(spec: AdapterSpec, rank: int, base_name: str) -> str:
    targets = sorted({m.name.rsplit(".", 1)[-1] for m in spec.modules})
    return f"""---
base_model: {json.dumps(base_name)}
library_name: peft
tags: [lora, federated-learning, code]
---

# LoRA adapter of run {spec.run_id}

Trained by Sketchfleet on code that never left the devices it lives on.

| | |
|---|---|
| base | {base_name} {spec.base_revision} |
| base digest (SHA-256) | `{spec.base_digest}` |
| rank, alpha | {rank}, {spec.alpha:g}{" (rsLoRA)" if spec.use_rslora else ""} |
| modules | {", ".join(targets)} ({len(spec.modules)} layers) |

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained("{base_name}")
model = PeftModel.from_pretrained(base, "<this folder>")
```
"""
