"""The processes of a fleet that are hit: carries faults out on them and brings them up again."""

from __future__ import annotations

import contextlib
import random
import shutil
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import psutil

from profiles.errors import SketchfleetError
from protos import faults
from trials.chaos_check import finished, needed
from trials.chaos_faults import AGENT_STEPS, COORDINATOR, COORDINATOR_STEPS, Outcome
from trials.fleet import environment
from trials.power import baseline, cut_power

if TYPE_CHECKING:
    from trials.chaos_run import Chaos

LOOK_S = 0.1
# Ends that a service manager answers by a new start: to mend what is damaged, or when nobody
# answered an agent for a minute.
TOLD = ("is damaged", "does not answer", "no byte moved")
MEET_S = 2.5  # a planted fault is waited for so long; then it waits for whoever passes by


class Worker:
    """One process that is hit: the coordinator, or an agent with its trainer and its link."""

    def __init__(self, chaos: Chaos, name: str) -> None:
        self.chaos, self.name, self.fleet = chaos, name, chaos.fleet
        self.device = None if name == COORDINATOR else chaos.device(name)
        self.folder = chaos.fleet.folder / "faults" / name
        own = chaos.fleet.folder / name / "state"
        self.state = chaos.fleet.state if name == COORDINATOR else own
        self.planted: dict[str, list[Outcome]] = {}  # by point, oldest first
        self.read = 0  # of what happened
        self.power = False  # at the next death, too
        self.disk_failed = False  # since the last start
        self.random = random.Random(f"{name} {chaos.seed}")  # noqa: S311 - to be repeated

    def prepare(self) -> None:
        """Takes what is in the state folder before the first start for synced."""
        self.state.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)
        baseline(self.state, self.folder)

    def start(self) -> None:
        """Starts the process; of the coordinator, waits until it listens or is dead again."""
        if self.device is not None:
            self.fleet.start_agent(self.device)
            return
        self.fleet.start_coordinator("--replay", str(self.chaos.plans))
        until = time.monotonic() + 60
        while self.fleet.running(self.name) and time.monotonic() < until:
            try:
                self.fleet.await_token(0.3)
            except SketchfleetError:
                continue
            return

    def work(self) -> None:
        """Carries its faults out, one after the other, and keeps its process alive."""
        try:
            while not self.chaos.over.is_set():
                self.revive()
                outcome = self._next()
                if outcome is None:
                    time.sleep(LOOK_S)
                    continue
                self.carry_out(outcome)
                with self.chaos.lock:
                    self.chaos.open.discard(id(outcome))
                self._pause(self.random.uniform(0.0, 1.0))
        except Exception as error:  # noqa: BLE001 - a thread's; told at the end
            with self.chaos.lock:
                self.chaos.problems.append(f"{self.name}: {type(error).__name__}: {error}")

    def _next(self) -> Outcome | None:
        with self.chaos.lock:
            for due, outcome in self.chaos.due:
                if id(outcome) in self.chaos.open and outcome.planned.target == self.name:
                    return outcome if due <= self.chaos.round else None
        return None

    def _pause(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until and not self.chaos.over.is_set():
            self.revive()
            time.sleep(LOOK_S)

    # --- the process ----------------------------------------------------------------------------

    def revive(self) -> None:
        """Starts the process again if it is dead, after looking at what it left."""
        process = self.fleet.processes[self.name]
        if process.poll() is None:
            return
        self.note_met()
        code, over = process.returncode, finished(self.fleet.state, self.fleet.run_id)
        if code == 0 and over:
            return
        lines = self.fleet.log(self.name).read_text(errors="replace").splitlines()
        last = lines[-1] if lines else ""
        told = any(words in last for words in TOLD)
        if code not in (0, -9) and not self.disk_failed and not told:
            raise SketchfleetError(f"ended by itself with {code}: {last}")
        if self.power:
            self.power = False
            cut_power(self.state, self.folder)
        if self.name == COORDINATOR:
            self.inspect()
        self.disk_failed = False
        self.chaos.restarts[self.name] += 1
        self.start()

    def inspect(self) -> None:
        """Holds the coordinator's state folder against what was promised."""
        with self.chaos.lock:
            try:
                self.chaos.promises.inspect(self.state)
            except SketchfleetError as error:
                self.chaos.problems.append(str(error))
            self.chaos.inspections += 1

    def kill(self) -> None:
        """SIGKILL to the process and what it started."""
        with contextlib.suppress(ProcessLookupError):  # it died just now
            self.fleet.kill(self.name)
        self.fleet.processes[self.name].wait()

    def note_met(self) -> None:
        """Ticks off the planted faults that were met meanwhile."""
        with self.chaos.lock:
            met = faults.happened(self.folder)
            for told in met[self.read :]:
                if told["do"] == "error":
                    self.disk_failed = True
                waiting = self.planted.get(told["point"], [])
                if waiting and not waiting[0].met:
                    waiting[0].met = True
                    waiting[0].notes.append(f"at {told['point']}")
                    if waiting[0].planned.way == "plant power":
                        self.power = True
                if waiting and not (self.folder / "todo" / told["point"]).exists():
                    waiting.pop(0)
            self.read = len(met)

    # --- the faults -----------------------------------------------------------------------------

    def carry_out(self, outcome: Outcome) -> None:
        """One fault, to the point where its process is up again or the fault lies in wait."""
        planned = outcome.planned
        match planned.way:
            case "plant" | "plant power":
                self._plant(outcome)
                return
            case "kill" | "power":
                self.power = planned.way == "power"
                self.kill()
                outcome.notes.append("restarted")
            case "stop":
                self._stopped(planned.seconds, self.fleet.processes[self.name])
                outcome.notes.append("went on")
            case "clock":
                (self.folder / "clock").write_text(str(planned.seconds))
                self._pause(2.0)
                (self.folder / "clock").unlink(missing_ok=True)
            case "half-open":
                self._stopped(planned.seconds, self.fleet.processes[f"{self.name}.link"])
                outcome.notes.append("nothing passed for a while")
            case "cut":
                link = self.fleet.processes[f"{self.name}.link"]
                link.send_signal(signal.SIGUSR1)
                self._pause(planned.seconds)
                link.send_signal(signal.SIGUSR2)
            case "trainer":
                outcome.notes.append(self._kill_trainer())
            case "corrupt":
                outcome.notes.append(self._corrupt())
            case "drain":
                outcome.notes.append(self._drain())
            case "restore":
                outcome.notes.append(self._restore())
        outcome.met = True

    def _plant(self, outcome: Outcome) -> None:
        planned = outcome.planned
        assert planned.fault is not None
        steps = AGENT_STEPS if self.device is not None else COORDINATOR_STEPS
        point = planned.point
        if planned.fault.do == "kill":
            free = [p for p in steps if not self.planted.get(p)]
            point = point if point in free or not free else self.random.choice(free)
        self.note_met()
        with self.chaos.lock:
            self.planted.setdefault(point, []).append(outcome)
        faults.plant(self.folder, point, planned.fault)
        until = time.monotonic() + MEET_S
        while time.monotonic() < until and not outcome.met and not self.chaos.over.is_set():
            self.note_met()
            self.revive()
            time.sleep(LOOK_S)

    def _stopped(self, seconds: float, process: subprocess.Popen[bytes]) -> None:
        if process.poll() is None:
            process.send_signal(signal.SIGSTOP)
            time.sleep(seconds)
            process.send_signal(signal.SIGCONT)

    def _kill_trainer(self) -> str:
        try:
            found = psutil.Process(self.fleet.processes[self.name].pid).children()
        except psutil.NoSuchProcess:
            return "no agent ran"
        for child in found:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
                return "the agent started another"
        return "none ran"

    def _corrupt(self) -> str:
        """Flips a bit in a file that is needed."""
        if self.name == COORDINATOR:
            digests = needed(self.state, self.fleet.run_id)
            files = [self.state / "blobs" / digest[:2] / digest for digest in digests]
        else:
            places = ("blobs", "updates", "mirror")
            files = [p for f in places for p in (self.state / f).glob("*")]
        self.random.shuffle(files)
        for path in files:
            try:
                if self.name == COORDINATOR:
                    with self.chaos.lock:
                        self.chaos.promises.rotten.add(path.name)
                with path.open("r+b") as stream:
                    at = self.random.randrange(max(1, path.stat().st_size))
                    stream.seek(at)
                    byte = stream.read(1) or b"\0"
                    stream.seek(at)
                    stream.write(bytes([byte[0] ^ 0x10]))
            except FileNotFoundError:
                continue
            return f"in {path.parent.name if self.device else 'a blob'}"
        return "nothing was there"

    def _drain(self) -> str:
        process = self.fleet.processes[self.name]
        if process.poll() is not None:
            return "was dead"
        process.terminate()
        try:
            code = process.wait(45)
        except subprocess.TimeoutExpired:
            raise SketchfleetError("did not end within 45 s of SIGTERM") from None
        if code == -signal.SIGTERM:
            self.fleet.processes[self.name].returncode = 0  # told before it was up: as by default
            return "was not up yet"
        return f"ended with {code}"

    def _restore(self) -> str:
        if self.chaos.backup is None:
            self.chaos.back_up()
        if self.chaos.backup is None:
            return "no backup could be made"
        self.kill()
        with self.chaos.lock:
            self.inspect()
            aside = self.state.with_name(f"aside-{time.monotonic_ns()}")
            self.state.rename(aside)
            backup = self.chaos.backup
            done = cli("restore", str(backup), "--state", str(self.state))
            if done.returncode:
                raise SketchfleetError(f"restore failed: {done.stderr.strip()[-300:]}")
            before = len(self.chaos.promises.rounds)
            self.chaos.promises.forget_after(self.state)
            back = before - len(self.chaos.promises.rounds)
            self.prepare()
            self.read, self.planted = 0, {}
            shutil.rmtree(aside)
        return f"{back} rounds back"


def cli(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A command of the coordinator."""
    return subprocess.run(
        [sys.executable, "-m", "coordinator.cli", *arguments],
        env=environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
