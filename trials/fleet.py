"""A fleet on this machine: one coordinator, agents, and a relay per link, as real processes.

Knows how to write their configuration, start, watch, kill and stop them. What they do is theirs.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from coordinator.authority import Authority
from coordinator.enrolment import Enrolment
from coordinator.listeners import AUTHORITY
from coordinator.store.members import Members
from coordinator.store.records import Records
from edge_agent.identity import Identity
from edge_agent.joining import enroll
from profiles.errors import SketchfleetError
from profiles.progress import progress
from profiles.settings import host_of, is_loopback
from protos.invitation import Invitation, pin_of
from trials.caps import KernelCap
from trials.emulation import EmulatedLink

Sections = Mapping[str, Mapping[str, Any]]


class FleetError(SketchfleetError):
    """A process of the fleet ended when it should not have."""


@dataclass(frozen=True)
class DeviceSetup:
    """One emulated device. Rates as `trials.relay` reads them ("400k", "5M"); none: no relay."""

    name: str
    include: Sequence[str]
    board: str = ""
    exclude: Sequence[str] = ()
    languages: Sequence[str] = ()
    max_files: int | None = None
    memory_mb: int | None = None
    up: str = ""
    down: str = ""
    delay_ms: float = 0.0
    cap: KernelCap | None = None  # what the kernel lets the agent and its trainer have
    network: EmulatedLink | None = None  # instead of `up`, `down` and `delay_ms`
    agent: Sections = field(default_factory=dict)  # further sections of agent.toml


def free_port() -> int:
    """A loopback port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def await_listening(
    place: tuple[str, int], check: Callable[[], None], log: Path, patience_s: float = 30.0
) -> None:
    """Waits until a coordinator listens. Raises `FleetError`, and what `check` raises."""
    until = time.monotonic() + patience_s
    while time.monotonic() < until:
        check()
        with contextlib.suppress(OSError), socket.create_connection(place, timeout=0.2):
            return
        time.sleep(0.1)
    raise FleetError(f"the coordinator did not listen within {patience_s:.0f} s; see {log}")


def write_toml(path: Path, sections: Sections) -> None:
    """Writes sections of plain values."""
    path.write_text(toml_text(sections))


def toml_text(sections: Sections) -> str:
    """Sections of plain values as TOML."""
    lines = []
    for name, section in sections.items():
        lines.append(f"[{name}]")
        lines += [f"{key} = {_toml(value)}" for key, value in section.items() if value is not None]
        lines.append("")
    return "\n".join(lines)


def _toml(value: Any) -> str:
    """JSON literals are TOML ones for plain values; tables are written inline."""
    if isinstance(value, Mapping):
        inside = ", ".join(f"{key} = {_toml(v)}" for key, v in value.items() if v is not None)
        return f"{{ {inside} }}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_toml, value))}]"
    return json.dumps(value)


