"""A base with an adapter added into its weights: a model folder that needs neither PEFT nor us.

Knows the safetensors format, which is a JSON header before raw values, and streams it a block of
rows at a time, so that memory stays at one tensor's factors. Sums are float64 and rounded once, to
the base's own floating-point type or the one asked for. Weights of fewer bits are refused: most
of an update is smaller than half a step of theirs and would be rounded away.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from profiles.model import base_digest, stored_tensors
from protos.codecs import CODECS, Values
from protos.export_options import ExportError, Precision
from protos.whole_adapter import WholeAdapter, appearing, require_text_model

KINDS: dict[Precision, str] = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
BYTES = {"F32": 4, "BF16": 2, "F16": 2}
KEPT = ("*.json", "*.txt", "*.model", "*.jinja", "LICENSE*", "NOTICE*")  # beside the weights
INDEX = "model.safetensors.index.json"
EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"
BLOCK_VALUES = 1 << 22  # of a tensor in memory at once: 32 MiB of float64

Change = Callable[[slice], NDArray[np.float64]]
"""What is added to some rows of a tensor: (rows, columns)."""


@dataclass
class Merge:
    """What rounding to the folder's type left of the update: sums of squares."""

    tensors: int = 0
    changed: float = 0.0  # of all that was added
    lost: float = 0.0  # of what came out otherwise

    @property
    def lost_share(self) -> float:
        """Between 0 and about 1."""
        return self.lost / self.changed if self.changed else 0.0


@dataclass(frozen=True)
class _Tensor:
    """A tensor of the base on its way: where it lies, and what it becomes."""

    name: str
    path: Path
    start: int  # of its values in the file
    stored: str  # its type there, as safetensors calls it
    stored_bytes: int
    shape: tuple[int, ...]
    kind: str  # its type in the new folder
    change: Change | None = field(default=None, compare=False)

    @property
    def rows(self) -> int:
        """A vector is one row."""
        return self.shape[0] if len(self.shape) > 1 else 1

    @property
    def columns(self) -> int:
        """Values of a row."""
        return int(np.prod(self.shape, dtype=np.int64)) // max(1, self.rows)

    @property
    def row_bytes(self) -> int:
        """Of a row in the new folder."""
        if self.kind == self.stored:  # copied, whatever it is
            return self.stored_bytes // max(1, self.rows)
        return self.columns * BYTES[self.kind]


