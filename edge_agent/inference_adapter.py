"""Adapters as files of ONNX Runtime: written out of what a round leaves, loaded without a copy.

A file holds `MODULE.down` (in, r) and `MODULE.up` (r, out) float32 for the modules that the adapter
changes, all scales in up; the others keep the graph's own factors of rank 0. Its name is the
digest of what it holds; the base's digest is inside. Knows onnxruntime's format and no requests.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_agent.inference_folder import ExportInfo, InferenceError
from edge_agent.inference_session import Adapter, onnxruntime
from profiles.model import ModelError, base_tensor, stored_tensors
from protos.transfer import make_folder, move_durably
from protos.whole_adapter import WholeAdapter

SUFFIX = ".onnx_adapter"
FORMAT = 1
PEFT_CONFIG = "adapter_config.json"
PEFT_PREFIX = "base_model.model."

Factors = Mapping[str, tuple[NDArray[np.float32], NDArray[np.float32]]]
"""Module -> up (r, out), down (r, in), whose product is all that is added to its weights."""


def write_whole(adapter: WholeAdapter, folder: Path) -> Path:
    """Writes a run's adapter into `folder`; returns the file. What is there already is kept.

    Raises `InferenceError` when the run also trains tensors whole, which only the base could hold.
    """
    if adapter.dense:
        raise InferenceError(
            f"run {adapter.spec.run_id} trains {min(adapter.dense)} whole, which cannot be swapped "
            "in; export a merged folder and export-base that"
        )
    if adapter.spec.classification is not None:
        raise InferenceError(f"run {adapter.spec.run_id} trains a classifier, which writes no text")
    scale = np.float32(adapter.scale)
    factors = {name: (up * scale, down) for name, (up, down) in adapter.factors.items()}
    return write_adapter(factors, adapter.spec.base_digest, folder)


def write_adapter(factors: Factors, base_digest: str, folder: Path) -> Path:
    """Writes `folder`/DIGEST.onnx_adapter, whole or not at all; what is there already is kept."""
    turned = {}
    for name, (up, down) in sorted(factors.items()):
        turned[f"{name}.down"] = np.ascontiguousarray(down.T, dtype=np.float32)
        turned[f"{name}.up"] = np.ascontiguousarray(up, dtype=np.float32)
    digest = hashlib.sha256(f"{FORMAT} {base_digest}\n".encode())
    for name, values in turned.items():
        digest.update(f"{name} {values.shape}\n".encode())
        digest.update(values.data)
    path = folder / f"{digest.hexdigest()}{SUFFIX}"
    if path.is_file():
        return path
    runtime = onnxruntime()
    file = runtime.AdapterFormat()
    file.set_adapter_version(FORMAT)
    file.set_model_version(_version_of(base_digest))
    make = runtime.OrtValue.ortvalue_from_numpy
    file.set_parameters({name: make(values) for name, values in turned.items()})
    make_folder(folder)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        file.export_adapter(str(part))
        move_durably(part, path)
    finally:
        part.unlink(missing_ok=True)
    return path


def read_peft(folder: Path) -> Factors:
    """The factors of a PEFT folder. Raises `InferenceError` on one that is no plain LoRA."""
    try:
        config = json.loads((folder / PEFT_CONFIG).read_text())
        tensors = stored_tensors(folder)
    except FileNotFoundError as error:
        raise InferenceError(f"{folder} is not a PEFT folder; it has no {PEFT_CONFIG}") from error
    except (OSError, ValueError, ModelError) as error:
        raise InferenceError(f"{folder} cannot be read as a PEFT folder: {error}") from error
    for key in ("use_dora", "modules_to_save", "rank_pattern", "alpha_pattern", "fan_in_fan_out"):
        if config.get(key):
            raise InferenceError(f"{folder} has {key}, which cannot be swapped in; use plain LoRA")
    divisor = math.sqrt if config.get("use_rslora") else float
    scale = np.float32(config["lora_alpha"] / divisor(config["r"]))
    downs = [name for name in tensors if name.endswith(".lora_A.weight")]
    if len(tensors) != 2 * len(downs) or not downs:
        raise InferenceError(f"{folder} holds other tensors than lora_A and lora_B; use plain LoRA")
    found = {}
    for name in downs:
        up = base_tensor(folder, name.replace(".lora_A.", ".lora_B."))  # (out, r)
        module = name.removeprefix(PEFT_PREFIX).removesuffix(".lora_A.weight")
        found[module] = (up.T * scale, base_tensor(folder, name))
    return found


def load_adapter(path: Path, info: ExportInfo) -> Adapter:
    """An adapter that fits this export. Raises `InferenceError` when it does not, or is damaged."""
    runtime = onnxruntime()
    try:
        file = runtime.AdapterFormat.read_adapter(str(path))
        shapes = {name: tuple(value.shape()) for name, value in file.get_parameters().items()}
    except Exception as error:  # onnxruntime raises many types of its own
        raise InferenceError(
            f"{path} is no adapter file or damaged; write it anew from the round's adapter"
        ) from error
    if file.get_adapter_version() != FORMAT:
        raise InferenceError(f"{path} has another format than {FORMAT}; write it anew")
    if file.get_model_version() != _version_of(info.base_digest):
        raise InferenceError(
            f"{path} belongs to another base than {info.base} ({info.base_digest[:12]}); export "
            "the base of its run"
        )
    _require_shapes(shapes, info, path)
    factors: Any = runtime.LoraAdapter()
    factors.Load(str(path))
    return Adapter(path.stem, factors)


def _require_shapes(shapes: Mapping[str, tuple[int, ...]], info: ExportInfo, path: Path) -> None:
    """Every module whole, of one rank, and none that the graph lacks. Raises `InferenceError`."""
    left = dict(shapes)
    for module in info.modules:
        down, up = left.pop(f"{module.name}.down", None), left.pop(f"{module.name}.up", None)
        if down is None and up is None:
            continue
        rank = down[-1] if down else 0
        if (down, up) != ((module.in_features, rank), (rank, module.out_features)):
            raise InferenceError(
                f"{path}: factors of {module.name} are {down} and {up}, its layer is "
                f"{module.in_features} to {module.out_features}; it is of another base"
            )
    if left:
        raise InferenceError(f"{path} adapts {min(left)}, which the exported base does not have")


def _version_of(base_digest: str) -> int:
    """What stands for the base in the file's one field for it, an int32."""
    return int(base_digest[:7], 16)
