"""A network namespace for one device, behind a link with rate, delay, loss and outages.

    device's namespace --- tun --- this process --- tun --- the coordinator's port

Packets pass through a small user-space relay between two TUN devices, so TCP's own handshake,
retransmissions and congestion control meet the link as they would outside. For kernels without
netem; needs root. Knows packets, not what is in them; a link that is only slow may as well be
`trials.relay`, which needs no privileges.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import heapq
import os
import random
import select
import shutil
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from profiles.errors import SketchfleetError
from profiles.trace import LinkState
from trials.doorway import Doorway

TUN = "/dev/net/tun"
TUNSETIFF = 0x400454CA  # linux/if_tun.h
IFF_TUN, IFF_NO_PI = 0x0001, 0x1000
MTU = 1500
QUEUE_S = 0.3  # of the link's rate is held for a sender before packets are dropped, as routers do
LEAST_QUEUE_BYTES = 30 * MTU


class TunnelError(SketchfleetError):
    """A namespace or its link cannot be made here."""


@dataclass
class Counts:
    """What one direction did."""

    packets: int = 0
    bytes: int = 0  # delivered
    lost: int = 0  # packets, by chance
    dropped: int = 0  # packets, for want of room or during an outage


class _Lane:
    """One direction: a bucket that drains at the link's rate into a queue of delayed packets."""

    def __init__(self, target: int, state: Callable[[], tuple[float, float, float]], seed: int):
        self._target, self._state = target, state
        self._chance = random.Random(seed)  # noqa: S311 - no secret
        self._free_at = 0.0  # when the link has sent what it holds
        self._waiting: list[tuple[float, int, bytes]] = []
        self.counts = Counts()

    def take(self, packet: bytes, now: float) -> None:
        """Queues a packet, or drops it."""
        bps, delay_s, loss = self._state()
        if bps <= 0:
            self.counts.dropped += 1
            return
        if self._chance.random() < loss:
            self.counts.lost += 1
            return
        held_s = max(0.0, self._free_at - now)
        if held_s * bps / 8 > max(LEAST_QUEUE_BYTES, QUEUE_S * bps / 8):
            self.counts.dropped += 1
            return
        self._free_at = max(now, self._free_at) + 8 * len(packet) / bps
        # The counter keeps packets that are due together in order.
        heapq.heappush(self._waiting, (self._free_at + delay_s, self.counts.packets, packet))
        self.counts.packets += 1

    def deliver(self, now: float) -> float | None:
        """Hands on what is due; when the next packet is, if any."""
        while self._waiting and self._waiting[0][0] <= now:
            _, _, packet = heapq.heappop(self._waiting)
            with contextlib.suppress(BlockingIOError):  # a full device drops, as a card does
                os.write(self._target, packet)
                self.counts.bytes += len(packet)
        return self._waiting[0][0] if self._waiting else None


