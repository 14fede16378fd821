"""The wheel: what is in it, what it asks for, and (slow) that it works where there is no source."""

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.utils import canonicalize_name

from edge_agent.bundle_wheels import metadata, requirements
from edge_agent.platforms import PLATFORMS
from tools import check_wheels, installed

ROOT = Path(__file__).parents[1]
PACKAGES = ("coordinator", "edge_agent", "protos", "profiles", "trials")
HEAVY = {"torch", "transformers", "accelerate", "peft", "bitsandbytes"}
NEEDED_AT_RUN_TIME = (
    "coordinator/web/templates/base.html",
    "coordinator/web/static/style.css",
    "edge_agent/shipped/constraints/jetpack6.txt",
    "edge_agent/shipped/deploy/install.sh",
    "edge_agent/shipped/deploy/systemd/sketchfleet-agent.service",
    "profiles/boards/orin-nano-8gb.toml",
    "profiles/links/lte.toml",
    "profiles/models/qwen2.5-coder-1.5b.json",
    "protos/sketchfleet/v1/fleet_pb2.py",
    "trials/nano_code/model.safetensors",
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return installed.build(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def names(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_it_is_pure_python_for_every_python_from_3_10(wheel):
    assert wheel.name.endswith("-py3-none-any.whl")
    assert metadata(wheel)["Requires-Python"] == ">=3.10"


@pytest.mark.parametrize("name", NEEDED_AT_RUN_TIME)
def test_it_holds_what_is_read_at_run_time(names, name):
    assert name in names


def test_it_holds_every_file_of_its_packages_and_no_other(names):
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", *PACKAGES],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if listed.returncode:
        pytest.skip("not a git checkout")
    tracked = {name for name in listed.stdout.split("\0") if name and (ROOT / name).exists()}
    assert not tracked - names
    shipped = {name for name in names if name.startswith("edge_agent/shipped/")}
    strange = {n for n in names - tracked - shipped if ".dist-info/" not in n}
    assert not strange


def test_its_programs_are_those_of_the_project(wheel):
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith("entry_points.txt"))
        told = archive.read(name).decode()
    for program in ("sketchfleet-agent", "sketchfleet-coordinator", "sketchfleet-trial"):
        assert f"{program} = " in told


def asked(wheel, extras, python="3.10"):
    there = PLATFORMS["jetpack6"].environment(python)
    return {canonicalize_name(need.name) for need in requirements(wheel, extras, there)}


@pytest.mark.parametrize("extras", [["agent"], ["coordinator"], ["agent", "serve"], ["gguf"]])
def test_no_torch_where_nothing_trains(wheel, extras):
    assert not asked(wheel, extras) & HEAVY
    assert asked(wheel, ["train"]) >= HEAVY


def test_agent_and_coordinator_do_not_bring_each_others_packages(wheel):
    both = asked(wheel, ["agent"]), asked(wheel, ["coordinator"])
    assert both[0] - asked(wheel, []) == {"packaging", "psutil"}
    assert "psutil" not in both[1]


def test_what_python_3_10_lacks_is_asked_for_there_alone(wheel):
    backports = {"tomli", "async-timeout"}
    assert backports <= asked(wheel, [], "3.10")
    assert not backports & asked(wheel, [], "3.11")


def test_every_extra_that_an_error_names_is_there(wheel):
    import re

    known = set(metadata(wheel).get_all("Provides-Extra"))
    named = set()
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            text = path.read_text()
            named |= set(re.findall(r"MissingExtraError\([^)]*, \"([a-z]+)\"\)", text))
            named |= set(re.findall(r"sketchfleet\[([a-z]+)\]", text))
    assert named and named <= known, named - known


def test_the_table_and_the_line_say_what_failed():
    outcomes = [
        check_wheels.Outcome("3.10", "agent", mb=151.2, seconds=2),
        check_wheels.Outcome("3.11", "agent", failed="CheckError: broken"),
        check_wheels.Outcome("3.12", "not on the PATH", absent=True),
    ]
    lines = check_wheels.table(outcomes).splitlines()
    assert lines[0].split() == ["Python", "what", "trainer", "MB", "s", "outcome"]
    assert [line.split("  ")[-1] for line in lines[1:]] == ["ok", "CheckError: broken", "-"]
    assert "151" in lines[1]


def test_an_interpreter_is_run_and_not_only_looked_up(tmp_path, monkeypatch):
    liar = tmp_path / "python3.12"
    liar.write_text("#!/bin/sh\necho 3.9 /usr/bin/python3.9\n")
    liar.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert installed.interpreter("3.12") is None
    assert installed.interpreter("3.13") is None
    liar.write_text("#!/bin/sh\necho 3.12 /right\n")
    assert installed.interpreter("3.12") == "/right"


@pytest.mark.slow
def test_installed_from_wheels_a_round_is_finished(tmp_path):
    """This Python alone; `python -m tools.check_wheels` does it with every one."""
    version = f"3.{sys.version_info[1]}"
    done = subprocess.run(
        [sys.executable, "-m", "tools.check_wheels", "--pythons", version],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    told = json.loads(done.stdout.splitlines()[-1])
    failed = [outcome["failed"] for outcome in told["outcomes"] if outcome["failed"]]
    if any("No matching distribution" in f or "connection" in f.lower() for f in failed):
        pytest.skip("no package index answers from here")
    assert not failed
    sizes = {outcome["what"]: outcome["mb"] for outcome in told["outcomes"]}
    assert sizes["agent, inference"] < 400
