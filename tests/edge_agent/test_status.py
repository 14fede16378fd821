"""The status as a person reads it."""

from __future__ import annotations

import json
import os

import pytest

from edge_agent.status import StatusError, StatusFile, beats, describe, read_status


def test_what_was_shown_is_read_with_whether_the_agent_runs(tmp_path):
    StatusFile(tmp_path)("training", round=2, step=3, steps=20, loss=2.5, joules=None)
    found = read_status(tmp_path)
    assert found["running"] and found["pid"] == os.getpid() and "joules" not in found
    assert [path.name for path in tmp_path.iterdir()] == ["status.json"]


def test_a_line_tells_progress_heat_and_why_it_waits():
    shown = {"phase": "training", "at": 100.0, "pid": 1, "running": True, "round": 4, "k": 8,
             "step": 5, "steps": 20, "loss": 2.3456, "tokens_per_s": 812.3, "temperature_c": 71.4,
             "memory_bytes": 2_500_000_000, "joules": 5400.0,
             "held_back": "on battery; goes on when plugged in"}  # fmt: skip
    assert describe(shown, 103.0) == (
        "training: step 5 of 20, round 4, k=8, loss 2.346, 812 tokens/s, 2.50 GB, 71 °C, 5.4 kJ, "
        "on battery; goes on when plugged in, 3 s ago"
    )


def test_a_line_leaves_out_what_is_not_known():
    assert describe({"phase": "waiting", "at": 1.0, "running": True, "message": ""}, 2.0) == (
        "waiting, 1 s ago"
    )
    gone = {"phase": "away", "at": 1.0, "running": False, "message": "outside the hours"}
    assert describe(gone, 2.0) == "not running (last: away): outside the hours, 1 s ago"


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"pid": 1, "at": "x", "phase": "y"}'])
def test_a_damaged_status_is_told(tmp_path, text):
    (tmp_path / "status.json").write_text(text)
    with pytest.raises(StatusError, match="damaged"):
        read_status(tmp_path)


def test_no_status_is_told(tmp_path):
    with pytest.raises(StatusError, match="no agent has run"):
        read_status(tmp_path)
    (tmp_path / "status.json").write_text(json.dumps({"pid": 2**22 + 1, "at": 1, "phase": "x"}))
    assert read_status(tmp_path)["running"] is False


def test_a_sign_of_life_is_fresh_for_three_minutes_and_of_a_running_agent(tmp_path):
    shown = StatusFile(tmp_path)
    shown.beat()  # nothing to keep fresh yet
    shown("waiting")
    at = (tmp_path / "status.json").stat().st_mtime
    assert beats(tmp_path, at + 179)
    assert not beats(tmp_path, at + 181)
    os.utime(tmp_path / "status.json", (at - 500, at - 500))
    assert not beats(tmp_path, at)
    shown.beat()
    assert beats(tmp_path, at)
    (tmp_path / "status.json").write_text('{"phase": "waiting", "at": 1, "pid": 4194305}')
    assert not beats(tmp_path, at), "no such process"
