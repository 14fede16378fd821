"""One run under faults: who is hit when, and what has to hold meanwhile."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from profiles.errors import SketchfleetError
from protos import faults
from trials.chaos_check import Promises, finished
from trials.chaos_faults import COORDINATOR, IMMEDIATE, Outcome, Planned, one, spread
from trials.chaos_workers import Worker, cli
from trials.fleet import DeviceSetup, LocalFleet

LOOK_S = 0.1
END_S = 90.0  # for processes to hear that the run is over
STUCK_S = 240.0  # without any progress


class Chaos:
    """One disturbed run: a thread for each process that is hit, and one that watches."""

    def __init__(
        self, fleet: LocalFleet, planned: Sequence[Planned], rounds: int, seed: int, holder: str,
        plans: Path, tell: Callable[[str], None],
    ) -> None:  # fmt: skip
        self.fleet, self.rounds, self.holder, self.plans = fleet, rounds, holder, plans
        self.wanted, self.tell = len(planned), tell
        self.due = [(round_, Outcome(fault)) for round_, fault in spread(planned, rounds)]
        self.outcomes = [outcome for _, outcome in self.due]
        self.open = {id(o) for o in self.outcomes}  # not carried out, nor planted
        self.promises = Promises(fleet.run_id)
        self.problems: list[str] = []
        self.restarts: Counter[str] = Counter()
        self.inspections = 0
        self.round = 0
        self.over = threading.Event()
        self.lock = threading.RLock()  # around the promises and the lists
        self.seed = seed
        self.random = random.Random(seed + 1)  # noqa: S311 - to be repeated
        names = [COORDINATOR, *(d.name for d in fleet.devices if d.name != holder)]
        fleet.variables = {
            n: {faults.VARIABLE: str(fleet.folder / "faults" / n)} for n in (*names, holder)
        }
        self.workers = {name: Worker(self, name) for name in names}
        self.backup: Path | None = None

    def run(self) -> None:
        """Plays it to its end; what did not hold is in `problems`."""
        for worker in self.workers.values():
            worker.prepare()
        self.workers[COORDINATOR].start()
        for worker in self.workers.values():
            if worker.device is not None:
                worker.start()
        gate = self.fleet.folder / "faults" / self.holder
        (gate / "go").mkdir(parents=True)
        faults.plant(gate, "agent.fetched", faults.Fault("hold", times=10**6))
        self.fleet.start_agent(self.device(self.holder))
        threads = [threading.Thread(target=w.work, daemon=True) for w in self.workers.values()]
        for thread in threads:
            thread.start()
        try:
            self._watch()
        finally:
            self.over.set()
            for thread in threads:
                thread.join(60)
        if not self.problems:
            self._await_ends()
        self.promises.rotten.clear()  # mended by now
        self.workers[COORDINATOR].inspect()
        self._count_met()

    def _watch(self) -> None:
        """Follows the run; the holder delivers once the faults of a round are under way."""
        newest, moved = -1, time.monotonic()
        gate = self.fleet.folder / "faults" / self.holder
        while not finished(self.fleet.state, self.fleet.run_id):
            time.sleep(LOOK_S)
            if self.problems:
                return
            with self.lock:
                try:
                    found = self.promises.observe(self.fleet.state)
                    for name in self.workers:
                        self.promises.take_receipts(self.fleet.log(name))
                except (SketchfleetError, OSError) as error:
                    self.problems.append(str(error))
                    return
            self.round = max(self.round, found or 0)
            if found is not None and found != newest:
                newest, moved = found, time.monotonic()
                self.tell(f"{time.strftime('%H:%M:%S')} round {newest}, {self._count_met()} faults")
                if newest % 3 == 0:
                    self.back_up()
            if time.monotonic() - moved > STUCK_S:
                self.problems.append(f"nothing moved for {STUCK_S:.0f} s in round {newest}")
                return
            if found is not None and not self._holding(found):
                for number in range(found, self.round + 1):  # it may hold what a restore undid
                    (gate / "go" / f"{self.fleet.run_id}.{number}.{self.holder}").touch()

    def _holding(self, round_: int) -> bool:
        with self.lock:
            waiting = [o for due, o in self.due if due <= round_ and id(o) in self.open]
            if not waiting and round_ == self.rounds - 1 and self._count_met() < self.wanted:
                kind = self.random.choice(IMMEDIATE)
                agents = [n for n in self.workers if n != COORDINATOR]
                extra = Outcome(one(kind, agents, self.random))
                self.due.append((self.round, extra))
                self.outcomes.append(extra)
                self.open.add(id(extra))
                return True
        return bool(waiting)

    def back_up(self) -> None:
        """Makes a backup of the round, unless there is one."""
        target = self.fleet.folder / f"backup-{self.round}.tar"
        if target.exists():
            return
        done = cli("backup", str(target), "--state", str(self.fleet.state))
        if done.returncode == 0:
            with self.lock:
                self.backup = target
        elif "No space" not in done.stderr:
            self.problems.append(f"backup failed: {done.stderr.strip()[-300:]}")

    def _await_ends(self) -> None:
        until = time.monotonic() + END_S
        names = [*self.workers, self.holder]
        for name in names:  # the last ones may lie dead, and are to hear the news
            worker = self.workers.get(name)
            while time.monotonic() < until:
                process = self.fleet.processes[name]
                if process.poll() == 0:
                    break
                if process.poll() is not None and worker is not None:
                    worker.revive()
                time.sleep(LOOK_S)
            else:
                self.problems.append(f"{name} did not end with the run")

    def _count_met(self) -> int:
        with self.lock:
            for worker in self.workers.values():
                worker.note_met()
            return sum(o.met for o in self.outcomes)

    def device(self, name: str) -> DeviceSetup:
        """How an agent of this name is set up."""
        return next(d for d in self.fleet.devices if d.name == name)
