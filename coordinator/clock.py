"""The time that rounds go by."""

from __future__ import annotations

import time

from protos import faults

SINCE_BOOT = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)  # the former counts sleep too


class SteadyClock:
    """Unix seconds that do not jump: the wall clock as this process began, and what passed since.

    A wall clock that is set, by hand or by a time service, closes no round and loses no device.
    """

    def __init__(self) -> None:
        self._began = faults.now() - time.clock_gettime(SINCE_BOOT)

    def __call__(self) -> float:
        """Now."""
        return self._began + time.clock_gettime(SINCE_BOOT)
