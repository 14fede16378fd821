"""The newest adapter that this device holds: its own where it has one, else the fleet's.

Reads what the agent keeps in the state folder (`journal`, `held`), also while it works. Knows no
PEFT and no inference.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from edge_agent.held import FOLDER, NAME, Held, HeldError, read_held
from edge_agent.journal import DATABASE, Home, JournalError, kept_homes
from edge_agent.training.home import HomeError
from edge_agent.training.personal import own_adapter
from protos.whole_adapter import WholeAdapter

Whose = Literal["own", "fleet"]
ATTEMPTS = 3  # the agent may replace what is being read


@dataclass(frozen=True, eq=False)
class Newest:
    """An adapter, and whose it is: this device's own, or all the fleet's."""

    whose: Whose
    adapter: WholeAdapter

    @property
    def run(self) -> str:
        """The run it comes from."""
        return self.adapter.spec.run_id

    def __str__(self) -> str:
        """For a person."""
        owner = "this device's own adapter" if self.whose == "own" else "the fleet's adapter"
        return f"{owner} of run {self.run} after {self.adapter.round} rounds"


def newest_adapter(state: Path, run: str = "", whose: Whose | None = None) -> Newest | None:
    """The adapter in this state folder; None where there is none.

    run: of this run; "": of the one worked for last. whose: None takes the device's own, which
    methods with personal parts and [personal] ditto leave, and where there is none the fleet's.
    Raises `JournalError`, `HomeError` or `HeldError` on what cannot be read or used.
    """
    for left in reversed(range(ATTEMPTS)):
        before = signature(state)
        try:
            return _newest(state, run, whose)
        except (HeldError, HomeError, OSError):
            if not left or signature(state) == before:
                raise
    raise AssertionError("unreachable")


def signature(state: Path) -> tuple[tuple[int, int], ...]:
    """Changes when what is kept may have changed; costs three looks at the folder."""
    found = []
    for path in (state / FOLDER / NAME, state / DATABASE, state / f"{DATABASE}-wal"):
        try:
            facts = path.stat()
            found.append((facts.st_mtime_ns, facts.st_size))
        except OSError:
            found.append((0, 0))
    return tuple(found)


def _newest(state: Path, run: str, whose: Whose | None) -> Newest | None:
    held, homes = read_held(state), kept_homes(state)
    run = run or _latest(state, held, homes)
    if held is not None and held.spec.run_id != run:
        held = None
    if whose != "fleet" and run in homes:
        home = homes[run]
        if home is None and (held is None or whose == "own"):
            raise JournalError(
                f"what this device kept of run {run!r} is damaged or gone; the next round of the "
                "run begins it anew"
            )
        own = None if home is None else own_adapter(home.path, home.spec)
        if own is not None:
            return Newest("own", own)
    return None if held is None or whose == "own" else Newest("fleet", held.whole())


def _latest(state: Path, held: Held | None, homes: Mapping[str, Home | None]) -> str:
    """The run that something was kept of last."""
    written = {run: home.path.stat().st_mtime_ns for run, home in homes.items() if home is not None}
    if held is not None:
        at = (state / FOLDER / NAME).stat().st_mtime_ns
        written[held.spec.run_id] = max(at, written.get(held.spec.run_id, 0))
    return max(written, key=written.__getitem__, default=next(iter(homes), ""))
