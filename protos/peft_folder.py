"""An adapter as a standard PEFT folder that `PeftModel.from_pretrained` loads.

Knows PEFT's file names and keys. It needs safetensors and no torch.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from profiles.errors import MissingExtraError
from protos.codecs import Values
from protos.contract import AdapterSpec
from protos.export_options import ExportError
from protos.head import starting_tensor
from protos.peft_config import adapter_config
from protos.whole_adapter import WholeAdapter, appearing

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
CARD_FILE = "README.md"
PREFIX = "base_model.model"


def write_peft(
    adapter: WholeAdapter, folder: Path, base_name: str, base_folder: Path | None = None
) -> Path:
    """Writes `folder` with adapter_config.json, adapter_model.safetensors and a model card.

    Weights are float32: lora_B (out, rank) and lora_A (rank, in). `base_name`: what users load as
    the base, a hub id or folder name. Tensors trained whole are added to the base's own in
    `base_folder` (PEFT's modules_to_save). The folder appears whole or not at all. Raises
    `ExportError` when it exists, `ModelError` when the base's own tensors are not there,
    `MissingExtraError` without safetensors.
    """
    try:
        from safetensors.numpy import save_file
    except ImportError as error:
        raise MissingExtraError("safetensors", "serve") from error
    spec = adapter.spec
    with appearing(folder) as part:
        save_file(
            _tensors(adapter, base_folder), part / WEIGHTS_FILE, metadata={"format": "pt"}
        )  # fmt: skip
        config = adapter_config(spec, adapter.rank, base_name)
        text = json.dumps(config, indent=2, sort_keys=True)
        (part / CONFIG_FILE).write_text(text + "\n")
        (part / CARD_FILE).write_text(_card(spec, adapter.rank, base_name))
    return folder


def _tensors(adapter: WholeAdapter, base_folder: Path | None) -> dict[str, Values]:
    tensors = {}
    for name, (up, down) in adapter.factors.items():
        tensors[f"{PREFIX}.{name}.lora_A.weight"] = np.ascontiguousarray(down, dtype=np.float32)
        tensors[f"{PREFIX}.{name}.lora_B.weight"] = np.ascontiguousarray(up.T, dtype=np.float32)
    for name, delta in adapter.dense.items():
        if base_folder is None:
            raise ExportError(f"{name} was trained whole; the base's own weights are needed")
        base = starting_tensor(adapter.spec, base_folder, name)
        tensors[f"{PREFIX}.{name}"] = base + delta.reshape(base.shape)
    return tensors


def _card(spec: AdapterSpec, rank: int, base_name: str) -> str:
    targets = sorted({m.name.rsplit(".", 1)[-1] for m in spec.modules})
    kind, options, told = "CausalLM", "", ""
    if spec.classification is not None:
        labels = spec.classification.labels
        kind, options = "SequenceClassification", f", num_labels={len(labels)}"
        told = f"\n| labels | {', '.join(f'{i}: {name}' for i, name in enumerate(labels))} |"
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
| modules | {", ".join(targets)} ({len(spec.modules)} layers) |{told}

```python
from peft import PeftModel
from transformers import AutoModelFor{kind}

base = AutoModelFor{kind}.from_pretrained("{base_name}"{options})
model = PeftModel.from_pretrained(base, "<this folder>")
```
"""
