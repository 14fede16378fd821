"""A real trainer process under the agent's watch: held up, let go and begun again, same result."""

from __future__ import annotations

import asyncio
import hashlib
import json
from pathlib import Path

import pytest

from edge_agent import watch as watching
from edge_agent.policy import CALM_S, Cause, Policy
from edge_agent.readings import Readings
from edge_agent.trainer_process import TrainerProcess
from edge_agent.watch import RoundWatch
from protos.contract import LocalReport, from_plain, to_plain
from tests.edge_agent.training.rounds import at_start, make_assignment

COOL, HOT = Readings(temperature_c=40.0, watts=8.0), Readings(temperature_c=95.0, watts=8.0)
STEPS = 40  # more than pass between two looks at the control file


class Machine:
    """Gets hot when it is told to."""

    def __init__(self):
        self.now = COOL

    def read(self, waiting):
        return self.now


@pytest.fixture
def job(spec, base_folder, code_folder, tmp_path):
    """A round of many steps, with its files in a folder of its own."""
    from edge_agent.training.connectors import DataSelection
    from tests.edge_agent.training.rounds import Device

    def in_folder(name):
        folder = tmp_path / name
        folder.mkdir()
        device = Device(folder, base_folder, code_folder, None)
        adapter = at_start(spec, 2)
        blob, path = device.blob("slice", spec, 2, adapter)
        task = make_assignment(local_steps=STEPS, slice=(blob,))
        return task, {
            "job": "train", "base_folder": str(base_folder), "spec": to_plain(spec),
            "assignment": to_plain(task),
            "data": to_plain(DataSelection(include=(str(code_folder),))),
            "slice_paths": [path], "side_path": None, "global_paths": [],
            "global_side_path": None, "update_path": str(folder / "update"), "home_path": None,
            "home_out": str(folder / "home"), "control_path": str(folder / "control.json"),
            "checkpoint_path": str(folder / "checkpoint"), "personal_weight": 0.0,
            "memory_cap_bytes": None,
        }  # fmt: skip

    return in_folder


async def carried_out(task, job, machine, folder, then=None):
    """The report of a round under watch; `then(watch)` goes on beside it."""
    trainer = TrainerProcess("", 1, folder / "trainer.log")
    watch = RoundWatch(
        task, Policy(pause_above_c=85, resume_below_c=70), machine, Path(job["control_path"]),
        release_after_s=0.2,
    )  # fmt: skip
    beside = [asyncio.create_task(watch.run())]
    if then is not None:
        beside.append(asyncio.create_task(then(watch)))
    try:
        result = await watch.carry_out(job, trainer)
    finally:
        await trainer.stop()
        for each in beside:
            each.cancel()
    done = await asyncio.gather(*beside, return_exceptions=True)
    assert not [e for e in done if isinstance(e, Exception)], done
    return watch.completed(from_plain(LocalReport, result["report"]))


async def test_a_round_that_was_held_up_and_let_go_ends_with_the_same_bytes(
    job, tmp_path, monkeypatch
):
    monkeypatch.setattr(watching, "EVERY_S", 0.02)
    monkeypatch.setitem(CALM_S, Cause.HEAT, 0)
    monkeypatch.setattr("edge_agent.trainer_process.STOP_S", 0.2)
    task, plain = job("plain")
    calm = await carried_out(task, plain, Machine(), tmp_path)
    machine, seen = Machine(), []

    async def heat_up(watch):
        while watch.progress().step < 2:
            await asyncio.sleep(0.001)
        machine.now = HOT
        while watch.training:
            seen.append(watch.progress().paused)
            await asyncio.sleep(0.01)
        machine.now = COOL

    task, held = job("held")
    report = await carried_out(task, held, machine, tmp_path, heat_up)
    digests = {hashlib.sha256(Path(j["update_path"]).read_bytes()).hexdigest()
               for j in (plain, held)}  # fmt: skip
    assert len(digests) == 1, "a pause changes nothing"
    assert "95 °C; goes on below 70 °C" in seen
    assert report.resumed_step >= 1 and report.paused_s > 0 and calm.resumed_step == 0
    assert report.temperature_c == 95.0 and report.joules > 0
    assert json.loads(Path(held["control_path"]).read_text()) == {}
