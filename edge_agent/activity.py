"""What other programs do on this machine: their share of the processor, and whether they compute.

The agent and the trainer below it are not "others". A GPU that does not tell whose work it does
(Jetson) is judged only while the trainer waits: any load is another's then.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from edge_agent.readings import Readings, Sensors

if TYPE_CHECKING:
    import psutil

SMOOTH_S = 8.0  # time constant: a page that loads is no use of the machine
GPU_BUSY = 0.2  # load of an unattributed GPU that counts as use


class Activity:
    """Completes readings with memory and with what others do; keeps a running mean."""

    def __init__(
        self, sensors: Sensors, watches_others: bool, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._sensors, self._watches, self._clock = sensors, watches_others, clock
        self._cores = os.cpu_count() or 1
        self._last: tuple[float, float, float] | None = None  # at, busy s, own s
        self._share: float | None = None

    def read(self, waiting: bool) -> Readings:
        """The machine now; `waiting`: the trainer does not compute at present."""
        import psutil

        found = self._sensors.read()
        available = int(psutil.virtual_memory().available)
        if not self._watches:  # walking through all processes each second is not for nothing
            return replace(found, memory_available_bytes=available)
        agent = psutil.Process()
        own = [agent, *agent.children(recursive=True)]
        return replace(
            found,
            memory_available_bytes=available,
            others_cpu=self._others_cpu(own),
            others_gpu=self._others_gpu(found, waiting, {process.pid for process in own}),
        )

    def _others_cpu(self, own: Sequence[psutil.Process]) -> float | None:
        import psutil

        now, busy_s = self._clock(), _busy_s()
        own_s = 0.0
        for process in own:
            try:
                spent, niced = process.cpu_times(), process.nice() > 0
            except psutil.Error:  # it ended meanwhile
                continue
            own_s += spent.system + (0.0 if niced else spent.user)  # as `_busy_s` counts
        last, self._last = self._last, (now, busy_s, own_s)
        if last is None or now <= last[0]:
            return self._share
        passed_s = now - last[0]
        # A child that ended takes its seconds along; a difference below zero says nothing.
        spent_s = (busy_s - last[1]) - max(0.0, own_s - last[2])
        share = min(1.0, max(0.0, spent_s / passed_s / self._cores))
        weight = 1 - math.exp(-passed_s / SMOOTH_S)
        self._share = share if self._share is None else self._share + weight * (share - self._share)
        return self._share

    def _others_gpu(self, found: Readings, waiting: bool, ours: Collection[int]) -> bool | None:
        import psutil

        if self._sensors.card.pids:
            # In a container the numbers are the host's; one that names nothing here is left out.
            return any(p not in ours and psutil.pid_exists(p) for p in self._sensors.card.pids)
        if found.gpu_load is None or not waiting:
            return None
        return found.gpu_load > GPU_BUSY


def _busy_s() -> float:
    """Processor seconds that were spent since the machine started, but for niced work."""
    import psutil

    t = psutil.cpu_times()
    return float(t.user + t.system + getattr(t, "irq", 0.0) + getattr(t, "softirq", 0.0))
