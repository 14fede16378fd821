"""Waiting while the agent says so: pauses, and a share of the time in which the device may work.

The network process watches heat, power and the owner, and writes what follows to a small file;
the trainer looks at it between micro-batches. Knows that file and the clock, no models.

    {}                          work
    {"pause": "too hot (91 C)"} wait until this says otherwise
    {"duty": 0.5}               work half of the time
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

LOOK_S = 0.25  # between two looks at the file
LONGEST_SLEEP_S = 0.5  # so that a pause that ends is noticed
LOWEST_DUTY = 0.02  # below, a step would take minutes; a pause says it better

log = logging.getLogger("sketchfleet.trainer")


class Pace:
    """Holds work up as the control file asks.

    `emit` gets {"event": "paused", "why": ...} when a pause begins or its reason changes and
    {"event": "resumed"} when it ends; `on_pause` is called when one begins. Without a path nothing
    is ever held up. What the process holds in memory it keeps while it waits: when a pause gets
    long, the agent ends the process, and another goes on from the checkpoint.
    """

    def __init__(
        self,
        path: Path | None,
        emit: Callable[[Mapping[str, Any]], None],
        on_pause: Callable[[], None] = lambda: None,
        *,
        clock: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.on_pause = on_pause
        self.waited_s = 0.0  # in all, for pauses and for the share of time
        self._path, self._emit, self._clock, self._sleep = path, emit, clock, sleep
        self._looked_at = -math.inf
        self._seen: tuple[int, int, int] | None = None
        self._why, self._duty = "", 1.0
        self._working_since = clock()

    def keep(self) -> None:
        """Returns when work may go on; to be called between pieces of work."""
        if self._path is None:
            return
        began = self._clock()
        self._look(began)
        if self._why:
            self._wait_out()
        elif self._duty < 1:
            self._rest((began - self._working_since) * (1 / self._duty - 1))
        else:
            self._working_since = began
            return
        self._working_since = self._clock()
        self.waited_s += self._working_since - began

    def _wait_out(self) -> None:
        told = ""
        self.on_pause()
        while self._why:
            if self._why != told:
                told = self._why
                self._emit({"event": "paused", "why": told})
            self._sleep(LONGEST_SLEEP_S)
            self._look(self._clock())
        self._emit({"event": "resumed"})

    def _rest(self, wanted_s: float) -> None:
        """Sleeps that long, or until the file asks for something else."""
        until, duty = self._clock() + wanted_s, self._duty
        while (left := until - self._clock()) > 0 and self._duty == duty and not self._why:
            self._sleep(min(left, LONGEST_SLEEP_S))
            self._look(self._clock())

    def _look(self, now: float) -> None:
        """Reads the file if it changed; keeps what was asked before while it cannot be read."""
        if self._path is None or now - self._looked_at < LOOK_S:
            return
        self._looked_at = now
        try:
            facts = self._path.stat()
            seen = (facts.st_mtime_ns, facts.st_size, facts.st_ino)
            if seen == self._seen:
                return
            asked = json.loads(self._path.read_text())
            why, duty = str(asked.get("pause") or ""), float(asked.get("duty") or 1.0)
        except FileNotFoundError:
            self._seen, self._why, self._duty = None, "", 1.0
            return
        except (OSError, ValueError, TypeError, AttributeError) as error:
            log.warning("the control file cannot be read", extra={"error": type(error).__name__})
            return
        self._seen = seen
        self._why, self._duty = why, min(1.0, max(LOWEST_DUTY, duty))
