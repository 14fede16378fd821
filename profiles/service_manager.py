"""Tells systemd how a service is: ready, stopping, what it does, and that it is alive (sd_notify).

Speaks the protocol of sd_notify(3) over NOTIFY_SOCKET, without libsystemd; where no service manager
asked for it, says nothing. What being alive means is the caller's to know.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from collections.abc import Callable, Mapping

log = logging.getLogger("sketchfleet")

PER_WATCHDOG = 3  # pings in the time after which the service manager ends a silent service


class Progress:
    """Whether something that changes as work goes on has changed within `longest_s`."""

    def __init__(
        self, sign: Callable[[], object], longest_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self._sign, self._longest_s, self._clock = sign, longest_s, clock
        self._last, self._at = sign(), clock()

    def __call__(self) -> bool:
        """To be asked more often than `longest_s`."""
        now, sign = self._clock(), self._sign()
        if sign != self._last:
            self._last, self._at = sign, now
        return now - self._at < self._longest_s


class ServiceManager:
    """Whoever started this service, if that is systemd or speaks like it."""

    def __init__(self, environ: Mapping[str, str] = os.environ) -> None:
        self._address = environ.get("NOTIFY_SOCKET", "")
        if self._address.startswith("@"):  # in Linux's abstract namespace
            self._address = "\0" + self._address[1:]
        try:
            mine = int(environ.get("WATCHDOG_PID", os.getpid())) == os.getpid()
            self.watchdog_s = int(environ.get("WATCHDOG_USEC", 0)) / 1e6 if mine else 0.0
        except ValueError:
            self.watchdog_s = 0.0
        """After how long without a ping this process is ended; 0 for never."""

    def tell(self, **facts: object) -> None:
        """Sends assignments, `READY=1`. A manager that is gone costs a line in the log."""
        if not self._address:
            return
        lines = "\n".join(f"{key}={' '.join(str(fact).split())}" for key, fact in facts.items())
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as line:
                line.setblocking(False)
                line.sendto(lines.encode(), self._address)
        except OSError as error:
            log.warning("the service manager cannot be told: %s", error)

    def ready(self, status: str) -> None:
        """The service does its work from now on."""
        self.tell(READY=1, STATUS=status)

    def stopping(self, status: str) -> None:
        """The service ends."""
        self.tell(STOPPING=1, STATUS=status)

    async def keep_alive(self, is_alive: Callable[[], bool], status: Callable[[], str]) -> None:
        """Pings from the event loop for as long as `is_alive`, and shows the status as it changes.

        Ends never, so it is run as a task. Neither function may block.
        """
        if not self._address:
            return
        shown = ""
        while True:
            if self.watchdog_s and is_alive():
                self.tell(WATCHDOG=1)
            if (now := status()) != shown:
                self.tell(STATUS=now)
                shown = now
            await asyncio.sleep(min(self.watchdog_s / PER_WATCHDOG or 10.0, 10.0))
