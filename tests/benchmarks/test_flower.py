"""What the comparison with Flower concludes; Flower itself is not needed here."""

import tomllib
from pathlib import Path

import pytest

from benchmarks import _flower_environment as environment
from benchmarks._flower_side import APP, _times
from benchmarks._race import Run, Version
from benchmarks.flower import ratio_of, result_of, row
from coordinator.state import StateFile
from protos.contract import Payload

FILE = StateFile(Path("adapter.bin"), Payload(1, "float32"))


def run_with(*ends, moved=()):
    versions = tuple(Version(number + 1, at, FILE) for number, at in enumerate(ends))
    return Run(began=90.0, opened=100.0, versions=versions, moved=tuple(moved), seeds={})


def test_time_runs_from_the_first_round_to_the_first_loss_that_is_low_enough():
    found = result_of(run_with(110.0, 130.0, 140.0), [3.0, 2.5, 2.4], target=2.5)
    assert (found.rounds_to_target, found.seconds_to_target) == (2, 30.0)
    assert found.startup_s == 10.0


def test_bytes_are_those_between_the_first_round_and_the_target():
    moved = [(95.0, 5, 7), (99.9, 6, 8), (112.0, 60, 80), (119.0, 70, 90), (125.0, 700, 900)]
    found = result_of(run_with(120.0, moved=moved), [1.0], target=1.0)
    assert (found.up_bytes, found.down_bytes, found.startup_bytes) == (64, 82, 14)


def test_a_target_that_was_not_reached_gives_no_ratio():
    found = result_of(run_with(110.0), [3.0], target=2.0)
    assert found.seconds_to_target is None
    assert ratio_of(50.0, found.seconds_to_target) is None
    assert ratio_of(50.0, 20.0) == 2.5
    assert " - " in row("Sketchfleet", found)


def test_rounds_are_read_as_the_server_writes_them(tmp_path):
    assert _times(tmp_path) == {}
    (tmp_path / "rounds.txt").write_text("0 100.5\n1 130.25\n")
    assert _times(tmp_path) == {0: 100.5, 1: 130.25}


def test_without_an_index_the_refusal_says_what_is_missing(tmp_path, monkeypatch):
    pins = tmp_path / "flower" / "requirements.txt"
    pins.parent.mkdir()
    pins.write_text("sketchfleet-no-such-package==1.0\n")
    monkeypatch.setattr(environment, "PINS", pins)
    monkeypatch.setattr(environment.venv, "create", lambda folder, **_: None)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    install = environment._install
    monkeypatch.setattr(environment, "_install", lambda python: install(Path("python3")))
    with pytest.raises(environment.PeerError, match=r"could not be installed .*package index"):
        environment.flower_commands(tmp_path / "venv")
    assert not list(tmp_path.glob("venv/flower-*")), "a failed install must not count as done"


def test_the_flower_app_names_components_that_are_there():
    with (APP / "pyproject.toml").open("rb") as file:
        components = tomllib.load(file)["tool"]["flwr"]["app"]["components"]
    for component in components.values():
        module, _, name = component.partition(":")
        source = (APP / f"{module.replace('.', '/')}.py").read_text()
        assert f"\n{name} = " in source
