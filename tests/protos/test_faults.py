"""Faults happen where they were planted, once, and nowhere when nobody asked."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from protos import faults
from protos.faults import Fault


@pytest.fixture
def armed(tmp_path):
    faults.arm(tmp_path / "faults")
    yield tmp_path / "faults"
    faults.arm(None)


def test_nothing_happens_unless_the_environment_asks(tmp_path):
    assert faults.VARIABLE not in os.environ
    faults.plant(tmp_path, "here", Fault("error", number=errno.EIO))
    assert faults.point("here") is None
    faults.synced_file(tmp_path / "gone")  # not even looked at
    assert abs(faults.now() - time.time()) < 1
    started = time.perf_counter()
    for _ in range(100_000):
        faults.point("here")
    assert time.perf_counter() - started < 0.5


def test_an_error_comes_as_often_as_asked_and_is_noted(armed):
    faults.plant(armed, "here", Fault("error", number=errno.ENOSPC, times=2))
    assert faults.point("elsewhere") is None
    for _ in range(2):
        with pytest.raises(OSError, match="No space left") as raised:
            faults.point("here")
        assert raised.value.errno == errno.ENOSPC
    assert faults.point("here") is None
    assert [told["point"] for told in faults.happened(armed)] == ["here", "here"]


def test_a_file_is_cut_short_and_time_passes(armed, tmp_path):
    file = tmp_path / "file"
    file.write_bytes(b"0123456789")
    faults.plant(armed, "here", Fault("truncate"))
    faults.point("here", file)
    assert file.read_bytes() == b"01234"
    faults.plant(armed, "here", Fault("wait", seconds=0.05))
    began = time.monotonic()
    faults.point("here")
    assert time.monotonic() - began >= 0.05


def test_a_process_that_the_environment_arms_dies_at_the_point(tmp_path):
    faults.plant(tmp_path, "here", Fault("kill"))
    code = (
        "from protos import faults\nprint('before', flush=True)\nfaults.point('here')\nprint('x')"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, faults.VARIABLE: str(tmp_path)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (ran.returncode, ran.stdout) == (-signal.SIGKILL, "before\n")
    assert faults.happened(tmp_path)[0]["do"] == "kill"


def test_the_clock_is_told_wrong_for_as_long_as_it_is_to_be(armed):
    (armed / "clock").write_text("-3600")
    assert abs(faults.now() + 3600 - time.time()) < 1
    (armed / "clock").unlink()
    assert abs(faults.now() - time.time()) < 1


@pytest.mark.parametrize(
    ("fault", "at_once"), [(Fault("again"), 2), (Fault("late", seconds=0.05), 1)]
)
def test_a_message_goes_twice_at_once_or_later(armed, fault, at_once):
    sent = []

    async def message():
        sent.append(1)
        if len(sent) > 1:
            raise ConnectionError  # of which nobody hears

    async def go():
        await message()
        faults.plant(armed, "link.answered", fault)
        await faults.repeat("link.answered", message)
        assert len(sent) == at_once
        await asyncio.sleep(0.2)

    asyncio.run(go())
    assert len(sent) == 2


def test_what_is_noted_can_be_read_back(armed, tmp_path):
    file = tmp_path / "file"
    file.write_bytes(b"0123")
    faults.synced_file(file)
    faults.synced_folder(tmp_path)
    notes = [json.loads(line) for line in (armed / "synced").read_text().splitlines()]
    assert notes[0]["size"] == 4 and notes[1]["entries"]["file"] == notes[0]["file"]
