"""The trained adapter as a standard PEFT folder that `PeftModel.from_pretrained` loads.

Knows PEFT's file names and keys. It needs no torch. A branch beside the base
becomes further rows of the adapter.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from coordinator.config import RunConfig
from coordinator.lowrank import Bundle, stack
from coordinator.methods import Method
from coordinator.state import StateFile, StateReader
from coordinator.store.blobs import BlobStore
from coordinator.store.rows import RunRecord
from profiles.errors import MissingExtraError, SketchfleetError
from profiles.model import resolve_base
from protos.contract import AdapterSpec, BlobRef
from protos.head import starting_tensor
from protos.peft_config import adapter_config

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
CARD_FILE = "README.md"


class ExportError(SketchfleetError):
    """The adapter cannot be written as a PEFT folder."""


def export_run(
    run: RunRecord, files: Mapping[str, BlobRef], blobs: BlobStore, folder: Path
) -> Path:
    """Writes one version of a run's model as a PEFT folder. Raises `ExportError`, `ModelError`."""
    spec = run.spec
    method = RunConfig.model_validate(run.config).make_method()
    reader = StateReader(
        spec, {role: StateFile(blobs.path(b.digest), b.payload) for role, b in files.items()}
    )
    adapter, dense = global_adapter(spec, method, reader)
    base = resolve_base(spec.base, spec.base_revision or None) if dense else None
    return export_peft(spec, adapter, folder, spec.base, dense, base)


def global_adapter(
    spec: AdapterSpec, method: Method, model: StateReader
) -> tuple[dict[str, Bundle], dict[str, NDArray[np.float32]]]:
    """(one bundle per module, branch included; differences of the dense tensors) of a model.

    Raises `ExportError` for a method whose model is partly at home.
    """
    if not method.has_global:
        raise ExportError(
            f"{method.name} keeps {', '.join(method.personal)} on the devices, so there is no "
            "adapter for all; export each device's own with `sketchfleet-agent export`"
        )
    adapter = {}
    for module in spec.modules:
        state = model.module(module.name)
        whole = state.product
        adapter[module.name] = whole if state.side is None else stack([whole, state.side], [1, 1])
    return adapter, {t.name: model.dense(t.name)[0] for t in spec.dense}


def export_peft(
    spec: AdapterSpec,
    adapter: Mapping[str, Bundle],
    folder: Path,
    base_name: str,
    dense: Mapping[str, NDArray[np.float32]] | None = None,
    base_folder: Path | None = None,
) -> Path:
    """Writes `folder` with adapter_config.json, adapter_model.safetensors and a model card.

    `adapter`: one bundle per module of the spec, all of one rank r: up (r, out), down (r, in);
    weights are written float32 as lora_B (out, r) and lora_A (r, in). `base_name`: what users
    load as the base, a hub id or folder name. `dense`: differences of tensors trained whole, added
    to the base's own in `base_folder` (PEFT's modules_to_save). The folder appears
    whole or not at all. Raises
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
        tensors = _tensors(spec, adapter, rank)
        for name, delta in (dense or {}).items():
            if base_folder is None:
                raise ExportError(f"{name} was trained whole; the base's own weights are needed")
            base = starting_tensor(spec, base_folder, name)
            tensors[f"base_model.model.{name}"] = base + delta.reshape(base.shape)
        save_file(tensors, part / WEIGHTS_FILE, metadata={"format": "pt"})
        config = json.dumps(adapter_config(spec, rank, base_name), indent=2, sort_keys=True)
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
