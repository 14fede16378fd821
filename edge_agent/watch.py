"""Watches one local round: reads the machine each second, applies the owner's policy, keeps score.

Tells the trainer through a control file that it reads between micro-batches, the coordinator
through `Progress`, and the report what the round cost in heat, energy and waiting.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

from edge_agent.activity import Activity
from edge_agent.policy import FREE, Policy, Verdict, decide
from edge_agent.readings import Readings
from edge_agent.trainer_process import TrainerError, TrainerProcess
from protos.contract import Assignment, LocalReport, Progress

log = logging.getLogger("sketchfleet.agent")

EVERY_S = 1.0
SHOW_EVERY_S = 5.0  # what did not change otherwise
SLOW_CLOCK, FULL_LOAD, SLOW_FOR_S = 0.8, 0.9, 30.0  # a GPU that works and is held back
LONGEST_GAP_S = 10.0  # between two readings that still say what was drawn in between
Clock = Callable[[], float]


class RoundWatch:
    """One local round, from before the trainer begins until its report."""

    def __init__(
        self,
        assignment: Assignment,
        policy: Policy,
        activity: Activity,
        control: Path,
        *,
        clock: Clock = time.monotonic,
        local: Callable[[], datetime] = datetime.now,
        release_after_s: float = math.inf,
        changed: Callable[[], None] = lambda: None,
    ) -> None:
        self.phase = "fetching"
        self.verdict = FREE
        self.readings = Readings()
        self.highest_c: float | None = None
        self.joules: float | None = None
        self.waited_s = 0.0  # before the trainer began
        self.training = False  # whether the trainer has the job
        self._assignment, self._policy, self._activity = assignment, policy, activity
        self._control, self._clock, self._local, self._changed = control, clock, local, changed
        self._event: dict[str, Any] = {}
        self._looking = asyncio.Lock()
        self._shown_at_s = -SHOW_EVERY_S
        self._slow_since_s: float | None = None
        self._slow_told = False
        self._told_paused, self._paused_at_s = "", 0.0  # by the trainer
        self._trainer: TrainerProcess | None = None
        self._released, self._release_after_s = False, release_after_s
        self._read_at_s: float | None = None
        write_control(control, FREE)

    async def run(self) -> None:
        """Looks once a second until it is cancelled; leaves no restraint behind."""
        try:
            while True:
                await self.look()
                await asyncio.sleep(EVERY_S)
        finally:
            write_control(self._control, FREE)

    async def look(self) -> None:
        """Reads the machine and acts on it."""
        async with self._looking:
            waiting = not self.training or self.verdict.pauses
            self.take(await asyncio.to_thread(self._activity.read, waiting))
        if self._trainer is not None and self._told_paused and not self._released:
            paused_s = self._clock() - self._paused_at_s
            if paused_s > self._release_after_s:
                log.info("the pause is long; the trainer gives its memory back")
                self._released = True  # it wrote a checkpoint when the pause began
                self.waited_s += paused_s
                await self._trainer.stop()

    def take(self, found: Readings) -> None:
        """Acts on these readings."""
        now = self._clock()
        if self.training:
            self._keep_score(found, now)
        self._read_at_s, self.readings = now, found
        before = self.verdict
        self.verdict = decide(self._policy, found, self._local(), now, before)
        if self.verdict.control != before.control:
            write_control(self._control, self.verdict)
        if (self.verdict.duty, self.verdict.cause) != (before.duty, before.cause):
            log.info("held back" if self.verdict.duty < 1 else "goes on at full speed",
                     extra={"why": self.verdict.why or before.why,
                            "duty": self.verdict.duty})  # fmt: skip
        elif now - self._shown_at_s < SHOW_EVERY_S:
            return
        self._shown_at_s = now
        self._changed()

    def _keep_score(self, found: Readings, now: float) -> None:
        if found.temperature_c is not None:
            self.highest_c = max(found.temperature_c, self.highest_c or found.temperature_c)
        if found.watts is not None and self._read_at_s is not None:
            passed_s = min(LONGEST_GAP_S, now - self._read_at_s)
            self.joules = (self.joules or 0.0) + found.watts * passed_s

        if (found.gpu_clock or 1.0) < SLOW_CLOCK and (found.gpu_load or 0.0) > FULL_LOAD:
            self._slow_since_s = now if self._slow_since_s is None else self._slow_since_s
            if now - self._slow_since_s > SLOW_FOR_S and not self._slow_told:
                self._slow_told = True
                log.warning("the GPU is held back by heat or by its power supply",
                            extra={"clock": round(found.gpu_clock or 0.0, 2),
                                   "temperature_c": found.temperature_c})  # fmt: skip
        else:
            self._slow_since_s = None

    async def carry_out(self, job: dict[str, Any], trainer: TrainerProcess) -> dict[str, Any]:
        """The trainer's result. It begins when the policy lets it; should it die, once more.

        A trainer that was let go in a long pause goes on from its checkpoint when that is over.
        """
        died = False
        while True:
            await self._admitted()
            self.training, self._trainer = True, trainer
            try:
                return await trainer.run(job, self.heard)
            except TrainerError as error:
                if not error.died or (died and not self._released):
                    raise
                if not self._released:
                    died = True
                    log.warning("the trainer died, trying once more: %s", error)
            finally:
                self.training, self._trainer = False, None
                self._told_paused, self._released = "", False

    async def _admitted(self) -> None:
        """Waits until the policy lets training begin."""
        await self.look()
        begun = self._clock()
        while self.verdict.pauses:
            await asyncio.sleep(EVERY_S)
        self.waited_s += self._clock() - begun

    def heard(self, event: Mapping[str, Any]) -> None:
        """Takes an event of the trainer."""
        match event.get("event"):
            case "paused":
                if not self._told_paused:
                    self._paused_at_s = self._clock()
                self._told_paused = str(event.get("why", "")) or "paused"
            case "resumed":
                self._told_paused = ""
            case _:
                self._event = dict(event)
        self._changed()

    @property
    def paused(self) -> str:
        """Why training waits; empty while it does not."""
        return self.verdict.why if self.verdict.pauses else self._told_paused

    def progress(self) -> Progress:
        """For the heartbeat."""
        return Progress(
            step=int(self._event.get("step", 0)),
            steps=self._assignment.local_steps,
            tokens_per_s=float(self._event.get("tokens_per_s", 0.0)),
            memory_bytes=int(self._event.get("memory_bytes", 0)),
            temperature_c=self.readings.temperature_c,
            joules=self.joules,
            paused=self.paused,
        )

    def shown(self) -> dict[str, Any]:
        """For the status file."""
        told = {key: self._event.get(key) for key in ("loss", "tokens_per_s", "memory_bytes")}
        return {
            "round": self._assignment.round, "k": self._assignment.rank,
            "step": int(self._event.get("step", 0)), "steps": self._assignment.local_steps,
            **told, "temperature_c": self.readings.temperature_c, "joules": self.joules,
            "held_back": self.paused or self.verdict.why,
        }  # fmt: skip

    def completed(self, report: LocalReport) -> LocalReport:
        """The trainer's report with what only the agent knows."""
        return replace(
            report,
            paused_s=report.paused_s + self.waited_s,
            temperature_c=self.highest_c,
            joules=self.joules,
        )


def write_control(path: Path, verdict: Verdict) -> None:
    """Tells the trainer; it sees the old verdict or the new one, never half of one."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(verdict.control))
    temporary.replace(path)
