"""Writes docs/reference/cli.md and docs/reference/protobuf.md from the code.

    python -m tools.reference            # writes both
    python -m tools.reference --check    # ends with 1 if one is out of date

The commands come from the programs' own argparse parsers; the contract from the descriptors of the
generated code, with the comments of fleet.proto.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from google.protobuf.descriptor import Descriptor, EnumDescriptor, FieldDescriptor

from coordinator.cli import make_parser as coordinator_parser
from edge_agent.cli import make_parser as agent_parser
from profiles.errors import ExitCode
from protos.sketchfleet.v1 import fleet_pb2
from trials.cli import make_parser as trial_parser

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "docs/reference"
PROTO = ROOT / "protos/sketchfleet/v1/fleet.proto"
NOTE = "<!-- Written by `python -m tools.reference`; edit {source} instead. -->"
PARSERS = (coordinator_parser, agent_parser, trial_parser)
SCALARS = ("double", "float", "int64", "uint64", "int32", "uint32", "bool", "string", "bytes")
_OPENING = re.compile(r"(message|enum|service|rpc)\s+(\w+)")
_MEMBER = re.compile(r"(?:repeated |optional )?[\w.]+ (\w+) = \d+;")
_ENUM_VALUE = re.compile(r"(\w+) = \d+;")


def commands(parser: argparse.ArgumentParser) -> Iterator[tuple[argparse.ArgumentParser, str]]:
    """The leaves of a parser's tree, in order: each with the line that `--help` lists it with."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            helps = {choice.dest: choice.help or "" for choice in action._choices_actions}
            for name, child in action.choices.items():
                below = list(commands(child))
                yield from below or [(child, helps.get(name, ""))]


def cli_page() -> str:
    """docs/reference/cli.md."""
    lines = [
        "# Commands", "", NOTE.format(source="the parsers in the three `cli.py`"), "",
        "Three programs; each answers `--help`, as does every command.",
    ]  # fmt: skip
    for make in PARSERS:
        parser = make()
        lines += ["", f"## {parser.prog}", "", parser.description or ""]
        lines += _options([a for a in _shown(parser) if a.option_strings])
        for command, text in commands(parser):
            lines += ["", f"### {command.prog}", "", *_described(command, text)]
    lines += ["", "## Exit codes", "", "| code | means |", "|---|---|"]
    lines += [f"| {code:d} | {code.meaning} |" for code in ExitCode]
    return "\n".join(lines) + "\n"


