"""The connections of this process to its devices: which are too many, and how to be rid of them.

gRPC tells a call's peer and closes no single connection. The kernel does: a connection's descriptor
is found among this process's own by its peer and shut down, upon which gRPC lets go of it; what a
flood sends is dropped (`tarpit`). Linux.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import resource
import socket
import stat
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Set
from dataclasses import dataclass

from coordinator.dialling import Dialling
from coordinator.limits import FLOOD_S
from coordinator.tarpit import Network, deafen, gate, hear

Peer = tuple[str, int]
MOST_OF_DEVICE = 8  # connections; an agent has two, and a broken one may linger
ANONYMOUS_S = 20.0  # a connection may be open without a call that was let in
DEAF_S = FLOOD_S  # then a flood's connection is hung up on
STRANGE_BYTES = 256 << 10  # before a call is let in; the largest that is asks with 64 KiB
MOST_CONNECTIONS, LEAST_CONNECTIONS, MOST_JOINING = 16_384, 256, 512
SPARE_FILES = 256 + MOST_JOINING  # descriptors that are not for the fleet's connections


def peer_of(told: str) -> Peer | None:
    """(address, port) of gRPC's name for a peer, "ipv4:127.0.0.1:4711"; None if it is no TCP."""
    kind, _, rest = told.partition(":")
    address, _, port = rest.rpartition(":")
    if kind not in ("ipv4", "ipv6") or not port.isdecimal():
        return None
    return _plain(address.replace("%5B", "").replace("%5D", "").strip("[]")), int(port)


def network_of(told: str) -> str:
    """What counts as one address: an IPv4 address, or the /64 of an IPv6 one."""
    peer = peer_of(told)
    try:
        return told if peer is None else str(_network(peer)).removesuffix("/32")
    except ValueError:
        return told


def _network(peer: Peer) -> Network:
    found = ipaddress.ip_address(peer[0].partition("%")[0])
    return ipaddress.ip_network((found, 32 if found.version == 4 else 64), strict=False)


