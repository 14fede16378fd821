"""Processes that wait for a word and then all work at once: clients of a transfer benchmark.

Parent and child speak lines of JSON over the child's pipes. Both sides of a comparison are driven
by this one file, so that starting, waiting and timing cost either the same.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import selectors
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from trials.fleet import environment

Work = Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]
PATIENCE_S = 300.0


@dataclass(frozen=True)
class Done:
    """A word carried out by all: seconds from the first told to the last that answered."""

    seconds: float
    cpu_s: float  # of all of them together
    answers: list[dict[str, Any]]


class Crowd:
    """Child processes, in the order they were started."""

    def __init__(self, processes: Sequence[subprocess.Popen[str]]) -> None:
        self._processes = processes
        self._ready = selectors.DefaultSelector()
        for index, process in enumerate(processes):
            assert process.stdout is not None
            self._ready.register(process.stdout, selectors.EVENT_READ, index)

    def do(self, word: str, each: Sequence[dict[str, Any]] = (), **task: Any) -> Done:
        """Has all of them do the same, `each` with particulars of its own.

        Raises `RuntimeError` when one ends or is silent for `PATIENCE_S`.
        """
        lines = [
            json.dumps({"word": word, **task, **(each[index] if each else {})}) + "\n"
            for index in range(len(self._processes))
        ]
        answers: dict[int, dict[str, Any]] = {}
        began = time.perf_counter()
        for process, line in zip(self._processes, lines, strict=True):
            assert process.stdin is not None
            process.stdin.write(line)
            process.stdin.flush()
        while len(answers) < len(self._processes):
            readable = self._ready.select(PATIENCE_S)
            for key, _ in readable:
                line = self._processes[key.data].stdout.readline()
                if not line:
                    raise RuntimeError("a client's process failed; see above")
                answers[key.data] = json.loads(line)
            if not readable:
                raise RuntimeError(f"a client did not {word} within {PATIENCE_S:.0f} s")
        seconds = time.perf_counter() - began
        in_order = [answers[index] for index in range(len(answers))]
        return Done(seconds, sum(a.pop("cpu_s") for a in in_order), in_order)


@contextlib.contextmanager
def crowd(count: int, module: str, *arguments: str) -> Iterator[Crowd]:
    """So many processes of `python -m module`, which call `obey`; they end with the block."""
    with contextlib.ExitStack() as stack:
        processes = [
            stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-m", module, *arguments],
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                    env=environment(),
                )
            )
            for _ in range(count)
        ]  # fmt: skip
        try:
            yield Crowd(processes)
        except BaseException:
            for process in processes:
                process.kill()
            raise


async def obey(words: dict[str, Work]) -> None:
    """The child's part: carries out what is asked until its standard input ends."""
    while line := await asyncio.to_thread(sys.stdin.readline):
        task = json.loads(line)
        before = time.process_time()
        answer = await words[task.pop("word")](task)
        print(json.dumps({**answer, "cpu_s": time.process_time() - before}), flush=True)


def cpu_s(pid: int) -> float:
    """Processor time of another process so far."""
    with open(f"/proc/{pid}/stat") as stat:  # noqa: PTH123 - a line
        fields = stat.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
