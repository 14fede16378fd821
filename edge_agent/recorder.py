"""`sketchfleet-agent record`: what a link is like over time, as the CSV that trials play back.

Delay, loss and outages: a TCP handshake with the coordinator each second; one whose packet was
lost takes a second longer, for the kernel then sends it again. Rates: what four connections
together move both ways, every now and then (one alone would say more of TCP's answer to loss than
of the link). The format is `profiles.trace`'s; who makes packets feel it is a trial's business.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import statistics
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from edge_agent.access import address_of, membership, open_link
from edge_agent.config import AgentConfig
from edge_agent.link import Link, LinkError
from profiles.compat import wait_for
from profiles.errors import SketchfleetError
from profiles.program import version
from profiles.trace import LinkState, write_trace

CONNECTIONS = 4
KNOCK_EVERY_S, KNOCK_PATIENCE_S = 1.0, 3.0
MISSED = 2  # handshakes in a row without an answer are an outage; a lost packet is not
LEAST_S, LEAST_ROUND_TRIPS = 4.0, 12  # that a measurement of the rate should take
START_BYTES, MOST_BYTES = 64 * 1024, 4 << 20  # of one connection, one way
MOST_GROWTH = 8  # from one payload to the next: the first one is mostly start-up
MEASURE_PATIENCE_S = 60.0
TELLING = 0.15  # relative change of the delay that is worth a row
SENT_AGAIN_S = 0.8  # by which a handshake that lost a packet is longer (RFC 6298: 1 s)
LOSS_WINDOW_S = 300.0  # of handshakes around a moment tell its loss


class RecordError(SketchfleetError):
    """Nothing could be recorded."""


class Measured(Protocol):
    """A link as it can be measured."""

    async def knock(self, patience_s: float) -> float | None:
        """Seconds of a handshake; None when there was no answer."""

    async def rate(self, direction: str, size_bytes: int) -> list[float]:
        """Seconds that so many bytes took over each of the connections at once."""


class RealLink:
    """The way to a coordinator, over connections of their own."""

    def __init__(self, address: str, links: list[Link]) -> None:
        self._links = links
        host, _, port = address.rpartition(":")
        self._place = (host.strip("[]"), int(port))

    async def knock(self, patience_s: float) -> float | None:
        """Seconds of a handshake; None when there was no answer."""
        begun = time.monotonic()
        try:
            _, writer = await wait_for(asyncio.open_connection(*self._place), patience_s)
        except (OSError, TimeoutError):
            return None
        took_s = time.monotonic() - begun
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
        return took_s

    async def rate(self, direction: str, size_bytes: int) -> list[float]:
        """Seconds that so many bytes took over each of the connections at once.

        Raises `LinkError`, `TimeoutError`.
        """
        sizes = (size_bytes, 0) if direction == "up" else (1, size_bytes)
        begun = time.monotonic()

        async def one(link: Link) -> float:
            await link.echo(*sizes)
            return time.monotonic() - begun

        calls = [asyncio.ensure_future(one(link)) for link in self._links]
        try:
            return list(await wait_for(asyncio.gather(*calls), MEASURE_PATIENCE_S))
        finally:
            for call in calls:
                call.cancel()


@dataclass
class Recording:
    """States in the order in which they began; `moved_bytes` is what measuring cost, payload."""

    times: list[float] = field(default_factory=list)
    states: list[LinkState] = field(default_factory=list)
    handshakes: list[tuple[float, bool]] = field(default_factory=list)  # (when, a packet was lost)
    moved_bytes: int = 0
    ended_s: float = 0.0

    def note(self, at_s: float, state: LinkState) -> None:
        """From now on it is like this."""
        if self.states and self.states[-1] == state:
            return
        if self.times and at_s <= self.times[-1]:
            self.states[-1] = state
            return
        self.times.append(at_s)
        self.states.append(state)

    def loss_at(self, at_s: float) -> float:
        """Share of packets lost each way around a moment: a handshake has one in either direction,
        so that 1 - (1 - p)^2 of them are sent again.
        """
        near = [lost for t, lost in self.handshakes if abs(t - at_s) <= LOSS_WINDOW_S / 2]
        return round(1 - math.sqrt(1 - sum(near) / len(near)), 4) if any(near) else 0.0

    @property
    def with_loss(self) -> list[LinkState]:
        """The states as they are written."""
        return [replace(state, loss=min(0.9, self.loss_at(at_s)))
                for at_s, state in zip(self.times, self.states, strict=True)]  # fmt: skip


class Recorder:
    """Watches one link. `clock` and `sleep` are handed in."""

    def __init__(
        self, link: Measured, every_s: float, told: Callable[[float, LinkState], None],
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:  # fmt: skip
        self._link, self._every_s, self._told = link, every_s, told
        self._clock, self._sleep = clock, sleep
        self._began = clock()
        self._up_bytes = self._down_bytes = START_BYTES
        self._knocks: list[float] = []
        self.recording = Recording()

    async def run(self, lasts_s: float) -> None:
        """Records for so long. Raises `RecordError` when the link never answers."""
        state = await self._measure(LinkState(0.0, 0.0, 0.0))
        while state.up_bps <= 0:
            if self._now >= lasts_s:
                raise RecordError(
                    "the coordinator did not answer; check that it runs and that [coordinator] "
                    "address is right"
                )
            await self._sleep(KNOCK_EVERY_S)
            state = await self._measure(state)
        self._began = self._clock()  # it begins with a link that is there
        self._note(0.0, state)
        measured_at, missed, silent_since = self._now, 0, 0.0
        while self._now < lasts_s:
            self.recording.ended_s = self._now
            asked_at = self._now
            took_s = await self._link.knock(KNOCK_PATIENCE_S)
            lost = took_s is None or took_s > 2 * state.delay_s + SENT_AGAIN_S
            if took_s is None:
                missed += 1
                silent_since = asked_at if missed == 1 else silent_since
                if missed == MISSED:
                    self._note(silent_since, replace(state, up_bps=0.0, down_bps=0.0))
                    self.recording.handshakes.pop()  # the first that was missed
            else:
                if missed >= MISSED:
                    self._note(asked_at, state)
                missed = 0
                if not lost:
                    state = self._with_delay(state, took_s)
                if self._now - measured_at >= self._every_s:
                    state = await self._measure(state)
                    measured_at = self._now
                self._note(self._now, state)
            if missed < MISSED:
                self.recording.handshakes.append((asked_at, lost))
            await self._sleep(max(0.0, KNOCK_EVERY_S - (self._now - asked_at)))

    @property
    def _now(self) -> float:
        return self._clock() - self._began

    def _note(self, at_s: float, state: LinkState) -> None:
        before = len(self.recording.times)
        self.recording.note(at_s, state)
        if len(self.recording.times) > before:
            self._told(at_s, state)

    def _with_delay(self, state: LinkState, took_s: float) -> LinkState:
        """With the median of the last handshakes."""
        self._knocks = [*self._knocks, took_s][-9:]
        delay_s = statistics.median(self._knocks) / 2
        if abs(delay_s - state.delay_s) <= TELLING * state.delay_s:
            return state
        return replace(state, delay_s=delay_s)

    async def _measure(self, state: LinkState) -> LinkState:
        """The state with rates measured anew; as it was when the link goes away meanwhile."""
        if not self._knocks:
            for _ in range(3):
                if (took_s := await self._link.knock(KNOCK_PATIENCE_S)) is not None:
                    self._knocks.append(took_s)
            if not self._knocks:
                return state
            state = replace(state, delay_s=min(self._knocks) / 2)
        try:
            up_bps, self._up_bytes = await self._rate("up", self._up_bytes, state)
            down_bps, self._down_bytes = await self._rate("down", self._down_bytes, state)
        except (LinkError, TimeoutError):
            return state  # the handshakes tell when an outage began
        return replace(state, up_bps=up_bps, down_bps=down_bps)

    async def _rate(self, direction: str, size_bytes: int, state: LinkState) -> tuple[float, int]:
        """(bit/s, the size that told it): more until it takes long enough to be believed."""
        round_trip_s = 2 * state.delay_s
        enough_s = max(LEAST_S, LEAST_ROUND_TRIPS * round_trip_s)
        while True:
            took_s = statistics.fmean(await self._link.rate(direction, size_bytes))
            self.recording.moved_bytes += CONNECTIONS * size_bytes
            if took_s >= enough_s or size_bytes >= MOST_BYTES:
                # Asking and hearing the end of it take a round trip.
                busy_s = max(took_s - round_trip_s, 0.1 * took_s)
                return round(8 * CONNECTIONS * size_bytes / busy_s, 1), size_bytes
            more = min(MOST_GROWTH, max(2, math.ceil(enough_s / max(took_s, 1e-3))))
            size_bytes = min(MOST_BYTES, more * size_bytes)


async def record(
    config: AgentConfig, out: Path, lasts_s: float, every_s: float,
    told: Callable[[float, LinkState], None],
) -> Recording:  # fmt: skip
    """Records this device's link to its coordinator and writes the trace, also when interrupted.

    Enrols where the device has not joined yet. Raises `RecordError`, `MembershipError`,
    `LinkError`, `RefusedError`.
    """
    config.state.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    address = address_of(config)
    links = [open_link(config) for _ in range(CONNECTIONS)]
    fleet = membership(config, links[0], version())
    await fleet.sign_on()
    await fleet.call(links[0].ping)
    for link in links[1:]:
        link.credential = links[0].credential
    recorder = Recorder(RealLink(address, links), every_s, told)
    try:
        await recorder.run(lasts_s)
    finally:
        if recorder.recording.times:
            found = recorder.recording
            write_trace(out, found.times, found.with_loss, found.ended_s)
        for link in links:
            await link.close()
    return recorder.recording
