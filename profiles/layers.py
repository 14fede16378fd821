"""A settings file and what stands above it: environment variables, and above them `--set`.

Knows how the text of a variable becomes a value and remembers where each value came from. Which
sections and keys there are say `coordinator.config` and `edge_agent.config`.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar, get_args, get_origin

from pydantic import BaseModel, SecretStr, TypeAdapter, ValidationError

from profiles.errors import SketchfleetError
from profiles.settings import explain, fields_of, parse_toml, read_toml

T = TypeVar("T", bound=BaseModel)

SET = "--set"
PASSWORD = re.compile(r"(?<=://)[^/@\s]+@")
HIDDEN = "**********"


@dataclass(frozen=True)
class Layered(Generic[T]):
    """Checked settings, and for every key that is not at its default who says so."""

    settings: T
    sources: Mapping[str, str]
    """ "section.key" -> the file, the variable's name or "--set"."""


@dataclass(frozen=True)
class _Above:
    """One value from above the file; `name`: what to call it in an error."""

    section: str
    key: str
    text: str
    name: str


def load_layered(
    path: Path | None,
    model: type[T],
    error_class: type[SketchfleetError],
    prefix: str,
    given: Sequence[str] = (),
    environ: Mapping[str, str] | None = None,
) -> Layered[T]:
    """Reads a TOML file (None: no file) with what the environment and `--set` put in its place.

    prefix: "SKETCHFLEET_AGENT" makes SKETCHFLEET_AGENT__LIMITS__THREADS the key `threads` of
    [limits]. given: "limits.threads=2", as `--set` takes it. Text is text; a list is written as in
    TOML, or bare where it has one item. Raises `error_class` with the variable or file, the key
    and what is allowed there.
    """
    plain = {} if path is None else read_toml(path, error_class)
    sources = {
        f"{section}.{key}": str(path)
        for section, table in plain.items()
        if isinstance(table, dict)
        for key in table
    }
    environ = os.environ if environ is None else environ
    names: dict[str, str] = {}
    above = [*_of_environment(environ, prefix, error_class), *_of_options(given, error_class)]
    for one in above:
        value = _value(model, one, prefix, error_class)
        table = plain.setdefault(one.section, {})
        if not isinstance(table, dict):
            continue  # the file is wrong there, which is told below
        table[one.key] = value
        dotted = f"{one.section}.{one.key}"
        names[dotted] = one.name
        sources[dotted] = SET if one.name.startswith(SET) else one.name
    try:
        return Layered(TypeAdapter(model).validate_python(plain), sources)
    except ValidationError as error:
        first, sentence = explain(model, error)
        blamed = _blamed(first, names)
        file = "the settings" if path is None else str(path)
        if len(first) > 1 and blamed:
            raise error_class(f"{blamed[0]}: {sentence}") from error
        beside = f" with {', '.join(blamed)}" if blamed else ""
        raise error_class(f"{file}{beside}: {sentence}") from error


def _of_environment(
    environ: Mapping[str, str], prefix: str, error_class: type[SketchfleetError]
) -> Iterator[_Above]:
    for name in sorted(environ):
        if name.startswith(f"{prefix}__"):
            parts = name.removeprefix(f"{prefix}__").lower().split("__")
            if len(parts) != 2 or not all(parts):
                raise error_class(f"{name} names no setting; write {prefix}__SECTION__KEY")
            yield _Above(parts[0], parts[1], environ[name], name)


def _of_options(given: Sequence[str], error_class: type[SketchfleetError]) -> Iterator[_Above]:
    for words in given:
        dotted, equals, text = words.partition("=")
        parts = dotted.strip().split(".")
        if not equals or len(parts) != 2 or not all(parts):
            raise error_class(f"{SET} {words} is not understood; write {SET} section.key=value")
        yield _Above(parts[0], parts[1], text, f"{SET} {dotted.strip()}")


