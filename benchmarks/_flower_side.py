"""Flower's side of the race: its deployment engine with the app in `peers/flower`.

SuperLink, SuperNodes and `flwr run` as its documentation starts them, with `--insecure`. Training
is done by warm trainers of ours, which the app reaches through sockets. Knows no other side.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._fleet_rounds import Fleet, Way, selection
from benchmarks._flower_environment import PeerError
from benchmarks._race import Run, Version, networks
from coordinator.state import StateFile
from protos.contract import Payload, ProfileRequest, to_plain
from protos.layout import Parts
from protos.packing import pack
from protos.unpacking import unpack
from trials.demo import NANO_CODE
from trials.fleet import environment, free_port, write_toml

APP = Path(__file__).resolve().parent / "peers" / "flower"
PATIENCE_S = 900.0


class WarmTrainer:
    """A trainer process that takes a job from whoever calls at a socket and answers its result."""

    def __init__(self, folder: Path) -> None:
        with (folder / "trainer.log").open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "edge_agent.training.trainer", "--threads", "1"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=environment(),
            )  # fmt: skip
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(str(folder / "trainer"))
        self._socket.listen()
        threading.Thread(target=self._serve, daemon=True).start()

    def ask(self, line: bytes) -> bytes:
        """The result or error that answers a job."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(line)
        self._process.stdin.flush()
        for event in self._process.stdout:
            if json.loads(event)["event"] in ("result", "error"):
                return event
        return b'{"event": "error", "message": "the trainer ended"}\n'

    def close(self) -> None:
        """Ends the process."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes whoever waits in accept
        self._socket.close()
        self._process.terminate()
        self._process.wait()

    def _serve(self) -> None:
        while True:
            try:
                call, _ = self._socket.accept()
            except OSError:
                return  # closed
            with call, call.makefile("rwb") as lines:
                lines.write(self.ask(lines.readline()))


def play_flower(
    fleet: Fleet,
    folder: Path,
    commands: Path,
    seeds: Mapping[str, Sequence[int]],
    *,
    rounds: int,
    shaped: bool,
) -> Run:
    """Flower's deployment engine, as its documentation starts it, with `--insecure`."""
    folder.mkdir()
    names = [device.name for device in fleet.devices]
    initial = unpack(fleet.initial().path.read_bytes(), fleet.spec, fleet.initial().payload)
    np.savez(folder / "initial.npz", **_arrays(fleet, initial))
    port = free_port()
    env = environment() | {"FLWR_HOME": str(folder), "FLWR_TELEMETRY_ENABLED": "0",
                           "FLWR_DISABLE_UPDATE_CHECK": "1", "NO_COLOR": "1",
                           "PATH": f"{commands}:{os.environ['PATH']}"}  # fmt: skip
    env.pop("PYTHONPATH")  # Flower's own packages come first
    write_toml(folder / "config.toml", {
        "superlink": {"default": "here"},
        "superlink.here": {"address": f"127.0.0.1:{port}", "insecure": True},
    })  # fmt: skip
    with contextlib.ExitStack() as stack:
        for device in fleet.devices:
            home = folder / device.name
            home.mkdir()
            task = fleet.task(device.name, 0, Way("float32", "float32"))
            job = {"job": "train", "base_folder": str(NANO_CODE), "spec": to_plain(fleet.spec),
                   "assignment": to_plain(task), "data": asdict(selection(device))}  # fmt: skip
            facts = {"job": job, "seeds": seeds[device.name]}
            (home / "job.json").write_text(json.dumps(facts))
            trainer = WarmTrainer(home)
            stack.callback(trainer.close)
            # As Sketchfleet's agents do at start: the base is in memory when the first round opens.
            trainer.ask((json.dumps(_measuring(fleet, job)) + "\n").encode())
        net = stack.enter_context(networks(shaped, port, names))
        began = time.time()
        superlink = [str(commands / "flower-superlink"), "--insecure", "--port", str(port),
                     "--disable-runtime-dependency-installation"]  # fmt: skip
        _start(stack, superlink, folder / "superlink.log", env)
        _await_port(port)
        for name, network in zip(names, net.nets, strict=True):
            command = [str(commands / "flower-supernode"), "--insecure", "--superlink",
                       network.address, "--node-config",
                       f'folder="{folder / name}"']  # fmt: skip
            _start(stack, network.wrap(command), folder / f"{name}.log", env)
        given = f'rounds={rounds} devices={len(names)} folder="{folder}"'
        done = subprocess.run(
            [commands / "flwr", "run", str(APP), "here", "--run-config", given], env=env,
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            raise PeerError(f"`flwr run` failed: {(done.stderr or done.stdout).strip()[-400:]}")
        _await(lambda: len(_times(folder)) > rounds, f"Flower; see the logs in {folder}")
        times, moved = _times(folder), net.stop()
    versions = []
    for number in range(1, rounds + 1):
        with np.load(folder / f"round-{number}.npz") as found:
            versions.append(
                Version(number, times[number], _as_file(fleet, dict(found), folder, number))
            )
    return Run(began, times[0], tuple(versions), moved, seeds)


def _measuring(fleet: Fleet, job: Mapping[str, Any]) -> dict[str, Any]:
    """What an agent has its trainer do before it asks for work."""
    c = fleet.learning
    request = ProfileRequest(c.precision, c.sequence_tokens, c.micro_batch, c.rank)
    return {"job": "profile", "request": to_plain(request)} | {
        key: job[key] for key in ("base_folder", "spec")
    }


def _arrays(fleet: Fleet, values: Mapping[str, Parts]) -> dict[str, Any]:
    """Factors by a name that says where they belong, in the order of the spec."""
    return {
        f"{m.name}/{part}": values[m.name][part]
        for m in fleet.spec.modules for part in ("up", "down")
    }  # fmt: skip


def _as_file(fleet: Fleet, arrays: Mapping[str, Any], folder: Path, number: int) -> StateFile:
    values: dict[str, Parts] = {
        m.name: {"up": arrays[f"{m.name}/up"], "down": arrays[f"{m.name}/down"]}
        for m in fleet.spec.modules
    }
    file = StateFile(folder / f"round-{number}.bin", Payload(fleet.spec.rank, "float32"))
    file.path.write_bytes(pack(fleet.spec, file.payload, values))
    return file


def _times(folder: Path) -> dict[int, float]:
    """Rounds merged -> when; round 0 is the start of the first."""
    path = folder / "rounds.txt"
    lines = path.read_text().splitlines() if path.exists() else []
    return {int(line.split()[0]): float(line.split()[1]) for line in lines}


def _start(
    stack: contextlib.ExitStack, command: Sequence[str], log: Path, env: Mapping[str, str]
) -> None:
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=env)

    def stop() -> None:
        process.terminate()
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    stack.callback(stop)


def _await(ready: Callable[[], bool], what: str) -> None:
    until = time.monotonic() + PATIENCE_S
    while not ready():
        if time.monotonic() > until:
            raise PeerError(f"no end within {PATIENCE_S:.0f} s of {what}")
        time.sleep(0.1)


def _await_port(port: int) -> None:
    def listens() -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 0.2):
            return True
        return False

    _await(listens, f"the start of what listens on port {port}")
