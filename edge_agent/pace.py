"""How fast transfers may go: the owner's limit, and a step back while others use the network.

A bucket each way holds the limit. The step back is additive-increase, multiplicative-decrease on
what the machine's way out carries beside us, in the spirit of LEDBAT (RFC 6817), whose one-way
delays gRPC does not show. Knows rates and times; counters, clock and sleep are handed in.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

from edge_agent.link_estimate import Direction

SAMPLE_S = 1.0
LEAST_BPS = 32_000.0  # however busy others are; a round has a deadline
# Others count from here on, and from this share of our own rate: below it are acknowledgements,
# retransmissions and headers of ours.
OTHERS_BPS, OTHERS_SHARE = 64_000.0, 0.25
BURST_S = 0.25  # of the limit may go at once after a pause


class Bucket:
    """Spaces bytes so that they keep to a rate over any time longer than `BURST_S`."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._paid_until = 0.0

    def wait_s(self, size_bytes: int, bps: float) -> float:
        """Takes so many bytes; how long to wait for them at this rate."""
        now = self._clock()
        self._paid_until = max(self._paid_until, now - BURST_S) + 8 * size_bytes / bps
        return max(0.0, self._paid_until - now)


class Courtesy:
    """The rate that is left to us while others use the network; None while they do not.

    `carried_bytes()`: what the way out has carried both ways since some time, None if unknown;
    `own_bytes()`: what of it was ours.
    """

    def __init__(
        self,
        carried_bytes: Callable[[], int | None],
        own_bytes: Callable[[], int],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._carried, self._own, self._clock = carried_bytes, own_bytes, clock
        self._before: tuple[float, int, int] | None = None
        self._busy = False  # at the last look; one alone may be our own, out of a buffer
        self._free_bps = 0.0  # ours, before we stepped back
        self._bps: float | None = None

    @property
    def bps(self) -> float | None:
        """Looks again when the last look is `SAMPLE_S` old."""
        now = self._clock()
        if self._before is not None and now - self._before[0] < SAMPLE_S:
            return self._bps
        carried = self._carried()
        if carried is None:
            self._bps = None
            return None
        before, self._before = self._before, (now, carried, self._own())
        if before is None or now - before[0] > 10 * SAMPLE_S or carried < before[1]:
            return self._bps  # too long ago to say what goes on, or another interface
        own_bps, all_bps = (
            8 * (new - old) / (now - before[0])
            for new, old in ((self._before[2], before[2]), (carried, before[1]))
        )
        before_busy, self._busy = (
            self._busy,
            (all_bps - own_bps > max(OTHERS_BPS, OTHERS_SHARE * own_bps)),
        )
        if self._busy:
            if not before_busy:
                return self._bps
            if self._bps is None:
                self._free_bps = own_bps
            self._bps = max(LEAST_BPS, (self._bps or own_bps) / 2)
        elif self._bps is not None:
            self._bps += max(LEAST_BPS, self._free_bps / 8)
            if self._bps >= self._free_bps:
                self._bps = None
        return self._bps


class Pace:
    """Holds transfers to the owner's limit (bit/s each way) and to what courtesy leaves."""

    def __init__(
        self,
        most_bps: float | None = None,
        courtesy: Courtesy | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self.most_bps, self.courtesy = most_bps, courtesy
        self._sleep = sleep
        self._buckets: dict[Direction, Bucket] = {"up": Bucket(clock), "down": Bucket(clock)}

    @property
    def bps(self) -> float | None:
        """The rate to keep to now; None: any."""
        left = None if self.courtesy is None else self.courtesy.bps
        rates = [bps for bps in (self.most_bps, left) if bps is not None]
        return min(rates, default=None)

    async def take(self, direction: Direction, size_bytes: int) -> None:
        """Returns once so many bytes may go, or have been paid for."""
        if (bps := self.bps) is None:
            return
        if (wait_s := self._buckets[direction].wait_s(size_bytes, bps)) > 0:
            await self._sleep(wait_s)
