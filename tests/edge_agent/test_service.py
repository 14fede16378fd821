"""The agent under a service manager: when it is ready, alive, and stopping."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from types import SimpleNamespace

import pytest

from edge_agent import service
from edge_agent.status import StatusFile


class StandIn:
    """An agent whose work the test controls."""

    def __init__(self, folder):
        self.status, self.link = StatusFile(folder), SimpleNamespace(moved_bytes=0)
        self.failure = None
        self.end = asyncio.Event()

    async def run(self):
        self.status("waiting")
        await self.end.wait()
        if self.failure is not None:
            raise self.failure


@pytest.fixture
def told(tmp_path, monkeypatch):
    """What the service manager has been told since it was asked last."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(str(tmp_path / "notify"))
        listening.setblocking(False)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        monkeypatch.setenv("WATCHDOG_USEC", "60000")
        monkeypatch.delenv("WATCHDOG_PID", raising=False)

        def since():
            found = []
            while True:
                try:
                    found.append(listening.recv(4096).decode())
                except BlockingIOError:
                    return found

        yield since


@pytest.fixture
def start(tmp_path, monkeypatch):
    """(the stand-in, its service as a task)."""

    async def go():
        agent = StandIn(tmp_path)
        monkeypatch.setattr(service, "Agent", lambda config: agent)
        running = asyncio.create_task(service.run(None))
        await asyncio.sleep(0.05)
        return agent, running

    return go


async def test_ready_is_told_once_and_then_what_it_does(start, told):
    agent, running = await start()
    said = told()
    assert said[0] == "READY=1\nSTATUS=starting"
    assert "STATUS=waiting" in said and "WATCHDOG=1" in said
    agent.status("training", round=3, step=2, steps=9)
    await asyncio.sleep(0.05)
    assert "STATUS=training: step 2 of 9, round 3" in told()
    agent.end.set()
    await running


async def test_a_poll_loop_that_stands_still_feeds_no_watchdog(start, told, monkeypatch):
    monkeypatch.setattr(service, "LONGEST_SILENCE_S", 0.1)
    agent, running = await start()
    await asyncio.sleep(0.15)
    told()
    await asyncio.sleep(0.1)
    assert "WATCHDOG=1" not in told()
    agent.link.moved_bytes += 1  # a call was tried: the loop lives, whether or not it is answered
    await asyncio.sleep(0.06)
    assert "WATCHDOG=1" in told()
    agent.status("measuring")  # takes its time
    await asyncio.sleep(0.2)
    told()
    await asyncio.sleep(0.05)
    assert "WATCHDOG=1" in told()
    agent.end.set()
    await running


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
async def test_told_to_stop_it_says_so_and_ends_well(start, told, number):
    agent, running = await start()
    os.kill(os.getpid(), number)
    await asyncio.wait_for(running, 5)
    assert told()[-1] == "STOPPING=1\nSTATUS=stopped"
    assert agent.status.phase == "stopped"


async def test_what_ends_the_agent_ends_the_service(start):
    agent, running = await start()
    agent.failure = ValueError("no")
    agent.end.set()
    with pytest.raises(ValueError, match="no"):
        await running
