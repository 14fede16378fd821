"""However a link is emulated, a device behind it feels the same; what is not to be had is said."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time

import pytest

from profiles.trace import LinkState, Outage, steady
from trials import emulation, netem, tunnel
from trials.bulk import bulk_tcp
from trials.emulation import Emulation, choose, free_number
from trials.netem import counts_of, netem_words
from trials.tunnel import TunnelError

CLIENT = """
import socket, sys, time
host, port = sys.argv[1].split(":")
s = socket.create_connection((host, int(port)), timeout=30)
began = time.time()
s.sendall(b"x" * (int(sys.argv[2]) - 1) + b"!")
assert s.recv(2) == b"ok"
print(time.time() - began)
"""
WHY_NOT = {"netem": netem.unavailable(), "tun": tunnel.unavailable(), "proxy": None}
each_means = pytest.mark.parametrize("means", [
    pytest.param(means, marks=pytest.mark.skipif(why is not None, reason=str(why)))
    for means, why in WHY_NOT.items()
])  # fmt: skip


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


def send(link, size):
    done = subprocess.run(
        link.wrap([sys.executable, "-c", CLIENT, link.address, str(size)]),
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return float(done.stdout)


@each_means
def test_rate_and_delay_are_those_of_the_link(service, means):
    made = Emulation(means, "").link(
        f"test-{means}", free_number(), service, steady(LinkState(2e6, 8e6, 0.05)), 1
    )
    with made as link:
        took_s = send(link, 250_000)
        assert 0.9 <= took_s < 3.5, f"1 s of bytes and a round trip took {took_s:.2f} s"
        assert link.up.bytes >= 250_000
        assert link.now == LinkState(2e6, 8e6, 0.05)


@each_means
def test_a_link_follows_its_trace_through_an_outage(service, means):
    at = steady(LinkState(1e7, 1e7, 0.01), Outage(every_s=3.0, lasts_s=2.0))
    with Emulation(means, "").link(f"test-o-{means}", free_number(), service, at, 1) as link:
        until = time.monotonic() + 5
        while link.now.up_bps and time.monotonic() < until:
            time.sleep(0.02)
        time.sleep(0.2)
        took_s = send(link, 20_000)
        assert took_s >= 0.5 or link.up.dropped > 0, "something passed in an outage"


def test_the_best_means_is_chosen_and_the_reason_is_told(monkeypatch):
    monkeypatch.setattr(netem, "unavailable", lambda: None)
    assert choose() == Emulation("netem", "")
    monkeypatch.setattr(netem, "unavailable", lambda: "this kernel has no netem")
    monkeypatch.setattr(tunnel, "unavailable", lambda: None)
    assert (choose().means, choose().why) == ("tun", "this kernel has no netem")
    monkeypatch.setattr(tunnel, "unavailable", lambda: "namespaces need root")
    found = choose()
    assert found.means == "proxy" and "no netem" in found.words and "need root" in found.words
    assert "packet loss is not emulated" in found.words


def test_netem_is_told_rate_delay_loss_and_outages():
    words = netem_words(1e6, LinkState(1e6, 2e6, 0.15, 0.02))
    said = " ".join(words)
    assert "delay 150000us" in said and "loss 2.000000%" in said and "rate 1000000bit" in said
    # What is on its way and 0.3 s of the rate: 12 + 30 packets of 1500 bytes.
    assert words[:2] == ["limit", "42"]
    assert "loss 100%" in " ".join(netem_words(0.0, LinkState(0, 0, 0.15)))
    assert "rate" not in netem_words(0.0, LinkState(0, 0, 0.15))


def test_netem_tells_what_passed():
    shown = "qdisc netem 8001: root limit 42\n Sent 5120 bytes 12 pkt (dropped 3, overlimits 0)\n"
    found = counts_of(shown)
    assert (found.bytes, found.packets, found.dropped) == (5120, 12, 3)


def test_a_kernel_without_netem_is_told_and_nothing_stays(monkeypatch):
    def refused(words):
        raise TunnelError("`tc` failed: Error: Specified qdisc kind is unknown.")

    if tunnel.unavailable() is not None:
        pytest.skip(str(tunnel.unavailable()))
    monkeypatch.setattr(netem, "_tc", refused)
    assert netem.unavailable() == "this kernel has no netem"
    left = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True)
    assert "sketchfleet-netem-" not in left.stdout


def test_numbers_of_links_that_are_up_are_not_given_again(monkeypatch, tmp_path):
    (tmp_path / "sfn0").mkdir()
    monkeypatch.setattr(emulation, "INTERFACES", tmp_path)
    monkeypatch.setattr(emulation.os, "getpid", lambda: 0)
    assert free_number() == 1 and free_number([1, 2]) == 3


@pytest.mark.skipif(WHY_NOT["tun"] is not None, reason=str(WHY_NOT["tun"]))
def test_plain_tcp_gets_nearly_all_of_a_good_link_and_nothing_of_its_outages():
    at = steady(LinkState(2e6, 4e6, 0.01), Outage(every_s=4, lasts_s=1))
    found = bulk_tcp(Emulation("tun", ""), [at, at], 4.0)
    assert 0.9e6 < found.up_bps < 1.6e6, found
    assert 1.8e6 < found.down_bps < 3.2e6, found
