"""What may be asked of an export, on both command lines alike. Imports nothing heavy."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from profiles.errors import SketchfleetError

Form = Literal["peft", "gguf", "merged"]
Precision = Literal["float32", "bfloat16", "float16"]


class ExportError(SketchfleetError):
    """An adapter cannot be written in the form that is asked for."""


@dataclass(frozen=True)
class Wanted:
    """What was asked for. base: where the base lies; "": where the run says."""

    out: Path
    form: Form = "peft"
    base: str = ""
    precision: Precision | None = None  # of a merged folder; None: the base's


def add_export_options(parser: argparse.ArgumentParser) -> None:
    """--out, --format, --base and --dtype, which `wanted_of` reads."""
    parser.add_argument(
        "--out", type=Path, required=True, metavar="PATH",
        help="a folder, for gguf a file, that is not there yet",
    )  # fmt: skip
    parser.add_argument(
        "--format", choices=get_args(Form), default="peft",
        help="peft: a folder for PEFT; gguf: a LoRA file for llama.cpp; merged: the whole model in "
        "full precision (default: peft)",
    )  # fmt: skip
    parser.add_argument(
        "--base", default="", metavar="MODEL", help="the base, when not where the run says"
    )
    parser.add_argument(
        "--dtype", choices=get_args(Precision), help="of a merged model (default: the base's)"
    )


def wanted_of(args: argparse.Namespace) -> Wanted:
    """What these options say. Raises `ExportError` where they contradict each other."""
    if args.dtype is not None and args.format != "merged":
        raise ExportError(f"--dtype is for --format merged; {args.format} is float32")
    return Wanted(args.out, args.format, args.base, args.dtype)
