"""How much one device, and all of them together, may ask of the coordinator.

Who asks too fast is kept waiting, which costs nothing here and slows down whoever asks; who would
wait too long is refused after the wait, and told how long to stay away; who goes on all the same is
not to be heard for a while. Of calls that a device has open at once the oldest ends, for an old one
may hang on a connection that broke long ago. Knows devices, addresses and kinds of calls; neither
gRPC nor what calls do.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path

from profiles.compat import uncancel
from protos.contract import Reason, RefusalError

log = logging.getLogger("sketchfleet.coordinator")

HOLD_S = 5.0  # a call is kept waiting at most
CALLS_PER_S, CALLS_BURST = 20.0, 200.0  # of a device; an agent makes one in 20 s, and 20 a round
MESSAGES_PER_S, MESSAGES_BURST = 400.0, 4000.0  # in its streams; beyond, they are read slower
NOISE_PER_S = 65_536.0  # bytes of a device's connections that are in no message, either way
NOISE_IN_BURST = float(64 << 20)  # a window's worth lies in buffers before its messages are taken
NOISE_OUT_BURST = float(1 << 20)
NOISE_SHARE, NOISE_BACK = 0.1, 0.02  # of messages comes along, and of theirs goes the other way
SILENT_S = 120.0  # without a message, an upload or a probe ends; agents give up after 45 s
STRANGERS_PER_S, STRANGERS_BURST = 10.0, 300.0  # calls to join from one address, perhaps a lab's
FLOOD_S = 60.0  # a device that floods is not heard
OVER_PER_S, OVER_BURST = 10.0, 300.0  # calls beyond these that are kept waiting; then: a flood
REFUSALS_PER_S, REFUSALS_BURST = 2.0, 30.0  # that an address is told at once
MOST_HELD = 64  # refusals kept waiting for one address; further ones are a flood
MOST_ADDRESSES = 4096  # remembered
TRIES = 4  # of a file that a round needs, its bytes may cross the link as often; and one MiB
REFILL_S = 3600.0  # in which such an allowance is whole again
MESSAGE_BYTES = 1024  # that a message counts at least, however little is in it
MOST_FILES = 256  # of a device, whose bytes are counted
DAY_S = 86_400.0
LEAST_SPARE_BYTES, MOST_SPARE_BYTES = 64 << 20, 10 << 30  # of the disk, for database and models


@dataclass(frozen=True)
class Allowed:
    """at_once: of one device; in_all: of the fleet; longest_s: until the call is ended; counts: as
    so many calls.
    """

    at_once: int
    in_all: int
    longest_s: float | None = None
    counts: float = 1.0


CALLS = {
    "NextTask": Allowed(4, 65_536, 90.0),
    "Report": Allowed(2, 1024, 60.0),
    "Renew": Allowed(2, 256, 60.0),
    "Probe": Allowed(2, 512, 90.0, counts=10.0),  # up to 8 MiB; an agent makes 11 as it starts
    "Fetch": Allowed(8, 1024),
    "Push": Allowed(8, 1024),
    "Enroll": Allowed(32, 256, 30.0),
    "Reenroll": Allowed(32, 256, 30.0),
}
OTHER = Allowed(8, 256, 30.0)


def slow_down(sentence: str, retry_s: float) -> RefusalError:
    """What a device that must wait is told."""
    return RefusalError(Reason.SLOW_DOWN, f"{sentence}; wait {retry_s:.0f} s", retry_s)


def most_bytes(size_bytes: int) -> int:
    """What may cross the link for a file of this size, resumed and repeated."""
    return TRIES * size_bytes + (1 << 20)


class FloodError(RefusalError):
    """Goes on asking, however often it was told to wait: hear it no more."""

    def __init__(self, who: str) -> None:
        sentence = f"{who} floods this coordinator; wait {FLOOD_S:.0f} s"
        super().__init__(Reason.SLOW_DOWN, sentence, FLOOD_S)


class Bucket:
    """A token bucket: `burst` at once, `per_s` in the long run."""

    def __init__(self, per_s: float, burst: float, now: float) -> None:
        self._per_s, self._burst = per_s, burst
        self._level, self._at = burst, now

    def take(self, now: float, most_wait_s: float, amount: float = 1.0) -> float | None:
        """Takes so many; returns the seconds until they are due. Fewer than none are given back.

        None where that were longer than `most_wait_s`: then none is taken.
        """
        self._fill(now)
        wait_s = max(0.0, (amount - self._level) / self._per_s)
        if wait_s > most_wait_s:
            return None
        self._level = max(self._level - amount, -self._burst)  # nobody pays for ever
        return wait_s

    def spend(self, now: float, amount: float) -> float:
        """Takes so much if anything is left (0), else returns the seconds until there is."""
        self._fill(now)
        if self._level <= 0:
            return (1.0 - self._level) / self._per_s
        self._level -= amount
        return 0.0

    def _fill(self, now: float) -> None:
        self._level = min(self._burst, self._level + (now - self._at) * self._per_s)
        self._at = now


class Noise:
    """What crosses a device's connections and is in no message of a call that was let in.

    Frames of HTTP/2 that are no calls, which gRPC heeds and answers unasked (pings, settings), and
    what comes for calls that were refused. Some goes along with whatever is sent.
    """

    def __init__(self, now: float) -> None:
        self._coming = Bucket(NOISE_PER_S, NOISE_IN_BURST, now)
        self._going = Bucket(NOISE_PER_S, NOISE_OUT_BURST, now)
        self._taken = self._given = 0.0

    def taken(self, message_bytes: int) -> None:
        """A message that came."""
        self._taken += (1 + NOISE_SHARE) * message_bytes

    def given(self, message_bytes: int) -> None:
        """A message that goes, perhaps long after this."""
        self._given += (1 + NOISE_SHARE) * message_bytes

    def crossed(self, now: float, received_bytes: int, sent_bytes: int) -> bool:
        """So much crossed the connections since the last time; returns whether it is too much."""
        coming = received_bytes - self._taken - NOISE_BACK * sent_bytes
        going = sent_bytes - min(self._given, sent_bytes) - NOISE_BACK * received_bytes
        self._taken, self._given = 0.0, self._given - min(self._given, sent_bytes)
        self._given = min(self._given, NOISE_IN_BURST)  # of what was broken off, nothing goes
        waits = [bucket.take(now, float("inf"), noise)
                 for bucket, noise in ((self._coming, coming), (self._going, going))]  # fmt: skip
        return any(waits)


@dataclass
class Device:
    """What one device uses just now."""

    calls: Bucket
    over: Bucket  # calls beyond those
    messages: Bucket
    noise: Noise
    flooding_until: float = float("-inf")
    running: dict[str, list[asyncio.Task[object]]] = field(default_factory=dict)


class Limits:
    """The books. Use from one event loop; clock: monotonic seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._devices: dict[str, Device] = {}
        self._addresses: OrderedDict[str, Bucket] = OrderedDict()
        self._held: dict[str, int] = {}
        self._open = dict.fromkeys([*CALLS, ""], 0)
        self._ended: set[asyncio.Task[object]] = set()  # those that are to say so

    @contextlib.asynccontextmanager
    async def turn(self, device_id: str, call: str) -> AsyncIterator[Device]:
        """A device's turn to make a call; ends the oldest of its calls of this kind if need be.

        Strangers go by "@" and their address. Raises `RefusalError` (SLOW_DOWN) after `HOLD_S`, and
        `FloodError` at once, from a device for `FLOOD_S`.
        """
        allowed, name = CALLS.get(call, OTHER), call if call in CALLS else ""
        own = self._of(device_id)
        if self._clock() < own.flooding_until:
            raise FloodError(device_id)
        wait_s = own.calls.take(self._clock(), HOLD_S, allowed.counts)
        if wait_s:
            await asyncio.sleep(wait_s)
        if wait_s is None or self._open[name] >= allowed.in_all:
            if own.over.take(self._clock(), 0.0) is None:
                self._floods(device_id, own)
                raise FloodError(device_id)
            await asyncio.sleep(HOLD_S)
            who = device_id if wait_s is None else "the fleet"
            raise slow_down(f"{who} makes more calls than this coordinator takes", 2 * HOLD_S)
        task: asyncio.Task[object] | None = asyncio.current_task()
        assert task is not None
        running = own.running.setdefault(name, [])
        if len(running) >= allowed.at_once:
            self._end(running.pop(0))
        running.append(task)
        self._open[name] += 1
        ending = None
        if allowed.longest_s is not None:
            ending = asyncio.get_running_loop().call_later(allowed.longest_s, self._end, task)
        try:
            yield own
        except asyncio.CancelledError:
            if task not in self._ended:
                raise
            uncancel(task)
            raise slow_down("the call took too long, or newer ones took its place", 1.0) from None
        finally:
            self._ended.discard(task)
            self._open[name] -= 1
            if task in running:
                running.remove(task)
            if ending is not None:
                ending.cancel()

    def _end(self, task: asyncio.Task[object]) -> None:
        self._ended.add(task)
        task.cancel()

    def crossed(self, device_id: str, received_bytes: int, sent_bytes: int) -> bool:
        """So much crossed a device's connections; returns whether it floods them with noise."""
        own = self._of(device_id)
        if own.noise.crossed(self._clock(), received_bytes, sent_bytes):
            self._floods(device_id, own)
            return True
        return False

    async def message(self, own: Device) -> None:
        """One more message in a stream of a device: waits until it is due."""
        if wait_s := own.messages.take(self._clock(), float("inf")):
            await asyncio.sleep(wait_s)

    async def refused(self, address: str) -> None:
        """A call from there was turned down: keeps it waiting if many were. Raises `FloodError`."""
        bucket = self._addresses.pop(address, None)
        if bucket is None:
            bucket = Bucket(REFUSALS_PER_S, REFUSALS_BURST, self._clock())
        self._addresses[address] = bucket
        if len(self._addresses) > MOST_ADDRESSES:
            self._addresses.popitem(last=False)
        wait_s = bucket.take(self._clock(), HOLD_S)
        if wait_s == 0:
            return
        held = self._held.get(address, 0)
        if held >= MOST_HELD:
            raise FloodError(address)
        self._held[address] = held + 1
        try:
            await asyncio.sleep(HOLD_S if wait_s is None else wait_s)
        finally:
            self._held[address] -= 1
            if not self._held[address]:
                del self._held[address]

    def _floods(self, device_id: str, own: Device) -> None:
        if not device_id.startswith("@"):  # at an address there may be others
            now = self._clock()
            heard, own.flooding_until = now >= own.flooding_until, now + FLOOD_S
            own.noise = Noise(now)  # forgiven when its time is over, however much it was
            if not heard:
                return
            log.warning("%s floods; not heard for %.0f s (`sketchfleet-coordinator revoke %s` ends "
                        "it)", device_id, FLOOD_S, device_id)  # fmt: skip

    def _of(self, device_id: str) -> Device:
        found = self._devices.get(device_id)
        if found is None:
            now, rate = self._clock(), (CALLS_PER_S, CALLS_BURST)
            if device_id.startswith("@"):
                rate = STRANGERS_PER_S, STRANGERS_BURST
                self._forget_strangers()
            found = Device(
                Bucket(*rate, now), Bucket(OVER_PER_S, OVER_BURST, now),
                Bucket(MESSAGES_PER_S, MESSAGES_BURST, now), Noise(now),
            )  # fmt: skip
            self._devices[device_id] = found
        return found

    def _forget_strangers(self) -> None:
        """The oldest half, where they are many: an IPv6 caller has no end of addresses."""
        strangers = [name for name in self._devices if name.startswith("@")]
        if len(strangers) >= MOST_ADDRESSES:
            for name in strangers[: MOST_ADDRESSES // 2]:
                del self._devices[name]


class Traffic:
    """Bytes that cross the link: of each file, some times its size; of each device, so many a day.

    mb_per_day: both ways together; None: without a limit. clock: Unix seconds.
    """

    def __init__(self, mb_per_day: int | None, clock: Callable[[], float] = time.time) -> None:
        self._most_bytes = None if mb_per_day is None else mb_per_day * 10**6
        self._clock = clock
        self._files: dict[str, OrderedDict[str, Bucket]] = {}
        self._day = -1
        self._moved: dict[str, int] = {}

    def take(self, device_id: str, file: str, size_bytes: int, moved_bytes: int) -> None:
        """One message with so many bytes of a file of that size. Raises `RefusalError`."""
        now, counted = self._clock(), max(MESSAGE_BYTES, moved_bytes)
        own = self._files.setdefault(device_id, OrderedDict())
        bucket = own.get(file)
        if bucket is None:
            most = most_bytes(size_bytes)
            bucket = own[file] = Bucket(most / REFILL_S, most, now)
            if len(own) > MOST_FILES:
                own.popitem(last=False)
        if (wait_s := bucket.spend(now, counted)) > 0:
            told = f"{device_id} moved {TRIES} times the bytes of a file"
            raise slow_down(told, max(60.0, wait_s))
        if self._most_bytes is None:
            return
        if self._day != now // DAY_S:
            self._day, self._moved = int(now // DAY_S), {}
        moved = self._moved.get(device_id, 0)
        if moved >= self._most_bytes:
            raise slow_down(
                f"{device_id} moved today's {self._most_bytes / 1e6:.0f} MB (mb_per_day)",
                DAY_S - now % DAY_S,
            )
        self._moved[device_id] = moved + counted


class Watermark:
    """Refuses uploads before the disk is full.

    share: of the disk, that may be used by anything; at most 10 GiB are kept free.
    """

    def __init__(
        self, folder: Path, share: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._folder, self._share, self._clock = folder, share, clock
        self._looked_at = float("-inf")
        self._room_bytes = 0

    def require(self, size_bytes: int) -> None:
        """Raises `RefusalError` (NO_ROOM) where so many bytes more would fill the disk."""
        if self._clock() - self._looked_at > 1.0:
            disk = shutil.disk_usage(self._folder)
            spare = min(MOST_SPARE_BYTES, int((1 - self._share) * disk.total))
            self._room_bytes = disk.free - max(LEAST_SPARE_BYTES, spare)
            self._looked_at = self._clock()
        if size_bytes > self._room_bytes:
            raise RefusalError(
                Reason.NO_ROOM,
                f"the coordinator's disk has no room for {size_bytes:,} bytes more; its operator "
                "has to make some, wait 60 s",
                60.0,
            )
