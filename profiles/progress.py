"""A line on standard error that says what is going on, for as long as it goes on.

Only on a terminal, and only for what takes longer than a second. Knows no command.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TextIO

PATIENCE_S = 1.0  # whatever is over sooner needs no word
EVERY_S = 0.25
ERASE = "\r\x1b[K"


@dataclass
class Progress:
    """How far it is: `done` of `total` in `unit`, or just the seconds while `total` is 0."""

    what: str
    total: float = 0.0
    unit: str = ""
    done: float = 0.0
    began_at: float = field(default_factory=time.monotonic)

    def step(self, amount: float = 1.0, what: str | None = None) -> None:
        """So much more is done; `what` is worked on now."""
        self.done += amount
        self.what = what or self.what

    def line(self, now: float, width: int) -> str:
        """For `width` columns."""
        past = now - self.began_at
        words = [f"{self.what} …"]
        if self.total:
            share = min(1.0, self.done / self.total)
            words.append(f"{self.done:,.0f} of {self.total:,.0f} {self.unit}".rstrip())
            if 0 < share < 1:
                words.append(f"{duration_words(past * (1 - share) / share)} left")
        else:
            words.append(duration_words(past))
        return "  ".join(words)[: max(8, width - 1)]


@contextlib.contextmanager
def progress(
    what: str, total: float = 0.0, unit: str = "", stream: TextIO | None = None
) -> Iterator[Progress]:
    """Shows it while the block runs; the block tells how far it is by `step`."""
    told = Progress(what, total, unit)
    stream = stream or sys.stderr
    if stream is None or not stream.isatty() or os.environ.get("TERM") == "dumb":
        yield told
        return
    over = threading.Event()

    def show() -> None:
        if over.wait(PATIENCE_S):
            return
        with contextlib.suppress(OSError, ValueError):  # the terminal went away: nobody to tell
            while True:
                width = shutil.get_terminal_size().columns
                stream.write(ERASE + told.line(time.monotonic(), width))
                stream.flush()
                if over.wait(EVERY_S):
                    break
            stream.write(ERASE)
            stream.flush()

    teller = threading.Thread(target=show, name="progress", daemon=True)
    teller.start()
    try:
        yield told
    finally:
        over.set()
        teller.join()


def duration_words(seconds: float) -> str:
    """With the unit that suits: "12 s", "4 min", "3.5 h", "9 days"."""
    for limit, unit_s, form, unit in ((100, 1, ".0f", "s"), (6000, 60, ".0f", "min"),
                                      (48 * 3600, 3600, ".1f", "h")):  # fmt: skip
        if seconds < limit:
            return f"{seconds / unit_s:{form}} {unit}"
    return f"{seconds / 86400:,.0f} days"
