"""A device's own adapter, out of its home, as a standard PEFT folder.

Knows PEFT's file names and keys. It needs no torch, and writes nothing but the folder.
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

from edge_agent.training.home import Home, HomeError, load_home
from profiles.errors import MissingExtraError
from profiles.model import resolve_base
from protos.codecs import Values
from protos.contract import AdapterSpec
from protos.head import starting_tensor
from protos.layout import Parts
from protos.peft_config import adapter_config

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
PREFIX = "base_model.model"


def export_personal(home_path: Path, spec: AdapterSpec, base_name: str, folder: Path) -> Path:
    """Writes `folder` with adapter_config.json and adapter_model.safetensors.

    Ditto's adapter if the home holds one, else the slice as last trained with its personal parts;
    a branch that it was trained beside becomes further rows, and tensors trained whole are added
    to the base's own. `base_name`: what users load as the base, a hub id or folder name. The
    folder appears whole or not at all. Raises `HomeError` when there is nothing to export or the
    folder exists, `ModelError` when the base's own tensors are needed and not there,
    `MissingExtraError` without safetensors.
    """
    home = load_home(home_path, spec)
    adapter = home.personal or home.slice
    if not adapter:
        raise HomeError(
            f"this device keeps no adapter of its own for run {spec.run_id}; methods with personal "
            "parts and [personal] ditto leave one"
        )
    try:
        from safetensors.numpy import save_file
    except ImportError as error:
        raise MissingExtraError("safetensors", "train") from error
    if folder.exists():
        raise HomeError(f"{folder} already exists; name a new folder or remove it first")
    tensors = _factors(spec, adapter, home) | _whole_tensors(spec, adapter, base_name)
    rank = len(tensors[f"{PREFIX}.{spec.modules[0].name}.lora_A.weight"])
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    except OSError as error:
        raise HomeError(f"{folder} cannot be made ({error.strerror}); choose another") from error
    try:
        save_file(tensors, part / WEIGHTS_FILE, metadata={"format": "pt"})
        config = json.dumps(adapter_config(spec, rank, base_name), indent=2, sort_keys=True)
        (part / CONFIG_FILE).write_text(config + "\n")
        part.chmod(0o755)  # temporary folders are for their owner only
        part.rename(folder)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    return folder


def _factors(spec: AdapterSpec, adapter: Mapping[str, Parts], home: Home) -> dict[str, Values]:
    """lora_A (k, in) and lora_B (out, k) of every module, all scales in B."""
    tensors: dict[str, Values] = {}
    for module in spec.modules:
        parts = adapter[module.name]
        up, down = parts["up"].astype(np.float64), parts["down"]
        if "core" in parts:  # up' core down = (core' up)' down
            up = parts["core"].T.astype(np.float64) @ up
        up *= home.alpha / spec.divisor(len(down))
        if side := home.side.get(module.name):
            up = np.concatenate([up, side["up"]])
            down = np.concatenate([down, side["down"]])
        up *= spec.divisor(len(down)) / spec.alpha
        tensors[f"{PREFIX}.{module.name}.lora_A.weight"] = np.ascontiguousarray(down)
        tensors[f"{PREFIX}.{module.name}.lora_B.weight"] = _float32(up.T)
    return tensors


def _whole_tensors(
    spec: AdapterSpec, adapter: Mapping[str, Parts], base_name: str
) -> dict[str, Values]:
    """The dense tensors as they are after training; PEFT keeps no differences."""
    if not spec.dense:
        return {}
    base = resolve_base(base_name, spec.base_revision or None)
    tensors = {}
    for tensor in spec.dense:
        weight = starting_tensor(spec, base, tensor.name)
        delta = adapter[tensor.name]["dense"].reshape(weight.shape)
        tensors[f"{PREFIX}.{tensor.name}"] = _float32(weight + delta)
    return tensors


def _float32(values: NDArray[Any]) -> Values:
    return np.ascontiguousarray(values, dtype=np.float32)