def _shown(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    return [
        a for a in parser._actions
        if a.help != argparse.SUPPRESS and not isinstance(a, argparse._HelpAction)
    ]  # fmt: skip


def _options(actions: Iterable[argparse.Action]) -> Iterator[str]:
    rows = []
    for action in actions:
        shown = f"{', '.join(action.option_strings)} {_value(action)}".strip()
        rows.append(f"| `{shown.replace('|', chr(92) + '|')}` | {_meaning(action)} |")
    if rows:
        yield from ("", "| | |", "|---|---|", *rows)


def _described(command: argparse.ArgumentParser, text: str) -> Iterator[str]:
    sentence = command.description or text
    yield _sentence(sentence)
    yield ""
    shown = _shown(command)
    places = [a for a in shown if not a.option_strings]
    needed = [a for a in shown if a.option_strings and a.required]
    words = [
        command.prog, "[options]" if len(places) + len(needed) < len(shown) else "",
        *(f"{a.option_strings[0]} {_value(a)}".strip() for a in needed),
        *(f"[{_value(a)}]" if a.nargs in ("?", "*") else _value(a) for a in places),
    ]  # fmt: skip
    yield from ("```text", " ".join(word for word in words if word), "```")
    rest = [a for a in shown if a not in places + needed]
    yield from _options([*places, *needed, *rest])


def _value(action: argparse.Action) -> str:
    """What stands for the value in a usage line."""
    if action.nargs == 0:
        return ""
    value = action.metavar if isinstance(action.metavar, str) else None
    if value is None and action.choices is not None:
        value = "{" + ",".join(map(str, action.choices)) + "}"
    value = value or (action.dest.upper() if action.option_strings else action.dest)
    return f"{value} [{value} ...]" if action.nargs == "+" else value


def _meaning(action: argparse.Action) -> str:
    text = (action.help or "").replace("%%", "%")
    default = action.default
    told = default in (None, False, argparse.SUPPRESS, [], "") or "default" in text
    if action.required and action.option_strings:
        text = f"{text}; must be given" if text else "must be given"
    elif not told and action.option_strings:
        text = f"{text} (default: {default})".strip()
    return text.replace("|", "\\|")


def _sentence(text: str) -> str:
    text = text.replace("%%", "%")
    return text if text.endswith(".") else f"{text[:1].upper()}{text[1:]}."


def comments(source: str) -> dict[str, str]:
    """Full name without the package -> the comment that stands before it in a .proto file."""
    found: dict[str, str] = {}
    path: list[str] = []
    held: list[str] = []
    for raw in source.splitlines():
        line = raw.strip()
        if line.startswith("//"):
            held.append(line.removeprefix("//").strip())
            continue
        opening = _OPENING.match(line)
        member = _MEMBER.match(line) or _ENUM_VALUE.match(line)
        name = opening[2] if opening else member[1] if member else None
        if name and held:
            found[".".join([*path, name])] = " ".join(held)
        if opening and line.endswith("{"):
            path.append(opening[2])
        elif line == "}":
            path.pop()
        held = []
    return found


def protobuf_page() -> str:
    """docs/reference/protobuf.md."""
    file, said = fleet_pb2.DESCRIPTOR, comments(PROTO.read_text())
    opening = re.match(r"((?://.*\n)+)", PROTO.read_text())
    intro = " ".join((opening[1] if opening else "").replace("//", "").split())
    lines = ["# Protobuf", "", NOTE.format(source="fleet.proto"), "",
             f"Package `{file.package}`, `protos/sketchfleet/v1/fleet.proto`. {intro}"]  # fmt: skip
    for service in file.services_by_name.values():
        lines += ["", f"## {service.name}", "", said.get(service.name, ""), "",
                  "| call | request | response | |", "|---|---|---|---|"]  # fmt: skip
        for method in service.methods:
            sent, answered = (
                ("stream of " if streams else "") + _link(kind.name)
                for kind, streams in ((method.input_type, method.client_streaming),
                                      (method.output_type, method.server_streaming))
            )  # fmt: skip
            text = said.get(f"{service.name}.{method.name}", "")
            lines.append(f"| `{method.name}` | {sent} | {answered} | {text} |")
    lines += ["", "## Messages"]
    for message in file.message_types_by_name.values():
        lines += ["", *_message(message, said)]
    for enum in file.enum_types_by_name.values():
        lines += ["", *_enum(enum, said, "###")]
    return "\n".join(lines) + "\n"


def _message(message: Descriptor, said: dict[str, str]) -> Iterator[str]:
    name = _short(message)
    yield from (f"### {name}", "")
    if name in said:
        yield from (said[name], "")
    if not message.fields:
        yield "No fields."
        return
    yield from ("| field | type | number | |", "|---|---|---|---|")
    for field in message.fields:
        text = said.get(f"{name}.{field.name}", "")
        yield f"| `{field.name}` | {_type(field)} | {field.number} | {text} |"
    for enum in message.enum_types:
        yield from ("", *_enum(enum, said, "####"))


def _enum(enum: EnumDescriptor, said: dict[str, str], heading: str) -> Iterable[str]:
    name = _short(enum)
    parent = name.rpartition(".")[0]
    rows = [
        f"| `{v.name}` | {v.number} | {said.get(f'{name}.{v.name}', '')} |" for v in enum.values
    ]
    about = [said[name], ""] if name in said else []
    title = f"{heading} {parent + '.' if parent else ''}{enum.name}"
    return [title, "", *about, "| value | number | |", "|---|---|---|", *rows]


def _type(field: FieldDescriptor) -> str:
    kinds = {getattr(FieldDescriptor, f"TYPE_{name.upper()}"): name for name in SCALARS}
    of = field.message_type or field.enum_type
    name = kinds[field.type] if of is None else _link(_short(of))
    if field.is_repeated:
        return f"repeated {name}"
    explicit = of is None and field.has_presence
    return f"optional {name}" if explicit else name


def _short(of: Descriptor | EnumDescriptor) -> str:
    return str(of.full_name).removeprefix(f"{fleet_pb2.DESCRIPTOR.package}.")


def _link(name: str) -> str:
    return f"[{name}](#{name.lower().replace('.', '')})"


def pages() -> dict[Path, str]:
    """File -> what it should hold."""
    return {FOLDER / "cli.md": cli_page(), FOLDER / "protobuf.md": protobuf_page()}


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tools.reference", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing")
    check = parser.parse_args(argv).check
    stale = [p for p, text in pages().items() if not p.exists() or p.read_text() != text]
    for path in stale:
        if not check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(pages()[path])
        print(f"{path.relative_to(ROOT)} {'is out of date' if check else 'written'}")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
