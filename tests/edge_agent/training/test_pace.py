"""Training waits while the agent says so, and says how long."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edge_agent.training import pace
from edge_agent.training.jobs import run_job
from edge_agent.training.pace import Pace
from edge_agent.training.workbench import Workbench
from protos.contract import AdapterSpec
from tests.edge_agent.training.rounds import (
    Device,
    K,
    make_adapter,
    make_assignment,
    report_of,
    run,
)


class Clock:
    """Sleeping passes time, and lets something happen."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.slept: list[float] = []
        self.then: Callable[[], None] = lambda: None

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.slept.append(seconds)
        self.then()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def control(tmp_path: Path) -> Path:
    return tmp_path / "control.json"


def ask(control: Path, **asked: Any) -> None:
    """As the agent does it: a new file takes the old one's place."""
    new = control.with_suffix(".new")
    new.write_text(json.dumps(asked))
    os.replace(new, control)  # noqa: PTH105


@pytest.fixture
def events() -> list[dict[str, Any]]:
    return []


@pytest.fixture
def kept(control: Path, clock: Clock, events: list[dict[str, Any]]) -> Pace:
    return Pace(control, lambda e: events.append(dict(e)), clock=clock, sleep=clock.sleep)


def test_nothing_is_held_up_without_a_file(kept: Pace, clock: Clock, control: Path) -> None:
    kept.keep()
    ask(control)
    clock.now += 1
    kept.keep()
    Pace(None, lambda _: None, clock=clock, sleep=clock.sleep).keep()
    assert clock.slept == [] and kept.waited_s == 0


def test_a_pause_lasts_until_the_file_says_otherwise(
    kept: Pace, clock: Clock, control: Path, events: list[dict[str, Any]]
) -> None:
    saved: list[float] = []
    kept.on_pause = lambda: saved.append(clock.now)
    ask(control, pause="too hot (91 C)")

    def cool() -> None:
        if clock.now >= 1060:
            control.unlink(missing_ok=True)
        elif clock.now >= 1030:
            ask(control, pause="on battery")

    clock.then = cool
    kept.keep()
    assert events == [
        {"event": "paused", "why": "too hot (91 C)"},
        {"event": "paused", "why": "on battery"},
        {"event": "resumed"},
    ]
    assert saved == [1000.0], "what was done is safe before the waiting begins"
    assert kept.waited_s == pytest.approx(60, abs=1)


@pytest.mark.parametrize(("duty", "worked", "rests"), [(0.5, 8.0, 8.0), (0.25, 2.0, 6.0)])
def test_a_duty_is_the_share_of_time_that_is_worked(
    kept: Pace, clock: Clock, control: Path, duty: float, worked: float, rests: float
) -> None:
    ask(control, duty=duty)
    kept.keep()
    clock.now += worked
    kept.keep()
    assert sum(clock.slept) == pytest.approx(rests)
    assert kept.waited_s == pytest.approx(rests)


def test_a_rest_ends_when_the_duty_does(kept: Pace, clock: Clock, control: Path) -> None:
    ask(control, duty=0.02)
    kept.keep()
    clock.then = lambda: ask(control) if clock.now > 1020 else None
    clock.now += 10
    kept.keep()
    assert sum(clock.slept) < 12, "and not the 490 s that were due"


def test_a_duty_below_sense_is_raised(kept: Pace, clock: Clock, control: Path) -> None:
    ask(control, duty=1e-9)
    kept.keep()
    clock.now += 1
    kept.keep()
    assert sum(clock.slept) == pytest.approx(1 / pace.LOWEST_DUTY - 1)


def test_the_file_is_looked_at_a_few_times_a_second(
    kept: Pace, clock: Clock, control: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[float] = []
    stat = Path.stat

    def noted(self: Path, **how: Any) -> Any:
        if self == control:
            looks.append(clock.now)
        return stat(self, **how)

    ask(control)
    monkeypatch.setattr(Path, "stat", noted)
    for _ in range(100):
        kept.keep()
        clock.now += 0.01
    assert 3 <= len(looks) <= 1 / pace.LOOK_S + 1


@pytest.mark.parametrize("text", ["", "{", "[]", '{"duty": "much"}'])
def test_a_file_that_cannot_be_read_changes_nothing(
    kept: Pace, clock: Clock, control: Path, caplog: pytest.LogCaptureFixture, text: str
) -> None:
    ask(control, duty=0.5)
    kept.keep()
    clock.now += 1
    control.write_text(text)
    kept.keep()
    assert sum(clock.slept) == pytest.approx(1.0), "still half of the time"
    assert "control file" in caplog.text


def test_a_round_that_was_paused_says_so_and_gives_the_same_bytes(
    device: Device, bench: Workbench, spec: AdapterSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pace, "LOOK_S", 0.0)
    monkeypatch.setattr(pace, "LONGEST_SLEEP_S", 0.05)
    control, checkpoint = device.folder / "control.json", device.folder / "c"
    job = device.job(
        spec, make_assignment(), make_adapter(spec, K),
        control_path=str(control), checkpoint_path=str(checkpoint),
    )  # fmt: skip
    undisturbed = report_of(run(job, bench))
    want = device.update.read_bytes()
    seen: list[dict[str, Any]] = []
    waits = 0

    def look(self: Pace, now: float) -> None:
        nonlocal waits
        told = [e["event"] for e in seen]
        if told[-1:] == ["paused"]:
            waits += 1
            assert checkpoint.exists(), "written before the waiting begins"
        self._why = "too hot" if told.count("progress") == 2 and waits < 3 else ""

    monkeypatch.setattr(Pace, "_look", look)
    run_job(job, bench, lambda e: seen.append(dict(e)))
    names = [e["event"] for e in seen]
    assert names == ["progress"] * 2 + ["paused", "resumed"] + ["progress"] * 2 + ["result"]
    report = report_of(seen)
    assert device.update.read_bytes() == want
    assert report.paused_s >= 0.1
    assert undisturbed.paused_s == 0
    assert report.train_s < report.paused_s + 10 * undisturbed.train_s
    assert not checkpoint.exists()


def test_progress_tells_speed_and_memory(
    device: Device, bench: Workbench, spec: AdapterSpec
) -> None:
    events = run(device.job(spec, make_assignment(), make_adapter(spec, K)), bench)
    report = report_of(events)
    for number, event in enumerate(events[:-1], start=1):
        assert (event["event"], event["step"], event["steps"]) == ("progress", number, 4)
        assert event["loss"] > 0 and event["memory_bytes"] > 1e8
        assert event["tokens_per_s"] > 0
    assert 0 < report.step_s <= report.train_s
    assert report.train_s == pytest.approx(4 * report.step_s, rel=2.0)
