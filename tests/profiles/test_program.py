"""How every program ends: a code for each way, one sentence, and never a traceback for a person."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import pytest

from profiles.errors import ExitCode, SketchfleetError
from profiles.program import (
    SHELLS,
    above_zero,
    add_common,
    at_least,
    perform,
    settings_options,
)

ROOT = Path(__file__).resolve().parents[2]


class LaterError(SketchfleetError):
    exit_code = ExitCode.LATER


def ends(work, **options) -> int:
    return perform("sketchfleet-x", work, extra="x", **options)


def raises(error):
    def work() -> int:
        raise error

    return work


@pytest.mark.parametrize(
    ("work", "code", "sentence"),
    [
        (lambda: 0, 0, ""),
        (lambda: 1, 1, ""),
        (raises(SketchfleetError("no such run; see `runs`")), 1, "no such run; see `runs`"),
        (raises(LaterError("nobody answers")), 75, "nobody answers"),
        (raises(ModuleNotFoundError("gone", name="scipy")), 1, "'sketchfleet[x]'"),
        (raises(KeyboardInterrupt()), 130, ""),
    ],
    ids=["done", "found wanting", "error", "later", "missing extra", "Ctrl-C"],
)
def test_every_way_to_end_has_its_code_and_sentence(capsys, work, code, sentence):
    assert ends(work, packages={"scipy"}) == code
    said = capsys.readouterr().err
    assert said.count("\n") == bool(sentence) and sentence in said
    assert not sentence or said.startswith("sketchfleet-x: ")


def test_defects_keep_their_traceback():
    with pytest.raises(ZeroDivisionError):
        ends(lambda: 1 // 0)
    with pytest.raises(ModuleNotFoundError):
        ends(raises(ModuleNotFoundError("gone", name="ours")), packages={"scipy"})


def test_a_broken_pipe_that_is_not_the_output_is_a_defect(monkeypatch):
    with Path(os.devnull).open("w") as out:
        monkeypatch.setattr(sys, "stdout", out)
        with pytest.raises(BrokenPipeError):
            ends(raises(BrokenPipeError()))


SCRIPT = """
import sys
from profiles.program import perform
def work():
    for number in range({lines}):
        print(number)
    return 0
sys.exit(perform("sketchfleet-x", work, extra="x"))
"""


@pytest.mark.parametrize("lines", [3, 100_000], ids=["a buffer full", "many buffers"])
def test_a_reader_that_has_seen_enough_is_no_error(lines):
    reading, writing = os.pipe()
    os.close(reading)  # as `head` does after its lines
    try:
        done = subprocess.run([sys.executable, "-c", SCRIPT.format(lines=lines)], stdout=writing,
                              stderr=subprocess.PIPE, cwd=ROOT, check=False)  # fmt: skip
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize("buffered", ["", "1"], ids=["at the end", "at once"])
def test_output_that_cannot_be_written_is_told(buffered):
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([sys.executable, "-c", SCRIPT.format(lines=3)], stdout=full,
                              stderr=subprocess.PIPE, text=True, cwd=ROOT, check=False,
                              env={**os.environ, "PYTHONUNBUFFERED": buffered})  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "cannot be used (No space left on device); make room" in done.stderr


def test_codes_are_the_ones_that_shells_and_service_managers_know():
    assert {code.name: int(code) for code in ExitCode} == {
        "OK": 0, "ERROR": 1, "USAGE": 2, "LATER": 75, "SETTINGS": 78, "INTERRUPTED": 130,
    }  # fmt: skip
    assert all(code.meaning for code in ExitCode)


def make() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="sketchfleet-x")
    commands = parser.add_subparsers(dest="command", required=True)
    work = commands.add_parser("work", parents=[settings_options("x.toml")], help="do it")
    work.add_argument("--out", type=Path, metavar="FOLDER")
    work.add_argument("--kind", choices=("round", "square"))
    add_common(parser, commands)
    return parser


@pytest.mark.parametrize("width", [40, 80, 200])
def test_help_fits_the_terminal(monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    assert max(map(len, make().format_help().splitlines())) <= width


def test_help_tells_the_exit_codes_and_a_version(capsys):
    parser = make()
    text = " ".join(parser.format_help().split())
    for code in ExitCode:
        assert f" {code:d} {code.meaning.partition(';')[0]}" in text
    with pytest.raises(SystemExit) as ended:
        parser.parse_args(["--version"])
    assert ended.value.code == 0 and capsys.readouterr().out.startswith("sketchfleet-x ")


@pytest.mark.parametrize("shell", SHELLS)
def test_completions_know_commands_options_choices_and_files(capsys, shell):
    parser = make()
    args = parser.parse_args(["completion", shell])
    assert args.perform(args) == 0
    text = capsys.readouterr().out
    for word in ("work", "config", "kind", "square", "completion"):
        assert word in text, word
    folders = {"bash": "_shtab_compgen_dirs", "zsh": "_files -/", "fish": "complete_directories"}
    assert folders[shell] in text


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        (at_least(1), "3", 3),
        (at_least(0), "0", 0),
        (above_zero, "0.5", 0.5),
        (above_zero, "2", 2.0),
    ],
)
def test_numbers_are_read(kind, text, value):
    assert kind(text) == value


@pytest.mark.parametrize(
    ("kind", "text"),
    [(at_least(1), "0"), (at_least(1), "-3"), (at_least(0), "x"), (at_least(0), "1.5"),
     (above_zero, "0"), (above_zero, "-1"), (above_zero, "nan"), (above_zero, "inf"),
     (above_zero, "")],
)  # fmt: skip
def test_a_number_that_does_not_fit_is_named_with_what_does(kind, text):
    with pytest.raises(
        argparse.ArgumentTypeError, match=r"is not a (whole number of|number above)"
    ):
        kind(text)
