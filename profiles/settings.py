"""A TOML file -> a checked pydantic model, or one sentence that says what is wrong with it.

Knows TOML and how people misspell keys; knows no section of `run.toml` or `agent.toml`, which
`coordinator.config` and `edge_agent.config` describe. Nothing is read from the environment.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from profiles.errors import SketchfleetError

HOST_AND_PORT = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+):([0-9]{1,5})")


class Section(BaseModel):
    """One table of a settings file, or the whole file: unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


M = TypeVar("M", bound=BaseModel)


def load_settings(path: Path, model: type[M], error_class: type[SketchfleetError]) -> M:
    """Reads a TOML file as a model whose fields are its tables.

    Raises `error_class` with the file, the key and what is allowed there.
    """
    try:
        plain = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise error_class(f"{path} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise error_class(f"{path} is not valid TOML: {error}") from error
    try:
        return model.model_validate(plain)
    except ValidationError as error:
        raise error_class(f"{path}: {_explain(model, error)}") from error


def host_of(address: str) -> str:
    """The host of "host:port", an IPv6 host without its brackets. Raises `ValueError`."""
    found = HOST_AND_PORT.fullmatch(address)
    if found is None or int(found[2]) > 65535:
        raise ValueError('must be "address:port", for example "127.0.0.1:8470"')
    return found[1].strip("[]")


def _explain(model: type[BaseModel], error: ValidationError) -> str:
    """The first problem as one sentence, with a suggestion for a misspelt key."""
    found = error.errors()
    # A misspelt section is also a missing one; the misspelling is what helps.
    first = next((e for e in found if e["type"] == "extra_forbidden"), found[0])
    where = [str(part) for part in first["loc"]]
    if first["type"] == "extra_forbidden":
        known = _keys(model, where[:-1])
        near = difflib.get_close_matches(where[-1], known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; known keys: {', '.join(known)}"
        place = f"[{where[0]}]" if len(where) > 1 else "the top level"
        return f"unknown key {where[-1]!r} in {place}{hint}"
    if first["type"] == "missing":
        return f"[{where[0]}] " + (f"lacks {where[1]!r}" if len(where) > 1 else "is missing")
    message = first["msg"].removeprefix("Value error, ")
    return f"[{where[0]}] {' '.join(where[1:2])}: {message}" if where else message


def _keys(model: type[BaseModel], section: list[str]) -> list[str]:
    fields: dict[str, Any] = dict(model.model_fields)
    if section:
        kind = fields[section[0]].annotation
        fields = dict(kind.model_fields) if kind is not None else {}
    return sorted(fields)
