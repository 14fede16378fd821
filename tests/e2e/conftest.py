"""A yard for whole fleets: a tiny random base, three kinds of code, and processes that run them.

One undisturbed run is finished once and shared; its recorded plans are what disturbed runs replay,
so that every one of them must end in the same bits.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from coordinator.state import StateFile, StateReader
from coordinator.store.blobs import BlobStore
from coordinator.store.records import Records
from coordinator.store.rows import AssignmentRecord, RoundRecord, RunRecord
from tests.tiny_base import write_base
from trials.fleet import DeviceSetup, LocalFleet

ROOT = Path(__file__).resolve().parent.parent.parent
RUN = "yard"
ROUNDS = 2
RANK = 128
SLOW_UP = "1.5M"  # the slow device's update of half the rank takes four seconds
PATIENCE_S = 170.0
POLL_S = 0.02

# Sketches of 64 or 128 rows: the whole rank never fits the slow link's round, half always does,
# and half is more than the five chunks that one window cannot hold.
SECTIONS: dict[str, dict[str, Any]] = {
    "run": {"name": RUN, "seed": 11, "rounds": ROUNDS},
    "adapter": {"rank": RANK, "alpha": 256.0},
    "training": {
        "precision": "nf4",
        "sequence_tokens": 64,
        "micro_batch": 4,
        "local_steps": 8,
        "min_local_steps": 2,
        "learning_rate": 5e-3,
        "checkpointing": False,
    },
    "round": {
        "min_devices": 3,
        "gather_s": 0.2,
        "quorum": 1.0,
        "round_s": 8,
        "max_round_s": 60,
        "min_rank": 64,
        "rank_multiple": 64,
    },
    "evaluation": {"every_rounds": 5, "sequences": 8, "held_out_share": 0.25},
}


def write_code(folder: Path, suffix: str, text: Callable[[int], str]) -> Path:
    folder.mkdir()
    for i in range(32):
        (folder / f"part_{i}{suffix}").write_text(text(i))
    return folder


@dataclass(frozen=True)
class Outcome:
    """What a finished run left in its state folder."""

    folder: Path
    state: Path
    digests: tuple[
        tuple[tuple[str, str], ...], ...
    ]  # (role, blob) of the model's files, by version
    rounds: tuple[RoundRecord, ...]
    assignments: tuple[AssignmentRecord, ...]
    seconds: float

    def records(self) -> Records:
        """The database; to be closed by whoever opens it."""
        return Records(self.state / "coordinator.sqlite")

    def model(self, version: int) -> tuple[RunRecord, StateReader]:
        """The run, and the global model after so many rounds."""
        records, blobs = self.records(), BlobStore(self.state / "blobs")
        try:
            run, found = records.run(RUN), records.model(RUN, version)
        finally:
            records.close()
        assert run is not None and found is not None and found[0] == version
        return run, StateReader(
            run.spec, {r: StateFile(blobs.path(b.digest), b.payload) for r, b in found[1].items()}
        )

    def arrival_order(self, round_: int) -> list[str]:
        """Devices in the order their updates arrived."""
        given = [a for a in self.assignments if a.assignment.round == round_]
        return [a.assignment.device_id for a in sorted(given, key=lambda a: a.received_at or 0)]


class Yard:
    """Starts fleets over one base and one set of code folders."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # 11,264 adapter parameters per rank row, so that a slow link takes seconds.
        self.base = write_base(folder / "base", hidden=256, intermediate=1024, spread=0.05)
        self.devices = [
            DeviceSetup("desk", [str(write_code(folder / "python", ".py", _python))]),
            DeviceSetup("field", [str(write_code(folder / "shell", ".sh", _shell))],
                        up=SLOW_UP, down="40M"),
            DeviceSetup("lab", [str(write_code(folder / "headers", ".h", _header))]),
        ]  # fmt: skip

    def device(self, name: str) -> DeviceSetup:
        return next(d for d in self.devices if d.name == name)

    def fleet(self, name: str, devices: Sequence[DeviceSetup] | None = None) -> LocalFleet:
        """A fleet in a fresh folder; nothing runs yet."""
        sections = {**SECTIONS, "model": {"base": str(self.base)}}
        return LocalFleet(self.folder / name, sections, devices or self.devices)

    @contextlib.contextmanager
    def replaying(
        self, name: str, plans: Path, devices: Sequence[DeviceSetup] | None = None
    ) -> Iterator[LocalFleet]:
        """A running fleet that follows recorded plans, agents started in the order given."""
        with self.fleet(name, devices) as fleet:
            fleet.start_coordinator("--replay", str(plans))
            fleet.await_token()
            for device in fleet.devices:
                fleet.start_agent(device)
            yield fleet

    def finish(self, fleet: LocalFleet, rounds: int = ROUNDS) -> Outcome:
        """Waits until the run is finished and every process has ended with exit code 0."""
        began = time.monotonic()
        names = ["coordinator", *(d.name for d in fleet.devices)]
        self.await_(fleet, lambda: not any(fleet.running(n) for n in names), "the run to finish")
        said = logs(fleet)
        assert "Traceback" not in said and "traceback" not in said, said
        return outcome(fleet, time.monotonic() - began, rounds)

    def await_(
        self, fleet: LocalFleet, happened: Callable[[], bool], what: str, ignore: str = ""
    ) -> None:
        """Polls until it happened. Fails with the end of every log when it does not."""
        until = time.monotonic() + PATIENCE_S
        while not happened():
            for name, process in fleet.processes.items():
                code = process.poll()
                if name != ignore and code not in (None, 0):
                    pytest.fail(f"{name} ended with {code} before {what}\n{logs(fleet)}")
            if time.monotonic() > until:
                pytest.fail(f"waited {PATIENCE_S:.0f} s in vain for {what}\n{logs(fleet)}")
            time.sleep(POLL_S)


