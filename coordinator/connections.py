"""The connections of this process to its devices: which are too many, and how to be rid of them.

gRPC tells a call's peer and closes no single connection. The kernel does: a connection's descriptor
is found among this process's own by its peer and shut down, upon which gRPC lets go of it; what a
flood sends is dropped (`tarpit`). Linux.
"""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import os
import resource
import socket
import stat
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Iterator

from coordinator.limits import FLOOD_S, MOST_ADDRESSES, Bucket
from coordinator.tarpit import Network, deafen, gate, hear

log = logging.getLogger("sketchfleet.coordinator")

Peer = tuple[str, int]
MOST_OF_DEVICE = 8  # connections; an agent has two, and a broken one may linger
ANONYMOUS_S = 20.0  # a connection may be open without a call that was let in
DEAF_S = FLOOD_S  # then a flood's connection is hung up on
DIALS_PER_S, DIALS_BURST = 20.0, 300.0  # from one address, perhaps a lab's; an agent dials twice
GATED_S = 10.0  # an address is shut out at once, at most
SPARE_FILES = 256  # descriptors that are not for connections
MOST_CONNECTIONS = 16_384
TELL_S = 60.0  # between two lines of the log on one matter


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
    return max(SPARE_FILES, max(soft, wanted) - SPARE_FILES)


class _Dialling:
    """How often one address dials."""

    def __init__(self, now: float) -> None:
        self.dials = Bucket(DIALS_PER_S, DIALS_BURST, now)
        self._told_at = float("-inf")

    def tell(self, network: Network, now: float) -> None:
        """Says so in the log, once in a while."""
        if now > self._told_at + TELL_S:
            self._told_at = now
            log.warning("%s opens more than %.0f connections a second; further ones from there "
                        "wait", network, DIALS_PER_S)  # fmt: skip


class Connections:
    """Who is behind which connection to `ports`. `sweep` may run in a thread of its own."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.ports: set[int] = set()
        self._of_device: dict[str, dict[Peer, float]] = {}  # when a call was last let in
        self._known: dict[Peer, str] = {}
        self._first_seen: dict[Peer, float] = {}
        self._deaf: dict[Peer, float] = {}  # since when
        self._dialled = 0  # since the last sweep
        self._dialling: OrderedDict[Network, _Dialling] = OrderedDict()
        self._gated: dict[Network, float] = {}  # until when

    def dialled(self) -> None:
        """A handshake begins. Of one that ends before a sweep nothing else is seen."""
        self._dialled += 1

    @property
    def pressing(self) -> bool:
        """Whether a sweep should not wait."""
        return self._dialled > MOST_OF_DEVICE or bool(self._gated)

    def used(self, device_id: str, told: str) -> None:
        """A call of this device was let in over the connection that gRPC names so."""
        peer = peer_of(told)
        if peer is not None:
            self._of_device.setdefault(device_id, {})[peer] = self._clock()
            self._known[peer] = device_id

    def of(self, device_id: str) -> list[Peer]:
        """The connections of a device that calls came over."""
        return list(self._of_device.get(device_id, ()))

    def sweep(self, flooding: Collection[Peer] = ()) -> int:
        """Makes these deaf; hangs up on strangers that say nothing, on what is too many of a
        device, and in the end on the deaf; shuts out for a while those that dial too often.

        Returns on how many it hung up.
        """
        now, live = self._clock(), {peer for peer, _ in _sockets(self.ports)}
        for known in (self._first_seen, self._deaf):
            for peer in known.keys() - live:
                del known[peer]
        new = live - self._first_seen.keys()
        self._first_seen.update(dict.fromkeys(new, now))
        self._watch_the_gate(now, new)
        over = {peer for peer, since in self._deaf.items() if now - since > DEAF_S}
        over |= self._deafen(set(flooding) & live - self._deaf.keys())
        for peer in live - self._deaf.keys():
            if peer not in self._known and now - self._first_seen[peer] > ANONYMOUS_S:
                over.add(peer)
        for device_id, peers in list(self._of_device.items()):
            there = sorted((at, peer) for peer, at in list(peers.items())
                           if peer in live and peer not in self._deaf)  # fmt: skip
            for gone in [peer for peer in list(peers) if peer not in live]:
                if now - peers[gone] > ANONYMOUS_S:  # or it was opened since
                    del peers[gone]
                    self._known.pop(gone, None)
            if not peers:
                del self._of_device[device_id]
            over.update(peer for _, peer in there[: max(0, len(there) - MOST_OF_DEVICE)])
        return self._hang_up(over) if over else 0

    def _watch_the_gate(self, now: float, new: Collection[Peer]) -> None:
        """Dials that no sweep saw are put down to addresses of new connections, of which a flood
        has some at any moment.
        """
        dialled, self._dialled = max(self._dialled, len(new)), 0
        gated = {network: until for network, until in self._gated.items() if until > now}
        for network, count in Counter(map(_network, new)).items():
            own = self._dialling.pop(network, None) or _Dialling(now)
            self._dialling[network] = own
            if len(self._dialling) > MOST_ADDRESSES:
                self._dialling.popitem(last=False)
            if wait_s := own.dials.take(now, float("inf"), count * dialled / len(new)):
                gated[network] = now + min(wait_s, GATED_S)
                own.tell(network, now)
        if gated.keys() != self._gated.keys():
            for listener in _listeners(self.ports):
                with contextlib.suppress(OSError):  # then its dialling costs what it costs
                    gate(listener, gated) if gated else hear(listener)
        self._gated = gated

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
                    if peer in self._deaf:
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
            connection = socket.socket(fileno=os.dup(int(entry)))
        except OSError:  # closed meanwhile
            continue
        with connection:
            own = connection.getsockname()
            if isinstance(own, tuple) and own[1] in ports:
                yield connection


def _plain(address: str) -> str:
    """Without the prefix that an IPv4 address has on a socket for both."""
    return address.removeprefix("::ffff:") if "." in address else address
