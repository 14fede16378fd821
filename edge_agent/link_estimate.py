"""What the link carries, learned from the transfers that happen anyway.

Samples in, an estimate out; the clock is handed in. Rates vary by factors, so their logarithm is
averaged; short transfers weigh less, and those that say more of start-up than of the link nothing.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from profiles.link import LinkProfile

Direction = Literal["up", "down"]
LEAST_BYTES = 32 * 1024
LEAST_ROUND_TRIPS = 4
WEIGHT, FULL_AFTER_S = 0.3, 2.0  # of a new sample, when it lasted this long
TELLING = 0.2  # relative change of a rate that the planner should hear of
MOST_ERROR = 1.0  # one burst through an empty buffer must not swamp the mean


@dataclass(frozen=True)
class Transfer:
    """Bytes that moved one way, timed from after the first of them."""

    direction: Direction
    size_bytes: int
    duration_s: float


class Stretch:
    """Times the bytes of one attempt from after the first to the last that came through."""

    def __init__(self, direction: Direction, clock: Callable[[], float] = time.monotonic) -> None:
        self._direction: Direction = direction
        self._clock = clock
        self._first: tuple[int, float] | None = None
        self._last = (0, 0.0)

    def reached(self, offset: int) -> None:
        """The transfer stands at this byte now."""
        self._last = (offset, self._clock())
        if self._first is None:
            self._first = self._last

    @property
    def transfer(self) -> Transfer | None:
        """What was timed; None when less than two pieces came through."""
        if self._first is None or self._last[0] <= self._first[0]:
            return None
        moved, took_s = (b - a for a, b in zip(self._first, self._last, strict=True))
        return Transfer(self._direction, int(moved), took_s)


@dataclass(frozen=True)
class LinkEstimate:
    """Rates in bit/s; variations are mean relative errors of what the rates had predicted."""

    up_bps: float
    down_bps: float
    rtt_s: float
    up_variation: float = 0.0  # 0: not known yet
    down_variation: float = 0.0

    @classmethod
    def measured(cls, link: LinkProfile) -> LinkEstimate:
        """From a probe of the link."""
        return cls(link.up_bps, link.down_bps, link.rtt_s)

    def after(self, transfer: Transfer) -> LinkEstimate:
        """The estimate with one more transfer; itself when the transfer says nothing."""
        if (
            transfer.size_bytes < LEAST_BYTES
            or transfer.duration_s <= 0
            or transfer.duration_s < LEAST_ROUND_TRIPS * self.rtt_s
        ):
            return self
        rate_bps = 8 * transfer.size_bytes / transfer.duration_s
        weight = WEIGHT * min(1.0, transfer.duration_s / FULL_AFTER_S)
        up = transfer.direction == "up"
        old_bps = self.up_bps if up else self.down_bps
        if old_bps <= 0:
            new_bps, variation = rate_bps, 0.0
        else:
            new_bps = math.exp((1 - weight) * math.log(old_bps) + weight * math.log(rate_bps))
            error = min(MOST_ERROR, abs(rate_bps - old_bps) / old_bps)
            known = self.up_variation if up else self.down_variation
            variation = error if known == 0.0 else known + weight * (error - known)
        if up:
            return replace(self, up_bps=new_bps, up_variation=variation)
        return replace(self, down_bps=new_bps, down_variation=variation)

    def profile(self, metered: bool, budget_bytes: int | None) -> LinkProfile:
        """As the planner wants it; the worse of the two variations."""
        return LinkProfile(
            self.up_bps, self.down_bps, self.rtt_s, metered,
            max(self.up_variation, self.down_variation), budget_bytes,
        )  # fmt: skip


def differs(now: LinkProfile, told: LinkProfile, daily_bytes: int | None) -> bool:
    """Whether the planner should hear of it: a rate, or the budget, is clearly another."""
    rates = ((now.up_bps, told.up_bps), (now.down_bps, told.down_bps))
    if now.metered != told.metered or any(abs(a - b) > TELLING * b for a, b in rates):
        return True
    left, known = now.budget_bytes, told.budget_bytes
    if left is None or known is None:
        return (left is None) != (known is None)
    return abs(left - known) > 0.1 * (daily_bytes or 0) or (left == 0) != (known == 0)
