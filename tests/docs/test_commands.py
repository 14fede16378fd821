"""Every command and setting that the pages name exists; what they show as commands can be run."""

from __future__ import annotations

import argparse
import contextlib
import io
import re
import shutil
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from coordinator.cli import make_parser as coordinator_parser
from coordinator.config import RunConfig
from edge_agent.cli import make_parser as agent_parser
from edge_agent.config import AgentConfig
from tools.page_commands import Step, programs, script, steps
from trials.cli import make_parser as trial_parser

ROOT = Path(__file__).resolve().parents[2]
GENERATED = ("cli.md", "protobuf.md", "config.md")
PAGES = sorted(p for p in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]
               if p.name not in GENERATED)  # fmt: skip
RUN_IN_SECONDS = ("docs/bad-links.md", "docs/boards.md")
RUN_IN_MINUTES = ("docs/quick-start.md",)


@cache
def parsers() -> dict[str, argparse.ArgumentParser]:
    made = (make() for make in (coordinator_parser, agent_parser, trial_parser))
    return {parser.prog: parser for parser in made}


def below(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    found = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    return dict(found[0].choices) if found else {}


def fault(words: list[str]) -> str | None:
    """What the program's own parser says against a whole command line."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        try:
            parsers()[words[0]].parse_args(words[1:])
        except SystemExit as ended:
            return None if ended.code in (0, None) else said.getvalue().splitlines()[-1]
    return None


def fault_of_mention(words: list[str]) -> str | None:
    """The same of part of one, as in a sentence: commands and options must exist."""
    at = [parsers()[words[0]]]
    rest = words[1:]
    while rest and below(at[0]) and not rest[0].startswith("-"):
        alternatives = re.split(r"\\?\|", rest[0])
        unknown = [word for word in alternatives if word not in below(at[0])]
        if unknown:
            return f"{at[0].prog} has no command {unknown[0]}"
        at, rest = [below(at[0])[word] for word in alternatives], rest[1:]
    options = [word.partition("=")[0] for word in rest if word.startswith("--")]
    known = set().union(*(parser._option_string_actions for parser in at))
    lacking = [option for option in options if option not in known]
    return f"{at[0].prog} has no {lacking[0]}" if lacking else None


def in_blocks(found: list[Step]) -> list[list[str]]:
    names = frozenset(parsers())
    texts = ["\n".join(s.commands) if s.kind == "commands" else s.text for s in found
             if s.kind == "commands" or s.where in ("", "sh", "bash", "text")]  # fmt: skip
    return [words for text in texts for words in programs(text, names)]


def mentions(page: Path) -> list[list[str]]:
    """Commands in inline code."""
    prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    codes = (code.split() for code in re.findall(r"`([^`]+)`", prose))
    return [words for words in codes if words and words[0] in parsers()]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_command_of_a_page_is_one_that_its_program_takes(page: Path) -> None:
    faults = [f"{' '.join(words)}: {why}" for words in in_blocks(steps(page))
              if not {"[options]", "…", "..."} & set(words) and (why := fault(words))]  # fmt: skip
    faults += [f"{' '.join(words)}: {why}" for words in mentions(page)
               if (why := fault_of_mention(words))]  # fmt: skip
    assert not faults


def test_commands_are_found_at_all() -> None:
    assert sum(len(in_blocks(steps(page))) for page in PAGES) > 40
    assert sum(len(mentions(page)) for page in PAGES) > 40
    assert fault(["sketchfleet-agent", "run", "--faster"])
    assert fault_of_mention(["sketchfleet-agent", "sing"])


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_setting_of_a_page_is_one_that_is_known(page: Path) -> None:
    unknown = []
    for block in re.findall(r"^ *```toml[^\n]*\n(.*?)^ *```", page.read_text(), re.DOTALL | re.M):
        found = tomllib.loads("\n".join(line.strip() for line in block.splitlines()))
        if any(isinstance(value, list) for value in found.values()):
            continue  # a fleet.toml, which tests of its own read
        known = {(name, key) for config in (RunConfig, AgentConfig)
                 for name in config.model_fields for key in fields_of(config, name)}  # fmt: skip
        unknown += [f"[{name}] {key}" for name, section in found.items() for key in section
                    if (name, key) not in known]  # fmt: skip
    assert not unknown


def fields_of(owner: Any, section: str) -> set[str]:
    kind = owner.model_fields[section].annotation
    kinds = [kind, *getattr(kind, "__args__", ())]
    return {name for k in kinds if hasattr(k, "model_fields") for name in k.model_fields}


def run_page(page: str, folder: Path) -> str:
    """Runs a page's commands in what looks like a fresh checkout, offline; returns their output."""
    if subprocess.run(["unshare", "--net", "true"], check=False, capture_output=True).returncode:
        pytest.skip("no network namespace can be made here, which takes root")
    for name in ("coordinator", "edge_agent", "profiles", "protos", "trials"):
        (folder / name).symlink_to(ROOT / name)
    tools = folder / "bin"
    tools.mkdir()
    for prog, package in (("coordinator", "coordinator"), ("agent", "edge_agent"),
                          ("trial", "trials")):  # fmt: skip
        tool = tools / f"sketchfleet-{prog}"
        tool.write_text(f'#!/bin/sh\nexec {sys.executable} -m {package}.cli "$@"\n')
        tool.chmod(0o755)
    text = "ip link set lo up\n" + script(steps(ROOT / page))
    done = subprocess.run(
        ["unshare", "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc",
         "bash", "-c", text], cwd=folder, check=False, text=True, timeout=280,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
        env={"PATH": f"{tools}:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": str(folder),
             "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE",
             "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs unshare of util-linux")
@pytest.mark.parametrize("page", RUN_IN_SECONDS)
def test_the_commands_of_a_page_run(page: str, tmp_path: Path) -> None:
    run_page(page, tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs unshare of util-linux")
@pytest.mark.parametrize("page", RUN_IN_MINUTES)
def test_the_commands_of_a_long_page_run(page: str, tmp_path: Path) -> None:
    run_page(page, tmp_path)


def test_every_page_with_commands_is_run_or_followed_by_the_field_trial() -> None:
    shown = {p.relative_to(ROOT).as_posix() for p in PAGES
             if any(step.kind == "commands" for step in steps(p))}  # fmt: skip
    assert shown <= {*RUN_IN_SECONDS, *RUN_IN_MINUTES, "docs/field-trial.md"}
