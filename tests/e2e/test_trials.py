"""Whole trials: run, interrupted, and over agents that somebody else started."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.e2e.conftest import ROOT, write_code
from tests.tiny_base import write_base
from trials.fleet import environment, free_port, write_toml
from trials.results import read_results
from trials.trial_report import against_bulk
from trials.tunnel import unavailable

pytestmark = pytest.mark.e2e
RUN = """
[run.run]
name = "tiny"
rounds = 1
[run.model]
base = "base"
[run.adapter]
rank = 8
[run.training]
sequence_tokens = 64
micro_batch = 2
local_steps = 2
min_local_steps = 2
checkpointing = false
[run.round]
gather_s = 0.2
quorum = 1.0
round_s = 60
max_round_s = 60
[run.evaluation]
sequences = 4
held_out_share = 0.25
"""
DEVICES = """
[[device]]
name = "desk"
data = { include = ["code"] }
[[device]]
name = "field"
up_bps = 4e6
down_bps = 8e6
rtt_s = 0.04
memory_mb = 1500
data = { include = ["code"] }
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trials")
    write_base(folder / "base", hidden=32, intermediate=64)
    write_code(folder / "code", ".py", lambda i: f"def f_{i}(x):\n    return x + {i}\n" * 20)
    (folder / "fleet.toml").write_text(RUN + DEVICES)
    return folder


def trial(*words):
    return subprocess.Popen(
        [sys.executable, "-m", "trials.cli", *map(str, words)], cwd=ROOT, env=environment(),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip


def leftovers():
    """Namespaces and links of trials that are still there."""
    links = subprocess.run(["ip", "-o", "link"], capture_output=True, text=True, check=False)
    return {line.split()[1] for line in links.stdout.splitlines() if " sfn" in line}


def test_a_trial_leaves_a_folder_with_everything_and_nothing_running(place):
    before, out = leftovers(), place / "out"
    process = trial("run", place / "fleet.toml", "--out", out)
    said = process.communicate(timeout=150)[0]
    assert process.returncode == 0, said
    assert "2 devices on this machine; links by" in said and "finished" in said
    for name in (
        "fleet.toml", "run.toml", "versions.json", "trial.json", "report.md", "report.json",
        "timeline.png", "logs/coordinator.log", "logs/desk.log",
    ):  # fmt: skip
        assert (out / name).is_file(), f"{name} is missing\n{said}"
    found = read_results(out)
    assert [(r["round"], r["device"], r["outcome"]) for r in found.ledger] == [
        (0, "desk", "done"), (0, "field", "done"), (1, "desk", "done"), (1, "field", "done"),
    ]  # fmt: skip
    rows = [r for r in found.ledger if r["round"] == 0]
    assert all(r["wait_s"] > 0 and r["pack_s"] > 0 and r["push_s"] > 0 for r in rows)
    field = next(r for r in rows if r["device"] == "field")
    assert field["link_up_bps"] == 4e6 and {r["device"] for r in found.links} == {"field"}
    assert json.loads((out / "versions.json").read_text())["kernel"]
    assert leftovers() <= before
    again = trial("run", place / "fleet.toml", "--out", out)
    assert "not empty" in again.communicate(timeout=60)[0] and again.returncode == 1


def test_ctrl_c_ends_everything_and_keeps_what_is_there(place):
    before, out = leftovers(), place / "cut"
    process = trial("run", place / "fleet.toml", "--out", out)
    until = time.monotonic() + 90
    while not (out / "fleet" / "field.log").is_file() and time.monotonic() < until:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 130, said
    assert "Traceback" not in said, said
    assert read_results(out).facts.outcome == "ended by Ctrl-C"
    assert "Ctrl-C" in (out / "report.md").read_text()
    assert leftovers() <= before
    running = [p for p in Path("/proc").glob("[0-9]*/cmdline") if str(out).encode() in _read(p)]
    assert not running, [_read(p) for p in running]


def _read(path):
    try:
        return path.read_bytes()
    except OSError:  # ended meanwhile
        return b""


@pytest.mark.slow
def test_a_remote_trial_drives_agents_that_were_started_by_hand(place, tmp_path):
    port = free_port()
    state = tmp_path / "state"
    names = "[[device]]\nname = 'ash'\n[[device]]\nname = 'oak'\n"
    base = json.dumps(str(place / "base"))
    (tmp_path / "fleet.toml").write_text(
        RUN.replace('"base"', base) + f"[run.server]\nlisten = '127.0.0.1:{port}'\n"
        f"plain_text = true\n"
        f"state = {json.dumps(str(state))}\n" + names
    )
    agents = []
    process = trial("run", tmp_path / "fleet.toml", "--out", tmp_path / "out", "--remote")
    try:
        until = time.monotonic() + 60
        while not (state / "join-token").is_file() and time.monotonic() < until:
            time.sleep(0.1)
        for name in ("ash", "oak"):
            folder = tmp_path / name
            folder.mkdir()
            write_toml(folder / "agent.toml", {
                "device": {"name": name}, "data": {"include": [str(place / "code")]},
                "coordinator": {"address": f"127.0.0.1:{port}", "plain_text": True,
                                "token_file": str(state / "join-token")},
                "model": {"base": str(place / "base")}, "state": {"folder": "state"},
            })  # fmt: skip
            with (folder / "log").open("wb") as log:
                agents.append(subprocess.Popen(
                    [sys.executable, "-m", "edge_agent.cli", "run", "--config",
                     str(folder / "agent.toml")],
                    stdout=log, stderr=log, env=environment(), cwd=ROOT,
                ))  # fmt: skip
        said = process.communicate(timeout=150)[0]
        assert [agent.wait(30) for agent in agents] == [0, 0], said
    finally:
        for one in (process, *agents):
            if one.poll() is None:
                one.kill()
    assert process.returncode == 0, said
    assert "ash is here" in said and "oak is here" in said
    found = read_results(tmp_path / "out")
    assert found.facts.remote and found.facts.outcome == "finished"
    assert {r["device"] for r in found.links} == {"ash", "oak"}, "as they estimate their links"
    assert {r["device"] for r in found.ledger} == {"ash", "oak"}
    assert all(r["link_up_bps"] > 0 for r in found.ledger if r["up_bytes"])
    assert (tmp_path / "out" / "logs" / "coordinator.log").is_file()


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))
def test_a_fleet_on_the_worst_link_finishes_sends_little_twice_and_nearly_all_that_tcp_would(
    tmp_path,
):
    out = tmp_path / "worst"
    process = trial("run", ROOT / "trials" / "fleets" / "worst_link.toml", "--out", out)
    said = process.communicate(timeout=1700)[0]
    assert process.returncode == 0, said
    found = read_results(out)
    assert found.facts.outcome == "finished" and found.rounds_merged == 3, said
    payload = sum(p.payload_bytes for p in found.phases)
    assert sum(p.resent_bytes for p in found.phases) < 0.01 * payload, said
    assert against_bulk(found, "down") >= 0.85 and against_bulk(found, "up") >= 0.85, said