class DeviceNetwork:
    """A namespace `name` whose only way out is an emulated link to one port of this machine.

    `address` is where the device dials; it reaches 127.0.0.1:`port` here. `state(t)` says what the
    link is like t seconds after the start. Use as a context manager. Raises `TunnelError`.
    """

    def __init__(
        self, name: str, number: int, port: int, state: Callable[[float], LinkState], seed: int = 0
    ) -> None:
        self.name, self._port, self._state = f"sketchfleet-{name}", port, state
        self._near, self._far = link_addresses(number)
        self._devices = (f"sfn{number}", f"sff{number}")
        self._seed, self._stopping = seed, threading.Event()
        self._pumping: threading.Thread | None = None
        self._lanes: list[_Lane] = []
        self._doorway: Doorway | None = None
        self._files: list[int] = []
        self._began = time.monotonic()

    @property
    def address(self) -> str:
        """Host and port for the device's agent.toml."""
        return f"{self._near}:{self._port}"

    @property
    def now(self) -> LinkState:
        """What the link is like at this moment."""
        return self._state(time.monotonic() - self._began)

    @property
    def up(self) -> Counts:
        """From the device."""
        return self._lanes[0].counts

    @property
    def down(self) -> Counts:
        """To the device."""
        return self._lanes[1].counts

    def wrap(self, command: Sequence[str]) -> list[str]:
        """The command that runs `command` inside."""
        return ["ip", "netns", "exec", self.name, *command]

    def __enter__(self) -> DeviceNetwork:
        why = unavailable()
        if why is not None:
            raise TunnelError(why)
        try:
            self._make()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        if self._doorway is not None:
            self._doorway.close()
        if self._pumping is not None:
            self._pumping.join(5)
        for file in self._files:
            os.close(file)
        self._files = []
        subprocess.run(["ip", "netns", "delete", self.name], capture_output=True, check=False)

    def _make(self) -> None:
        subprocess.run(["ip", "netns", "delete", self.name], capture_output=True, check=False)
        run_ip("netns", "add", self.name)
        near, far = self._devices
        self._files = [_tun(far), _tun(near)]
        run_ip("link", "set", far, "netns", self.name)
        inside = ("-n", self.name)
        run_ip(*inside, "link", "set", "lo", "up")
        run_ip(*inside, "addr", "add", f"{self._far}/30", "dev", far)
        run_ip(*inside, "link", "set", far, "mtu", str(MTU), "up")
        run_ip("addr", "add", f"{self._near}/30", "dev", near)
        run_ip("link", "set", near, "mtu", str(MTU), "up")
        self._began = time.monotonic()

        def up() -> tuple[float, float, float]:
            now = self.now
            return now.up_bps, now.delay_s, now.loss

        def down() -> tuple[float, float, float]:
            now = self.now
            return now.down_bps, now.delay_s, now.loss

        device, here = self._files
        self._lanes = [_Lane(here, up, 2 * self._seed), _Lane(device, down, 2 * self._seed + 1)]
        self._doorway = Doorway(self._near, self._port)
        self._pumping = threading.Thread(target=self._pump, name=f"{self.name}-pump", daemon=True)
        self._pumping.start()

    def _pump(self) -> None:
        """Moves packets until told to stop."""
        device, here = self._files
        up, down = self._lanes
        due: list[float | None] = [None, None]
        while not self._stopping.is_set():
            now = time.monotonic()
            soonest = min((at for at in due if at is not None), default=now + 0.2)
            ready, _, _ = select.select([device, here], [], [], min(0.2, max(0.0, soonest - now)))
            now = time.monotonic()
            for file, lane in ((device, up), (here, down)):
                if file in ready:
                    _drain(file, lane, now)
            due = [up.deliver(now), down.deliver(now)]


def link_addresses(number: int) -> tuple[str, str]:
    """(near, far): the two ends of link `number`, in a /30 of its own. Raises `TunnelError`."""
    if not 0 <= number < 2**14:
        raise TunnelError(f"device {number} has no addresses left; use fewer than 16384")
    first = (10 << 24) + (77 << 16) + 4 * number
    near, far = (socket.inet_ntoa(struct.pack("!I", first + i)) for i in (1, 2))
    return near, far


def unavailable() -> str | None:
    """Why there can be no namespaces with links here; None if there can."""
    if shutil.which("ip") is None:
        return "the `ip` command is missing; install iproute2"
    if os.geteuid() != 0:
        return "network namespaces need root; run as root, or use links without packet loss"
    if not os.path.exists(TUN):  # noqa: PTH110 - a device, not a file
        return f"{TUN} is missing; load the kernel's tun module"
    return None


def _tun(name: str) -> int:
    """A new TUN device, non-blocking."""
    file = os.open(TUN, os.O_RDWR | os.O_NONBLOCK)
    try:
        fcntl.ioctl(file, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TUN | IFF_NO_PI))
    except OSError as error:
        os.close(file)
        raise TunnelError(f"no TUN device {name} can be made: {error}") from error
    return file


def _drain(file: int, lane: _Lane, now: float) -> None:
    """Reads what is there, a batch at most: the other direction waits for its turn."""
    for _ in range(64):
        try:
            packet = os.read(file, MTU + 64)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EIO):  # nothing more; not up any more
                return
            raise
        lane.take(packet, now)


def run_ip(*words: str) -> None:
    """Runs `ip`. Raises `TunnelError` with what it said."""
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise TunnelError(f"`ip {' '.join(words)}` failed: {done.stderr.strip()}")
