"""Follows docs/field-trial.md to the letter, on machines that it plays.

    python -m tools.field_trial --out trial [--page docs/field-trial.md]

Runs the page's own blocks where their titles say, as root: "desk" in a copy of this checkout, the
rest in `trials.machines`. Ends with 0 if every command did and the run's records show what the page
promises. What was typed and what came of it: transcript.md there.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from profiles.errors import ExitCode, SketchfleetError
from tools.page_commands import Step, file_script, steps
from trials.machines import Lan, Machine, unavailable

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs/field-trial.md"
HUB, DEVICES = "fleet", ("bench-1", "bench-2", "bench-3", "bench-4")
EVERY, DESK = "every device", "desk"
ALIASES = {"fleet.example.org": HUB}
RUN = "field"
PACKAGES = "/opt/packages"  # where devices see those of the interpreter that this runs with
COMMAND_S = 600.0
PATIENCE_S = 900.0
LOOK_EVERY_S = 3.0
TRAINING = "training"
AS_AGENT = "runuser -u sketchfleet-agent --"


class TrialError(SketchfleetError):
    """The page asked for something that did not come about."""


class FieldTrial:
    """The machines, and who does what the page says."""

    def __init__(self, out: Path) -> None:
        """out: a folder that is not there yet."""
        self.out = out.resolve()
        self.out.mkdir(parents=True)
        self._desk = self.out / DESK
        self._log = (self.out / "transcript.md").open("w")
        self._began = time.monotonic()
        tag = str(os.getpid())
        names = (HUB, *DEVICES)
        self._lan = Lan(tag, names, ALIASES)
        self.machines = {n: Machine(tag, n, self.out / "machines" / n, self._lan) for n in names}
        self.found: dict[str, bool] | None = None

    def __enter__(self) -> FieldTrial:
        try:
            copy_checkout(self._desk)
            packages = Path(sysconfig.get_paths()["purelib"])
            shown = {packages: PACKAGES, Path(sys.base_prefix): sys.base_prefix}
            for machine in self.machines.values():
                machine.start(shown if machine.name in DEVICES else {})
                if machine.name in DEVICES:
                    self._give_pytorch(machine)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        with ThreadPoolExecutor() as pool:
            list(pool.map(self._end, self.machines.values()))
        self._lan.close()
        self._log.close()

    def _give_pytorch(self, machine: Machine) -> None:
        """The environment that the page expects: this interpreter's packages, torch among them."""
        python = Path(sys.base_prefix) / "bin" / f"python3.{sys.version_info.minor}"
        made = machine.shell(
            f"{python} -m venv --without-pip /opt/pytorch && "
            f"echo {PACKAGES} > $(echo /opt/pytorch/lib/python3.*/site-packages)/packages.pth"
        )
        if made.returncode:
            raise TrialError(f"{machine.name} got no PyTorch: {made.stdout.strip()}")

    def _end(self, machine: Machine) -> None:
        """Stops it and keeps what its services logged."""
        if machine.running:
            said = machine.shell("journalctl --no-pager -u 'sketchfleet-*'").stdout
            (self.out / f"journal-{machine.name}.log").write_text(said)
        machine.stop()

    def follow(self, page: Path) -> None:
        """Does all that the page says. Raises `TrialError` with the line that failed."""
        for step in steps(page):
            try:
                self._do(step)
            except SketchfleetError as error:
                raise TrialError(f"{page.name} line {step.line}: {error}") from error

    def facts(self, *command: str) -> Any:
        """What the coordinator's command says as JSON."""
        return json.loads(self._said(*command))

    def facts_by_line(self, *command: str) -> list[dict[str, Any]]:
        """The same of a command that gives an object on each line."""
        lines = self._said(*command).splitlines()
        return [json.loads(line) for line in lines if line.startswith("{")]

    def _said(self, *command: str) -> str:
        words = shlex.join(["sketchfleet-coordinator", *command, "--json"])
        done = self.machines[HUB].shell(words)
        if done.returncode:
            raise TrialError(f"`{words}` on {HUB}: {done.stdout.strip()}")
        return done.stdout

    def _do(self, step: Step) -> None:
        if step.kind == "action":
            self._act(step.text)
        elif step.kind == "file":
            place, _, file = step.where.rpartition(":")
            for machine in self._at(place or DESK):
                self._run(machine, file_script(file, step.text), f"writes {file}")
        elif step.kind == "commands":
            places = self._at(step.where)
            for command in step.commands:
                with ThreadPoolExecutor() as pool:
                    list(pool.map(lambda place, c=command: self._run(place, c), places))

    def _at(self, place: str) -> Sequence[str]:
        known = (DESK, *self.machines)
        if place == EVERY:
            return DEVICES
        if place not in known:
            raise TrialError(f"{place!r} is none of {', '.join(known)} and {EVERY}")
        return (place,)

    def _run(self, place: str, command: str, shown: str | None = None) -> None:
        began = time.monotonic()
        if place == DESK:
            done = self._at_desk(command)
        else:
            done = self.machines[place].shell(command, COMMAND_S)
        self.tell(f"{place}$ {shown or command}", done.stdout, time.monotonic() - began)
        if done.returncode:
            raise TrialError(f"`{shown or command}` on {place} ended with {done.returncode}: "
                             f"{done.stdout.strip()[-800:]}")  # fmt: skip

    def _at_desk(self, command: str) -> subprocess.CompletedProcess[str]:
        env = {**os.environ, "PATH": f"{self._desk / '.tools'}:{Path(sys.executable).parent}:"
               f"{os.environ['PATH']}", "SKETCHFLEET_TRIAL": json.dumps(self._homes())}  # fmt: skip
        return subprocess.run(
            ["bash", "-e", "-o", "pipefail", "-c", command], cwd=self._desk, check=False, env=env,
            text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            timeout=COMMAND_S,
        )  # fmt: skip

    def _homes(self) -> dict[str, str]:
        return {name: str(machine.path("/root")) for name, machine in self.machines.items()}

    def _act(self, action: str) -> None:
        began = time.monotonic()
        for pattern, do in ACTIONS.items():
            if found := re.fullmatch(pattern, action):
                do(self, *found.groups())
                self.tell(f"({action})", "", time.monotonic() - began)
                return
        raise TrialError(f"nobody knows how to do this: {action}")

    def _unplug(self, name: str) -> None:
        self._wait(f"{name} trains", lambda: self._phase(name) == TRAINING, 0.2)
        self._lan.pull(name)

    def _plug_in(self, name: str) -> None:
        self._lan.put_back(name)

    def _await_rounds(self, count: str) -> None:
        self._wait(f"{count} rounds", lambda: len(self._merged()) >= int(count))

    def _await_next_round(self) -> None:
        before = len(self._merged())
        self._wait("a round more", lambda: len(self._merged()) > before)

    def _await_end(self) -> None:
        def finished() -> bool:
            return any(run["run_id"] == RUN and run["finished"] for run in self.facts("runs"))

        self._wait("the end of the run", finished)
        self.found = verdict(self, "bench-2", "bench-4")

    def _merged(self) -> list[dict[str, Any]]:
        return [r for r in self.facts("runs", RUN) if r["phase"] == "merged"]

    def _phase(self, name: str) -> str:
        said = self.machines[name].shell(f"{AS_AGENT} sketchfleet-agent status --json")
        return str(json.loads(said.stdout).get("phase", "")) if not said.returncode else ""

    def _wait(self, what: str, done: Callable[[], bool], every_s: float = LOOK_EVERY_S) -> None:
        until = time.monotonic() + PATIENCE_S
        while not done():
            if time.monotonic() > until:
                raise TrialError(f"waited {PATIENCE_S:.0f} s in vain: {what}")
            time.sleep(every_s)

    def tell(self, what: str, said: str, seconds: float) -> None:
        """Shows a line, and keeps it with its output."""
        at = time.monotonic() - self._began
        print(f"{at:6.0f} s  {what}", flush=True)
        self._log.write(f"### {at:.0f} s: `{what}` ({seconds:.1f} s)\n\n")
        if said.strip():
            self._log.write(f"```text\n{said.rstrip()}\n```\n\n")
        self._log.flush()


