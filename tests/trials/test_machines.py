"""Machines within this one are apart, joined by their cables, and leave nothing behind."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from trials.machines import Lan, Machine, unavailable

pytestmark = [
    pytest.mark.slow,
    pytest.mark.e2e,
    pytest.mark.skipif(unavailable() is not None, reason=str(unavailable())),
]


@pytest.fixture
def two(tmp_path):
    tag = f"t{os.getpid()}"
    lan = Lan(tag, ("north", "south"), {"pole.example.org": "north"})
    machines = [Machine(tag, name, tmp_path / name, lan) for name in ("north", "south")]
    (tmp_path / "shown").mkdir()
    (tmp_path / "shown/note").write_text("here")
    try:
        for machine in machines:
            machine.start({tmp_path / "shown": "/opt/shown"})
        yield lan, *machines
    finally:
        for machine in machines:
            machine.stop()
        lan.close()
        assert tag not in subprocess.check_output(["ip", "netns"], text=True)


def test_machines_are_apart_but_for_their_cables(two):
    lan, north, south = two
    assert north.shell("hostname; cat /opt/shown/note").stdout.split() == ["north", "here"]
    assert north.shell("touch /opt/shown/more").returncode, "what is shown can be written"
    north.shell("echo mine > /etc/mine; echo hello > /srv/hello")
    assert not Path("/etc/mine").exists() and south.shell("cat /etc/mine").returncode
    assert north.path("/srv/hello").read_text() == "hello\n"

    server = "python3 -m http.server --directory /srv 8000"
    service = f"systemd-run --quiet --unit=web {server}"
    assert north.shell(service).returncode == 0
    page = "http://pole.example.org:8000/hello"
    ask = f"print(u.urlopen('{page}', timeout=3).read())"
    fetch = f'python3 -c "import urllib.request as u; {ask}"'
    again = f"for i in 1 2 3 4 5; do {fetch} 2>/dev/null && exit 0; sleep 0.3; done; exit 1"
    assert south.shell(again).stdout.strip() == "b'hello\\n'"
    lan.pull("south")
    assert south.shell(fetch).returncode, "the cable is out"
    lan.put_back("south")
    assert south.shell(again).returncode == 0
