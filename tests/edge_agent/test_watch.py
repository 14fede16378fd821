"""A round under watch: the trainer is told, heat and energy are counted, waiting is told apart."""

from __future__ import annotations

import asyncio
import json
from datetime import datetime
from types import SimpleNamespace

import pytest

from edge_agent import watch as module
from edge_agent.policy import Policy
from edge_agent.readings import Readings
from edge_agent.trainer_process import TrainerError
from edge_agent.watch import RoundWatch
from protos.contract import LocalReport

TASK = SimpleNamespace(assignment_id="run.0.ash", round=3, rank=4, local_steps=20)


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class Activity:
    """A machine that tells these readings one after the other, then the last one for ever."""

    def __init__(self, *readings):
        self.readings, self.asked = list(readings), []

    def read(self, waiting):
        self.asked.append(waiting)
        return self.readings.pop(0) if len(self.readings) > 1 else self.readings[0]


class Trainer:
    def __init__(self, *outcomes):
        self.outcomes = list(outcomes)

    async def run(self, job, progress=None):
        outcome = self.outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome


@pytest.fixture
def watching(tmp_path, monkeypatch):
    """A watch over these readings, its clock, and what the control file holds."""
    monkeypatch.setattr(module, "EVERY_S", 0.0)

    def over(*readings, **policy):
        clock = Clock()
        found = RoundWatch(
            TASK, Policy(**policy), Activity(*readings), tmp_path / "control.json",
            clock=clock, local=lambda: datetime(2026, 11, 21, 12),
        )  # fmt: skip
        return found, clock, lambda: json.loads((tmp_path / "control.json").read_text())

    return over


HOT, WARM, COOL = (Readings(temperature_c=c, watts=10.0) for c in (90.0, 82.0, 60.0))


def test_the_trainer_is_told_by_a_whole_file(watching, tmp_path):
    watch, _, control = watching(COOL, pause_above_c=85, resume_below_c=70)
    assert control() == {}
    watch.take(HOT)
    assert control()["pause"].startswith("90 °C")
    watch.take(WARM)
    assert control()["pause"].startswith("82 °C"), "the sentence stays true"
    watch._clock.now = 100.0
    watch.take(COOL)
    assert control() == {}
    assert [path.name for path in tmp_path.iterdir()] == ["control.json"]


def test_energy_and_heat_count_only_while_training(watching):
    watch, clock, _ = watching(COOL)
    for second, found in enumerate((HOT, HOT)):
        clock.now = float(second)
        watch.take(found)
    assert watch.joules is None and watch.highest_c is None
    watch.training = True
    for second, found in ((2, COOL), (3, WARM), (5, COOL)):
        clock.now = float(second)
        watch.take(found)
    assert watch.joules == pytest.approx(40.0) and watch.highest_c == 82.0
    clock.now = 500.0  # the machine slept
    watch.take(COOL)
    assert watch.joules == pytest.approx(140.0)


def test_a_machine_that_tells_nothing_reports_nothing(watching):
    watch, clock, _ = watching(Readings())
    watch.training = True
    watch.take(Readings())
    clock.now = 1.0
    watch.take(Readings())
    report = watch.completed(LocalReport("run.0.ash", "done", paused_s=2.0))
    assert (report.joules, report.temperature_c, report.paused_s) == (None, None, 2.0)


def test_progress_holds_what_trainer_and_sensors_tell(watching):
    watch, _, _ = watching(WARM)
    watch.take(WARM)
    watch.heard({"event": "progress", "step": 7, "loss": 2.5, "tokens_per_s": 123.4,
                 "memory_bytes": 10**9})  # fmt: skip
    told = watch.progress()
    assert (told.step, told.steps, told.tokens_per_s, told.memory_bytes) == (7, 20, 123.4, 10**9)
    assert told.temperature_c == 82.0 and told.paused == ""
    watch.heard({"event": "paused", "why": "too warm"})
    assert watch.progress().paused == "too warm" and watch.progress().step == 7
    watch.heard({"event": "resumed"})
    assert watch.progress().paused == ""
    assert watch.shown()["loss"] == 2.5


def test_an_older_trainer_that_tells_less_is_understood(watching):
    watch, _, _ = watching(COOL)
    watch.heard({"event": "progress", "step": 1, "loss": 3.0})
    assert watch.progress().tokens_per_s == 0.0 and watch.progress().memory_bytes == 0


async def test_training_begins_only_when_it_may(watching):
    watch, clock, _ = watching(HOT, WARM, COOL, pause_above_c=85, resume_below_c=70)
    looking = asyncio.create_task(watch.run())

    async def time_passes():
        while True:
            clock.now += 20.0
            await asyncio.sleep(0.001)

    passing = asyncio.create_task(time_passes())
    assert await watch.carry_out({}, Trainer({"report": 1})) == {"report": 1}
    for task in (looking, passing):
        task.cancel()
    assert watch.waited_s > 0
    report = watch.completed(LocalReport("run.0.ash", "done", paused_s=1.0))
    assert report.paused_s == watch.waited_s + 1.0


async def test_a_trainer_that_dies_is_tried_once_more(watching):
    death = TrainerError("crashed", "gone", died=True)
    watch, _, _ = watching(COOL)
    assert await watch.carry_out({}, Trainer(death, {"n": 1})) == {"n": 1}
    with pytest.raises(TrainerError, match="gone"):
        await watch.carry_out({}, Trainer(death, death))
    with pytest.raises(TrainerError, match="no room"):
        await watch.carry_out({}, Trainer(TrainerError("out_of_memory", "no room")))


async def test_a_watch_that_ends_leaves_no_restraint(watching):
    watch, _, control = watching(HOT, pause_above_c=85)
    looking = asyncio.create_task(watch.run())
    while not watch.verdict.pauses:
        await asyncio.sleep(0.001)
    assert "pause" in control()
    looking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await looking
    assert control() == {}


async def test_load_is_anothers_only_while_the_trainer_waits(watching):
    watch, _, _ = watching(COOL)
    await watch.look()
    watch.training = True
    await watch.look()
    assert watch._activity.asked == [True, False]


async def test_a_long_pause_gives_the_memory_back_and_training_goes_on_after_it(watching):
    watch, clock, _ = watching(COOL)
    watch._release_after_s = 60.0
    begun, stopped = [], asyncio.Event()

    class Patient:
        """Pauses in its first life until it is stopped; the second one goes on."""

        async def run(self, job, progress=None):
            begun.append(clock.now)
            if len(begun) > 1:
                return {"n": len(begun)}
            progress({"event": "paused", "why": "in use"})
            await stopped.wait()
            raise TrainerError("crashed", "killed", died=True)

        async def stop(self):
            stopped.set()

    working = asyncio.create_task(watch.carry_out({}, Patient()))
    while not begun:
        await asyncio.sleep(0.001)
    clock.now = 59.0
    await watch.look()
    assert not stopped.is_set(), "a short pause keeps the base loaded"
    clock.now = 61.0
    await watch.look()
    assert await working == {"n": 2} and watch.waited_s == pytest.approx(61.0)


def test_a_gpu_that_is_held_back_is_told_once(watching, caplog):
    watch, clock, _ = watching(COOL)
    watch.training = True
    slow = Readings(gpu_load=0.99, gpu_clock=0.5)
    for second in range(100):
        clock.now = float(second)
        watch.take(Readings(gpu_load=0.99, gpu_clock=1.0) if second == 20 else slow)
    assert caplog.text.count("held back by heat or by its power supply") == 1