ACTIONS: dict[str, Callable[..., None]] = {
    r"wait until round (\d+) is merged": FieldTrial._await_rounds,
    r"wait until a round is merged": FieldTrial._await_next_round,
    r"wait until the run is finished": FieldTrial._await_end,
    r"unplug (\S+) while it trains": FieldTrial._unplug,
    r"plug (\S+) in": FieldTrial._plug_in,
}
"""What a page may have done by hand (`<!-- do: ... -->`), as regular expressions."""


def copy_checkout(folder: Path) -> None:
    """A copy of the files that are, or will be, under version control, with the desk's programs."""
    listed = subprocess.run(["git", "ls-files", "-z", "-co", "--exclude-standard"], cwd=ROOT,
                            check=True, capture_output=True, text=True).stdout  # fmt: skip
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    tools = folder / ".tools"
    tools.mkdir()
    agent = f'export PYTHONPATH="{folder}"\nexec {sys.executable} -m edge_agent.cli "$@"\n'
    for name, text in (("scp", f"#!{sys.executable}\n{_SCP}"),
                       ("sketchfleet-agent", f"#!/bin/sh\n{agent}")):  # fmt: skip
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)


_SCP = """
import json, os, shutil, sys
from pathlib import Path
homes = json.loads(os.environ["SKETCHFLEET_TRIAL"])
def place(word):
    host, colon, path = word.partition(":")
    return Path(homes[host]) / path if colon else Path(word)
*sources, target = [place(word) for word in sys.argv[1:] if not word.startswith("-")]
for source in sources:
    to = target / source.name if target.is_dir() else target
    shutil.copytree(source, to) if source.is_dir() else shutil.copy2(source, to)
"""


