"""The connections of this process to its devices, and how to hang up on one.

gRPC tells a call's peer and closes no single connection. The kernel does: a connection's descriptor
is found among this process's own by its peer and shut down, upon which gRPC lets go of it. Linux.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import resource
import socket
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

Peer = tuple[str, int]
MOST_OF_DEVICE = 8  # connections; an agent has two, and a broken one may linger
ANONYMOUS_S = 20.0  # a connection may be open without a call that was let in
SPARE_FILES = 256  # descriptors that are not for connections
MOST_CONNECTIONS = 16_384


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
    if peer is None:
        return told
    try:
        found = ipaddress.ip_address(peer[0].partition("%")[0])
    except ValueError:
        return peer[0]
    if found.version == 4:
        return str(found)
    return str(ipaddress.ip_network((found, 64), strict=False))


def room_for_connections() -> int:
    """Raises the limit on open files as far as it goes; returns how many may be connections."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MOST_CONNECTIONS + SPARE_FILES
    wanted = most if hard == resource.RLIM_INFINITY else min(most, hard)
    if wanted > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return max(SPARE_FILES, max(soft, wanted) - SPARE_FILES)


class Connections:
    """Who is behind which connection to `ports`. `sweep` may run in a thread of its own."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.ports: set[int] = set()
        self._of_device: dict[str, dict[Peer, float]] = {}  # when a call was last let in
        self._known: dict[Peer, str] = {}
        self._first_seen: dict[Peer, float] = {}

    def used(self, device_id: str, told: str) -> None:
        """A call of this device was let in over the connection that gRPC names so."""
        peer = peer_of(told)
        if peer is not None:
            self._of_device.setdefault(device_id, {})[peer] = self._clock()
            self._known[peer] = device_id

    def sweep(self, doomed: Collection[Peer] = ()) -> int:
        """Hangs up on these, on strangers that say nothing, and on what is too many of a device.

        Returns on how many.
        """
        now, live = self._clock(), set(_live(self.ports))
        for peer in self._first_seen.keys() - live:
            del self._first_seen[peer]
        over = set(doomed)
        for peer in live:
            since = self._first_seen.setdefault(peer, now)
            if peer not in self._known and now - since > ANONYMOUS_S:
                over.add(peer)
        for device_id, peers in list(self._of_device.items()):
            there = sorted((at, peer) for peer, at in list(peers.items()) if peer in live)
            for gone in [peer for peer in list(peers) if peer not in live]:
                if now - peers[gone] > ANONYMOUS_S:  # or it was opened since
                    del peers[gone]
                    self._known.pop(gone, None)
            if not peers:
                del self._of_device[device_id]
            over.update(peer for _, peer in there[: max(0, len(there) - MOST_OF_DEVICE)])
        return self._hang_up(over) if over else 0

    def _hang_up(self, peers: Collection[Peer]) -> int:
        ended = 0
        for peer, connection in _sockets(self.ports):
            with contextlib.closing(connection):
                if peer in peers:
                    with contextlib.suppress(OSError):
                        connection.shutdown(socket.SHUT_RDWR)
                        ended += 1
        return ended


def _live(ports: Collection[int]) -> list[Peer]:
    found = []
    for peer, connection in _sockets(ports):
        connection.close()
        found.append(peer)
    return found


def _sockets(ports: Collection[int]) -> Iterator[tuple[Peer, socket.socket]]:
    """(peer, a descriptor of ours for it) of this process's connections to these ports."""
    for entry in os.listdir("/proc/self/fd"):  # noqa: PTH208 - names are all that is wanted
        try:
            if not str(Path(f"/proc/self/fd/{entry}").readlink()).startswith("socket:"):
                continue
            connection = socket.socket(fileno=os.dup(int(entry)))
        except OSError:  # closed meanwhile
            continue
        try:
            own, peer = connection.getsockname(), connection.getpeername()
        except OSError:
            connection.close()
            continue
        if isinstance(own, tuple) and own[1] in ports:
            yield (_plain(peer[0]), peer[1]), connection
        else:
            connection.close()


def _plain(address: str) -> str:
    """Without the prefix that an IPv4 address has on a socket for both."""
    return address.removeprefix("::ffff:") if "." in address else address
