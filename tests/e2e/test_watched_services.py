"""What systemd would hear of the real processes."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from trials.fleet import free_port

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).resolve().parents[2]


def test_a_coordinator_tells_when_it_listens_that_it_lives_and_when_it_drains(
    tmp_path: Path,
) -> None:
    (tmp_path / "run.toml").write_text(
        f'[run]\nname = "watched"\nrounds = 3\n[model]\nbase = "{ROOT}/trials/nano_code"\n'
        f'[server]\nplain_text = true\nlisten = "127.0.0.1:{free_port()}"\n[web]\nlisten = ""\n'
    )
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as told:
        told.bind(str(tmp_path / "notify"))
        told.settimeout(30)
        process = subprocess.Popen(
            [sys.executable, "-m", "coordinator.cli", "serve", "--config", tmp_path / "run.toml"],
            cwd=ROOT, stderr=subprocess.DEVNULL,
            env={**os.environ, "NOTIFY_SOCKET": str(tmp_path / "notify"),
                 "WATCHDOG_USEC": "300000"},
        )  # fmt: skip
        try:
            status = "STATUS=watched: round 0 of 3, gathering"
            assert told.recv(4096).decode() == f"READY=1\n{status}"
            assert {told.recv(4096).decode() for _ in range(3)} == {"WATCHDOG=1", status}
            process.send_signal(signal.SIGTERM)
            until, said = time.monotonic() + 20, ""
            while "STOPPING=1" not in said and time.monotonic() < until:
                said = told.recv(4096).decode()
            assert said.startswith("STOPPING=1\nSTATUS=stopping in watched: round 0")
            assert process.wait(20) == 0
        finally:
            process.kill()
            process.wait()