def outcome(fleet: LocalFleet, seconds: float, rounds: int) -> Outcome:
    records = Records(fleet.state / "coordinator.sqlite")
    try:
        run = records.run(RUN)
        assert run is not None and run.finished_at is not None, logs(fleet)
        models = [records.model(RUN, version) for version in range(rounds + 1)]
        found = [m is not None and m[0] == version for version, m in enumerate(models)]
        assert all(found), f"versions {found}\n{logs(fleet)}"
        return Outcome(
            fleet.folder,
            fleet.state,
            tuple(tuple((r, b.digest) for r, b in m[1].items()) for m in models if m is not None),
            tuple(records.all_rounds(RUN)),
            tuple(records.assignments(RUN)),
            seconds,
        )
    finally:
        records.close()


def logs(fleet: LocalFleet, lines: int = 12) -> str:
    """The end of every log of a fleet."""
    parts = []
    for path in sorted(fleet.folder.glob("**/*.log")):
        tail = path.read_text(errors="replace").splitlines()[-lines:]
        parts.append("\n".join([f"--- {path.relative_to(fleet.folder)}", *tail]))
    return "\n".join(parts)


def _python(i: int) -> str:
    body = "\n".join(f"    total += values[{j}] * {i}" for j in range(12))
    return f"def weigh_{i}(values):\n    total = {i}\n{body}\n    return total\n"


def _shell(i: int) -> str:
    body = "\n".join(f'echo "step {j} of job {i}" >> "$log"' for j in range(12))
    return f'#!/bin/sh\nset -eu\nlog="/tmp/job_{i}.log"\n{body}\n'


def _header(i: int) -> str:
    body = "\n".join(f"int read_{i}_{j}(struct port *port, int flags);" for j in range(12))
    return f"#ifndef PORT_{i}_H\n#define PORT_{i}_H\n{body}\n#endif\n"


@pytest.fixture(scope="session")
def yard(tmp_path_factory: pytest.TempPathFactory) -> Yard:
    return Yard(tmp_path_factory.mktemp("yard"))


@pytest.fixture(scope="session")
def first_run(yard: Yard) -> Outcome:
    """An undisturbed run, planned by the planner, with everything stopped."""
    with yard.fleet("first") as fleet:
        fleet.start()
        return yard.finish(fleet)


@pytest.fixture(scope="session")
def plans(first_run: Outcome, coordinator_says: Callable[..., str]) -> Path:
    """The plans of the undisturbed run, as `runs NAME --plans` writes them."""
    path = first_run.folder / "plans.json"
    path.write_text(coordinator_says("runs", RUN, "--plans", "--state", str(first_run.state)))
    return path


@pytest.fixture(scope="session")
def coordinator_says() -> Callable[..., str]:
    """Standard output of a `sketchfleet-coordinator` command that must succeed."""

    def run(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "coordinator.cli", *arguments],
            capture_output=True, text=True, timeout=120, cwd=ROOT, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{arguments} ended with {done.returncode}: {done.stderr}"
        return done.stdout

    return run
