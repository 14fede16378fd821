"""A fleet of processes ends with whoever started it."""

from __future__ import annotations

import subprocess
import sys

import pytest

from trials.fleet import LocalFleet

DEAF = """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("up", flush=True)
time.sleep(60)
"""


def test_a_second_ctrl_c_while_it_ends_leaves_no_process(monkeypatch):
    fleet = object.__new__(LocalFleet)
    fleet.processes = {}
    for name in ("coordinator", "laptop"):
        process = subprocess.Popen([sys.executable, "-c", DEAF], stdout=subprocess.PIPE)
        assert process.stdout is not None and process.stdout.readline() == b"up\n"
        process.stdout.close()
        fleet.processes[name] = process
    first, whole = fleet.processes["coordinator"], subprocess.Popen.wait

    def wait(process, timeout=None):
        if process is first and timeout is not None:
            raise KeyboardInterrupt
        return whole(process, timeout)

    monkeypatch.setattr(subprocess.Popen, "wait", wait)
    with pytest.raises(KeyboardInterrupt):
        fleet.__exit__(None, None, None)
    assert [process.returncode for process in fleet.processes.values()] == [-9, -9]
