"""The reference of settings: current, and with a meaning for every key."""

from __future__ import annotations

import pytest

from tools.config_reference import FILES, keys, main, page, sections


def test_the_page_is_current(capsys):
    assert main(["--check"]) == 0, capsys.readouterr().err


def test_a_page_that_is_out_of_date_is_told(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("tools.config_reference.ROOT", tmp_path)
    monkeypatch.setattr("tools.config_reference.PAGE", tmp_path / "config.md")
    monkeypatch.setattr("tools.config_reference.page", lambda: "# Settings\n")
    assert main(["--check"]) == 1
    assert "config.md is out of date; run: python -m tools.config_reference" in (
        capsys.readouterr().err
    )
    assert main([]) == 0 and main(["--check"]) == 0


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_every_table_and_key_says_what_it_is_for(file):
    silent = [
        f"{heading} {key.name}"
        for heading, model, told in sections(file.model)
        for key in keys(model)
        if not key.meaning or not told
    ]
    assert not silent, "write a string below the key, in the type that reads it"


def test_kinds_limits_units_and_defaults_are_the_types():
    lines = page().splitlines()
    for row in (
        "| `quorum` | number > 0, ≤ 1 |  | `0.8` | Share of the assigned devices",
        "| `memory_mb` | integer ≥ 64 | MB | none | Cap on the trainer process",
        '| `sequence_tokens` | integer ≥ 16 or `"auto"` | tokens | `512` |',
        '| `policy` | `"fastest"`, `"fairest"`, `"cheapest"` |  | `"fastest"` |',
        "| `name` | text like `^[a-z0-9][a-z0-9-]{0,62}$` |  | **needed** |",
        "| `include` | list: text |  | `[]` | Folders, files or globs",
    ):
        assert any(line.startswith(row) for line in lines), row
    assert "### [[device]]" in lines and "### [device.outage]" in lines
