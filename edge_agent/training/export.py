"""The base as an ONNX folder, once: `edge_agent.inference` runs it where torch is too heavy.

    python -m edge_agent.training.export --base FOLDER --out FOLDER --precision int8

What `sketchfleet-agent export-base` runs. The graph is compared with the model it came from before
anything is kept. Needs memory for about four times the float32 weights, so that a base for a small
board is exported on a larger machine.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from edge_agent.inference_folder import (
    INFO_FILE,
    MODEL_FILE,
    TOKENIZER_FILE,
    WEIGHTS_FILE,
    ExportInfo,
    ExportPrecision,
    Marks,
    read_info,
)
from edge_agent.inference_session import Session
from edge_agent.training.backbone import Backbone, load_base
from edge_agent.training.export_graph import context_tokens, to_graph
from edge_agent.training.fill_in_middle import middle_tokens
from profiles.errors import MissingExtraError, SketchfleetError
from profiles.model import ModelShape, base_digest, read_shape, resolve_base
from protos.whole_adapter import appearing

if TYPE_CHECKING:
    import onnx_ir

MOST_FILE_BYTES = 2**31 - 2**20  # of a protobuf file; larger weights lie beside it
NEED = ("onnx", "onnxscript", "onnxruntime")
MOST_DIFFERENCE = 1e-3  # between logits of graph and model, relative to the largest


class BaseExportError(SketchfleetError):
    """A base that cannot be exported."""


def export_base(
    base: str,
    out: Path,
    precision: ExportPrecision,
    told: Callable[[str], None] = lambda _: None,
) -> ExportInfo:
    """Writes the folder `out`, whole or not at all; `told` hears of each step that takes long.

    base: hub id or folder of a causal language model, or a float32 folder that was written so,
    which another precision is made of without tracing the model again. Raises `ModelError`,
    `BackboneError` or `GraphError` on a base that is none or cannot be exported, `ExportError`
    when `out` exists, `BaseExportError` when the graph computes other than the model,
    `MissingExtraError`.
    """
    for package in NEED:
        _require(package)
    from edge_agent.training.export_weights import add_absent_adapter

    if (Path(base) / INFO_FILE).is_file():
        return _from_export(Path(base), out, precision, told)
    folder = resolve_base(base)
    shape = read_shape(folder)
    if shape.encodes:
        raise BaseExportError(
            f"{folder} is a {shape.model_type} encoder, which writes no text; export a decoder"
        )
    if not (folder / TOKENIZER_FILE).is_file():
        raise BaseExportError(
            f"{folder} has no {TOKENIZER_FILE}, which inference reads; save its tokenizer in the "
            "fast format (AutoTokenizer.from_pretrained(…).save_pretrained)"
        )
    with appearing(out) as part:
        told("loading the base")
        loaded = load_base(folder, "fp32", torch.device("cpu"))
        info = _info(base, base_digest(folder), shape, loaded, precision)
        asked, expected = _sample(loaded.model, shape)
        told("tracing the model")
        traced = to_graph(loaded.model, shape, info.modules)
        del loaded
        path = part / MODEL_FILE
        told("writing the graph")
        add_absent_adapter(traced.graph, info.modules)
        _save(traced, path)
        del traced
        told("comparing the graph with the model")
        _compare(path, info, asked, expected)
        if precision != "float32":
            told(f"writing it as {precision}")
            _quantise(path, part, info)
        _write_rest(folder, part, info)
    return info


def _from_export(
    folder: Path, out: Path, precision: ExportPrecision, told: Callable[[str], None]
) -> ExportInfo:
    info = read_info(folder)
    if info.precision != "float32" or precision == "float32":
        raise BaseExportError(
            f"{folder} is an export in {info.precision}; int8 and int4 are made of a float32 one, "
            "or of the base itself"
        )
    info = info.model_copy(update={"precision": precision})
    with appearing(out) as part:
        told(f"writing it as {precision}")
        _quantise(folder / MODEL_FILE, part, info)
        _write_rest(folder, part, info)
    return info


def _write_rest(folder: Path, part: Path, info: ExportInfo) -> None:
    shutil.copyfile(folder / TOKENIZER_FILE, part / TOKENIZER_FILE)
    (part / INFO_FILE).write_text(json.dumps(info.model_dump(), indent=2) + "\n")


def _info(
    base: str, digest: str, shape: ModelShape, loaded: Backbone, precision: ExportPrecision
) -> ExportInfo:
    found = middle_tokens(loaded.tokenizer)
    marks = None if found is None else Marks(**vars(found))
    config = loaded.model.generation_config
    ends = config.eos_token_id if config is not None else None
    listed = ends if isinstance(ends, list) else [] if ends is None else [ends]
    # A model that was taught to fill in writes a mark where its part is over and another begins.
    over = {int(end) for end in listed} | {loaded.separator_id}
    over |= set() if marks is None else {end for end in vars(marks).values() if end is not None}
    return ExportInfo(
        base=base,
        base_digest=digest,
        precision=precision,
        context_tokens=context_tokens(loaded.model.config),
        vocabulary=shape.vocabulary,
        layers=shape.layers,
        key_value_heads=shape.kv_heads,
        head_size=shape.head_dim,
        separator=loaded.separator_id,
        ends=tuple(sorted(over)),
        marks=marks,
        modules=shape.modules(()),
        versions={name: version(name) for name in (*NEED, "torch", "transformers")},
    )


def _sample(model: Any, shape: ModelShape) -> tuple[NDArray[Any], NDArray[Any]]:
    """Some tokens (1, t), and what the model makes of them, (t, vocabulary)."""
    length = min(24, context_tokens(model.config))
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, shape.vocabulary, (1, length)))
    with torch.no_grad():
        return ids.numpy(), model(input_ids=ids, use_cache=False).logits[0].float().numpy()


def _save(graph: onnx_ir.Model, path: Path) -> None:
    import onnx_ir

    weights = (value.const_value for value in graph.graph.initializers.values())
    size = sum(tensor.nbytes for tensor in weights if tensor is not None)
    onnx_ir.save(graph, path, external_data=WEIGHTS_FILE if size > MOST_FILE_BYTES else None)


def _compare(path: Path, info: ExportInfo, asked: NDArray[Any], expected: NDArray[Any]) -> None:
    """In two steps, so that the cache is looked at as well. Raises `BaseExportError`."""
    session = Session(path, info, threads=None)
    cut = asked.shape[1] // 2
    first, cache = session.run(asked[:, :cut], session.empty, np.arange(cut))
    rest, _ = session.run(asked[:, cut:], cache, np.arange(asked.shape[1] - cut))
    got = np.concatenate([first[0], rest[0]])
    difference = float(np.abs(got - expected).max() / np.abs(expected).max())
    if not difference < MOST_DIFFERENCE:
        raise BaseExportError(
            f"the graph's logits differ from the model's by {difference:.1e} of the largest; this "
            "architecture cannot be exported with these releases of torch and transformers"
        )


def _quantise(source: Path, part: Path, info: ExportInfo) -> None:
    """Writes a float32 graph in the precision of `info`, perhaps over itself."""
    import onnx
    import onnx_ir

    from edge_agent.training.export_weights import add_absent_adapter, quantise

    model = quantise(onnx.load(source), info.precision)
    for name in (MODEL_FILE, WEIGHTS_FILE):  # now in memory
        (part / name).unlink(missing_ok=True)
    graph = onnx_ir.from_proto(model)
    add_absent_adapter(graph.graph, info.modules)
    _save(graph, part / MODEL_FILE)


def _require(package: str) -> None:
    import importlib.util

    if importlib.util.find_spec(package) is None:
        raise MissingExtraError(package, "export")


def main() -> int:
    """Exports one base."""
    parser = argparse.ArgumentParser(prog="sketchfleet-agent export-base")
    parser.add_argument("--base", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--precision", choices=get_args(ExportPrecision), required=True)
    args = parser.parse_args()
    from profiles.progress import progress

    try:
        with progress("starting") as line:
            info = export_base(args.base, args.out, args.precision, lambda what: line.step(0, what))
    except SketchfleetError as error:
        print(f"sketchfleet-agent: {error}", file=sys.stderr)  # noqa: T201
        return 1
    size = sum(file.stat().st_size for file in args.out.iterdir())
    print(  # noqa: T201
        f"{args.out}: {info.precision}, {size / 1e6:.1f} MB, context {info.context_tokens} tokens, "
        f"{len(info.modules)} layers take an adapter"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
