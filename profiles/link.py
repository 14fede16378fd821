"""What a link is: measured or declared rate both ways, and delay."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LinkProfile:
    """Rates are of the gRPC channel as the receiver timed it, bits per second."""

    up_bps: float
    down_bps: float
    rtt_s: float
    metered: bool = False
    variation: float = 0.0  # mean relative error of what the rates predicted; 0: not known
    budget_bytes: int | None = None  # left of the owner's daily budget, both ways together
