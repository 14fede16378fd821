"""`sketchfleet-agent export-base`, `generate` and `evaluate`: an exported base from a terminal."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from profiles.errors import MissingExtraError, SketchfleetError

if TYPE_CHECKING:
    from edge_agent.inference import Engine
    from edge_agent.training.rows import Rows

PRECISIONS = ("float32", "int8", "int4")
NEWEST = "newest"
SAMPLING = ("suffix", "temperature", "top_p", "seed", "stop")  # what torch's `generate` lacks


class GenerateError(SketchfleetError):
    """What is asked for cannot be done with this base."""


def add_commands(commands: Any, settled: argparse.ArgumentParser) -> None:
    """Registers the three. settled: --config and --set."""
    export = commands.add_parser(
        "export-base",
        help="write a base model for ONNX Runtime, once, to complete code without torch",
        description="Writes a base as a graph of ONNX Runtime that takes each round's adapter "
        "while it runs (docs/inference.md). Needs torch, and memory for four times the float32 "
        "weights: for a small board, do it on a larger machine and copy the folder.",
    )
    export.add_argument(
        "base", metavar="MODEL", help="hub id or model folder, or a float32 folder made so before"
    )
    export.add_argument(
        "--out", type=Path, required=True, metavar="FOLDER", help="a folder that is not there yet"
    )
    export.add_argument(
        "--precision", choices=PRECISIONS, default="int8", help="of the weights (default: int8)"
    )
    export.set_defaults(perform=_export_base)
    generate = commands.add_parser(
        "generate",
        parents=[settled],
        help="complete code with a base and, if given, an adapter",
        description="Prints a prompt and how it goes on: word by word from a folder that "
        "export-base wrote, which needs no torch, else with torch from the base itself.",
    )
    generate.add_argument("prompt", help="code to go on from; - reads it from standard input")
    _add_model(generate)
    generate.add_argument(
        "--max-tokens", "--max-new-tokens", type=int, default=64, help="at most (default: 64)"
    )
    generate.add_argument("--suffix", help="code after the place to fill in")
    generate.add_argument("--temperature", type=float, help="0 takes the likeliest (default: 0)")
    generate.add_argument("--top-p", type=float, help="draw from so much probability (default: 1)")
    generate.add_argument("--seed", type=int, help="draw the same again")
    generate.add_argument("--stop", action="append", metavar="TEXT", help="end before this text")
    generate.set_defaults(perform=_generate)
    evaluate = commands.add_parser(
        "evaluate",
        parents=[settled],
        help="loss on this device's held-out code, through ONNX Runtime",
        description="Measures a folder that export-base wrote on the held-out part of [data], "
        "with the same measures as a round.",
    )
    _add_model(evaluate)
    evaluate.add_argument(
        "--tokens", type=int, metavar="N", help="per sequence (default: the context, 512 at most)"
    )
    evaluate.add_argument("--sequences", type=int, default=64, help="at most (default: 64)")
    evaluate.add_argument(
        "--held-out-share", type=float, default=0.1, metavar="X",
        help="of the code, as the run has it (default: 0.1)",
    )  # fmt: skip
    evaluate.add_argument("--json", action="store_true", help="print JSON")
    evaluate.set_defaults(perform=_evaluate)


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--base", required=True, metavar="MODEL", help="what export-base wrote")
    parser.add_argument(
        "--adapter", metavar="FILE|FOLDER|newest",
        help="an adapter file, a PEFT folder, or the newest adapter that this device holds",
    )  # fmt: skip


def _export_base(args: argparse.Namespace) -> NoReturn:
    _hand_over(
        "edge_agent.training.export", ("torch", "onnx", "onnxscript", "onnxruntime"), "export",
        ["--base", args.base, "--out", str(args.out), "--precision", args.precision],
    )  # fmt: skip


def _generate(args: argparse.Namespace) -> int:
    from edge_agent.inference_folder import INFO_FILE

    if args.prompt == "-":
        args.prompt = sys.stdin.read()
    if not (Path(args.base).expanduser() / INFO_FILE).is_file():
        _generate_with_torch(args)
    with _engine(args) as engine:
        ids = engine.encode(args.prompt, suffix=args.suffix)
        pieces = engine.generate(
            ids,
            max_tokens=args.max_tokens,
            temperature=0.0 if args.temperature is None else args.temperature,
            top_p=1.0 if args.top_p is None else args.top_p,
            seed=args.seed,
            stop=args.stop or (),
        )
        print(args.prompt, end="", flush=True)
        for piece in pieces:
            print(piece.text, end="", flush=True)
        print(args.suffix or "")
    return 0


def _generate_with_torch(args: argparse.Namespace) -> NoReturn:
    """Hands over to the training room: this process stays without torch."""
    asked = [f"--{key.replace('_', '-')}" for key in SAMPLING if getattr(args, key) is not None]
    if asked or args.adapter == NEWEST:
        raise GenerateError(
            f"{', '.join(asked) or '--adapter newest'} needs a folder of export-base, which "
            f"{args.base} is not; write one with sketchfleet-agent export-base"
        )
    words = ["--base", args.base, "--prompt", args.prompt, "--max-new-tokens", str(args.max_tokens)]
    if args.adapter is not None:
        words += ["--adapter", args.adapter]
    _hand_over("edge_agent.training.completion", ("torch", "peft"), "train", words)


def _hand_over(module: str, needed: tuple[str, ...], extra: str, words: list[str]) -> NoReturn:
    """Becomes a program of the training room. Raises `MissingExtraError`."""
    import importlib.util
    import os

    for package in needed:
        if importlib.util.find_spec(package) is None:
            raise MissingExtraError(package, extra)
    os.execv(sys.executable, [sys.executable, "-m", module, *words])  # noqa: S606 - our own module


def _evaluate(args: argparse.Namespace) -> int:
    import json

    from profiles.progress import progress

    with _engine(args) as engine:
        rows = _held_out(args, engine)
        with progress(f"predicting {rows.predictions} tokens"):
            found = engine.held_out(rows)
        adapter = engine.adapter
    if args.json:
        told = {**found._asdict(), "sequences": len(rows), "adapter": adapter,
                "precision": engine.info.precision}  # fmt: skip
        print(json.dumps(told))
    else:
        print(
            f"held-out loss {found.loss:.4f} nats per token, {found.token_accuracy:.1%} of "
            f"{found.tokens} tokens right ({len(rows)} sequences, {engine.info.precision}, "
            f"{f'adapter {adapter[:12]}' if adapter else 'no adapter'})"
        )
    return 0


def _held_out(args: argparse.Namespace, engine: Engine) -> Rows:
    """Held-out rows of this device, as a round has them; evenly spaced where there are more."""
    import numpy as np

    from edge_agent.config import load_agent_config
    from edge_agent.training.connectors import collect
    from edge_agent.training.row_packing import pack_documents

    corpus = collect(load_agent_config(args.config, args.set).selection, args.held_out_share)
    tokens = args.tokens or min(512, engine.info.context_tokens)
    rows = pack_documents(corpus.of("held_out"), engine.encode_bare, engine.info.separator, tokens)
    chosen = np.linspace(0, len(rows) - 1, min(len(rows), args.sequences)).astype(np.int64)
    return rows.take(chosen)


@contextmanager
def _engine(args: argparse.Namespace) -> Iterator[Engine]:
    """The exported base with the adapter that was asked for."""
    import tempfile

    from edge_agent.inference import Engine

    engine = Engine.open(Path(args.base).expanduser())
    with tempfile.TemporaryDirectory(prefix="sketchfleet-adapter-") as folder:
        if args.adapter is not None:
            engine.swap(_adapter_file(args, engine, Path(folder)))
        try:
            yield engine
        finally:
            engine.close()


def _adapter_file(args: argparse.Namespace, engine: Engine, folder: Path) -> Path:
    from edge_agent.inference_adapter import read_peft, write_adapter, write_whole

    if args.adapter == NEWEST:
        from edge_agent.adapters import newest_adapter
        from edge_agent.config import load_agent_config

        found = newest_adapter(load_agent_config(args.config, args.set).state.folder)
        if found is None:
            raise GenerateError("this device holds no adapter yet; work for a run first")
        return write_whole(found.adapter, folder)
    given = Path(args.adapter).expanduser()
    if given.is_dir():
        return write_adapter(read_peft(given), engine.info.base_digest, folder)
    return given
