"""constraints/*.txt: what they pin, and that a resolver agrees for each platform's tags."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from edge_agent.platforms import PLATFORMS
from tools import lock_platforms

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NO_ANSWER = re.compile(r"dns error|error sending request|Connect|timed out|No route|tunnel")


def file_of(name):
    return ROOT / "constraints" / f"{name}.txt"


def pins(path):
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", line) for line in lines), lines
    found = {canonicalize_name(name): version for name, version in (x.split("==") for x in lines)}
    assert len(found) == len(lines), "a package is pinned twice"
    return found


def asked_for(name, python):
    """What pyproject.toml asks for there: its own requirements and those of the extras."""
    extras = {"", *lock_platforms.EXTRAS[name]}
    environment = PLATFORMS[name].environment(python)
    optional = PROJECT["optional-dependencies"]
    listed = [*PROJECT["dependencies"], *(text for e in extras if e for text in optional[e])]
    for text in listed:
        wanted = Requirement(text)
        if wanted.name != "sketchfleet" and (
            wanted.marker is None or wanted.marker.evaluate(environment)
        ):
            yield wanted


def test_every_platform_has_its_file_and_every_file_its_platform():
    assert {path.stem for path in (ROOT / "constraints").iterdir()} == set(PLATFORMS)


@pytest.mark.parametrize("name", PLATFORMS)
def test_everything_asked_for_is_pinned_within_its_range(name):
    pinned = pins(file_of(name))
    for python in PLATFORMS[name].pythons:
        for wanted in asked_for(name, python):
            version = pinned.get(canonicalize_name(wanted.name))
            assert version is not None, f"{wanted.name} is not pinned; {lock_platforms.__doc__}"
            assert version in wanted.specifier, f"{wanted} against {version}"


@pytest.mark.parametrize("name", PLATFORMS)
def test_no_registry_is_named(name):
    text = file_of(name).read_text()
    assert "://" not in text
    assert not re.search(r"\b[\w-]+\.(com|dev|io|net|org)\b", text)
    assert not re.search(r"^\s*-", text, re.MULTILINE), "options belong to whoever runs pip"


@pytest.mark.parametrize("name", [name for name in PLATFORMS if name.startswith("x86")])
def test_x86_pins_are_what_the_checks_run_with(name):
    tested = pins(ROOT / "constraints.txt")
    differ = {
        package: (version, tested[package])
        for package, version in pins(file_of(name)).items()
        if tested.get(package, version) != version
    }
    assert not differ


def test_the_cpu_file_leaves_cuda_alone():
    assert not [
        name for name in pins(file_of("x86-cpu")) if name.startswith(lock_platforms.CUDA_OF_TORCH)
    ]


def test_every_python_of_a_platform_is_one_that_the_project_admits():
    admitted = SpecifierSet(PROJECT["requires-python"])
    assert all(python in admitted for p in PLATFORMS.values() for python in p.pythons)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "python"), [(n, v) for n, p in PLATFORMS.items() for v in p.pythons]
)
def test_the_resolver_finds_the_pins_and_nothing_else(name, python):
    """For the platform's tags and wheels only: every pin has a wheel there, and none is missing."""
    try:
        found = lock_platforms.resolve(PLATFORMS[name], python, file_of(name))
    except lock_platforms.LockError as error:
        if NO_ANSWER.search(str(error)):
            pytest.skip("no package index answers from here")
        raise
    assert found == pins(file_of(name))
