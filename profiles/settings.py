"""A TOML file -> a checked model or dataclass, or one sentence that says what is wrong with it.

Knows TOML and how people misspell keys; knows no section of `run.toml` or `agent.toml`, which
`coordinator.config` and `edge_agent.config` describe. What stands above a file: `profiles.layers`.
"""

from __future__ import annotations

import difflib
import ipaddress
import re
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from profiles.compat import tomllib
from profiles.errors import SketchfleetError

HOST_AND_PORT = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+):([0-9]{1,5})")


class Section(BaseModel):
    """One table of a settings file, or the whole file: unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


UNKNOWN_KEY = ("extra_forbidden", "unexpected_keyword_argument")  # of a model, of a dataclass

T = TypeVar("T")


def load_settings(path: Path, model: type[T], error_class: type[SketchfleetError]) -> T:
    """Reads a TOML file as a model or dataclass whose fields are its tables.

    Raises `error_class` with the file, the key and what is allowed there.
    """
    return _validated(read_toml(path, error_class), str(path), model, error_class)


def parse_settings(text: str, name: str, model: type[T], error_class: type[SketchfleetError]) -> T:
    """The same for text that is read already; errors call it `name`."""
    return _validated(parse_toml(text, name, error_class), name, model, error_class)


def read_toml(path: Path, error_class: type[SketchfleetError]) -> dict[str, Any]:
    """A TOML file as plain data. Raises `error_class`."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise error_class(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise error_class(f"{path} is not valid TOML: {error}") from error
    return parse_toml(text, str(path), error_class)


def parse_toml(text: str, name: str, error_class: type[SketchfleetError]) -> dict[str, Any]:
    """The same for text that is read already."""
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise error_class(f"{name} is not valid TOML: {error}") from error


def _validated(
    plain: dict[str, Any], name: str, model: type[T], error_class: type[SketchfleetError]
) -> T:
    try:
        return TypeAdapter(model).validate_python(plain)
    except ValidationError as error:
        raise error_class(f"{name}: {explain(model, error)[1]}") from error


def host_of(address: str) -> str:
    """The host of "host:port", an IPv6 host without its brackets. Raises `ValueError`."""
    found = HOST_AND_PORT.fullmatch(address)
    if found is None or int(found[2]) > 65535:
        raise ValueError('must be "address:port", for example "127.0.0.1:8470"')
    return found[1].strip("[]")


def is_loopback(host: str) -> bool:
    """Whether a host (no brackets) can only mean this machine; other names are not looked up."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def explain(model: type[Any], error: ValidationError) -> tuple[tuple[int | str, ...], str]:
    """The first problem: where, and in one sentence, with a suggestion for a misspelt key."""
    found = error.errors()
    # A misspelt section is also a missing one; the misspelling is what helps.
    first = next((e for e in found if e["type"] in UNKNOWN_KEY), found[0])
    where = first["loc"]
    if first["type"] in UNKNOWN_KEY:
        key, known = str(where[-1]), _keys(model, where[:-1])
        near = difflib.get_close_matches(key, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; known keys: {', '.join(known)}"
        place = _place(where[:-1])[0] if len(where) > 1 else "the top level"
        return where, f"unknown key {key!r} in {place}{hint}"
    message = first["msg"].removeprefix("Value error, ")
    if not where:
        return where, message
    place, inside = _place(where)
    if first["type"] == "missing":
        return where, f"{place} lacks {inside[0]!r}" if inside else f"{place} is missing"
    return where, f"{place} {inside[0]}: {message}" if inside else f"{place} {message}"


def _place(where: tuple[int | str, ...]) -> tuple[str, list[str]]:
    """(the table as one writes it, the way from there): "[run]", or "[[group]] 2" in a list."""
    if len(where) > 1 and isinstance(where[1], int):
        return f"[[{where[0]}]] {where[1] + 1}", [str(part) for part in where[2:]]
    return f"[{where[0]}]", [str(part) for part in where[1:]]


def _keys(model: type[Any], where: tuple[int | str, ...]) -> list[str]:
    fields = fields_of(model)
    for part in where:
        if isinstance(part, str):  # a number chooses among tables of one kind
            fields = fields_of(fields.get(part))
    return sorted(fields)


def fields_of(kind: Any) -> dict[str, Any]:
    """Names and types of a model's or dataclass's fields, also within `tuple[...]` or `| None`."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return {name: field.annotation for name, field in kind.model_fields.items()}
    if is_dataclass(kind):
        return get_type_hints(kind)
    return next((found for inner in get_args(kind) if (found := fields_of(inner))), {})
