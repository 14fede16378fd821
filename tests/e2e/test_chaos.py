"""Real processes under faults of many kinds: everything that was committed stays, bit for bit."""

from __future__ import annotations

import json

import pytest

from trials.cli import main

pytestmark = pytest.mark.e2e


def test_a_run_under_faults_ends_as_one_that_is_left_alone(tmp_path, capsys):
    out = tmp_path / "chaos"
    code = main(["chaos", "--faults", "10", "--rounds", "3", "--seed", "5", "--out", str(out)])
    said = capsys.readouterr().out
    found = json.loads(said.splitlines()[-1])
    logs = "\n".join(p.read_text(errors="replace")[-2000:] for p in out.glob("chaos/*.log"))
    assert code == 0, said + logs
    assert found["faults"] >= 10 and found["kinds"] >= 8
    assert found["rounds"] == 4 and found["holds"] and not found["problems"]
    assert found["rounds_of_same_updates"] == found["of_these_bit_identical"] >= 1


@pytest.mark.slow
def test_two_hundred_faults_over_twenty_rounds(tmp_path, capsys):
    out = tmp_path / "chaos"
    assert main(["chaos", "--faults", "200", "--seed", "1", "--out", str(out)]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["faults"] >= 200 and found["rounds"] == 21 and found["holds"]
