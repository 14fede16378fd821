"""A device behind a namespace feels its link: rate, delay, loss, outages, and nothing else."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading

import pytest

from profiles.trace import LinkState, Outage, steady
from trials.tunnel import DeviceNetwork, TunnelError, unavailable

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))

CLIENT = """
import socket, sys, time
host, port = sys.argv[1].split(":")
began = time.time()
s = socket.create_connection((host, int(port)), timeout=60)
shaken = time.time() - began
began = time.time()
s.sendall(b"x" * (int(sys.argv[2]) - 1) + b"!")
assert s.recv(2) == b"ok"
print(shaken, time.time() - began)
"""


@pytest.fixture
def service():
    """A port on loopback that answers "ok" to whatever ends with "!"."""
    server = socket.create_server(("127.0.0.1", 0))

    def answer(caller):
        while data := caller.recv(1 << 16):
            if data.endswith(b"!"):
                caller.sendall(b"ok")

    def serve():
        while True:
            try:
                caller, _ = server.accept()
            except OSError:
                return
            threading.Thread(target=answer, args=(caller,), daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    yield server.getsockname()[1]
    server.shutdown(socket.SHUT_RDWR)
    server.close()


def send(net, size):
    """(seconds of the handshake, seconds of the transfer)."""
    done = subprocess.run(
        net.wrap([sys.executable, "-c", CLIENT, net.address, str(size)]),
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return tuple(map(float, done.stdout.split()))


def test_rate_and_delay_are_those_of_the_link(service):
    link = steady(LinkState(2e6, 8e6, 0.05))
    with DeviceNetwork("test-rate", 8001, service, link) as net:
        shaken, took = send(net, 250_000)
        assert shaken >= 0.1
        assert took >= 8 * 250_000 / 2e6 * 0.95, "faster than the link"
        assert net.up.bytes > 250_000
        assert net.up.lost == net.down.lost == 0


def test_lost_packets_are_sent_again_by_tcp(service):
    link = steady(LinkState(1e8, 1e8, 0.002, loss=0.05))
    with DeviceNetwork("test-loss", 8002, service, link, seed=3) as net:
        send(net, 300_000)
        assert net.up.lost > 0


def test_nothing_passes_during_an_outage(service):
    link = steady(LinkState(1e8, 1e8, 0.001), Outage(every_s=1000, lasts_s=999.9))
    with DeviceNetwork("test-outage", 8003, service, link) as net:
        code = (
            "import socket, sys, time; time.sleep(0.2)\n"
            "h, p = sys.argv[1].split(':')\n"
            "try: socket.create_connection((h, int(p)), timeout=1)\n"
            "except TimeoutError: print('nothing')"
        )
        words = net.wrap([sys.executable, "-c", code, net.address])
        found = subprocess.run(words, capture_output=True, text=True, check=False, timeout=30)
        assert found.stdout == "nothing\n", found.stderr
        assert net.up.dropped > 0


def test_a_device_reaches_nothing_but_the_port(service):
    with DeviceNetwork("test-only", 8004, service, steady(LinkState(1e8, 1e8, 0.0))) as net:
        code = (
            "import socket\n"
            "for host in ('127.0.0.1', '192.0.2.1', '10.77.0.1'):\n"
            f"  try: socket.create_connection((host, {service}), timeout=1); print('reached')\n"
            "  except OSError: pass"
        )
        words = net.wrap([sys.executable, "-c", code])
        found = subprocess.run(words, capture_output=True, text=True, check=False, timeout=30)
        assert found.stdout == "", found.stdout


def test_namespaces_and_devices_are_gone_afterwards_and_names_can_be_used_again(service):
    for _ in range(2):
        with DeviceNetwork("test-again", 8005, service, steady(LinkState(1e8, 1e8, 0.0))) as net:
            send(net, 1000)
    left = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True)
    assert "sketchfleet-test-again" not in left.stdout
    links = subprocess.run(["ip", "link"], capture_output=True, text=True, check=True)
    assert "sfn8005" not in links.stdout


def test_too_many_devices_are_refused_by_number(service):
    with pytest.raises(TunnelError, match="16384"):
        DeviceNetwork("test-many", 2**14, service, steady(LinkState(1e8, 1e8, 0.0)))
