"""What every command-line program of the project does alike: how it ends, what it is, completion.

Imports nothing heavy: `--help` passes through here.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import re
import select
import sys
import textwrap
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from profiles.errors import DISK_ERRORS, ExitCode, MissingExtraError, SketchfleetError

if TYPE_CHECKING:
    from profiles.layers import Layered

SHELLS = {
    "bash": "~/.local/share/bash-completion/completions/{program}",
    "zsh": "~/.zfunc/_{program}, after `fpath+=~/.zfunc` and `autoload -U compinit; compinit`",
    "fish": "~/.config/fish/completions/{program}.fish",
}
"""Where each looks for the completions of a program."""


class DiskError(SketchfleetError):
    """A disk is full, read-only or failing."""


def version() -> str:
    """The installed version of Sketchfleet; "0" where it runs from its sources."""
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as installed

    try:
        return installed("sketchfleet")
    except PackageNotFoundError:
        return "0"


def perform(
    program: str, work: Callable[[], int], *, extra: str, packages: Collection[str] = ()
) -> int:
    """Runs a command, tells what went wrong in one sentence, and returns how the program ends.

    extra: what to install where one of `packages` is missing. Defects keep their traceback.
    """
    try:
        code = work()
        _flush()
        return code
    except SystemExit:  # of --help, --version and a wrong command line
        _send()
        raise
    except SketchfleetError as error:
        return _tell(program, error)
    except ModuleNotFoundError as error:
        if error.name is None or error.name not in packages:
            raise
        return _tell(program, MissingExtraError(error.name, extra))
    except KeyboardInterrupt:
        return ExitCode.INTERRUPTED
    except BrokenPipeError:
        if not _reader_gone():
            raise
        _silence()
        return ExitCode.OK
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        place = error.filename or "what it writes to"
        return _tell(program, DiskError(
            f"{place} cannot be used ({error.strerror}); make room or see to its disk, then start "
            "again: nothing is lost"
        ))  # fmt: skip


def add_common(parser: argparse.ArgumentParser, commands: Any) -> None:
    """`--version`, `completion` and what the exit codes mean. commands: the parser's subparsers."""
    parser.add_argument("--version", action=_Version, nargs=0, help="say which version this is")
    parser.formatter_class = _Lines
    lines = [f"  {code:<4} {code.meaning.partition(';')[0]}" for code in ExitCode]
    parser.epilog = "\n".join(["exit codes:", *lines])
    places = "; ".join(f"{shell}: {at.format(program=parser.prog)}" for shell, at in SHELLS.items())
    completion = commands.add_parser(
        "completion",
        help="print completions for a shell",
        description=f"Prints completions for a shell. Where they go: {places}.",
    )
    completion.add_argument("shell", choices=tuple(SHELLS))
    completion.set_defaults(perform=lambda args: _completion(parser, args.shell))


def settings_options(file: str) -> argparse.ArgumentParser:
    """--config and --set of every command that reads the settings file of this name; a parent."""
    parent = argparse.ArgumentParser(add_help=False)
    parent.add_argument(
        "--config", type=Path, metavar="FILE",
        help=f"the settings (default: {file} here, else this user's, else the system's)",
    )  # fmt: skip
    parent.add_argument(
        "--set", action="append", default=[], metavar="SECTION.KEY=VALUE",
        help="instead of what the file and the environment say; may be repeated",
    )  # fmt: skip
    return parent


def add_config(commands: Any, parent: argparse.ArgumentParser, prefix: str) -> Any:
    """Registers `config`, which shows the settings; returns its parser. parent: --config, --set."""
    config = commands.add_parser(
        "config",
        parents=[parent],
        help="the settings, and where each comes from",
        description=f"Prints the settings that the file, the environment ({prefix}__SECTION__KEY) "
        "and --set give, each with where it comes from. Secrets are hidden.",
    )
    config.add_argument("--effective", action="store_true", help="the defaults too")
    config.add_argument("--json", action="store_true", help="print JSON")
    return config


def show_settings(found: Layered[Any], args: argparse.Namespace) -> int:
    """Does what `config` is asked for."""
    from profiles.layers import settings_in_force, settings_text

    rows = settings_in_force(found, args.effective)
    if args.json:
        print(json.dumps([dataclasses.asdict(row) for row in rows], indent=2))
    else:
        print(settings_text(rows))
    return ExitCode.OK


def at_least(least: float) -> Callable[[str], int]:
    """The `type` of an argument that is a whole number, no smaller than this."""

    def whole(text: str) -> int:
        if not re.fullmatch(r"[+-]?\d+", text) or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of {least:g} or more")
        return int(text)

    return whole


def above_zero(text: str) -> float:
    """The `type` of an argument that is a number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return number


class _Lines(argparse.HelpFormatter):
    """Keeps lines apart, and hangs what does not fit the terminal below its words."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n".join(
            textwrap.fill(line, width, initial_indent=indent,
                          subsequent_indent=indent + 7 * " " * line.startswith("  "))
            for line in text.splitlines()
        )  # fmt: skip


class _Version(argparse.Action):
    """Looks the version up when asked: reading the installation takes longer than all of --help."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        with contextlib.suppress(BrokenPipeError):
            print(f"{parser.prog} {version()}")
        parser.exit()


def _completion(parser: argparse.ArgumentParser, shell: str) -> int:
    import shtab

    for action in _actions(parser):
        if action.type is Path:
            folder = str(action.metavar or "").split("|")[0] == "FOLDER"
            vars(action)["complete"] = shtab.DIR if folder else shtab.FILE
    print(shtab.complete(parser, shell))
    return ExitCode.OK


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Every argument of a program and of its commands."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for inner in set(action.choices.values()):
                yield from _actions(inner)


def _tell(program: str, error: SketchfleetError) -> int:
    from profiles.events import suits

    _send()  # what was found before stands above
    priority = "<3>" if suits(sys.stderr) == "journal" else ""
    print(f"{priority}{program}: {error}", file=sys.stderr)
    return error.exit_code


def _flush() -> None:
    """Sends what was printed on its way while it can still be told that it did not get there."""
    if sys.stdout is not None:
        sys.stdout.flush()


def _send() -> None:
    """The same where that does not matter any more."""
    try:
        _flush()
    except OSError:
        _silence()


def _reader_gone() -> bool:
    """Whether it is standard output that nobody reads any more, and no other pipe."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _silence() -> None:
    """What is still to be written goes nowhere; else the interpreter complains as it ends."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
