"""A trainer ends with the agent that started it, however the agent ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from edge_agent.training import trainer

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="asks the Linux kernel")

# The trainer as it is, stopped before it imports torch, so that the test takes no time.
TRAINER = """
import sys, time
from pathlib import Path
from edge_agent.training import trainer

def wait():
    Path(sys.argv[2]).write_text("ready")
    time.sleep(60)

trainer._settle_environment = wait
trainer.main(["--agent", sys.argv[1]])
"""
AGENT = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", sys.argv[1], str(os.getpid()), sys.argv[2]])
print(child.pid, flush=True)
time.sleep(60)
"""


def running(pid: int) -> bool:
    """Whether this process lives; one that waits to be collected does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


def wait_until(holds, limit_s=30.0) -> bool:
    until = time.monotonic() + limit_s
    while not holds() and time.monotonic() < until:
        time.sleep(0.02)
    return holds()


def test_a_trainer_ends_when_its_agent_is_killed(tmp_path):
    ready = tmp_path / "ready"
    agent = subprocess.Popen(
        [sys.executable, "-c", AGENT, TRAINER, str(ready)],
        stdout=subprocess.PIPE, cwd=ROOT, text=True,
    )  # fmt: skip
    assert agent.stdout is not None
    pid = int(agent.stdout.readline())
    try:
        assert wait_until(ready.exists) and running(pid)
        agent.kill()
        agent.wait()
        assert wait_until(lambda: not running(pid), 5.0), "the trainer outlives its agent"
    finally:
        agent.kill()
        agent.stdout.close()
        if running(pid):
            os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize(
    ("starters", "agent", "ends"),
    [
        ([4242, 4242], 4242, False),
        ([1, 1], 4242, True),  # the agent was gone before the trainer began
        ([4242, 1], 4242, True),  # it went in between
        ([4242, 77], None, True),  # a session manager took the orphan
        ([1, 1], 1, False),  # the agent is the first process of its container
        ([1, 1], None, False),  # started by hand
        ([900, 900], 4242, False),  # started through a wrapper around the interpreter
    ],
)
def test_a_trainer_without_an_agent_does_not_begin(monkeypatch, starters, agent, ends):
    asked = []

    class Kernel:
        @staticmethod
        def prctl(*words):
            asked.append(words)

    answers = iter(starters)
    monkeypatch.setattr(trainer.os, "getppid", lambda: next(answers))
    monkeypatch.setattr(trainer.ctypes, "CDLL", lambda name: Kernel)
    try:
        trainer._end_with_the_agent(agent)
    except SystemExit:
        assert ends
    else:
        assert not ends
    assert asked == [(1, signal.SIGKILL)]


def test_systems_without_such_a_signal_are_left_alone(monkeypatch):
    monkeypatch.setattr(trainer.sys, "platform", "darwin")
    monkeypatch.setattr(trainer.ctypes, "CDLL", lambda name: pytest.fail("asked the kernel"))
    trainer._end_with_the_agent(1)
