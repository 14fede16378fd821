"""A network namespace for one device, behind a link that the kernel shapes: veth and netem.

    device's namespace --- veth, netem --- veth, netem --- the coordinator's port

The same manners as `trials.tunnel`, without a user-space relay: rate, delay and loss are netem's
on the way out of either end, set anew whenever the link changes. Needs root and `sch_netem`.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Sequence

from profiles.trace import LinkState
from trials.doorway import Doorway
from trials.tunnel import MTU, QUEUE_S, Counts, TunnelError, link_addresses, run_ip

LOOK_EVERY_S = 0.1  # at what the link should be like now
LEAST_QUEUE_PACKETS = 30
SENT = re.compile(r"Sent (\d+) bytes (\d+) pkt \(dropped (\d+)")


class NetemNetwork:
    """A namespace `name` behind a link that the kernel shapes; as `trials.tunnel.DeviceNetwork`.

    `seed` stands for equal manners: which packets are lost is the kernel's to draw. It does not
    tell those from packets that found no room: all that were not delivered count as dropped.
    """

    def __init__(
        self, name: str, number: int, port: int, state: Callable[[float], LinkState], seed: int = 0
    ) -> None:
        self.name, self._port, self._state = f"sketchfleet-{name}", port, state
        self._near, self._far = link_addresses(number)
        self._near_device, self._far_device = f"sfn{number}", f"sff{number}"
        self._stopping, self._began = threading.Event(), time.monotonic()
        self._doorway: Doorway | None = None
        self._following: threading.Thread | None = None

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
        return counts_of(_tc(["-n", self.name, "-s", "qdisc", "show", "dev", self._far_device]))

    @property
    def down(self) -> Counts:
        """To the device."""
        return counts_of(_tc(["-s", "qdisc", "show", "dev", self._near_device]))

    def wrap(self, command: Sequence[str]) -> list[str]:
        """The command that runs `command` inside."""
        return ["ip", "netns", "exec", self.name, *command]

    def __enter__(self) -> NetemNetwork:
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
        if self._following is not None:
            self._following.join(5)
        # The other end of the pair goes with it.
        subprocess.run(
            ["ip", "link", "delete", self._near_device], capture_output=True, check=False
        )
        subprocess.run(["ip", "netns", "delete", self.name], capture_output=True, check=False)

    def _make(self) -> None:
        subprocess.run(["ip", "netns", "delete", self.name], capture_output=True, check=False)
        run_ip("netns", "add", self.name)
        near, far = self._near_device, self._far_device
        run_ip("link", "add", near, "type", "veth", "peer", "name", far, "netns", self.name)
        for inside, device, address in (
            ((), near, self._near),
            (("-n", self.name), far, self._far),
        ):
            run_ip(*inside, "addr", "add", f"{address}/30", "dev", device)
            # Packets of 64 KB would be lost, delayed and counted as one.
            run_ip(*inside, "link", "set", device, "gso_max_size", str(MTU + 14), "mtu", str(MTU))
            run_ip(*inside, "link", "set", device, "up")
        run_ip("-n", self.name, "link", "set", "lo", "up")
        self._began = time.monotonic()
        self._shape(self._state(0.0), "add")
        self._doorway = Doorway(self._near, self._port)
        self._following = threading.Thread(target=self._follow, name=f"{self.name}-netem",
                                           daemon=True)  # fmt: skip
        self._following.start()

    def _shape(self, state: LinkState, verb: str) -> None:
        for inside, device, bps in (
            (["-n", self.name], self._far_device, state.up_bps),
            ([], self._near_device, state.down_bps),
        ):
            _tc([*inside, "qdisc", verb, "dev", device, "root", "netem", *netem_words(bps, state)])

    def _follow(self) -> None:
        """Sets what has changed until told to stop."""
        set_to = self._state(0.0)
        while not self._stopping.wait(LOOK_EVERY_S):
            now = self.now
            if now != set_to:
                self._shape(now, "change")
                set_to = now


def netem_words(bps: float, state: LinkState) -> list[str]:
    """Parameters of netem for one direction; a rate of 0 loses every packet."""
    packets_per_s = bps / 8 / MTU
    # netem holds what is delayed and what waits in one queue.
    limit = int(packets_per_s * state.delay_s + max(LEAST_QUEUE_PACKETS, packets_per_s * QUEUE_S))
    words = ["limit", str(limit), "delay", f"{1e6 * state.delay_s:.0f}us"]
    if bps <= 0:
        return [*words, "loss", "100%"]
    if state.loss:
        words += ["loss", f"{100 * state.loss:.6f}%"]
    return [*words, "rate", f"{bps:.0f}bit"]


def counts_of(shown: str) -> Counts:
    """What `tc -s qdisc show` tells of one direction."""
    found = SENT.search(shown)
    if found is None:
        return Counts()
    sent_bytes, packets, dropped = map(int, found.groups())
    return Counts(packets=packets, bytes=sent_bytes, dropped=dropped)


def unavailable() -> str | None:
    """Why the kernel cannot shape links here, tried in a namespace of its own; None if it can."""
    for command in ("ip", "tc"):
        if shutil.which(command) is None:
            return f"the `{command}` command is missing; install iproute2"
    if os.geteuid() != 0:
        return "network namespaces need root"
    name = f"sketchfleet-netem-{os.getpid()}"
    try:
        run_ip("netns", "add", name)
    except TunnelError as error:
        return str(error)
    try:
        _tc(["-n", name, "qdisc", "add", "dev", "lo", "root", "netem", "delay", "1ms"])
    except TunnelError:
        return "this kernel has no netem"
    finally:
        with contextlib.suppress(TunnelError):
            run_ip("netns", "delete", name)
    return None


def _tc(words: Sequence[str]) -> str:
    done = subprocess.run(["tc", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise TunnelError(f"`tc {' '.join(words)}` failed: {done.stderr.strip()}")
    return done.stdout