def _value(
    model: type[BaseModel], one: _Above, prefix: str, error_class: type[SketchfleetError]
) -> Any:
    """The text of one variable as what its key takes. Raises `error_class` for an unknown key."""
    sections = fields_of(model)
    keys = {name: fields_of(kind) for name, kind in sections.items()}
    place, kind = one.section, keys.get(one.section, {}).get(one.key)
    if kind is None:
        hint = _hint(keys, place, one.key)
        if hint:
            variable = "__".join((prefix, *hint.upper().split(".")))
            hint = f"{SET} {hint}" if one.name.startswith(SET) else variable
        known = f"sections: {', '.join(sorted(keys))}"
        if place in keys:
            known = f"keys of [{place}]: {', '.join(sorted(keys[place]))}"
        hint = f"did you mean {hint}?" if hint else f"known {known}"
        raise error_class(f"{one.name} names unknown key {one.key!r} in [{place}]; {hint}")
    kinds = set(_kinds(kind))
    if kinds & {list, tuple, dict} and one.text.lstrip()[:1] not in ("[", "{"):
        return [one.text]
    if kinds & {list, tuple, dict} or (str in kinds and kinds & {int, float}):
        try:
            return parse_toml(f"value = {one.text}", one.name, error_class)["value"]
        except error_class:
            if str not in kinds or kinds & {list, tuple, dict}:
                raise
    return one.text


def _hint(keys: Mapping[str, Mapping[str, Any]], section: str, key: str) -> str:
    """The "section.key" that was probably meant, or nothing."""
    if section not in keys:
        section = next(iter(difflib.get_close_matches(section, keys, n=1)), "")
    near = difflib.get_close_matches(key, keys.get(section, ()), n=1)
    return f"{section}.{near[0]}" if near else ""


def _kinds(annotation: Any) -> Iterator[Any]:
    """The types that an annotation allows, containers without what they hold."""
    origin = get_origin(annotation)
    if origin in (list, tuple, dict) or not get_args(annotation):
        yield origin or annotation
        return
    for inner in get_args(annotation):
        yield from _kinds(inner)


def _blamed(where: Sequence[int | str], names: Mapping[str, str]) -> list[str]:
    """Which values from above the file an error may come from."""
    if len(where) > 1:
        dotted = f"{where[0]}.{where[1]}"
        return [names[dotted]] if dotted in names else []
    return [name for dotted, name in names.items() if not where or dotted.split(".")[0] == where[0]]


# --- showing them ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """One key as it is in force. `value` is plain JSON data, secrets hidden; `source`: who says."""

    section: str
    key: str
    value: Any
    source: str


def settings_in_force(found: Layered[Any], everything: bool) -> list[Setting]:
    """What has been set, or with `everything` the defaults too, in the order of the sections."""
    rows = []
    for section in type(found.settings).model_fields:
        table = getattr(found.settings, section)
        for key in type(table).model_fields if isinstance(table, BaseModel) else ():
            source = found.sources.get(f"{section}.{key}", "default")
            if everything or source != "default":
                rows.append(Setting(section, key, _shown(getattr(table, key)), source))
    return rows


def settings_text(rows: Sequence[Setting]) -> str:
    """As TOML that says of each key where it comes from.

    What is not given, or not shown, stands as a comment.
    """
    lines: list[str] = []
    told = [_line(row) for row in rows]
    width = min(48, max(map(len, told), default=0))
    section = None
    for row, text in zip(rows, told, strict=True):
        if row.section != section:
            lines += ["", f"[{row.section}]"]
            section = row.section
        lines.append(f"{text:<{width}}  # {row.source}")
    return "\n".join(lines).strip()


def _line(row: Setting) -> str:
    if row.value is None:
        return f"# {row.key} is not given"
    if row.value == HIDDEN:
        return f"# {row.key} is given and not shown"
    return f"{row.key} = {json.dumps(row.value, ensure_ascii=False)}"


def _shown(value: Any) -> Any:
    if isinstance(value, SecretStr):
        return HIDDEN if value.get_secret_value() else ""
    if isinstance(value, (list, tuple)):
        return [_shown(item) for item in value]
    if isinstance(value, dict):
        return {key: _shown(item) for key, item in value.items()}
    if isinstance(value, str | Path):
        return PASSWORD.sub(f"{HIDDEN}@", str(value))
    return value
