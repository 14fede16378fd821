"""What a base model is: dimensions from its config.json, its linear layers, its identity.

Reads JSON and file bytes only: no torch, so that the coordinator can plan for any model.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from profiles.compat import file_digest
from profiles.errors import MissingExtraError, SketchfleetError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

PLAIN_MLP_MODEL_TYPES = ("starcoder2",)
DECODERS = ("llama", "qwen2", "qwen3", "mistral", "starcoder2", "gemma", "gemma2")
ENCODERS = ("bert", "roberta")
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
    """Dimensions of a transformer, decoder or encoder, that decide memory, time and bytes."""

    model_type: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    tied_embeddings: bool
    positions: int = 0  # of learnt positions; 0: rotary ones, which take no weights
    labels: int = 0  # outputs of a classification head; 0: the next token, over the vocabulary

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ModelShape:
        """Reads a Hugging Face config.json. Raises `ModelError` on an unknown architecture."""
        kind = str(config.get("model_type", ""))
        if kind not in (*DECODERS, *ENCODERS):
            raise ModelError(
                f"model type {kind or 'unknown'!r} is not supported; use a decoder of type "
                f"{', '.join(DECODERS)}, or to classify an encoder of type {', '.join(ENCODERS)}"
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
                tied_embeddings=kind in ENCODERS or bool(config.get("tie_word_embeddings", False)),
                positions=int(config["max_position_embeddings"]) if kind in ENCODERS else 0,
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ModelError(
                f"config.json lacks a usable {error}; is it one of a transformer?"
            ) from error

    @property
    def encodes(self) -> bool:
        """Whether every token sees all others, so that the model predicts no next one."""
        return self.model_type in ENCODERS

    @property
    def gated(self) -> bool:
        """Whether the MLP has a gate (Llama, Qwen) or two matrices (StarCoder2, BERT)."""
        return self.model_type not in (*PLAIN_MLP_MODEL_TYPES, *ENCODERS)

    @property
    def outputs(self) -> int:
        """Width of what the output head gives."""
        return self.labels or self.vocabulary

    @property
    def kv_dim(self) -> int:
        """Width of the key and value projections."""
        return self.kv_heads * self.head_dim

    def linears(self) -> dict[str, tuple[str, int, int]]:
        """Projections of one layer: suffix -> (path in the layer, out_features, in_features)."""
        q = self.heads * self.head_dim
        h, i, kv = self.hidden, self.intermediate, self.kv_dim
        if self.encodes:
            return {
                "query": ("attention.self.query", q, h),
                "key": ("attention.self.key", kv, h),
                "value": ("attention.self.value", kv, h),
                "attention.output.dense": ("attention.output.dense", h, q),
                "intermediate.dense": ("intermediate.dense", i, h),
                "output.dense": ("output.dense", h, i),
            }
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
        if unknown := [t for t in targets if not self.adapted((t,))]:
            raise ModelError(
                f"target modules {', '.join(unknown)} do not exist in a {self.model_type} model; "
                f"choose from {', '.join(linears)}"
            )
        wanted = self.adapted(targets)
        stack = f"{self.model_type}.encoder.layer" if self.encodes else "model.layers"
        return tuple(
            ModuleShape(f"{stack}.{layer}.{path}", out, in_)
            for layer in range(self.layers)
            for suffix, (path, out, in_) in linears.items()
            if suffix in wanted
        )

    def adapted(self, targets: Sequence[str]) -> list[str]:
        """The projections that these targets name; all of them if there are none.

        As PEFT does, a target names what ends with it: "dense" the three of a BERT layer.
        """
        found = self.linears()
        if not targets:
            return list(found)
        return [name for name in found if any(f".{name}".endswith(f".{t}") for t in targets)]

    def head(self, labels: int) -> tuple[str, tuple[ModuleShape, ...]]:
        """The task head as transformers names it: its module, and its tensors as (out, in)."""
        h = self.hidden
        if self.model_type == "bert":
            return "classifier", _linear("classifier", labels, h)
        if self.model_type == "roberta":
            first = _linear("classifier.dense", h, h)
            return "classifier", (*first, *_linear("classifier.out_proj", labels, h))
        return "score", _linear("score", labels, h)[1:]

    @property
    def linear_parameters(self) -> int:
        """Weights in the projections: what quantisation shrinks."""
        return self.layers * sum(out * in_ for _, out, in_ in self.linears().values())

    @property
    def other_parameters(self) -> int:
        """Embeddings, output head if untied, norms."""
        tables = 1 if self.tied_embeddings or self.labels else 2
        rows = tables * self.vocabulary + self.positions + 2 * self.layers + 1
        return rows * self.hidden


def _linear(name: str, out_features: int, in_features: int) -> tuple[ModuleShape, ModuleShape]:
    """Bias, as a row, and weight of a linear layer, in the order of their names."""
    bias = ModuleShape(f"{name}.bias", 1, out_features)
    return bias, ModuleShape(f"{name}.weight", out_features, in_features)


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
            part = file_digest(stream)
        whole.update(f"{path.name}\0{part.hexdigest()}\n".encode())
    return whole.hexdigest()


def dense_tensors(folder: Path, names: Sequence[str]) -> tuple[ModuleShape, ...]:
    """Every weight of the named modules, as shapes; one-dimensional ones as (1, n).

    Raises `ModelError` on a module that has no weights of its own in the safetensors files, or
    weights of more than two dimensions.
    """
    tensors = stored_tensors(folder) if names else {}  # else nobody asks what the files hold
    shapes = {tensor: facts["shape"] for tensor, (_, facts, _) in tensors.items()}
    found = []
    for name in names:
        own = sorted(n for n in shapes if n.startswith(f"{name}."))
        if not own and (bare := _headless(name)):
            # A folder of the encoder alone, without a head, leaves the first part out.
            own = [n for n in shapes if n.startswith(f"{bare}.")]
            shapes |= {name + n.removeprefix(bare): shapes[n] for n in own}
            own = sorted(name + n.removeprefix(bare) for n in own)
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

    tensors = stored_tensors(folder)
    found = next((n for n in (name, _headless(name)) if n in tensors), None)
    if found is None:
        raise ModelError(f"{folder} holds no tensor {name}; is it the run's base?")
    path, facts, start = tensors[found]
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


def _headless(name: str) -> str:
    """A tensor's or module's name as files of an encoder without a head have it; "" if no such."""
    first, _, rest = name.partition(".")
    return rest if first in ENCODERS else ""


def stored_tensors(folder: Path) -> dict[str, tuple[Path, dict[str, Any], int]]:
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
