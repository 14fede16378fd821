"""How a link changes over time: rate, delay, loss and outages, from a description or a recording.

A recording is CSV with a header of `t_s,up_bps,down_bps,rtt_s,loss`, each row valid until the next;
rates of 0 are an outage. Knows no sockets: who makes packets feel it is `trials.tunnel`.
"""

from __future__ import annotations

import bisect
import csv
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from profiles.errors import SketchfleetError

COLUMNS = ("t_s", "up_bps", "down_bps", "rtt_s", "loss")


class TraceError(SketchfleetError):
    """A recording or description of a link that cannot be used."""


@dataclass(frozen=True)
class LinkState:
    """What a link is like at one moment. `delay_s` one way; rates of 0: nothing passes."""

    up_bps: float
    down_bps: float
    delay_s: float
    loss: float = 0.0  # share of packets, each way

    def __post_init__(self) -> None:
        rates = (self.up_bps, self.down_bps)
        if not all(rate >= 0 for rate in rates) or not 0 <= self.delay_s < math.inf:
            raise TraceError(f"rates {rates} and delay {self.delay_s} must be at least 0")
        if not 0 <= self.loss < 1:
            raise TraceError(f"loss {self.loss} must be a share of packets in [0, 1)")


@dataclass(frozen=True)
class Outage:
    """Nothing passes for `lasts_s` at the end of every `every_s`."""

    every_s: float
    lasts_s: float

    def __post_init__(self) -> None:
        if not 0 < self.lasts_s < self.every_s < math.inf:
            raise TraceError(
                f"an outage of {self.lasts_s} s every {self.every_s} s leaves no time between "
                "outages, or is none; lasts_s must be above 0 and below every_s"
            )


def steady(state: LinkState, outage: Outage | None = None) -> Callable[[float], LinkState]:
    """A link that stays as it is, but for outages."""
    down = LinkState(0.0, 0.0, state.delay_s, state.loss)

    def at(t_s: float) -> LinkState:
        if outage is not None and t_s % outage.every_s >= outage.every_s - outage.lasts_s:
            return down
        return state

    return at


def replayed(times: Sequence[float], states: Sequence[LinkState]) -> Callable[[float], LinkState]:
    """A recording, from its beginning again when it is over; its last state lasts as long as the
    one before it.
    """
    if len(times) != len(states) or not times or times[0] != 0:
        raise TraceError("a recording begins at t_s = 0 and has a state for every time")
    if any(b <= a for a, b in itertools.pairwise(times)):
        raise TraceError("the times of a recording must rise")
    last = times[-1] - times[-2] if len(times) > 1 else 1.0
    length = times[-1] + last

    def at(t_s: float) -> LinkState:
        return states[bisect.bisect_right(times, t_s % length) - 1]

    return at


def read_trace(path: Path) -> Callable[[float], LinkState]:
    """A recording from its CSV. Raises `TraceError` with the line that is wrong, `OSError`."""
    times, states = [], []
    with path.open(newline="") as stream:
        rows = csv.DictReader(stream)
        if tuple(rows.fieldnames or ()) != COLUMNS:
            raise TraceError(f"{path} must begin with the line {','.join(COLUMNS)}")
        for row in rows:
            try:
                t, up, down, rtt, loss = (float(row[c]) for c in COLUMNS)
                states.append(LinkState(up, down, rtt / 2, loss))
            except (TypeError, ValueError, TraceError) as error:
                raise TraceError(f"{path}, line {rows.line_num}: {error}") from error
            times.append(t)
    return replayed(times, states)


def write_trace(
    path: Path, times: Sequence[float], states: Sequence[LinkState], ends_s: float | None = None
) -> None:
    """Writes a recording as `read_trace` reads it; `ends_s`: when its last state ended.

    Raises `TraceError`, `OSError`.
    """
    replayed(times, states)
    rows = list(zip(times, states, strict=True))
    if ends_s is not None and ends_s > times[-1]:
        # A last state lasts as long as the one before it: one that is written in two halves ends
        # when it should.
        rows.append(((times[-1] + ends_s) / 2, states[-1]))
    with path.open("w", newline="") as stream:
        out = csv.writer(stream, lineterminator="\n")
        out.writerow(COLUMNS)
        for t_s, state in rows:
            out.writerow((f"{t_s:.3f}", f"{state.up_bps:.0f}", f"{state.down_bps:.0f}",
                          f"{2 * state.delay_s:.6g}", f"{state.loss:.6g}"))  # fmt: skip
