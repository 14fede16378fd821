"""What a decoder model is: dimensions from its config.json, its linear layers, its identity.

Reads JSON and file bytes only: no torch, so that the coordinator can plan for any model.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from profiles.errors import MissingExtraError, SketchfleetError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

PLAIN_MLP_MODEL_TYPES = ("starcoder2",)
KNOWN_MODEL_TYPES = ("llama", "qwen2", "qwen3", "mistral", "starcoder2", "gemma", "gemma2")
BASE_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "*.safetensors")


class ModelError(SketchfleetError):
    """A base model cannot be found, read, or used."""


@dataclass(frozen=True)
class ModuleShape:
    """One adapted linear layer: W is (out_features, in_features)."""

    name: str  # as transformers names it: "model.layers.0.self_attn.q_proj"
    out_features: int
    in_features: int


@dataclass(frozen=True)
class ModelShape:
    """Dimensions of a decoder-only transformer that decide memory, time and bytes."""

    model_type: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    tied_embeddings: bool

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ModelShape:
        """Reads a Hugging Face config.json. Raises `ModelError` on an unknown architecture."""
        kind = str(config.get("model_type", ""))
        if kind not in KNOWN_MODEL_TYPES:
            raise ModelError(
                f"model type {kind or 'unknown'!r} is not supported; use a decoder of type "
                f"{', '.join(KNOWN_MODEL_TYPES)}"
            )
        try:
            heads = int(config["num_attention_heads"])
            hidden = int(config["hidden_size"])
            return cls(
                model_type=kind,
                hidden=hidden,
                layers=int(config["num_hidden_layers"]),
                heads=heads,
                kv_heads=int(config.get("num_key_value_heads") or heads),
                head_dim=int(config.get("head_dim") or hidden // heads),
                intermediate=int(config["intermediate_size"]),
                vocabulary=int(config["vocab_size"]),
                tied_embeddings=bool(config.get("tie_word_embeddings", False)),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ModelError(f"config.json lacks a usable {error}; is it a decoder?") from error

    @property
    def gated(self) -> bool:
        """Whether the MLP has a gate (Llama, Qwen) or two matrices (StarCoder2)."""
        return self.model_type not in PLAIN_MLP_MODEL_TYPES

    @property
    def kv_dim(self) -> int:
        """Width of the key and value projections."""
        return self.kv_heads * self.head_dim

    def linears(self) -> dict[str, tuple[str, int, int]]:
        """Projections of one layer: suffix -> (path in the layer, out_features, in_features)."""
        q = self.heads * self.head_dim
        h, i, kv = self.hidden, self.intermediate, self.kv_dim
        found = {
            "q_proj": ("self_attn.q_proj", q, h),
            "k_proj": ("self_attn.k_proj", kv, h),
            "v_proj": ("self_attn.v_proj", kv, h),
            "o_proj": ("self_attn.o_proj", h, q),
        }
        if self.gated:
            found |= {
                "gate_proj": ("mlp.gate_proj", i, h),
                "up_proj": ("mlp.up_proj", i, h),
                "down_proj": ("mlp.down_proj", h, i),
            }
        else:
            found |= {"c_fc": ("mlp.c_fc", i, h), "c_proj": ("mlp.c_proj", h, i)}
        return found

    def modules(self, targets: Sequence[str]) -> tuple[ModuleShape, ...]:
        """Adapted layers in wire order (layer by layer). Empty `targets` means all linears.

        Raises `ModelError` on a target that this architecture does not have.
        """
        linears = self.linears()
        wanted = list(targets) or list(linears)
        if unknown := [t for t in wanted if t not in linears]:
            raise ModelError(
                f"target modules {', '.join(unknown)} do not exist in a {self.model_type} model; "
                f"choose from {', '.join(linears)}"
            )
        return tuple(
            ModuleShape(f"model.layers.{layer}.{path}", out, in_)
            for layer in range(self.layers)
            for suffix, (path, out, in_) in linears.items()
            if suffix in wanted
        )

    @property
    def linear_parameters(self) -> int:
        """Weights in the projections: what quantisation shrinks."""
        return self.layers * sum(out * in_ for _, out, in_ in self.linears().values())

    @property
    def other_parameters(self) -> int:
        """Embeddings, output head if untied, norms."""
        tables = 1 if self.tied_embeddings else 2
        return tables * self.vocabulary * self.hidden + (2 * self.layers + 1) * self.hidden


def resolve_base(base: str, revision: str | None = None) -> Path:
    """The local folder of a base model: a folder as it is, anything else from the hub's cache.

    Raises `ModelError` when neither exists, `MissingExtraError` without huggingface_hub.
    """
    folder = Path(base).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelError(f"{folder} has no config.json; point at a Hugging Face model folder")
        return folder
    if base.startswith((".", "/", "~")) or base.count("/") != 1:
        raise ModelError(f"base model folder {folder} does not exist; check [model] base")
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise MissingExtraError("huggingface_hub", "train") from error
    try:
        return Path(snapshot_download(base, revision=revision, allow_patterns=list(BASE_FILES)))
    except Exception as error:  # the hub client raises many unrelated types when offline
        raise ModelError(
            f"base model {base!r} is neither a local folder nor to be had from the hub "
            f"({type(error).__name__}); check the name and the connection"
        ) from error


def base_digest(folder: Path) -> str:
    """SHA-256 (hex) over names and contents of config, tokenizer and weights of a base model."""
    whole = hashlib.sha256()
    files = sorted({p for pattern in BASE_FILES for p in folder.glob(pattern)})
    if not any(p.suffix == ".safetensors" for p in files):
        raise ModelError(f"{folder} has no .safetensors weights; pickled weights are not loaded")
    for path in files:
        with path.open("rb") as stream:
            part = hashlib.file_digest(stream, "sha256")
        whole.update(f"{path.name}\0{part.hexdigest()}\n".encode())
    return whole.hexdigest()


def dense_tensors(folder: Path, names: Sequence[str]) -> tuple[ModuleShape, ...]:
    """Every weight of the named modules, as shapes; one-dimensional ones as (1, n).

    Raises `ModelError` on a module that has no weights of its own in the safetensors files, or
    weights of more than two dimensions.
    """
    tensors = _tensors(folder) if names else {}  # else nobody asks what the files hold
    shapes = {tensor: facts["shape"] for tensor, (_, facts, _) in tensors.items()}
    found = []
    for name in names:
        own = sorted(n for n in shapes if n.startswith(f"{name}."))
        if not own:
            raise ModelError(
                f"[model] modules_to_save names {name!r}, which has no weights of its own in "
                f"{folder}; give a module's whole name, for example model.norm (an output head "
                "that is tied to the embeddings has none)"
            )
        for tensor in own:
            shape = shapes[tensor]
            if len(shape) not in (1, 2):
                raise ModelError(f"{tensor} has shape {shape}; only vectors and matrices travel")
            found.append(ModuleShape(tensor, *([1] * (2 - len(shape))), *shape))
    return tuple(found)


def base_tensor(folder: Path, name: str) -> NDArray[np.float32]:
    """One weight of a base model, float32. Raises `ModelError`."""
    import numpy as np

    tensors = _tensors(folder)
    if name not in tensors:
        raise ModelError(f"{folder} holds no tensor {name}; is it the run's base?")
    path, facts, start = tensors[name]
    first, end = facts["data_offsets"]
    with path.open("rb") as stream:
        stream.seek(start + first)
        data = stream.read(end - first)
    match facts["dtype"]:
        case "F32" | "F16" as kind:
            values = np.frombuffer(data, "<f4" if kind == "F32" else "<f2").astype(np.float32)
        case "BF16":  # the upper half of a float32
            values = (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
        case kind:
            raise ModelError(f"{name} is {kind}; only F32, F16 and BF16 weights can be added to")
    return values.reshape(facts["shape"])


def _tensors(folder: Path) -> dict[str, tuple[Path, dict[str, Any], int]]:
    """(file, its entry in the header, where data begins) of every tensor of a base."""
    found: dict[str, tuple[Path, dict[str, Any], int]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with path.open("rb") as stream:
                length = int.from_bytes(stream.read(8), "little")
                if length > path.stat().st_size:
                    raise ValueError(f"its header would have {length:,} bytes")
                header = json.loads(stream.read(length))
            if not isinstance(header, dict):
                raise TypeError("its header is no JSON object")
        except (OSError, ValueError, TypeError) as error:
            raise ModelError(f"{path} is no safetensors file: {error}") from error
        header.pop("__metadata__", None)
        found |= {name: (path, facts, 8 + length) for name, facts in header.items()}
    return found


def read_shape(folder: Path) -> ModelShape:
    """Dimensions of the model in this folder. Raises `ModelError` on unreadable config.json."""
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder / 'config.json'} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise ModelError(f"{folder / 'config.json'} cannot be read: it holds no JSON object")
    return ModelShape.from_config(config)
