"""`sketchfleet-trial chaos`: a run under faults drawn from a seed must end as an undisturbed one.

Two runs follow the same plans: one is left alone; in the other, processes are killed, disks fill
up, power is cut, clocks jump, links break, files rot, and the coordinator is restored from a
backup. After every death of the coordinator its database and audit log are held against what was
seen to be committed. The faults are `chaos_faults`, carrying them out is `chaos_workers`, when is
`chaos_run`, what has to hold is `chaos_check`.
"""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from coordinator.plan_types import DevicePlan
from profiles.cost import Cost
from protos.contract import to_plain
from trials.chaos_check import Committed, committed_rounds, finished
from trials.chaos_faults import draw
from trials.chaos_run import Chaos
from trials.demo import NANO_CODE
from trials.fleet import DeviceSetup, FleetError, LocalFleet, fresh_folder
from trials.warm_trainer import WarmTrainers

RUN = "chaos"
HIT, HOLDER = ("ash", "birch"), "yew"
SLICES = {"ash": (8, 0), "birch": (4, 0), "yew": (4, 4)}  # rows, and the first of them
ROUND_S = 86400.0  # every round waits for every device
LOOK_S = 0.2


@dataclass(frozen=True)
class Found:
    """What a chaos trial found."""

    ends_equal: bool
    rounds: int
    same_updates: int  # rounds that merged the same updates as the undisturbed run
    equal_models: int  # of these, rounds after which the model is the same bits
    problems: tuple[str, ...]

    @property
    def holds(self) -> bool:
        """Whether everything held."""
        return not self.problems and self.same_updates == self.equal_models


def chaos(out: Path, faults: int, rounds: int, seed: int) -> int:
    """Runs both; returns the exit code: 0 when all promises held."""
    console, began = Console(highlight=False, width=110), time.monotonic()
    folder = fresh_folder(out).resolve()
    (folder / "run.toml").touch()  # the mark of a folder that may be replaced
    plans = folder / "plans.json"
    plans.write_text(json.dumps(list(_plans(rounds))))
    with WarmTrainers(folder / "trainers") as python:
        undisturbed = _undisturbed(folder, plans, rounds, seed, python)
        quiet_s = time.monotonic() - began
        console.print(f"undisturbed: {rounds} rounds in {quiet_s:.0f} s")
        with _fleet(folder / "chaos", rounds, seed, python, linked=True) as fleet:
            planned = draw(faults, HIT, random.Random(seed))  # noqa: S311 - to be repeated
            trial = Chaos(fleet, planned, rounds, seed, HOLDER, plans, console.print)
            trial.run()
            found = _compared(undisturbed, trial, fleet, rounds)
    seconds = time.monotonic() - began
    _show(console, trial, found)
    met = sum(outcome.met for outcome in trial.outcomes)
    print(json.dumps({
        "faults": met, "kinds": len({o.planned.kind for o in trial.outcomes if o.met}),
        "rounds": found.rounds, "restarts": dict(trial.restarts), "seed": seed,
        "rounds_of_same_updates": found.same_updates, "of_these_bit_identical": found.equal_models,
        "final_bit_identical": found.ends_equal, "inspections": trial.inspections,
        "problems": list(found.problems), "holds": found.holds, "seconds": round(seconds, 1),
    }))  # fmt: skip
    return 0 if found.holds and met >= faults else 1


def _undisturbed(
    folder: Path, plans: Path, rounds: int, seed: int, python: Path
) -> dict[int, Committed]:
    with _fleet(folder / "undisturbed", rounds, seed, python, linked=False) as fleet:
        fleet.start_coordinator("--replay", str(plans))
        fleet.await_token()
        for device in fleet.devices:
            fleet.start_agent(device)
        until = time.monotonic() + 60 + 20 * rounds
        while not finished(fleet.state, RUN):
            for name in fleet.processes:
                fleet.check(name)
            if time.monotonic() > until:
                raise FleetError(f"the undisturbed run did not end; see {fleet.folder}")
            time.sleep(LOOK_S)
        return committed_rounds(fleet.state, RUN)


