"""Connections: hung up on, deaf or shut out by the kernel where they are too many or a flood."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import socket
from collections import Counter

import pytest

from coordinator import connections as connections_module
from coordinator.connections import (
    ANONYMOUS_S,
    DEAF_S,
    MOST_OF_DEVICE,
    STRANGE_BYTES,
    Connections,
    Crossed,
    network_of,
    peer_of,
)
from coordinator.dialling import (
    DIALS_BURST,
    LOUD_DIALS,
    MOST_UNSEEN,
    SHUT_OUT_S,
    Dialling,
)
from coordinator.tarpit import MOST_GATED, deafen, gate, hear

SOON_S = 0.3  # in which loopback delivers, and TCP does not try a dropped packet again


def test_peers_and_networks_are_told_by_grpc_s_names():
    assert peer_of("ipv4:10.0.0.1:80") == ("10.0.0.1", 80)
    assert peer_of("ipv6:%5B::1%5D:80") == ("::1", 80)
    assert peer_of("unix:") is None
    assert network_of("ipv4:10.0.0.1:80") == "10.0.0.1"
    assert network_of("ipv6:%5B2001:db8::1%5D:8") == network_of("ipv6:%5B2001:db8::2%5D:9")
    assert network_of("ipv6:%5B2001:db8::1%5D:8") != network_of("ipv6:%5B2001:db9::1%5D:8")


class Place:
    """A listener with some connections to it."""

    def __init__(self, host="127.0.0.1", family=socket.AF_INET):
        self.listener = socket.create_server(
            (host, 0), family=family, dualstack_ipv6=family == socket.AF_INET6 and host == "::"
        )

    def __enter__(self):
        self.port = self.listener.getsockname()[1]
        self.pairs = []
        return self

    def __exit__(self, *_):
        for pair in self.pairs:
            for end in pair:
                end.close()
        self.listener.close()

    def dial(self, source="127.0.0.1"):
        """(the far end, gRPC's name for it). Raises `TimeoutError`."""
        to = "::1" if ":" in source else "127.0.0.1"
        far = socket.create_connection((to, self.port), SOON_S, (source, 0))
        self.pairs.append((far, self.listener.accept()[0]))
        name = f"ipv6:%5B{source}%5D" if ":" in source else f"ipv4:{source}"
        return far, f"{name}:{far.getsockname()[1]}"

    def lets_in(self, source="127.0.0.1"):
        """Whether a dial from there is answered."""
        try:
            self.dial(source)
        except TimeoutError:
            return False
        return True

    def hears(self):
        """Whether what the newest far end says arrives."""
        far, near = self.pairs[-1]
        far.sendall(b"x")
        near.settimeout(SOON_S)
        try:
            return near.recv(1) == b"x"
        except TimeoutError:
            return False


def open_yet(far):
    """Whether the other end has not hung up."""
    far.setblocking(False)
    try:
        return far.recv(1) != b""
    except BlockingIOError:
        return True


def test_strangers_that_say_nothing_are_hung_up_on_and_devices_are_not():
    now = [0.0]
    connections = Connections(lambda: now[0])
    with Place() as place:
        connections.ports = {place.port}
        stranger, device = place.dial(), place.dial()
        connections.used("ash", device[1])
        assert connections.sweep().hung_up == 0
        now[0] = ANONYMOUS_S + 1
        assert connections.sweep().hung_up == 1
        assert not open_yet(stranger[0]) and open_yet(device[0])


def test_a_device_keeps_its_newest_connections():
    now = [0.0]
    connections = Connections(lambda: now[0])
    with Place() as place:
        connections.ports = {place.port}
        dialled = [place.dial() for _ in range(MOST_OF_DEVICE + 3)]
        for number, (_, told) in enumerate(dialled):
            now[0] = float(number)
            connections.used("ash", told)
        assert connections.sweep().hung_up == 3
        assert [open_yet(far) for far, _ in dialled] == [False] * 3 + [True] * MOST_OF_DEVICE


def test_what_is_closed_is_forgotten():
    now = [0.0]
    connections = Connections(lambda: now[0])
    with Place() as place:
        connections.ports = {place.port}
        connections.used("ash", place.dial()[1])
        for end in place.pairs.pop():
            end.close()
        now[0] = 1000.0
        connections.sweep()
        assert not connections._known and not connections._of_device and not connections._first_seen


# --- what the kernel drops ----------------------------------------------------------------------


def test_a_deaf_connection_hears_nothing_and_then_what_was_said_meanwhile():
    with Place() as place:
        place.dial()
        near = place.pairs[-1][1]
        assert place.hears()
        deafen(near)
        assert not place.hears()
        hear(near)
        near.settimeout(10)
        assert near.recv(1) == b"x", "TCP lost what was said"


@pytest.mark.parametrize("host", ["127.0.0.1", "::"])
def test_a_gate_shuts_out_an_address_and_leaves_open_what_is(host):
    family = socket.AF_INET6 if host == "::" else socket.AF_INET
    with Place(host, family) as place:
        place.dial()
        before = place.pairs[-1]
        gate(place.listener, [ipaddress.ip_network("127.0.0.1/32")])
        assert not place.lets_in()
        assert place.lets_in("127.0.0.2") and place.hears()
        place.pairs.append(before)
        assert place.hears(), "a connection that was open is not heard"
        place.pairs.pop()
        hear(place.listener)
        assert place.lets_in()


def test_a_gate_shuts_out_a_network_of_ipv6():
    with contextlib.ExitStack() as stack:
        try:
            place = stack.enter_context(Place("::1", socket.AF_INET6))
        except OSError:
            pytest.skip("this machine has no IPv6")
        gate(place.listener, [ipaddress.ip_network("2001:db8::/64")])
        assert place.lets_in("::1")
        gate(place.listener, [ipaddress.ip_network(n) for n in ("2001:db8::/64", "::/64")])
        assert not place.lets_in("::1")


def test_a_gate_has_room_for_many_addresses_and_takes_no_more():
    many = [ipaddress.ip_network((f"10.0.{n >> 8}.{n & 255}", 32)) for n in range(MOST_GATED + 9)]
    of_six = [ipaddress.ip_network((n << 64, 64)) for n in range(1, MOST_GATED + 9)]
    with Place() as place:
        for shut_out in (many, of_six, [*many[:100], *of_six[:100]]):
            gate(place.listener, shut_out)
            assert place.lets_in()


# --- floods ---------------------------------------------------------------------------------------


@pytest.fixture
def place():
    """A listener, whose connections are watched; `now` is its clock."""
    now = [0.0]
    with Place() as place:
        place.now, place.connections = now, Connections(lambda: now[0])
        place.connections.ports = {place.port}
        yield place


def test_a_flood_s_connection_is_deaf_for_a_while_and_then_hung_up_on(place):
    far, told = place.dial()
    place.connections.used("ash", told)
    place.now[0] = 1.0
    assert place.connections.sweep({peer_of(told)}).hung_up == 0
    assert open_yet(far) and not place.hears()
    place.now[0] = DEAF_S
    assert place.connections.sweep().hung_up == 0
    place.now[0] = DEAF_S + 2
    assert place.connections.sweep().hung_up == 1
    assert not open_yet(far)
    with pytest.raises(FileNotFoundError):
        hear(place.pairs[-1][1])  # the filter is gone: the kernel hears the peer's goodbye


def test_deaf_connections_do_not_count_among_a_device_s_own(place):
    dialled = [place.dial() for _ in range(MOST_OF_DEVICE + 3)]
    for _, told in dialled:
        place.connections.used("ash", told)
    flooding = {peer_of(told) for _, told in dialled[:3]}
    assert place.connections.sweep(flooding).hung_up == 0
    assert all(open_yet(far) for far, _ in dialled)


def test_where_the_kernel_has_no_filters_a_flood_is_hung_up_on(place, monkeypatch):
    def fail(*given):
        raise OSError("no such option")

    monkeypatch.setattr(connections_module, "deafen", fail)
    monkeypatch.setattr(connections_module, "gate", fail)
    far, told = place.dial()
    place.connections.used("ash", told)
    assert place.connections.sweep({peer_of(told)}).hung_up == 1
    assert not open_yet(far)
    flood_of_dials(place)
    assert place.lets_in()


def flood_of_dials(place):
    """More handshakes from one address than it may begin; a sweep sees some of them."""
    dialled = [place.dial()[0] for _ in range(int(DIALS_BURST / MOST_UNSEEN) + 4)]
    for _ in range(int(DIALS_BURST) + 40):
        place.connections.dialling.begun()
    place.connections.sweep()
    for far in dialled:
        far.close()


def test_who_dials_too_often_is_shut_out_for_a_while_and_others_are_not(place, caplog):
    known = place.dial()
    place.connections.used("birch", known[1])
    flood_of_dials(place)
    assert not place.lets_in() and place.lets_in("127.0.0.2")
    assert open_yet(known[0])
    assert [r.getMessage() for r in caplog.records if "127.0.0.1/32 opens" in r.getMessage()]
    place.now[0] = SHUT_OUT_S + 1
    place.connections.sweep()
    assert place.lets_in()
    flood_of_dials(place)
    assert not place.lets_in(), "shut out but once"


def test_dials_of_a_lab_are_let_in(place):
    place.dial()
    for _ in range(int(DIALS_BURST) - 10):
        place.connections.dialling.begun()
    place.connections.sweep()
    assert place.lets_in()


def test_a_connection_counts_as_one_dial_however_long_it_is_deaf(place):
    _, told = place.dial()
    for _ in range(int(DIALS_BURST) + 9):
        place.connections.sweep({peer_of(told)})
    assert place.lets_in()


def say(place, size_bytes):
    """The newest far end says so much, which is heard; returns both ends."""
    far, near = place.pairs[-1]
    for start in range(0, size_bytes, 1 << 16):
        block = min(1 << 16, size_bytes - start)
        far.sendall(bytes(block))
        while block:
            block -= len(near.recv(block))
    return far, near


def test_what_crosses_a_device_s_connections_is_told_from_one_sweep_to_the_next(place):
    for size in (1000, 500):
        _, told = place.dial()
        place.connections.used("ash", told)
        say(place, size)
    stranger, _ = place.dial()
    say(place, 77)
    assert place.connections.sweep().crossed == {"ash": Crossed(1500, 0)}
    place.pairs.pop()
    far, near = say(place, 30)
    near.sendall(bytes(200))
    far.recv(200, socket.MSG_WAITALL)
    assert place.connections.sweep().crossed == {"ash": Crossed(30, 200)}
    assert place.connections.sweep().crossed == {"ash": Crossed(0, 0)}
    stranger.close()


def test_a_stranger_that_says_much_is_not_heard_and_counts_as_many_dials(place):
    place.dial()
    say(place, STRANGE_BYTES)
    place.connections.sweep()
    assert place.hears(), "a stranger may say so much"
    known = place.dial()
    place.connections.used("ash", known[1])
    say(place, 2 * STRANGE_BYTES)
    place.connections.sweep()
    assert place.hears(), "a device may say more"
    loud = -(-int(DIALS_BURST) // LOUD_DIALS)
    for _ in range(loud):
        place.dial()
        say(place, STRANGE_BYTES + 1)
    place.connections.sweep()
    assert not place.hears()
    assert not place.lets_in() and place.lets_in("127.0.0.2")


# --- dialling -------------------------------------------------------------------------------------

LAB, HOME, V6 = (ipaddress.ip_network(n) for n in ("10.0.0.1/32", "10.0.0.2/32", "2001:db8::/64"))


def dialled(dialling, now, **new):
    """Who waits after these new connections of LAB, HOME or V6 were seen."""
    names = {"lab": LAB, "home": HOME, "v6": V6}
    return dialling.shut_out(now, Counter({names[n]: k for n, k in new.items()}), {})


def test_dials_that_nobody_saw_are_put_down_to_addresses_of_those_that_were_seen():
    dialling = Dialling()
    for _ in range(400):
        dialling.begun()
    assert dialled(dialling, 0.0, lab=90, home=9) == {LAB}  # 364 and 36 of them
    assert dialled(dialling, 1.0) == {LAB}
    assert dialled(dialling, 60.0) == set()


def test_an_address_waits_until_its_dials_are_within_the_rate_again_and_never_for_long():
    dialling = Dialling()
    assert dialled(dialling, 0.0, v6=int(DIALS_BURST) + 40) == {V6}
    assert dialled(dialling, 1.9) == {V6} and dialled(dialling, 2.1) == set()
    assert dialled(dialling, 2.1, v6=10_000) == {V6}
    assert dialled(dialling, 2.1 + SHUT_OUT_S + 0.1) == set()


def test_one_connection_stands_for_few_dials_and_for_none_of_before():
    dialling = Dialling()
    for _ in range(10_000):
        dialling.begun()
    assert dialled(dialling, 0.0, home=MOST_UNSEEN) == set()
    for _ in range(10_000):
        dialling.begun()
    assert dialled(dialling, 1.0) == set()
    assert dialled(dialling, 20.0, home=int(DIALS_BURST) - 1) == set()


def test_what_an_address_s_strangers_say_counts_as_dials():
    dialling = Dialling()
    shares = (DIALS_BURST + 20) / LOUD_DIALS
    assert dialling.shut_out(0.0, Counter(), {LAB: shares, HOME: 1.0}) == {LAB}


def test_a_port_that_comes_to_another_device_is_the_other_s(place):
    _, told = place.dial()
    place.connections.used("ash", told)
    place.connections.used("birch", told)
    assert place.connections.of("ash") == [] and place.connections.of("birch") == [peer_of(told)]


def test_without_descriptors_nobody_is_taken_for_gone(place, monkeypatch):
    far, told = place.dial()
    place.connections.used("ash", told)
    say(place, 1000)
    place.connections.sweep({peer_of(told)})

    def full(*given):
        raise OSError(errno.EMFILE, "too many open files")

    with monkeypatch.context() as patch:
        patch.setattr("os.dup", full)
        with pytest.raises(OSError, match="too many"):
            place.connections.sweep()
    place.now[0] = DEAF_S + 1
    assert place.connections.sweep().hung_up == 1 and not open_yet(far)


def test_a_gate_that_is_too_long_for_the_kernel_shuts_out_as_many_as_it_can(place, monkeypatch):
    lengths = []

    def short(listener, shut_out):
        lengths.append(len(shut_out))
        if len(shut_out) > 1:
            raise OSError("no memory")

    monkeypatch.setattr(connections_module, "gate", short)
    place.connections._gate(frozenset({LAB, HOME, V6}))
    assert lengths == [3, 1]
