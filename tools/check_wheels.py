"""Builds the wheel, installs it into fresh environments, and has coordinator and agent do a round.

    python -m tools.check_wheels [--pythons 3.10 3.12] [--train 3.11] [--logs FOLDER]

Nothing of the source tree is importable there. With each Python from 3.10 to 3.13 on the PATH: the
agent alone, with inference, the coordinator alone, both; a round between the first and the third
over loopback with mutual TLS, and one within the last. There, `tools/stub_trainer.py` stands in for
training, as the table says. With `--train` one Python installs PyTorch too: its environment does a
round, and is then the trainer of every other Python's agent in one more. Prints a table, then one
line of JSON; the exit code is 1 when anything failed. Takes minutes, and an index for pip.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from tools.installed import (
    ROOT,
    CheckError,
    Environment,
    bare,
    build,
    check_alone,
    install,
    interpreter,
)

PYTHONS = ("3.10", "3.11", "3.12", "3.13")
INSTALLS = {
    "agent": "agent",
    "agent, inference": "agent,serve",
    "coordinator": "coordinator",
    "both": "agent,coordinator",
}
ROUND_S = 300.0
STUB = "stub, trains nothing"


@dataclasses.dataclass
class Outcome:
    """A line of the table."""

    python: str
    what: str
    trainer: str = ""
    mb: float | None = None
    seconds: float = 0.0
    failed: str = ""
    absent: bool = False


def stub(environment: Environment, folder: Path) -> str:
    """An executable that takes the place of the trainer's interpreter."""
    folder.mkdir(parents=True)
    script = folder / "stub_trainer"
    source = (ROOT / "tools" / "stub_trainer.py").read_text()
    script.write_text(f"#!{environment.program('python')}\n{source}")
    script.chmod(0o755)
    return str(script)


def free_ports(count: int) -> list[int]:
    """Loopback ports that are free now."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]


@contextlib.contextmanager
def started(environment: Environment, log: Path, *words: str) -> Iterator[subprocess.Popen[bytes]]:
    """A program that runs beside this one; ended with it."""
    with log.open("wb") as out:
        process = subprocess.Popen(
            [environment.program(words[0]), *words[1:]],
            stdout=out, stderr=out, cwd=log.parent, env=bare(),
        )  # fmt: skip
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def do_round(serving: Environment, training: Environment, trainer: str, folder: Path) -> None:
    """A coordinator and an agent finish a run of one round. Raises `CheckError`."""
    folder.mkdir(parents=True)
    port, joining = free_ports(2)
    state, join = folder / "coordinator", folder / "join"
    (folder / "run.toml").write_text(f"""\
[run]
name = "wheels"
rounds = 1
[model]
base = "{serving.packages / "trials" / "nano_code"}"
[adapter]
rank = 8
[training]
precision = "fp32"
sequence_tokens = 64
local_steps = 2
min_local_steps = 1
checkpointing = false
[round]
min_devices = 1
gather_s = 0
round_s = 60
[evaluation]
sequences = 2
[server]
listen = "127.0.0.1:{port}"
enrolment = "127.0.0.1:{joining}"
state = "{state}"
""")
    (folder / "agent.toml").write_text(f"""\
