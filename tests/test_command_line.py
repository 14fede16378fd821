"""What all three programs promise whoever types: exit codes, completion, a clean end."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from profiles.errors import ExitCode

ROOT = Path(__file__).resolve().parent.parent
PROGRAMS = {
    "sketchfleet-coordinator": "coordinator.cli",
    "sketchfleet-agent": "edge_agent.cli",
    "sketchfleet-trial": "trials.cli",
}
every_program = pytest.mark.parametrize("program", PROGRAMS)


def cli(program: str):
    return importlib.import_module(PROGRAMS[program])


def leaves(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    inner = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    for action in inner:
        for child in action.choices.values():
            yield from leaves(child)
    if not inner:
        yield parser


# --- codes ----------------------------------------------------------------------------------------


@every_program
def test_a_wrong_command_line_ends_with_2_and_the_usage(program, capsys):
    for words in ([], ["nonsense"], ["completion", "tcsh"]):
        with pytest.raises(SystemExit) as ended:
            cli(program).main(words)
        assert ended.value.code == ExitCode.USAGE
        said = capsys.readouterr().err
        assert said.startswith(f"usage: {program} ") and "error: " in said


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("sketchfleet-coordinator", ["serve", "--config", "wrong.toml"]),
        ("sketchfleet-coordinator", ["serve", "--config", "missing.toml"]),
        ("sketchfleet-coordinator", ["config", "--config", "right.toml", "--set", "run.rounds=x"]),
        ("sketchfleet-agent", ["run", "--config", "wrong.toml"]),
        ("sketchfleet-agent", ["config", "--set", "data.inclde=x"]),
        ("sketchfleet-trial", ["run", "wrong.toml", "--out", "out"]),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_wrong_settings_end_with_78(tmp_path, monkeypatch, capsys, program, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wrong.toml").write_text("[nonsense]\nkey = 1\n")
    (tmp_path / "right.toml").write_text('[run]\nname = "a"\n[model]\nbase = "b"\n')
    assert cli(program).main(words) == ExitCode.SETTINGS
    said = capsys.readouterr().err
    assert said.startswith(f"{program}: ") and said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_coordinator_that_does_not_answer_ends_with_75(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "agent.toml").write_text('[data]\ninclude = ["."]\n')
    with socket.socket() as nobody:  # bound, and never listening
        nobody.bind(("127.0.0.1", 0))
        word = f"abcdefgh.{'s' * 24}@127.0.0.1:{nobody.getsockname()[1]}#sha256:{'p' * 43}"
        assert cli("sketchfleet-agent").main(["enroll", word]) == ExitCode.LATER
    assert "nobody answers" in capsys.readouterr().err


def test_what_is_found_wanting_ends_with_1(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli("sketchfleet-coordinator").main(["devices", "--state", "gone"]) == ExitCode.ERROR
    assert "is not a coordinator's state folder" in capsys.readouterr().err


@pytest.mark.e2e
def test_ctrl_c_ends_a_waiting_agent_with_130_and_no_traceback(tmp_path):
    (tmp_path / "agent.toml").write_text('[data]\ninclude = ["."]\n')
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes the call, says nothing
        word = f"abcdefgh.{'s' * 24}@127.0.0.1:{silent.getsockname()[1]}#sha256:{'p' * 43}"
        with subprocess.Popen(
            [sys.executable, "-m", "edge_agent.cli", "enroll", word], cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE, text=True,
        ) as agent:  # fmt: skip
            silent.settimeout(30)
            called, _ = silent.accept()
            agent.send_signal(signal.SIGINT)
            said = agent.communicate(timeout=30)[1]
            called.close()
    assert (agent.returncode, said) == (ExitCode.INTERRUPTED, "")
    left = [p.name for p in tmp_path.rglob("*") if p.is_file()]
    assert left == ["agent.toml"], "nothing half done"


@pytest.mark.parametrize("buffered", ["", "1"], ids=["buffered", "unbuffered"])
@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("sketchfleet-coordinator", ["plan", "--list"]),
        ("sketchfleet-coordinator", ["--help"]),
        ("sketchfleet-agent", ["completion", "bash"]),
        ("sketchfleet-trial", ["--version"]),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_a_reader_that_has_seen_enough_is_no_error(program, words, buffered):
    reading, writing = os.pipe()
    os.close(reading)  # as `head` does after its lines
    try:
        done = subprocess.run(
            [sys.executable, "-m", PROGRAMS[program], *words], stdout=writing, check=False,
            stderr=subprocess.PIPE, cwd=ROOT, env={**os.environ, "PYTHONUNBUFFERED": buffered},
        )  # fmt: skip
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (ExitCode.OK, b"")


# --- help, JSON, completion -----------------------------------------------------------------------


@every_program
def test_every_option_says_what_it_does_and_no_name_means_two_things(program):
    kinds: dict[str, set[object]] = {}
    for parser in leaves(cli(program).make_parser()):
        for action in parser._actions:
            assert action.help or not action.option_strings, f"{parser.prog} {action.dest}"
            for option in set(action.option_strings) & {"--json", "--config", "--state", "--set"}:
                kinds.setdefault(option, set()).add((action.nargs, action.type, action.dest))
    assert all(len(found) == 1 for found in kinds.values()), kinds


@every_program
def test_the_defaults_that_help_names_are_the_defaults(program):
    for parser in leaves(cli(program).make_parser()):
        for action in parser._actions:
            told = re.search(r"\(default: ([0-9.]+)\)", action.help or "")
            if told is not None and action.default is not None:
                assert float(told[1]) == float(action.default), (parser.prog, action.dest)


@every_program
def test_bash_completes_commands_options_and_choices(program):
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("bash is not installed")
    words = [sys.executable, "-m", PROGRAMS[program], "completion", "bash"]
    said = subprocess.run(words, capture_output=True, text=True, check=True, cwd=ROOT)
    script = said.stdout
    function = f"_shtab_{program.replace('-', '_')}"

    def offered(*words: str) -> list[str]:
        ask = (f"{script}\nCOMP_WORDS=({program} {' '.join(repr(w) for w in words)})\n"
               f"COMP_CWORD={len(words)}\n{function} {program} '{words[-1]}' ''\n"
               'printf "%s\\n" "${COMPREPLY[@]}"')  # fmt: skip
        done = subprocess.run([bash, "-c", ask], capture_output=True, text=True, check=True)
        return done.stdout.split()

    assert offered("comp")[0].startswith("comp") and "completion" in offered("comp")
    assert offered("completion", "f") == ["fish"]
    assert "--version" in offered("--v")


@every_program
@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_can_read_their_completions(program, shell, capsys, tmp_path):
    found = shutil.which(shell)
    if found is None:
        pytest.skip(f"{shell} is not installed (Debian: apt install {shell})")
    assert cli(program).main(["completion", shell]) == 0
    (tmp_path / "script").write_text(capsys.readouterr().out)
    done = subprocess.run([found, "-n", str(tmp_path / "script")], capture_output=True, text=True,
                          check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_a_token_can_be_made_by_a_program(tmp_path, capsys):
    coordinator = cli("sketchfleet-coordinator")
    state = ["--state", str(tmp_path / "state")]
    assert coordinator.main(["init", "--name", "fleet.example.org", *state]) == 0
    capsys.readouterr()
    out = tmp_path / "pi.join"
    assert coordinator.main(["token", "create", "--json", "--out", str(out), *state]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["address"] == "fleet.example.org:8471" and made["file"] == str(out)
    assert made["word"].startswith(made["id"]) and made["pin"] in made["word"]
    assert coordinator.main(["token", "list", "--json", *state]) == 0
    assert [token["id"] for token in json.loads(capsys.readouterr().out)] == [made["id"]]
    assert coordinator.main(["backup", str(tmp_path / "b"), "--json", *state]) == 0
    assert json.loads(capsys.readouterr().out)["target"] == str(tmp_path / "b")
