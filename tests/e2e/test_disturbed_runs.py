"""Runs that replay the undisturbed one's plans and are disturbed: all end in the same bits."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import sqlite3
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.e2e.conftest import Outcome, Yard, logs
from trials.fleet import LocalFleet

pytestmark = pytest.mark.e2e


def rows(fleet: LocalFleet, query: str, *values: Any) -> list[tuple[Any, ...]]:
    """What the coordinator's database says now; nothing before it exists."""
    where = f"{(fleet.state / 'coordinator.sqlite').as_uri()}?mode=ro"
    try:
        with contextlib.closing(sqlite3.connect(where, uri=True, timeout=5)) as db:
            return db.execute(query, values).fetchall()
    except sqlite3.OperationalError:
        return []


def events(path: Path, name: str) -> list[dict[str, Any]]:
    """The log events that begin so."""
    found = [json.loads(line) for line in path.read_text().splitlines() if line.startswith("{")]
    return [e for e in found if e["event"].startswith(name)]


def assert_same_bits(got: Outcome, want: Outcome, fleet: LocalFleet) -> None:
    """Updates first, since they say which device differs; then every version of the adapter."""

    def updates(outcome: Outcome) -> dict[str, str | None]:
        return {a.assignment.assignment_id: a.update_digest for a in outcome.assignments}

    assert updates(got) == updates(want), logs(fleet)
    assert got.digests == want.digests, logs(fleet)
    assert all(a.report is not None and a.report.outcome == "done" for a in got.assignments)


def test_replayed_plans_give_the_same_bits_whatever_the_order_of_finishing(
    yard: Yard, first_run: Outcome, plans: Path
) -> None:
    # The slow link moves from one device to another, so another one finishes last.
    devices = [
        yard.device("lab"),
        dataclasses.replace(yard.device("field"), up="", down=""),
        dataclasses.replace(yard.device("desk"), up="4M", down="40M"),
    ]
    with yard.replaying("other-order", plans, devices) as fleet:
        second = yard.finish(fleet)
    assert (first_run.arrival_order(0)[-1], second.arrival_order(0)[-1]) == ("field", "desk")
    assert_same_bits(second, first_run, fleet)


def test_an_agent_killed_in_mid_push_resumes_it_and_the_result_is_the_same(
    yard: Yard, first_run: Outcome, plans: Path
) -> None:
    (size,) = {a.update_bytes for a in first_run.assignments
               if a.assignment.assignment_id == "yard.0.field"}  # fmt: skip
    assert size is not None
    with yard.replaying("agent-killed", plans) as fleet:

        def held_bytes() -> int:
            found = rows(
                fleet, "SELECT upload_id FROM uploads WHERE assignment_id = 'yard.0.field'"
            )
            paths = [fleet.state / "blobs" / "uploads" / upload_id for (upload_id,) in found]
            with contextlib.suppress(FileNotFoundError):
                return sum(p.stat().st_size for p in paths)
            return 0

        yard.await_(fleet, lambda: held_bytes() > 0, "the slow push to begin")
        assert fleet.status("field")["phase"] == "pushing", logs(fleet)
        fleet.kill("field")
        assert 0 < held_bytes() < size, "the push was over before the kill"
        fleet.start_agent(yard.device("field"))
        got = yard.finish(fleet)
        (resumed,) = events(fleet.log("field"), "push resumed")
    assert 0 < resumed["at_byte"] < resumed["of_bytes"] == size
    assert_same_bits(got, first_run, fleet)


def test_a_coordinator_killed_in_mid_round_goes_on_by_itself_to_the_same_result(
    yard: Yard, first_run: Outcome, plans: Path
) -> None:
    with yard.replaying("coordinator-killed", plans) as fleet:

        def states() -> dict[str, str]:
            query = "SELECT device_id, state FROM assignments WHERE round = 1"
            return dict(rows(fleet, query))

        yard.await_(fleet, lambda: "arrived" in states().values(), "an update of round 1")
        fleet.kill("coordinator")
        assert states()["field"] == "issued", "the round was over before the kill"
        merged = rows(fleet, "SELECT merged_at FROM rounds WHERE round = 0")
        agents = {d.name: fleet.processes[d.name].pid for d in fleet.devices}
        fleet.start_coordinator("--replay", str(plans))
        got = yard.finish(fleet)
        assert {d.name: fleet.processes[d.name].pid for d in fleet.devices} == agents
        assert events(fleet.log("coordinator"), "round resumed")[0]["round"] == 1
    assert [(got.rounds[0].merged_at,)] == merged, "the finished round was done again"
    assert_same_bits(got, first_run, fleet)


def test_a_trainer_killed_in_mid_training_is_started_again_by_its_agent(
    yard: Yard, first_run: Outcome, plans: Path
) -> None:
    with yard.replaying("trainer-killed", plans) as fleet:
        yard.await_(fleet, lambda: fleet.status("lab").get("step", 0) >= 2, "lab to train")
        agent = psutil.Process(fleet.processes["lab"].pid)
        (trainer,) = (
            p for p in agent.children() if "edge_agent.training.trainer" in str(p.cmdline())
        )
        os.kill(trainer.pid, signal.SIGKILL)
        got = yard.finish(fleet)
        (crash,) = events(fleet.log("lab"), "the trainer died, trying once more")
    assert "want of memory" in crash["event"]
    assert_same_bits(got, first_run, fleet)


def test_an_agent_that_is_killed_and_loses_its_mirror_gets_the_same_one_whole(
    yard: Yard, first_run: Outcome, plans: Path
) -> None:
    (task,) = (a.assignment for a in first_run.assignments
               if a.assignment.assignment_id == "yard.1.lab")  # fmt: skip
    assert task.mirror is not None and task.mirror.base is not None
    result = task.mirror.result
    with yard.replaying("mirror-lost", plans) as fleet:
        held = fleet.folder / "lab" / "state" / "mirror"
        yard.await_(fleet, (held / result.digest).is_file, "lab to take the step of round 1")
        fleet.kill("lab")
        for path in held.iterdir():
            path.unlink()
        fleet.start_agent(yard.device("lab"))
        got = yard.finish(fleet)
    (report,) = (a.report for a in got.assignments
                 if a.assignment.assignment_id == "yard.1.lab")  # fmt: skip
    assert report is not None and report.fetched_bytes == result.size_bytes
    assert_same_bits(got, first_run, fleet)