[device]
name = "board"
[data]
include = ["{training.packages / "pydantic"}"]
max_files = 30
[model]
base = "{training.packages / "trials" / "nano_code"}"
[state]
folder = "{folder / "agent-state"}"
[trainer]
python = "{trainer}"
""")
    settings = ("--config", str(folder / "agent.toml"))
    serving.run("sketchfleet-coordinator", "init", "--state", str(state), "--name", "127.0.0.1")
    until = time.monotonic() + ROUND_S
    with started(serving, folder / "coordinator.log", "sketchfleet-coordinator", "serve",
                 "--config", str(folder / "run.toml")) as coordinator:  # fmt: skip
        serving.run("sketchfleet-coordinator", "token", "create", "--state", str(state),
                    "--address", f"127.0.0.1:{joining}", "--out", str(join))  # fmt: skip
        await_port(joining, coordinator, folder / "coordinator.log")
        training.run("sketchfleet-agent", "enroll", str(join), *settings)
        with started(
            training, folder / "agent.log", "sketchfleet-agent", "run", *settings
        ) as agent:
            for process, name in ((agent, "agent"), (coordinator, "coordinator")):
                ended(process, max(1.0, until - time.monotonic()), folder / f"{name}.log")
    told = json.loads(serving.run("sketchfleet-coordinator", "runs", "--state", str(state),
                                  "--json"))  # fmt: skip
    if [run["finished"] for run in told] != [True]:
        raise CheckError(f"the run did not finish: {told}")


def await_port(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    """Waits until something listens there. Raises `CheckError`."""
    for _ in range(300):
        if process.poll() is not None:
            raise CheckError(f"the coordinator ended: {last_line(log)}")
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.1)
    raise CheckError(f"the coordinator does not listen: {last_line(log)}")


def ended(process: subprocess.Popen[bytes], patience_s: float, log: Path) -> None:
    """Waits for an end without fault. Raises `CheckError`."""
    try:
        code = process.wait(patience_s)
    except subprocess.TimeoutExpired:
        raise CheckError(f"the run takes too long: {last_line(log)}") from None
    if code:
        raise CheckError(f"{log.stem} ended with {code}: {last_line(log)}")


def last_line(log: Path) -> str:
    """The last words of a process."""
    return (log.read_text(errors="replace").strip().splitlines() or ["it said nothing"])[-1]


def table(outcomes: Sequence[Outcome]) -> str:
    """For people."""
    rows = [("Python", "what", "trainer", "MB", "s", "outcome")]
    rows += [
        (o.python, o.what, o.trainer, "" if o.mb is None else f"{o.mb:.0f}", f"{o.seconds:.0f}",
         o.failed or ("-" if o.absent else "ok"))
        for o in outcomes
    ]  # fmt: skip
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    return "\n".join(
        "  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[5]])
        for row in rows
    )


class Checks:
    """Does one thing after the other and writes down how each ended."""

    def __init__(self, wheel: Path, scratch: Path) -> None:
        self.wheel, self.scratch = wheel, scratch
        self.outcomes: list[Outcome] = []

    @contextlib.contextmanager
    def noting(self, python: str, what: str, trainer: str = "") -> Iterator[Outcome]:
        """Times what is done within; what goes wrong there is written down and ends there."""
        outcome, begun = Outcome(python, what, trainer), time.monotonic()
        print(f"{python}: {what} ...", file=sys.stderr, flush=True)
        try:
            yield outcome
        except (CheckError, OSError, LookupError, ValueError, subprocess.SubprocessError) as error:
            outcome.failed = f"{type(error).__name__}: {error}"
        outcome.seconds = time.monotonic() - begun
        self.outcomes.append(outcome)

    def installed(
        self, version: str, executable: str, what: str, extras: str, pins: Path | None = None
    ) -> Environment:
        """An environment of that Python; what it has to do alone is tried."""
        folder = self.scratch / f"{version}-{extras}"
        with self.noting(version, what) as outcome:
            made = install(executable, folder, self.wheel, extras, pins)
            outcome.mb = made.megabytes
            check_alone(made, extras)
        return Environment(folder)

    def rounds(self, version: str, executable: str, trainer: Environment | None) -> None:
        """Everything with one Python. trainer: whose interpreter trains in one more round."""
        made = {what: self.installed(version, executable, what, extras)
                for what, extras in INSTALLS.items()}  # fmt: skip
        apart, within = "round, coordinator and agent apart", "round, both in one"
        for what, serving, training in ((apart, "coordinator", "agent"), (within, "both", "both")):
            with self.noting(version, what, STUB):
                stood_in = stub(made[training], self.scratch / f"{version}-{training}-stub")
                folder = self.scratch / f"{version}-{training}-round"
                do_round(made[serving], made[training], stood_in, folder)
        if trainer is not None:
            with self.noting(version, apart, "PyTorch, of its own Python"):
                folder = self.scratch / f"{version}-trained"
                do_round(made["coordinator"], made["agent"], trainer.program("python"), folder)
        for environment in made.values():
            shutil.rmtree(environment.folder, ignore_errors=True)

    def all(self, pythons: Sequence[str], trains: str | None) -> None:
        """Every Python, the one that trains first."""
        found = {version: interpreter(version) for version in pythons}
        trainer = None
        if trains is not None and (executable := found.get(trains)) is not None:
            pins = ROOT / "constraints.txt"  # the torch that the checks run with
            trainer = self.installed(trains, executable, "agent, training", "train", pins)
        for version, executable in found.items():
            if executable is None:
                self.outcomes.append(Outcome(version, "not on the PATH", absent=True))
            else:
                self.rounds(version, executable, trainer)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--pythons", nargs="+", default=PYTHONS, choices=PYTHONS)
    parser.add_argument("--train", choices=PYTHONS, help="the Python that PyTorch is installed for")
    parser.add_argument("--logs", type=Path, help="keep what the processes wrote there")
    options = parser.parse_args(argv)
    for ending in (signal.SIGINT, signal.SIGTERM):  # so that the environments go with it
        signal.signal(ending, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="sketchfleet-wheels-") as name:
        scratch = Path(name)
        wheel = build(scratch / "wheel")
        checks = Checks(wheel, scratch)
        try:
            checks.all(options.pythons, options.train)
        except KeyboardInterrupt:  # what is known so far is told all the same
            checks.outcomes.append(Outcome("", "interrupted", failed="the rest was not done"))
        wheel_mb = wheel.stat().st_size / 1e6
        if options.logs is not None:
            for log in scratch.rglob("*.log"):
                options.logs.mkdir(parents=True, exist_ok=True)
                shutil.copy(log, options.logs / f"{log.parent.name}-{log.name}")
    print(table(checks.outcomes))
    print(f"MB: packages installed, without pip; the wheel itself has {wheel_mb:.1f} MB")
    plain = [dataclasses.asdict(outcome) for outcome in checks.outcomes]
    print(json.dumps({"wheel_mb": round(wheel_mb, 2), "outcomes": plain}))
    return int(any(outcome.failed for outcome in checks.outcomes))


if __name__ == "__main__":
    sys.exit(main())