@dataclass
class LocalFleet:
    """Processes under `folder`; use as a context manager, which stops what still runs."""

    folder: Path
    run: Sections  # run.toml less [server] and [web]
    devices: Sequence[DeviceSetup]
    port: int = field(default_factory=free_port)
    web_port: int = 0  # of the dashboard; 0: none
    secured: bool = False  # mutual TLS, as in the field; without it plain text over loopback
    joining_port: int = field(default_factory=free_port)
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    variables: Mapping[str, Mapping[str, str]] = field(default_factory=dict)  # by process

    def __enter__(self) -> LocalFleet:
        self.folder.mkdir(parents=True, exist_ok=True)
        linked = [host_of(d.network.address) for d in self.devices if d.network is not None]
        self.secured = self.secured or not all(map(is_loopback, linked))
        write_toml(self.folder / "run.toml", {
            **self.run, "server": self._server,
            "web": {"listen": f"127.0.0.1:{self.web_port}" if self.web_port else ""},
        })  # fmt: skip
        if self.secured and not (self.state / AUTHORITY).exists():
            names = dict.fromkeys(("127.0.0.1", "localhost", *linked))
            Authority.create(self.state / AUTHORITY, list(names))
        return self

    @property
    def _server(self) -> dict[str, Any]:
        own = self.run.get("server", {})
        place = {"listen": f"127.0.0.1:{self.port}", "state": "coordinator"}
        if self.secured:
            return {**own, **place, "enrolment": f"127.0.0.1:{self.joining_port}"}
        return {**own, **place, "plain_text": True}

    def __exit__(self, *_: object) -> None:
        running = [process for process in self.processes.values() if process.poll() is None]
        for process in running:
            process.terminate()
        try:
            with progress("stopping every process"):
                for process in running:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(15)
        finally:  # a second Ctrl-C too leaves nothing behind
            for process in running:
                process.kill()
                process.wait()

    @property
    def state(self) -> Path:
        """The coordinator's state folder."""
        return self.folder / "coordinator"

    @property
    def run_id(self) -> str:
        """The name of the run."""
        return str(self.run["run"]["name"])

    def start_coordinator(self, *arguments: str) -> None:
        """Starts (or, after a kill, restarts) the coordinator."""
        self._start("coordinator", "coordinator.cli", "serve", "--config",
                    str(self.folder / "run.toml"), *arguments)  # fmt: skip

    def start_agent(self, device: DeviceSetup) -> None:
        """Starts an agent, behind its own relay when its link is shaped."""
        if device.network is not None:
            address = device.network.address
        else:
            port = self._relay(device) if device.up or device.down else self.port
            address = f"127.0.0.1:{port}"
        folder = self.folder / device.name
        folder.mkdir(exist_ok=True)
        sections: dict[str, Mapping[str, Any]] = {
            "device": {"name": device.name, "board": device.board},
            "coordinator": {"address": address, **({} if self.secured else {
                "plain_text": True, "token_file": str(self.state / "join-token")})},
            "data": {"include": list(device.include), "exclude": list(device.exclude),
                     "languages": list(device.languages), "max_files": device.max_files},
            "limits": {"memory_mb": device.memory_mb, "threads": 1},
            "state": {"folder": "state"},
        }  # fmt: skip
        for name, section in device.agent.items():
            sections[name] = {**sections.get(name, {}), **section}
        write_toml(folder / "agent.toml", sections)
        if self.secured:
            self._enroll(device.name, folder / "state")
        self._start(device.name, "edge_agent.cli", "run", "--config", str(folder / "agent.toml"),
                    cap=device.cap, network=device.network)  # fmt: skip

    def invitation(self, **terms: Any) -> Invitation:
        """A join token of a secured fleet; `terms` as `Enrolment.create_token` takes them."""
        records = Records(self.state / "coordinator.sqlite")
        members = Members(records)
        try:
            authority = Authority(self.state / AUTHORITY)
            token = Enrolment(authority, members, lifetime_s=0.0).create_token(**terms)
        finally:
            members.close()
            records.close()
        pin = pin_of(authority.trust)
        return Invitation(token, f"127.0.0.1:{self.joining_port}", pin, authority.trust)

    def _enroll(self, name: str, folder: Path) -> None:
        folder.mkdir(mode=0o700, exist_ok=True)
        identity = Identity(folder / "identity")
        if not identity.exists:
            enroll(identity, self.invitation(name=name), name, "trial", lambda: None, 60.0)

    def start(self) -> None:
        """Starts everything, the coordinator first."""
        self.start_coordinator()
        self.await_token()
        for device in self.devices:
            self.start_agent(device)

    def await_token(self, patience_s: float = 30.0) -> None:
        """Waits until the coordinator listens. Raises `FleetError` with its last words."""

        def check() -> None:
            self.check("coordinator")

        for port in (self.port, self.joining_port) if self.secured else (self.port,):
            await_listening(("127.0.0.1", port), check, self.log("coordinator"), patience_s)

    def await_finish(self, records: Records, patience_s: float) -> None:
        """Waits for the end of the run. Raises `FleetError` when a process fails or it drags on."""
        until = time.monotonic() + patience_s
        while True:
            for name in self.processes:
                self.check(name)
            run = records.run(self.run_id)
            if run is not None and run.finished_at is not None:
                return
            if time.monotonic() > until:
                raise FleetError(
                    f"the run did not finish within {patience_s:.0f} s; see "
                    f"{self.log('coordinator')}"
                )
            time.sleep(0.25)

    def kill(self, name: str) -> None:
        """SIGKILL to one process (and, for an agent, to its trainer)."""
        process = self.processes[name]
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def running(self, name: str) -> bool:
        """Whether a process still runs."""
        return self.processes[name].poll() is None

    def check(self, name: str) -> None:
        """Raises `FleetError` with the last line of its log when a process has failed."""
        process = self.processes[name]
        if process.poll() not in (None, 0):
            lines = self.log(name).read_text(errors="replace").strip().splitlines()
            last = lines[-1] if lines else "no output"
            raise FleetError(f"{name} ended with exit code {process.returncode}: {last}")

    def log(self, name: str) -> Path:
        """The log of a process."""
        return self.folder / f"{name}.log"

    def status(self, device: str) -> dict[str, Any]:
        """What an agent last said it was doing; empty before it said anything."""
        try:
            plain: dict[str, Any] = json.loads(
                (self.folder / device / "state" / "status.json").read_text()
            )
        except (OSError, ValueError):
            return {}
        return plain

    def _relay(self, device: DeviceSetup) -> int:
        name = f"{device.name}.link"
        running = self.processes.get(name)
        if running is not None and running.poll() is None:
            return int((self.folder / f"{name}.port").read_text())
        out = self.folder / f"{name}.port.json"
        out.unlink(missing_ok=True)
        with out.open("wb") as stdout, self.log(name).open("ab") as log:
            self.processes[name] = subprocess.Popen(
                [sys.executable, "-m", "trials.relay", "--listen", "0", "--target",
                 str(self.port), "--up", device.up or "10G", "--down", device.down or "10G",
                 "--delay-ms", str(device.delay_ms)],
                stdout=stdout, stderr=log, env=environment(), start_new_session=True,
            )  # fmt: skip
        until = time.monotonic() + 60
        while time.monotonic() < until:
            self.check(name)
            if (text := out.read_text()).endswith("\n"):
                port = int(json.loads(text)["port"])
                (self.folder / f"{name}.port").write_text(str(port))
                return port
            time.sleep(0.05)
        raise FleetError(f"the link of {device.name} did not come up; see {self.log(name)}")

    def _start(
        self, name: str, module: str, *arguments: str, cap: KernelCap | None = None,
        network: EmulatedLink | None = None,
    ) -> None:  # fmt: skip
        command = [sys.executable, "-m", module, *arguments]
        if network is not None:
            command = network.wrap(command)
        with self.log(name).open("ab") as log:
            self.processes[name] = subprocess.Popen(
                command if cap is None else cap.wrap(command), start_new_session=True,
                stdout=log, stderr=log, env={**environment(), **self.variables.get(name, {})},
            )  # fmt: skip


def environment() -> dict[str, str]:
    """For child processes: this checkout importable, no look-ups on a hub."""
    root = str(Path(__file__).resolve().parent.parent)
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}


def fresh_folder(folder: Path) -> Path:
    """An empty folder of that name; an earlier one of ours is replaced, anything else is kept.

    Raises `FleetError` when the folder holds something that a fleet did not write.
    """
    if folder.exists():
        if not folder.is_dir():
            raise FleetError(f"{folder} is a file; choose another --out")
        if any(folder.iterdir()) and not (folder / "run.toml").is_file():
            raise FleetError(f"{folder} holds other files; choose another --out")
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    return folder
