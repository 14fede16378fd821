"""The trainer seen from the agent: a child process that takes jobs as JSON lines.

Launched by exec, never fork (gRPC does not survive a fork), possibly with another interpreter. A
crash of it is an answer like any other; its memory goes back to the system when it is stopped.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from profiles.compat import wait_for
from profiles.errors import SketchfleetError

LINE_LIMIT_BYTES = 1 << 20
STOP_S = 10.0
TOLD = ("progress", "paused", "resumed")  # events that are no answer
Progress = Callable[[dict[str, Any]], None]

BORROW = """\
import runpy, sys
from importlib import machinery, util
for name in ("profiles", "protos", "edge_agent"):
    spec = machinery.PathFinder.find_spec(name, [{root!r}])
    sys.modules[name] = util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
sys.path.append({root!r})
runpy.run_module({module!r}, run_name="__main__", alter_sys=True)
"""


class TrainerError(SketchfleetError):
    """The trainer could not do a job; `outcome` is one of `protos.contract.Outcome`.

    `died`: the process ended without an answer, so that trying again may help. What it answered,
    a training that diverged for one, is the same the next time.
    """

    def __init__(self, outcome: str, sentence: str, *, died: bool = False) -> None:
        super().__init__(sentence)
        self.outcome = outcome
        self.died = died


class TrainerProcess:
    """Starts the trainer when there is a job and keeps it warm between jobs."""

    def __init__(self, python: str, threads: int, log: Path) -> None:
        self._python = python or sys.executable
        self._threads = threads
        self._log = log
        self._process: asyncio.subprocess.Process | None = None

    async def run(self, job: dict[str, Any], progress: Progress | None = None) -> dict[str, Any]:
        """Does one job; returns its result event. `progress` hears every event before it.

        Raises `TrainerError` on a named failure; when the process died, outcome "crashed", `died`.
        """
        process = await self._started()
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps(job).encode() + b"\n")
            await process.stdin.drain()
            # A last line without its end is no answer: the process died while writing it.
            while (line := await process.stdout.readline()).endswith(b"\n"):
                event: dict[str, Any] = json.loads(line)
                match event["event"]:
                    case kind if kind in TOLD:
                        if progress is not None:
                            progress(event)
                    case "result":
                        return event
                    case "error":
                        raise TrainerError(event["outcome"], event["message"])
        except (ConnectionError, ValueError, KeyError, TypeError) as error:
            await self.stop()
            died = isinstance(error, ConnectionError)
            raise TrainerError("crashed", f"the trainer broke off: {error}", died=died) from error
        except asyncio.CancelledError:
            await self.stop()
            raise
        if not await _ended(process):
            # Its output is closed, so no answer can come: whoever waits for it waits for ever.
            await self.stop()
            raise TrainerError(
                "crashed", f"the trainer closed its output but went on; see {self._log}", died=True
            )
        self._process = None
        raise TrainerError("crashed", _explain_exit(process.returncode, self._log), died=True)

    async def _started(self) -> asyncio.subprocess.Process:
        if self._process is not None and self._process.returncode is None:
            return self._process
        threads = str(self._threads)
        with self._log.open("ab") as log:
            try:
                self._process = await asyncio.create_subprocess_exec(
                    self._python, *running("edge_agent.training.trainer"),
                    "--threads", threads, "--agent", str(os.getpid()),
                    stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=log,
                    limit=LINE_LIMIT_BYTES,
                    env={**os.environ, "OMP_NUM_THREADS": threads,
                         "OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"},
                )  # fmt: skip
            except OSError as error:
                raise TrainerError(
                    "crashed", f"trainer interpreter {self._python} cannot be started: {error}"
                ) from error
        return self._process

    async def stop(self) -> None:
        """Ends the process and gives its memory back."""
        process, self._process = self._process, None
        if process is None or process.returncode is not None:
            return
        if process.stdin is not None:
            process.stdin.close()  # end of input is the request to stop
        try:
            await _ended(process)
        finally:  # also when whoever asked for it cannot wait any longer
            if process.returncode is None:
                process.kill()
        await process.wait()


def running(module: str) -> list[str]:
    """Arguments that have any interpreter run a module of this very installation.

    Our own packages are pure Python and come from here, so that both sides are of one version. What
    they need comes from the interpreter's own packages; only what is not there comes from ours,
    which may be for another Python.
    """
    return ["-c", BORROW.format(root=str(Path(__file__).resolve().parent.parent), module=module)]


async def _ended(process: asyncio.subprocess.Process) -> bool:
    """Whether the process ends within `STOP_S`."""
    with contextlib.suppress(TimeoutError):
        await wait_for(process.wait(), STOP_S)
    return process.returncode is not None


def _explain_exit(code: int | None, log: Path) -> str:
    if code == -9:
        return "the trainer was killed, most likely by the kernel for want of memory"
    return f"the trainer ended with exit code {code}; see {log}"
