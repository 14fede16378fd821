"""Writes docs/reference/config.md from the types that read the settings files.

    python -m tools.config_reference            # writes it
    python -m tools.config_reference --check    # ends with 1 if it is out of date

Kinds, limits and defaults come from the types; what a key means from the string below it.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import json
import re
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, SecretStr

from coordinator.config import RunConfig
from coordinator.server_config import ENVIRONMENT
from coordinator.what_if_fleet import FleetFile as PlannedFleet
from edge_agent.config import PREFIX, AgentConfig
from trials.fleet_file import FleetFile as TriedFleet
from trials.study.rank_shift_settings import RankShiftSettings
from trials.study.settings import StudySettings

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "reference" / "config.md"
UNITS = {"s": "s", "ms": "ms", "h": "h", "days": "days", "mb": "MB", "bytes": "bytes",
         "bps": "bit/s", "tokens": "tokens", "c": "°C", "share": "0 to 1", "steps": "steps",
         "rounds": "rounds", "sequences": "sequences"}  # fmt: skip
KINDS = {"integer": "integer", "number": "number", "string": "text", "boolean": "true or false",
         "object": "table"}  # fmt: skip
MOST_CHOICES = 12


@dataclass(frozen=True)
class File:
    """A settings file: how it is called, what reads it, and the prefix of its variables."""

    name: str
    model: type[BaseModel]
    told: str
    prefix: str = ""


FILES = (
    File("run.toml", RunConfig, "For `sketchfleet-coordinator serve`: a run, and the service.",
         ENVIRONMENT),
    File("agent.toml", AgentConfig, "For `sketchfleet-agent`: what the owner of a device decides.",
         PREFIX),
    File("fleet.toml of a trial", TriedFleet,
         "For `sketchfleet-trial run` ([trials](../trials.md))."),
    File("fleet.toml of a plan", PlannedFleet,
         "For `sketchfleet-coordinator plan --fleet` ([boards](../boards.md))."),
    File("study.toml", StudySettings,
         "For `sketchfleet-trial study` of `compression-fairness` and `methods` "
         "([studies](../studies.md))."),
    File("study.toml of rank-shift", RankShiftSettings,
         "For `sketchfleet-trial study rank-shift` ([its findings](../rank-shift.md))."),
)  # fmt: skip


@dataclass(frozen=True)
class Key:
    """One row of the page."""

    name: str
    kind: str
    unit: str
    default: str
    meaning: str


def page() -> str:
    """docs/reference/config.md."""
    lines = [
        "# Settings", "",
        "<!-- Written by `python -m tools.config_reference`; edit the types instead. -->", "",
        "Every key of every settings file. Files are TOML; a key that does not exist is an error "
        "that names the nearest one that does. Relative paths are relative to the file.", "",
        "Keys of `run.toml` and `agent.toml` can be set from outside too. `--set "
        "section.key=value` stands above the environment, the environment above the file, the file "
        "above the default:",
        "", "```text",
        f"{ENVIRONMENT}__ROUND__QUORUM=0.5        [round] quorum of run.toml",
        f"{PREFIX}__LIMITS__THREADS=2             [limits] threads of agent.toml",
        "```", "",
        "`sketchfleet-coordinator config --effective` and `sketchfleet-agent config --effective` "
        "print every key as it is in force, with where it comes from.",
    ]  # fmt: skip
    for file in FILES:
        lines += ["", f"## {file.name}", "", file.told]
        for heading, model, told in sections(file.model):
            lines += ["", f"### {heading}", "", told, ""]
            lines += ["| key | kind | unit | default | means |", "|---|---|---|---|---|"]
            lines += [
                "| " + " | ".join((f"`{k.name}`", k.kind, k.unit, k.default, k.meaning)) + " |"
                for k in keys(model)
            ]
    return "\n".join(lines) + "\n"


def sections(model: type[BaseModel], above: str = "") -> Iterator[tuple[str, type[BaseModel], str]]:
    """(heading, type, what it is for) of every table of a file, each before those within it."""
    if not above and any(table_of(f.annotation)[0] is None for f in model.model_fields.values()):
        yield "Above all tables", model, summary(model)
    meant = meanings(model)
    for name, field in model.model_fields.items():
        inner, listed = table_of(field.annotation)
        if inner is not None:
            place = f"{above}.{name}".lstrip(".")
            told = " ".join((summary(inner), _linked(_cell(meant.get(name, ""))))).strip()
            yield (f"[[{place}]]" if listed else f"[{place}]"), inner, told
            yield from sections(inner, place)


def table_of(annotation: Any) -> tuple[type[BaseModel] | None, bool]:
    """(the type of a table, whether there may be several), or (None, False) for a plain value."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation, False
    inner = [found for arg in get_args(annotation) if (found := table_of(arg)[0])]
    listed = getattr(annotation, "__origin__", None) is tuple
    return (inner[0], listed) if inner else (None, False)


