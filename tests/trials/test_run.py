"""What a trial decides before it starts anything: caps, and where its results go."""

from __future__ import annotations

import socket
import threading

import pytest

from profiles.boards import load_boards
from trials import run
from trials.caps import CapError
from trials.doorway import HELD_BYTES, Doorway
from trials.fleet import FleetError, toml_text
from trials.fleet_file import TrialDevice

MIB = 2**20


def device(**changes):
    plain = {"name": "ash", "board": None, "memory_bytes": 900 * MIB, "cpus": None, "link": None,
             "agent": {}}  # fmt: skip
    return TrialDevice(**(plain | changes))


class Cap:
    """A cap of the kernel's, as far as a trial looks at it."""

    means = "cgroup v2"

    def __init__(self, name, memory_bytes, cpus):
        self.memory_bytes, self.cpus, self.closed = memory_bytes, cpus, False

    def close(self):
        self.closed = True


def test_a_board_is_capped_at_its_memory_and_at_its_cores_if_there_are_fewer(monkeypatch):
    monkeypatch.setattr(run, "KernelCap", Cap)
    board = load_boards()["orin-nano-8gb"]
    monkeypatch.setattr(run.os, "cpu_count", lambda: board.cpu.cores + 2)
    cap, words = run._cap(device(board=board))
    assert (cap.memory_bytes, cap.cpus) == (900 * MIB, board.cpu.cores)
    assert words == f"{board.title}, 944 MB and 6 processors by cgroup v2, and by the planner"
    monkeypatch.setattr(run.os, "cpu_count", lambda: 1)
    assert run._cap(device(board=board))[0].cpus is None
    assert run._cap(device(board=board, cpus=0.5))[0].cpus == 0.5


def test_without_control_groups_the_planner_alone_is_told_and_that_is_said(monkeypatch):
    class Limit(Cap):
        means = "rlimit"

    monkeypatch.setattr(run, "KernelCap", Limit)
    cap, words = run._cap(device())
    assert cap is None and "by the planner only" in words
    assert run._setup(device(), None, cap).memory_mb == 943

    def refuses(*_):
        raise CapError("no control groups here")

    monkeypatch.setattr(run, "KernelCap", refuses)
    cap, words = run._cap(device(cpus=0.5))
    assert cap is None and "processors open: no control groups here" in words


def test_a_device_without_board_or_limits_has_no_caps():
    assert run._cap(device(memory_bytes=None)) == (None, "no caps")


def test_an_earlier_trial_is_never_replaced(tmp_path):
    (tmp_path / "report.md").write_text("days of work")
    with pytest.raises(FleetError, match="not empty; choose another --out"):
        run._new_folder(tmp_path)
    assert run._new_folder(tmp_path / "new").is_dir()


def test_sections_are_written_with_tables_in_them():
    import tomllib

    plain = {"data": {"include": ["a"], "more": {"x": 1, "y": [True, 0.5]}, "none": None}}
    assert tomllib.loads(toml_text(plain)) == {
        "data": {"include": ["a"], "more": {"x": 1, "y": [True, 0.5]}}
    }


def test_a_doorway_holds_little_of_what_the_device_does_not_take():
    server = socket.create_server(("127.0.0.1", 0))
    port = server.getsockname()[1]
    door = Doorway("127.0.0.2", port)
    door._listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 14)  # the link's own end
    sent = []

    def pour():
        service, _ = server.accept()
        service.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 14)
        service.settimeout(1.0)
        try:
            while True:
                sent.append(service.send(bytes(1 << 14)))
        except TimeoutError:
            pass
        service.close()

    pouring = threading.Thread(target=pour, daemon=True)
    pouring.start()
    with socket.socket() as caller:
        caller.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 14)
        caller.connect(("127.0.0.2", port))
        taken = 0
        while taken < 32 * MIB:  # buffers grow while data flows
            taken += len(caller.recv(MIB))
        pouring.join(20)
        held = sum(sent) - taken
    assert not pouring.is_alive()
    assert held < 6 * HELD_BYTES, f"{held} bytes wait between a service and a slow device"
    door.close()
    server.close()
