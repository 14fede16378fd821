"""What lies in a folder that `sketchfleet-agent export-base` writes, and what export.json says.

    model.onnx, model.onnx.data (where weights exceed what one file may hold), tokenizer.json,
    export.json

Knows names and facts only; the export (which has torch) and inference (which has not) share it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from profiles.errors import SketchfleetError
from profiles.model import ModuleShape

MODEL_FILE = "model.onnx"
WEIGHTS_FILE = "model.onnx.data"
TOKENIZER_FILE = "tokenizer.json"
INFO_FILE = "export.json"
FORMAT = 1

ExportPrecision = Literal["float32", "int8", "int4"]


class InferenceError(SketchfleetError):
    """An export, an adapter or a request cannot be used; the message says what to do."""


class ContextLengthError(InferenceError):
    """A prompt leaves no room in the model's context."""


class Marks(BaseModel):
    """Token ids that mark the parts of a text whose middle is asked for."""

    model_config = ConfigDict(frozen=True)

    prefix: int
    suffix: int
    middle: int
    end: int | None = None


class ExportInfo(BaseModel):
    """export.json: what the graph holds and what else a caller must know of the base."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int = FORMAT
    base: str  # as it was named to the export
    base_digest: str  # SHA-256, hex (`profiles.model.base_digest`)
    precision: ExportPrecision
    context_tokens: int = Field(gt=0)
    vocabulary: int = Field(gt=0)
    layers: int = Field(gt=0)
    key_value_heads: int = Field(gt=0)
    head_size: int = Field(gt=0)
    separator: int  # stands before a prompt, as in training
    ends: tuple[int, ...]  # tokens at which a text is over
    marks: Marks | None = None  # None: the tokenizer cannot fill in the middle
    modules: tuple[ModuleShape, ...]  # that take an adapter, of any rank
    versions: dict[str, str]  # of the packages that made it


def read_info(folder: Path) -> ExportInfo:
    """export.json of a folder. Raises `InferenceError`."""
    try:
        found = json.loads((folder / INFO_FILE).read_text())
    except FileNotFoundError as error:
        raise InferenceError(
            f"{folder} is no exported base; write one with sketchfleet-agent export-base"
        ) from error
    except (OSError, ValueError) as error:
        raise InferenceError(
            f"{folder / INFO_FILE} cannot be read; export the base anew"
        ) from error
    if isinstance(found, dict) and found.get("format") != FORMAT:
        raise InferenceError(
            f"{folder} has export format {found.get('format')}, this release reads {FORMAT}; "
            "export the base anew"
        )
    try:
        return ExportInfo.model_validate(found)
    except ValidationError as error:
        raise InferenceError(f"{folder / INFO_FILE} is damaged; export the base anew") from error