def verdict(trial: FieldTrial, unplugged: str, revoked: str) -> dict[str, bool]:
    """What the page promises, and whether the run's own records say so."""
    report = trial.facts("report", RUN)
    audit = trial.facts_by_line("audit")
    given = {e["round"]: e["devices"] for e in audit if e["event"] == "assigned"}
    merged = {
        e["round"]: {assignment.rpartition(".")[2] for assignment in e["updates"]}
        for e in audit
        if e["event"] == "merged"
    }
    shut_at = next((e["at"] for e in audit if e["event"] == "device revoked"), None)
    asked = "systemctl show sketchfleet-agent -p NRestarts --value"
    restarts = trial.machines[unplugged].shell(asked).stdout.strip()
    joined = [e for e in audit if e["event"] == "device enrolled"]
    missed = [r for r, who in merged.items()
              if unplugged in given.get(r, ()) and unplugged not in who and who]  # fmt: skip
    return {
        "the run is finished": bool(report["finished"]),
        "all devices joined": len(joined) == len(DEVICES),
        f"a round was merged without {unplugged}, which had work in it": len(missed) == 1,
        f"{unplugged} delivered in every round after that, without a restart":
            bool(missed) and restarts == "0"
            and all(unplugged in who for r, who in merged.items() if r > min(missed) and who),
        f"{revoked} got no work after it was revoked":
            shut_at is not None and not any(e["event"] == "assigned" and e["at"] > shut_at
                                            and revoked in e["devices"] for e in audit),
        f"{revoked} took part before": any(revoked in who for who in merged.values()),
    }  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.field_trial", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER",
                        help="for all that is made; must not be there yet")  # fmt: skip
    parser.add_argument("--page", type=Path, default=PAGE, metavar="FILE")
    args = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that no machine is left running
    try:
        if why := unavailable():
            raise TrialError(why)
        if args.out.exists():
            raise TrialError(f"{args.out} is there already; name a new folder")
        with FieldTrial(args.out) as trial:
            trial.follow(args.page)
    except SketchfleetError as error:
        print(f"field_trial: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return ExitCode.INTERRUPTED
    assert trial.found is not None
    print(json.dumps(trial.found, indent=1))
    return 0 if all(trial.found.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
