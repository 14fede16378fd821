"""Trainers that start at once: forked from a process that has imported torch already.

    with WarmTrainers(folder) as python: ...   # python: what [trainer] python of agents is set to

Each is a process of its own that runs the real trainer; only the seconds of importing are saved,
which a trial that kills agents by the hundred would otherwise spend most of its time on. What an
agent starts is a small stand-in that hands its pipes over and ends as the trainer ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from profiles.errors import SketchfleetError
from trials.fleet import environment

STAND_IN = """#!{python} -IS
import ctypes, json, os, signal, socket, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # ends with the agent, as the trainer does
line = socket.socket(socket.AF_UNIX)
line.connect({place!r})
told = json.dumps([sys.argv[3:], dict(os.environ), os.getcwd()]).encode()
socket.send_fds(line, [len(told).to_bytes(4, "big")], [0, 1, 2])
line.sendall(told)
os.close(0), os.close(1)
answer = line.recv(16)
code = int(answer) if answer else 1
if code < 0:
    signal.signal(-code, signal.SIG_DFL) if -code != signal.SIGKILL else None
    os.kill(os.getpid(), -code)
sys.exit(code)
"""


class WarmTrainerError(SketchfleetError):
    """The process that trainers are forked from did not come up."""


class WarmTrainers:
    """Use as a context manager, which gives the stand-in to be used as the trainer's Python."""

    def __init__(self, folder: Path, patience_s: float = 120.0) -> None:
        self._folder, self._patience_s = folder, patience_s
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Path:
        self._folder.mkdir(parents=True, exist_ok=True)
        place = self._folder / "trainers.socket"
        with (self._folder / "trainers.log").open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "trials.warm_trainer", str(place)], stderr=log,
                stdin=subprocess.PIPE, env={**environment(), "OMP_NUM_THREADS": "1"},
            )  # fmt: skip
        python = self._folder / "trainer-python"
        python.write_text(STAND_IN.format(python=sys.executable, place=str(place)))
        python.chmod(0o755)
        until = time.monotonic() + self._patience_s
        while not place.exists():
            if self._process.poll() is not None or time.monotonic() > until:
                self.__exit__()
                raise WarmTrainerError(f"no trainer could be made; see {self._folder}/trainers.log")
            time.sleep(0.05)
        return python

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.kill()  # its trainers end with it
            self._process.wait()


def serve(place: Path) -> None:
    """Forks a trainer for every caller, until standard input ends."""
    _import_all()
    listener = socket.socket(socket.AF_UNIX)
    draft = place.with_suffix(".new")
    draft.unlink(missing_ok=True)
    listener.bind(str(draft))
    listener.listen()
    draft.rename(place)
    ends, told = os.pipe()
    os.set_blocking(told, False)
    signal.set_wakeup_fd(told)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    lines: dict[int, socket.socket] = {}  # by trainer
    with selectors.DefaultSelector() as waiting:
        waiting.register(listener, selectors.EVENT_READ, "call")
        waiting.register(ends, selectors.EVENT_READ, "end")
        waiting.register(sys.stdin.fileno(), selectors.EVENT_READ, "stop")
        while True:
            for key, _ in waiting.select():
                if key.data == "stop":
                    return
                if key.data == "end":
                    os.read(ends, 1 << 10)
                    _bury(lines, waiting)
                elif key.data == "call":
                    line, _ = listener.accept()
                    pid = _fork(line, listener)
                    lines[pid] = line
                    waiting.register(line, selectors.EVENT_READ, pid)
                else:  # the stand-in is gone: its agent was killed
                    waiting.unregister(key.fileobj)
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(key.data, signal.SIGKILL)


def _bury(lines: dict[int, socket.socket], waiting: selectors.BaseSelector) -> None:
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        line = lines.pop(pid)
        with contextlib.suppress(KeyError):
            waiting.unregister(line)
        with contextlib.suppress(OSError):
            line.sendall(str(os.waitstatus_to_exitcode(status)).encode())
        line.close()


def _fork(line: socket.socket, listener: socket.socket) -> int:
    """The process id of a new trainer with the caller's pipes, environment and folder."""
    size, pipes, _, _ = socket.recv_fds(line, 4, 3)
    length, text = int.from_bytes(size, "big"), b""
    while len(text) < length:
        text += line.recv(length - len(text))
    pid = os.fork()
    if pid:
        for pipe in pipes:
            os.close(pipe)
        return pid
    try:
        _become(json.loads(text), pipes, (line, listener))
    finally:
        os._exit(1)


def _become(told: list[Any], pipes: list[int], others: tuple[socket.socket, ...]) -> None:
    from edge_agent.training.trainer import main

    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    arguments, variables, folder = told
    for number, pipe in enumerate(pipes):
        os.dup2(pipe, number)
    for other in others:
        other.close()
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(folder)
    at = arguments.index("--agent")
    code = main([*arguments[:at], *arguments[at + 2 :]])  # its parent is not the agent
    sys.stdout.flush()
    os._exit(code)


def _import_all() -> None:
    os.environ.update(OMP_WAIT_POLICY="PASSIVE", TOKENIZERS_PARALLELISM="false")
    import bitsandbytes
    import peft
    import torch
    import transformers

    import edge_agent.training.jobs
    import edge_agent.training.workbench

    torch.set_num_threads(1)
    assert all((bitsandbytes, peft, transformers, edge_agent.training.jobs))


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
