"""How links are emulated on this machine: by the kernel, a TUN relay, or a proxy, as it allows.

Chooses and says why; the three are `trials.netem`, `trials.tunnel` and `trials.relay`.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from profiles.trace import LinkState
from trials import netem, tunnel
from trials.netem import NetemNetwork
from trials.relay import LOOPBACK, LinkShape, Relay
from trials.tunnel import Counts, DeviceNetwork, TunnelError

Means = Literal["netem", "tun", "proxy"]
LOOK_EVERY_S = 0.1  # at what a proxied link should be like now
LEAST_BPS = 1.0  # a relay cannot be made for a link that begins with an outage
INTERFACES = Path("/sys/class/net")
LINKS = 2**14  # that have addresses
WORDS: dict[Means, str] = {
    "netem": "network namespaces, shaped by the kernel (netem)",
    "tun": "network namespaces, shaped by a user-space relay between TUN devices",
    "proxy": "a user-space proxy for each device",
}


class EmulatedLink(Protocol):
    """A link that is up: where the device dials, and how its agent is started."""

    @property
    def address(self) -> str:
        """Host and port for the device's agent.toml."""

    @property
    def now(self) -> LinkState:
        """What the link is like at this moment."""

    @property
    def up(self) -> Counts:
        """From the device."""

    @property
    def down(self) -> Counts:
        """To the device."""

    def wrap(self, command: Sequence[str]) -> list[str]:
        """The command that runs `command` behind the link."""


@dataclass(frozen=True)
class Emulation:
    """What emulates links here, and why not something better."""

    means: Means
    why: str

    @property
    def words(self) -> str:
        """One sentence for people."""
        return f"links by {WORDS[self.means]}{f': {self.why}' if self.why else ''}"

    def link(
        self, name: str, number: int, port: int, at: Callable[[float], LinkState], seed: int
    ) -> AbstractContextManager[EmulatedLink]:
        """A link to 127.0.0.1:`port`; `name` and `number` are its own on this machine."""
        if self.means == "netem":
            return NetemNetwork(name, number, port, at, seed)
        if self.means == "tun":
            return DeviceNetwork(name, number, port, at, seed)
        return ProxiedLink(port, at)


def choose() -> Emulation:
    """The most faithful that works here."""
    no_netem = netem.unavailable()
    if no_netem is None:
        return Emulation("netem", "")
    no_tun = tunnel.unavailable()
    if no_tun is None:
        return Emulation("tun", no_netem)
    return Emulation("proxy", f"{no_netem}, and {no_tun}; packet loss is not emulated")


def free_number(taken: Sequence[int] = ()) -> int:
    """A link number that no namespace of this machine uses now. Raises `TunnelError`."""
    first = 61 * os.getpid()  # two trials that look at the same time find others
    for number in ((first + i) % LINKS for i in range(LINKS)):
        if number not in taken and not (INTERFACES / f"sfn{number}").exists():
            return number
    raise TunnelError("every link number is in use; end other trials on this machine")


class ProxiedLink:
    """A link through `trials.relay`, in a thread of its own. Rate, delay and outages; no loss."""

    def __init__(self, port: int, at: Callable[[float], LinkState]) -> None:
        self._port, self._at = port, at
        self._began = time.monotonic()
        self._relay: Relay | None = None
        self._listening, self._stopping = threading.Event(), threading.Event()
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="proxied-link", daemon=True)

    @property
    def address(self) -> str:
        """Host and port for the device's agent.toml."""
        assert self._relay is not None
        return f"{LOOPBACK}:{self._relay.port}"

    @property
    def now(self) -> LinkState:
        """What the link is like at this moment."""
        return self._at(time.monotonic() - self._began)

    @property
    def up(self) -> Counts:
        """From the device; bytes only."""
        return Counts(bytes=0 if self._relay is None else self._relay.up_bytes)

    @property
    def down(self) -> Counts:
        """To the device; bytes only."""
        return Counts(bytes=0 if self._relay is None else self._relay.down_bytes)

    def wrap(self, command: Sequence[str]) -> list[str]:
        """The command itself: the address is all there is to a proxy."""
        return list(command)

    def __enter__(self) -> ProxiedLink:
        self._thread.start()
        self._listening.wait()
        if self._failure is not None:
            raise TunnelError(f"a proxy cannot listen here: {self._failure}") from self._failure
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join(5)

    def _run(self) -> None:
        try:
            asyncio.run(self._relay_until_told())
        except OSError as error:
            self._failure = error
        finally:
            self._listening.set()

    async def _relay_until_told(self) -> None:
        self._began = time.monotonic()
        state = self._at(0.0)
        up_bps, down_bps = max(state.up_bps, LEAST_BPS), max(state.down_bps, LEAST_BPS)
        relay = Relay(self._port, LinkShape(up_bps, down_bps, state.delay_s))
        relay.change(state.up_bps, state.down_bps, state.delay_s)
        await relay.start()
        self._relay = relay
        self._listening.set()
        while not self._stopping.is_set():
            await asyncio.sleep(LOOK_EVERY_S)
            now = self.now
            relay.change(now.up_bps, now.down_bps, now.delay_s)
        await relay.stop()