def room_for_connections() -> int:
    """Raises the limit on open files as far as it goes; returns how many may be connections."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MOST_CONNECTIONS + SPARE_FILES
    wanted = most if hard == resource.RLIM_INFINITY else min(most, hard)
    if wanted > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return max(LEAST_CONNECTIONS, max(soft, wanted) - SPARE_FILES)


@dataclass(frozen=True)
class Crossed:
    """Bytes of connections: that the kernel received, and that it sent and saw acknowledged."""

    received: int
    sent: int

    def __add__(self, other: Crossed) -> Crossed:
        return Crossed(self.received + other.received, self.sent + other.sent)

    def __sub__(self, other: Crossed) -> Crossed:
        return Crossed(self.received - other.received, self.sent - other.sent)


NOTHING = Crossed(0, 0)


@dataclass(frozen=True)
class Swept:
    """On how many connections was hung up, what crossed those of each device since the last sweep,
    and what it took of a processor.
    """

    hung_up: int
    crossed: dict[str, Crossed]
    took_s: float


class Connections:
    """Who is behind which connection to `ports`. `sweep` may run in a thread of its own."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self.ports: set[int] = set()
        self._of_device: dict[str, dict[Peer, float]] = {}  # when a call was last let in
        self._known: dict[Peer, str] = {}
        self._first_seen: dict[Peer, float] = {}
        self._deaf: dict[Peer, float] = {}  # since when
        self._crossed: dict[Peer, Crossed] = {}  # at the last sweep
        self.dialling = Dialling()
        self._shut_out: frozenset[Network] = frozenset()

    def used(self, device_id: str, told: str) -> None:
        """A call of this device was let in over the connection that gRPC names so."""
        peer = peer_of(told)
        if peer is None:
            return
        with self._lock:
            before = self._known.get(peer, device_id)
            if before != device_id:  # behind one address a port comes to another device
                self._of_device.get(before, {}).pop(peer, None)
            self._of_device.setdefault(device_id, {})[peer] = self._clock()
            self._known[peer] = device_id

    def of(self, device_id: str) -> list[Peer]:
        """The connections of a device that calls came over."""
        with self._lock:
            return list(self._of_device.get(device_id, ()))

    def sweep(self, flooding: Collection[Peer] = ()) -> Swept:
        """Makes these deaf; hangs up on strangers that say nothing, on what is too many of a
        device, and in the end on the deaf; shuts out for a while those that dial too often.
        """
        begun, now, known = time.thread_time(), self._clock(), dict(self._known)
        crossed = {peer: _crossed(connection) for peer, connection in _sockets(self.ports)}
        live = crossed.keys()
        for seen in (self._first_seen, self._deaf, self._crossed):
            for peer in seen.keys() - live:
                del seen[peer]
        new = live - self._first_seen.keys()
        self._first_seen.update(dict.fromkeys(new, now))
        strange = live - known.keys() - self._deaf.keys()
        loud = {peer for peer in strange if crossed[peer].received > STRANGE_BYTES}
        said: Counter[Network] = Counter()
        for peer in strange:
            more = crossed[peer] - self._crossed.get(peer, NOTHING)
            said[_network(peer)] += more.received
        shares = {network: size / STRANGE_BYTES for network, size in said.items()}
        self._gate(self.dialling.shut_out(now, Counter(map(_network, new)), shares))
        over = {peer for peer, since in self._deaf.items() if now - since > DEAF_S}
        over |= {peer for peer in strange if now - self._first_seen[peer] > ANONYMOUS_S}
        over |= self._deafen((loud | set(flooding)) & live - self._deaf.keys())
        heard = live - self._deaf.keys()
        over |= self._too_many(now, live, heard)
        moved: dict[str, Crossed] = {}
        for peer in heard & known.keys():
            more = crossed[peer] - self._crossed.get(peer, NOTHING)
            moved[known[peer]] = moved.get(known[peer], NOTHING) + more
        self._crossed = crossed
        ended = self._hang_up(over) if over else 0
        return Swept(ended, moved, time.thread_time() - begun)

    def _too_many(self, now: float, live: Set[Peer], heard: Set[Peer]) -> set[Peer]:
        """A device's oldest. Forgets those that are closed."""
        over: set[Peer] = set()
        for device_id in list(self._of_device):
            with self._lock:
                peers = self._of_device[device_id]
                for gone in [peer for peer in peers if peer not in live]:
                    if now - peers[gone] > ANONYMOUS_S:  # or it was opened since
                        del peers[gone]
                        self._known.pop(gone, None)
                if not peers:
                    del self._of_device[device_id]
                there = sorted((at, peer) for peer, at in peers.items() if peer in heard)
            over.update(peer for _, peer in there[: max(0, len(there) - MOST_OF_DEVICE)])
        return over

    def _gate(self, shut_out: frozenset[Network]) -> None:
        if shut_out == self._shut_out:
            return
        self._shut_out = shut_out
        for listener in _listeners(self.ports):
            with contextlib.suppress(OSError):  # no such filters: dialling costs what it costs
                hear(listener)
            waiting = list(shut_out)
            while waiting:
                try:
                    gate(listener, waiting)
                except OSError:  # also of a filter that is too long for this kernel
                    waiting = waiting[: len(waiting) // 2]
                else:
                    break

    def _deafen(self, peers: Collection[Peer]) -> set[Peer]:
        """Returns those that the kernel has no filter for."""
        failed = set()
        for peer, connection in _sockets(self.ports) if peers else ():
            if peer in peers:
                try:
                    deafen(connection)
                except OSError:
                    failed.add(peer)
                else:
                    self._deaf[peer] = self._clock()
        return failed

    def _hang_up(self, peers: Collection[Peer]) -> int:
        ended = 0
        for peer, connection in _sockets(self.ports):
            if peer in peers:
                with contextlib.suppress(OSError):
                    if self._deaf.pop(peer, None) is not None:
                        hear(connection)  # or the kernel never hears the peer's goodbye
                    connection.shutdown(socket.SHUT_RDWR)
                    ended += 1
        return ended


def _sockets(ports: Collection[int]) -> Iterator[tuple[Peer, socket.socket]]:
    """(peer, a descriptor of ours until the next) of this process's connections to these ports."""
    for connection in _at(ports):
        with contextlib.suppress(OSError):
            peer = connection.getpeername()
            yield (_plain(peer[0]), peer[1]), connection


def _listeners(ports: Collection[int]) -> Iterator[socket.socket]:
    """A descriptor of ours, until the next, for what listens there."""
    for connection in _at(ports):
        if connection.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            yield connection


def _at(ports: Collection[int]) -> Iterator[socket.socket]:
    for entry in os.listdir("/proc/self/fd"):  # noqa: PTH208 - names are all that is wanted
        try:
            if not stat.S_ISSOCK(os.fstat(int(entry)).st_mode):
                continue
            number = os.dup(int(entry))
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                raise  # who is not seen would be taken for gone
            continue  # closed meanwhile
        try:
            connection = socket.socket(fileno=number)
        except OSError:  # the number is another file's by now
            os.close(number)
            continue
        with connection:
            own = connection.getsockname()
            if isinstance(own, tuple) and own[1] in ports:
                yield connection


def _crossed(connection: socket.socket) -> Crossed:
    """tcpi_bytes_received and tcpi_bytes_acked of struct tcp_info, linux/tcp.h."""
    facts = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 136)
    sent, received = struct.unpack_from("QQ", facts, 120)
    return Crossed(received, sent)


def _plain(address: str) -> str:
    """Without the prefix that an IPv4 address has on a socket for both."""
    return address.removeprefix("::ffff:") if "." in address else address