def keys(model: type[BaseModel]) -> Iterator[Key]:
    """The plain keys of one table."""
    schema = model.model_json_schema()
    known, meant = schema.get("$defs", {}), meanings(model)
    for name, field in model.model_fields.items():
        if table_of(field.annotation)[0] is None:
            shape = schema["properties"][name]
            kind = _kind(shape, known)
            yield Key(name, kind, _unit(name, shape), _default(field),
                      _linked(_cell(meant.get(name, ""))))  # fmt: skip


def meanings(model: type[BaseModel]) -> dict[str, str]:
    """Of each key, the string that stands below it in the source."""
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(model))).body
    assert isinstance(body, ast.ClassDef)
    found = {}
    for key, below in zip(body.body, body.body[1:], strict=False):
        if (
            isinstance(key, ast.AnnAssign)
            and isinstance(key.target, ast.Name)
            and isinstance(below, ast.Expr)
            and isinstance(below.value, ast.Constant)
        ):
            found[key.target.id] = inspect.cleandoc(str(below.value.value)).strip()
    return found


def summary(model: type[BaseModel]) -> str:
    """What a table is for."""
    words = " ".join(inspect.cleandoc(model.__doc__ or "").split())
    return _linked(re.sub(r"^\[\[?\w+\]?\]: (.)", lambda found: found[1].upper(), words))


def _kind(shape: dict[str, Any], known: dict[str, Any]) -> str:
    if "$ref" in shape:
        shape = known[shape["$ref"].rpartition("/")[2]]
    if "anyOf" in shape:
        kinds = [_kind(one, known) for one in shape["anyOf"] if one.get("type") != "null"]
        return " or ".join(dict.fromkeys(kinds))
    choices = shape.get("enum") or ([shape["const"]] if "const" in shape else [])
    if choices:
        shown = ", ".join(f"`{_plain(choice)}`" for choice in choices[:MOST_CHOICES])
        return shown + (", …" if len(choices) > MOST_CHOICES else "")
    if shape.get("type") == "array":
        return f"list: {_kind(shape.get('items', {}), known)}"
    if shape.get("format") == "path":
        return "path"
    words = [KINDS.get(shape.get("type", ""), "any")]
    for key, sign in (("minimum", "≥"), ("exclusiveMinimum", ">"), ("maximum", "≤"),
                      ("exclusiveMaximum", "<")):  # fmt: skip
        if key in shape:
            words.append(f"{sign} {_number(shape[key])}")
    if "pattern" in shape:
        words.append(f"like `{_cell(shape['pattern'])}`")
    return " ".join((words[0], ", ".join(words[1:]))).strip()


def _unit(name: str, shape: dict[str, Any]) -> str:
    numeric = any(
        one.get("type") in ("integer", "number") for one in [shape, *shape.get("anyOf", [])]
    )
    return UNITS.get(name.rpartition("_")[2], "") if numeric else ""


def _default(field: Any) -> str:
    if field.is_required():
        return "**needed**"
    if field.default_factory is not None:
        return "none" if field.default_factory is dict else "found out"
    value = field.default
    if value is None or isinstance(value, SecretStr):
        return "none"
    return f"`{_cell(_plain(value))}`"


def _plain(value: Any) -> str:
    """As TOML writes it."""
    if isinstance(value, tuple):
        return f"[{', '.join(_plain(item) for item in value)}]"
    return json.dumps(str(value) if isinstance(value, Path) else value, ensure_ascii=False)


def _number(value: float) -> str:
    return f"{value:g}" if abs(value) < 1e6 else f"{value:,.0f}".replace(",", " ")


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _linked(text: str) -> str:
    """With links in place of the names of other pages."""
    return re.sub(r"`docs/([\w-]+)\.md`", r"[\1](../\1.md)", text)


def main(argv: list[str] | None = None) -> int:
    """Writes the page or checks it; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tools.config_reference")
    parser.add_argument(
        "--check", action="store_true", help="write nothing; 1 if it is out of date"
    )
    text = page()
    if not parser.parse_args(argv).check:
        PAGE.parent.mkdir(parents=True, exist_ok=True)
        PAGE.write_text(text, encoding="utf-8")
    elif not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != text:
        print(f"{PAGE.relative_to(ROOT)} is out of date; run: python -m tools.config_reference",
              file=sys.stderr)  # fmt: skip
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
