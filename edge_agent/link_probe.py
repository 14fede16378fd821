"""How much to send to measure a link: doubling payloads until one takes long enough to be believed.

Knows sizes and times; the call that moves the bytes is handed in.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from profiles.link import LinkProfile

START_BYTES = 64 * 1024
MOST_BYTES = 4 << 20  # of one payload
METERED_BYTES = 512 * 1024  # each way, all payloads together
ENOUGH_S = 1.5
PINGS = 4  # the first pays for connecting


@dataclass(frozen=True)
class Echo:
    """One payload both ways, each way timed by its receiver after the first message."""

    up_bps: float
    down_bps: float
    slower_s: float


async def measure(once: Callable[[int, int], Awaitable[Echo]], metered: bool) -> LinkProfile:
    """The link's rates and delay; `once` sends (bytes up, bytes down)."""
    round_trips = []
    for _ in range(PINGS):
        begun = time.perf_counter()
        await once(1, 0)
        round_trips.append(time.perf_counter() - begun)
    most = METERED_BYTES if metered else 2 * MOST_BYTES
    size = spent = START_BYTES
    while True:
        echo = await once(size, size)
        if echo.slower_s >= ENOUGH_S or spent + 2 * size > most:
            return LinkProfile(echo.up_bps, echo.down_bps, min(round_trips), metered)
        size *= 2
        spent += size
