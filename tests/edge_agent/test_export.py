"""A device's own adapter comes out as a folder, or one sentence says why it does not."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
import types

import pytest

from edge_agent.cli import main
from edge_agent.journal import Journal
from profiles.errors import SketchfleetError
from profiles.model import ModuleShape
from protos.contract import AdapterSpec, LocalReport

SPEC = AdapterSpec(
    run_id="team-code", base="org/base", base_revision="", base_digest="b" * 64, rank=4, alpha=8.0,
    use_rslora=False, seed=7, modules=(ModuleShape("layer", 8, 8),),
)  # fmt: skip


@pytest.fixture
def asked(monkeypatch):
    """What the exporter of the training room was asked for; it writes nothing itself."""
    calls = []
    room = types.ModuleType("edge_agent.training.personal")
    room.export_personal = lambda *given: calls.append(given)
    monkeypatch.setitem(sys.modules, room.__name__, room)
    return calls


@pytest.fixture
def export(tmp_path, capsys):
    """The command on a device with these settings: (exit code, what it said)."""

    def with_settings(run="team-code", out="adapter", text=""):
        config = tmp_path / "agent.toml"
        config.write_text('[data]\ninclude = ["code"]\n[state]\nfolder = "state"\n' + text)
        words = ["--config", str(config), "--run", run, "--out", str(tmp_path / out)]
        code = main(["export", *words])
        said = capsys.readouterr()
        return code, (said.out + said.err).strip()

    return with_settings


@pytest.fixture
def keep(tmp_path):
    """Leaves a home of this run in the state folder."""

    def of_run(spec=SPEC, data=b"factors"):
        journal = Journal(tmp_path / "state")
        (tmp_path / "new").write_bytes(data)
        journal.add(LocalReport("a", "done"), None, (spec, tmp_path / "new"))
        path = journal.home_path(spec)
        journal.close()
        return path

    return of_run


def refused(said, *words):
    code, text = said
    assert code == 1 and text.startswith("sketchfleet-agent: ") and "\n" not in text, text
    for word in words:
        assert word in text


def test_the_exporter_gets_the_home_and_the_spec_of_the_run(export, keep, asked, tmp_path):
    path = keep()
    assert export() == (0, f"{tmp_path / 'adapter'}: this device's own adapter of run team-code")
    assert asked == [(path, SPEC, "org/base", tmp_path / "adapter")]


def test_the_base_is_named_as_this_device_finds_it(export, keep, asked, tmp_path):
    keep()
    (tmp_path / "nano").mkdir()
    assert export(text='[model]\nbase = "nano"\n')[0] == 0
    assert asked[0][2] == str(tmp_path / "nano")


def test_a_run_that_left_nothing_here_is_named_with_those_that_did(export, keep, asked, tmp_path):
    refused(export("other"), "nothing of a run 'other'", "it keeps nothing", "[personal] ditto")
    assert not (tmp_path / "state").exists(), "asking makes no state folder"
    keep()
    keep(dataclasses.replace(SPEC, run_id="docs"))
    refused(export("other"), "'other'", "it keeps something of: docs, team-code")
    assert asked == []


def test_a_home_that_is_damaged_is_told(export, keep, asked):
    keep().write_bytes(b"rot")
    refused(export(), "'team-code' is damaged or gone")
    assert asked == []


def test_a_folder_that_is_there_is_left_alone(export, keep, asked, tmp_path):
    keep()
    (tmp_path / "adapter").mkdir()
    refused(export(), "adapter already exists", "--out")
    assert asked == []


def test_a_home_with_nothing_personal_in_it_is_told_in_the_words_of_its_reader(
    export, keep, asked, monkeypatch
):
    def find_nothing(*given):
        raise SketchfleetError("run team-code keeps nothing personal; use a method that does")

    monkeypatch.setattr(
        sys.modules["edge_agent.training.personal"], "export_personal", find_nothing
    )
    keep()
    refused(export(), "nothing personal")


def test_a_missing_extra_is_named(export, keep, asked, monkeypatch):
    keep()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    refused(export(), "safetensors is not installed", "sketchfleet[train]")