def write_merged(
    adapter: WholeAdapter, base_folder: Path, folder: Path, base_name: str,
    precision: Precision | None = None,
) -> Merge:  # fmt: skip
    """Writes `folder`: weights, configuration and tokenizer of the base with the adapter added.

    precision: of all weights; None keeps the base's. The folder appears whole or not at all.
    Raises `ExportError` when it exists, the base is quantised or another one, or the run trains a
    classifier; `ModelError` on a base that cannot be read.
    """
    spec = adapter.spec
    require_text_model(spec, "a merged folder")
    config = json.loads((base_folder / "config.json").read_text())
    if "quantization_config" in config:
        raise ExportError(
            f"{base_folder} holds quantised weights, which would round the update away; name the "
            "full-precision original with --base"
        )
    if base_digest(base_folder) != spec.base_digest:
        raise ExportError(
            f"{base_folder} is another base than run {spec.run_id} was trained on (SHA-256 "
            f"{spec.base_digest[:12]}); name that one with --base"
        )
    untied = EMBEDDINGS in adapter.dense and bool(config.get("tie_word_embeddings"))
    files = _planned(adapter, base_folder, precision, untied)
    merge = Merge()
    with appearing(folder) as part:
        for pattern in KEPT:
            for path in base_folder.glob(pattern):
                if path.name != INDEX:
                    shutil.copyfile(path, part / path.name)
        for name, tensors in files.items():
            with (part / name).open("wb") as out:
                out.write(_header(tensors))
                for tensor in tensors:
                    _write(out, tensor, merge)
        if len(files) > 1:
            (part / INDEX).write_text(_index(files))
        if precision is not None:
            config["dtype" if "torch_dtype" not in config else "torch_dtype"] = precision
        if untied:
            config["tie_word_embeddings"] = False
        (part / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        (part / "README.md").write_text(_card(adapter, base_name, precision, merge))
    return merge


def _planned(
    adapter: WholeAdapter, base: Path, precision: Precision | None, untied: bool
) -> dict[str, list[_Tensor]]:
    """File -> its tensors, in the order of their values. Raises `ExportError`."""
    changes = _changes(adapter)
    stored = stored_tensors(base)
    model = _model_files(base)
    files: dict[str, list[_Tensor]] = {}
    for name, (path, facts, start) in stored.items():
        if path.name not in model:
            continue
        kind, change = facts["dtype"], changes.pop(name, None)
        if change is not None and kind not in BYTES:
            raise ExportError(
                f"{name} is {kind} in {base}; only F32, F16 and BF16 weights can be added to"
            )
        wanted = KINDS[precision] if precision is not None and kind in BYTES else kind
        first, end = facts["data_offsets"]
        tensor = _Tensor(
            name, path, start + first, kind, end - first, tuple(facts["shape"]), wanted, change
        )
        files.setdefault(path.name, []).append(tensor)
        if name == EMBEDDINGS and untied:  # training moved one of the two that were the same
            files[path.name].append(replace(tensor, name=HEAD, change=None))
    if changes:
        raise ExportError(f"{base} holds no tensor {min(changes)}; is it the run's base?")
    return files


def _model_files(base: Path) -> set[str]:
    """Names of the files that transformers would load; a folder may hold the weights twice."""
    if (base / INDEX).is_file():
        return set(json.loads((base / INDEX).read_text())["weight_map"].values())
    single = base / "model.safetensors"
    return {single.name} if single.is_file() else {p.name for p in base.glob("*.safetensors")}


def _changes(adapter: WholeAdapter) -> dict[str, Change]:
    """Tensor of the base -> what is added to it."""
    found: dict[str, Change] = {}
    for module, (up, down) in adapter.factors.items():
        found[f"{module}.weight"] = _product(up, down, adapter.scale)
    for name, delta in adapter.dense.items():
        found[name] = _difference(delta)
    return found


def _difference(delta: Values) -> Change:
    return lambda rows: delta[rows].astype(np.float64)


def _product(up: Values, down: Values, scale: float) -> Change:
    def of(rows: slice) -> NDArray[np.float64]:
        some: NDArray[np.float64] = scale * up[:, rows].T.astype(np.float64)
        return some @ down.astype(np.float64)

    return of


def _header(tensors: list[_Tensor]) -> bytes:
    """The length of the JSON that follows, and the JSON, filled up to a multiple of 8."""
    facts: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for tensor in tensors:
        size = tensor.rows * tensor.row_bytes
        facts[tensor.name] = {
            "dtype": tensor.kind, "shape": tensor.shape, "data_offsets": [at, at + size]
        }  # fmt: skip
        at += size
    text = json.dumps(facts, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write(out: IO[bytes], tensor: _Tensor, merge: Merge) -> None:
    """The values of a tensor, as they are to be."""
    stored_row = tensor.stored_bytes // max(1, tensor.rows)
    step = max(1, BLOCK_VALUES // max(1, tensor.columns))
    with tensor.path.open("rb") as stream:
        stream.seek(tensor.start)
        for first in range(0, tensor.rows, step):
            rows = slice(first, min(first + step, tensor.rows))
            data = stream.read((rows.stop - rows.start) * stored_row)
            if tensor.change is None and tensor.kind == tensor.stored:
                out.write(data)
                continue
            values = _decoded(data, tensor.stored).reshape(-1, tensor.columns)
            exact = values.astype(np.float64)
            if tensor.change is not None:
                added = tensor.change(rows)
                exact += added.reshape(exact.shape)
            written = _encoded(exact, tensor)
            out.write(written)
            if tensor.change is not None:
                back = _decoded(written, tensor.kind).reshape(exact.shape)
                merge.changed += float(np.vdot(added, added))
                merge.lost += float(np.sum((back - exact) ** 2))
    merge.tensors += tensor.change is not None


def _decoded(data: bytes, kind: str) -> Values:
    if kind == "BF16":
        return CODECS["bfloat16"].decode(memoryview(data), 1, len(data) // 2)
    return np.frombuffer(data, "<f4" if kind == "F32" else "<f2").astype(np.float32)


def _encoded(exact: NDArray[np.float64], tensor: _Tensor) -> bytes:
    with np.errstate(over="ignore"):
        if tensor.kind == "BF16":
            return bytes(CODECS["bfloat16"].encode(exact.astype(np.float32), None)[1])
        found = exact.astype("<f4" if tensor.kind == "F32" else "<f2")
    if not np.isfinite(found).all():
        raise ExportError(
            f"{tensor.name} does not fit {tensor.kind} any more; export with --dtype float32"
        )
    return found.tobytes()


def _index(files: Mapping[str, list[_Tensor]]) -> str:
    """What says which tensor lies in which file."""
    size = sum(t.rows * t.row_bytes for tensors in files.values() for t in tensors)
    where = {t.name: name for name, tensors in files.items() for t in tensors}
    return json.dumps({"metadata": {"total_size": size}, "weight_map": where}, indent=2) + "\n"


def _card(
    adapter: WholeAdapter, base_name: str, precision: Precision | None, merge: Merge
) -> str:  # fmt: skip
    spec = adapter.spec
    rounds = "" if adapter.round is None else f" after {adapter.round} rounds"
    return f"""---
base_model: {json.dumps(base_name)}
library_name: transformers
tags: [federated-learning, code]
---

# {base_name} with run {spec.run_id}{rounds}

Fine-tuned by Sketchfleet on code that never left the devices it lives on: the adapter is added into
the weights.

| | |
|---|---|
| base | {base_name} {spec.base_revision} |
| base digest (SHA-256) | `{spec.base_digest}` |
| tensors changed | {merge.tensors} |
| weights | {precision or "as in the base"} |
| of the update's energy, lost to rounding | {merge.lost_share:.1e} |
"""
