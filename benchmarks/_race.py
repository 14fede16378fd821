"""What two sides of a race have in common: devices behind links, and what each side leaves.

Knows links, times and adapters' files; it starts neither side.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from coordinator.state import StateFile
from profiles.links import load_links
from profiles.trace import LinkState, steady
from trials.tunnel import DeviceNetwork

LINKS = ("fibre", "home-dsl", "lte", "lte-poor")  # of the devices, in the demo's order
UNSHAPED = LinkState(up_bps=1e10, down_bps=1e10, delay_s=0.0)
SAMPLE_S = 0.05


@dataclass(frozen=True)
class Version:
    """An adapter after so many rounds: when it came, in seconds since the epoch, and its file."""

    rounds: int
    at: float
    file: StateFile


@dataclass(frozen=True)
class Run:
    """What one side did. Times in seconds since the epoch; bytes by time, of all links together."""

    began: float  # the first process was started
    opened: float  # the first round
    versions: tuple[Version, ...]  # after one round, two, ...
    moved: tuple[tuple[float, int, int], ...]  # (when, up, down) so far
    seeds: Mapping[str, Sequence[int]]  # device -> what its batches were drawn with, by round


@dataclass
class Networks:
    """The devices' namespaces, and a thread that writes down what crossed their links."""

    nets: Sequence[DeviceNetwork]
    moved: list[tuple[float, int, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> tuple[tuple[float, int, int], ...]:
        """Everything that was written down."""
        self._over.set()
        self._thread.join()
        return tuple(self.moved)

    def _watch(self) -> None:
        while not self._over.wait(SAMPLE_S):
            up = sum(net.up.bytes for net in self.nets)
            down = sum(net.down.bytes for net in self.nets)
            self.moved.append((time.time(), up, down))


@contextlib.contextmanager
def networks(shaped: bool, port: int, names: Sequence[str]) -> Iterator[Networks]:
    """A namespace for each device that reaches `port` of this machine over its link."""
    links = load_links()
    with contextlib.ExitStack() as stack:
        nets = []
        for number in range(len(names)):
            state = UNSHAPED
            if shaped:
                link = links[LINKS[number % len(LINKS)]]
                state = LinkState(link.up_bps, link.down_bps, link.rtt_s / 2, link.loss)
            net = DeviceNetwork(f"peer{number}", 9000 + number, port, steady(state), seed=number)
            nets.append(stack.enter_context(net))
        watched = Networks(nets)
        try:
            yield watched
        finally:
            watched.stop()