def _compared(
    undisturbed: dict[int, Committed], trial: Chaos, fleet: LocalFleet, rounds: int
) -> Found:
    got = committed_rounds(fleet.state, RUN)
    problems = list(trial.problems)
    if not finished(fleet.state, RUN):
        problems.append("the run did not finish")
    if sorted(got) != sorted(undisturbed):
        problems.append(f"rounds {sorted(got)} were committed, not {sorted(undisturbed)}")
    same = [n for n in got if n in undisturbed and got[n].updates == undisturbed[n].updates]
    equal = [n for n in same if got[n].files == undisturbed[n].files]
    last = rounds - 1
    ends = last in got and got[last].files == undisturbed[last].files
    return Found(ends, len(got), len(same), len(equal), tuple(problems))


@contextmanager
def _fleet(
    folder: Path, rounds: int, seed: int, python: Path, *, linked: bool
) -> Iterator[LocalFleet]:
    """A fleet of the smallest model; nothing runs yet. linked: each device behind a relay."""
    devices = []
    for name in (*HIT, HOLDER):
        code = folder / "code" / name
        code.mkdir(parents=True)
        for i in range(16):
            lines = "\n".join(f"    total += {name}[{j}] * {i}" for j in range(8))
            (code / f"{name}_{i}.py").write_text(f"def sum_{i}({name}):\n{lines}\n    return total")
        devices.append(DeviceSetup(
            name, [str(code)], up="10G" if linked else "", down="10G" if linked else "",
            agent={"trainer": {"python": str(python), "idle_s": 3600.0},
                   "policy": {"owner": "dedicated"}},
        ))  # fmt: skip
    sections: dict[str, dict[str, Any]] = {
        "run": {"name": RUN, "seed": seed, "rounds": rounds},
        "model": {"base": str(NANO_CODE)},
        "adapter": {"rank": 8, "alpha": 16.0},
        "training": {"precision": "fp32", "sequence_tokens": 32, "micro_batch": 1,
                     "local_steps": 1, "min_local_steps": 1, "learning_rate": 3e-3,
                     "checkpointing": False},
        "round": {"min_devices": len(devices), "gather_s": 0.0, "quorum": 1.0},
        "evaluation": {"every_rounds": 1000, "sequences": 2, "held_out_share": 0.25},
        # A device that fetches its rows anew, because its copy rotted, trains from the same values.
        "wire": {"slice": "float32"},
        # One step on two sequences says little: a loss far from the evaluated one is no sign here.
        "screening": {"enabled": False},
    }  # fmt: skip
    fleet = LocalFleet(folder, sections, devices)
    with fleet:
        yield fleet


def _plans(rounds: int) -> Iterator[dict[str, Any]]:
    """The same for every round; the one after the last evaluates."""
    for number in range(rounds + 1):
        for name, (rank, first) in SLICES.items():
            plan = DevicePlan(
                device_id=name, rank=rank, sketch_offset=first, precision="fp32",
                sequence_tokens=32, micro_batch=1, accumulation=1, checkpointing=False,
                local_steps=1, evaluates_global=number == rounds, reason="for the trial",
                predicted=Cost(0.0, 0.0, 0.0, 0.0, 0, 0), predicted_peak_bytes=10**8,
            )  # fmt: skip
            yield {"round": number, "round_s": ROUND_S, "plan": to_plain(plan)}


def _show(console: Console, trial: Chaos, found: Found) -> None:
    table = Table("fault", "drawn", "met", "what happened")
    for kind in sorted({o.planned.kind for o in trial.outcomes}):
        mine = [o for o in trial.outcomes if o.planned.kind == kind]
        notes = Counter(note for o in mine for note in o.notes)
        words = "; ".join(f"{n} x {note}" for note, n in notes.most_common(4))
        table.add_row(kind, str(len(mine)), str(sum(o.met for o in mine)), words)
    console.print(table)
    for problem in found.problems:
        console.print(f"[red]{escape(problem)}[/]")
