"""What systemd is told, over a real datagram socket."""

from __future__ import annotations

import asyncio
import os
import socket

import pytest

from profiles.service_manager import Progress, ServiceManager


@pytest.fixture(params=["in a folder", "abstract"])
def manager(request, tmp_path):
    """(what a service is started with, what it told so far)."""
    abstract = f"sketchfleet-test-{os.getpid()}-{request.node.name}"
    place = str(tmp_path / "notify") if request.param == "in a folder" else f"@{abstract}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(place.replace("@", "\0", 1))
        listening.setblocking(False)

        def told():
            found = []
            while True:
                try:
                    found.append(listening.recv(4096).decode())
                except BlockingIOError:
                    return found

        yield {"NOTIFY_SOCKET": place}, told


def test_ready_and_stopping_are_told_with_a_status_of_one_line(manager):
    environ, told = manager
    service = ServiceManager(environ)
    service.ready("round 1\nREADY=0")
    service.stopping("told to")
    assert told() == ["READY=1\nSTATUS=round 1 READY=0", "STOPPING=1\nSTATUS=told to"]


async def test_the_watchdog_is_fed_only_while_the_service_gets_on(manager):
    environ, told = manager
    service = ServiceManager({**environ, "WATCHDOG_USEC": "30000"})
    lives = True
    pulse = asyncio.create_task(service.keep_alive(lambda: lives, lambda: "round 1"))
    await asyncio.sleep(0.06)
    fed = told()
    assert fed.count("WATCHDOG=1") >= 2
    assert fed.count("STATUS=round 1") == 1, "told only when it changes"
    lives = False
    await asyncio.sleep(0.06)
    pulse.cancel()
    assert told() == []


async def test_a_blocked_event_loop_feeds_nothing(manager):
    environ, told = manager
    service = ServiceManager({**environ, "WATCHDOG_USEC": "30000"})
    pulse = asyncio.create_task(service.keep_alive(lambda: True, lambda: ""))
    await asyncio.sleep(0)
    told()
    import time

    time.sleep(0.1)  # as a defect would
    assert told() == []
    pulse.cancel()


def test_without_a_service_manager_nothing_is_said():
    service = ServiceManager({})
    service.ready("x")
    assert service.watchdog_s == 0


def test_the_watchdog_of_another_process_is_not_ours():
    for_another = {"WATCHDOG_USEC": "1000000", "WATCHDOG_PID": str(os.getpid() + 1)}
    assert ServiceManager(for_another).watchdog_s == 0
    assert ServiceManager({**for_another, "WATCHDOG_PID": str(os.getpid())}).watchdog_s == 1.0


def test_a_manager_that_is_gone_costs_a_line_and_no_more(tmp_path, caplog):
    ServiceManager({"NOTIFY_SOCKET": str(tmp_path / "gone")}).ready("x")
    assert "cannot be told" in caplog.text


def test_work_that_does_not_get_on_is_noticed_after_the_longest_silence():
    now, done = 0.0, 0
    gets_on = Progress(lambda: done, 60.0, lambda: now)
    now = 59.0
    assert gets_on()
    done, now = 1, 61.0
    assert gets_on()
    now = 120.0
    assert gets_on()
    now = 121.0
    assert not gets_on()
    done = 2
    assert gets_on()
