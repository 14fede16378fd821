"""An adapter as a GGUF file that llama.cpp puts beside a base it serves (`--lora FILE`).

Knows llama.cpp's names of tensors and in which order it keeps the rows of queries and keys. The
delta of a tensor is alpha / rank * lora_b @ lora_a there, with lora_a (rank, in) and lora_b
(out, rank); rsLoRA's scale goes into alpha. Needs the package gguf and no torch.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from profiles.errors import MissingExtraError
from profiles.model import ModelShape
from protos.codecs import Values
from protos.export_options import ExportError
from protos.whole_adapter import WholeAdapter, require_text_model

# model_type -> (llama.cpp's architecture, whether it keeps pairs of rotated rows side by side).
ARCHITECTURES: dict[str, tuple[str, bool]] = {
    "llama": ("LLAMA", True),
    "mistral": ("LLAMA", True),
    "qwen2": ("QWEN2", False),
    "qwen3": ("QWEN3", False),
    "starcoder2": ("STARCODER2", False),
    "gemma": ("GEMMA", False),
    "gemma2": ("GEMMA2", False),
}


def write_gguf(adapter: WholeAdapter, shape: ModelShape, path: Path) -> Path:
    """Writes `path` in float32; `shape`: the base's. It appears whole or not at all.

    Raises `ExportError` when it is there already or the run has what GGUF adapters cannot hold,
    `MissingExtraError` without the package gguf.
    """
    try:
        import gguf
    except ImportError as error:
        raise MissingExtraError("gguf", "gguf") from error
    spec = adapter.spec
    require_text_model(spec, "a GGUF adapter")
    if adapter.dense:
        raise ExportError(
            f"run {spec.run_id} trained {min(adapter.dense)} whole, which llama.cpp takes from no "
            "adapter; export the merged model and convert that"
        )
    if shape.model_type not in ARCHITECTURES:
        raise ExportError(
            f"llama.cpp's names for a {shape.model_type} model are not known here; export a merged "
            "folder"
        )
    if path.exists():
        raise ExportError(f"{path} already exists; name a new file or remove it first")
    kind, paired = ARCHITECTURES[shape.model_type]
    architecture = getattr(gguf.MODEL_ARCH, kind)
    names = gguf.get_tensor_name_map(architecture, shape.layers)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        place = tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise ExportError(f"{path} cannot be made ({error.strerror}); choose another") from error
    with place as folder:
        part = Path(folder) / path.name
        writer: Any = gguf.GGUFWriter(part, gguf.MODEL_ARCH_NAMES[architecture])
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, adapter.scale * adapter.rank)
        writer.add_name(spec.run_id)
        writer.add_string("sketchfleet.base_digest", spec.base_digest)
        if adapter.round is not None:
            writer.add_uint32("sketchfleet.rounds", adapter.round)
        for module, (up, down) in adapter.factors.items():
            name = names.get_name(f"{module}.weight", try_suffixes=(".weight",))
            if name is None:
                raise ExportError(
                    f"llama.cpp has no tensor for {module}; export a merged folder instead"
                )
            rows = _as_rotated(module, up.T, shape) if paired else up.T
            writer.add_tensor(f"{name}.lora_a", np.ascontiguousarray(down, dtype=np.float32))
            writer.add_tensor(f"{name}.lora_b", np.ascontiguousarray(rows, dtype=np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        part.rename(path)
    return path


def _as_rotated(module: str, rows: Values, shape: ModelShape) -> Values:
    """The rows (out, rank) of a query or key projection in llama.cpp's order, others as they are.

    Rotary embeddings turn pairs of rows. transformers keeps the halves of all pairs of a head one
    after the other, i beside i + d / 2; llama.cpp's Llama keeps a pair at 2i and 2i + 1.
    """
    heads = {"q_proj": shape.heads, "k_proj": shape.kv_heads}.get(module.rpartition(".")[2])
    if heads is None:
        return rows
    halves = rows.reshape(heads, 2, shape.head_dim // 2, rows.shape[1])
    return halves.transpose(0, 2, 1, 3).reshape(rows.shape)
