"""The network this device is on and what its owner lets it carry: route, metered, limits, budget.

Knows /proc, NetworkManager's tools and one small file. The transfers themselves are `link`'s.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from datetime import date, datetime
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from edge_agent.machine import Machine
from profiles.settings import Section
from protos.transfer import write_durably

log = logging.getLogger("sketchfleet.agent")

SAVE_EVERY_BYTES = 64 * 1024  # what a power cut may forget
RESERVE_BYTES = 128 * 1024  # of a day, for reports and polls
NEVER_DEFAULT = "00000000"


class NetworkSection(Section):
    """What the link may carry."""

    metered: Literal["auto", "yes", "no"] = "auto"
    """Whether bytes cost money; "auto" asks NetworkManager."""
    daily_mb: Annotated[int, Field(ge=1)] | None = None
    """Both ways together, from midnight to midnight local time, MB."""
    most_bps: Annotated[int, Field(ge=8_000)] | None = None
    """What transfers may take of the link, each way, bit/s."""


def default_route(machine: Machine) -> str:
    """Interface and gateway of the way out; empty when there is none."""
    ways = []
    for line in (machine.text("/proc/net/route") or "").splitlines()[1:]:
        cells = line.split()
        if len(cells) > 6 and cells[1] == NEVER_DEFAULT and cells[6].isdigit():
            ways.append((int(cells[6]), f"{cells[0]} {cells[2]}"))
    for line in (machine.text("/proc/net/ipv6_route") or "").splitlines():
        cells = line.split()
        if len(cells) == 10 and not cells[0].strip("0") and cells[9] != "lo" and cells[1] == "00":
            ways.append((1 << 40, f"{cells[9]} {cells[4]}"))  # only where IPv4 has none
    return min(ways, default=(0, ""))[1]


def carried_bytes(machine: Machine) -> int | None:
    """What the interface of the way out has carried both ways since it is up; None if unknown."""
    interface = default_route(machine).partition(" ")[0]
    counts = [
        machine.number(f"/sys/class/net/{interface}/statistics/{way}_bytes") for way in ("rx", "tx")
    ]
    return None if not interface or None in counts else int(sum(c for c in counts if c is not None))


def is_metered(machine: Machine, wanted: Literal["auto", "yes", "no"]) -> bool:
    """Whether to spare bytes: as the owner says, else as NetworkManager does, else no."""
    if wanted != "auto":
        return wanted == "yes"
    interface = default_route(machine).partition(" ")[0]
    if not interface:
        return False
    told = machine.tool(
        "nmcli", "-t", "-f", "GENERAL.METERED", "device", "show", interface, timeout_s=3.0
    )
    if told is not None:
        return told.strip().rpartition(":")[2].startswith("yes")  # also "yes (guessed)"
    told = machine.tool(
        "busctl", "--system", "--auto-start=no", "get-property",
        "org.freedesktop.NetworkManager", "/org/freedesktop/NetworkManager",
        "org.freedesktop.NetworkManager", "Metered", timeout_s=3.0,
    )  # fmt: skip
    return told is not None and told.split()[-1:] in (["1"], ["3"])  # yes, guessed yes


class DailyBudget:
    """Counts what was moved today, across restarts; a new day begins at local midnight."""

    def __init__(
        self, path: Path, daily_bytes: int | None, clock: Callable[[], float] = time.time
    ) -> None:
        self.daily_bytes = daily_bytes
        self._path, self._clock = path, clock
        self._day, self._spent, self._saved = self._today(), 0, 0
        try:
            plain = json.loads(path.read_text())
            if str(plain["day"]) == self._day.isoformat():
                self._spent = self._saved = max(0, int(plain["bytes"]))
        except FileNotFoundError:
            return
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning("today's bytes are counted from none again: %s (%s)", path.name, error)

    @property
    def day(self) -> date:
        """The day that is counted now."""
        self._turn_page()
        return self._day

    @property
    def left_bytes(self) -> int | None:
        """What may still be moved today; None without a budget."""
        self._turn_page()
        return None if self.daily_bytes is None else max(0, self.daily_bytes - self._spent)

    @property
    def is_used_up(self) -> bool:
        """Whether nothing but reports should travel until midnight."""
        left = self.left_bytes
        return left is not None and left < min(RESERVE_BYTES, (self.daily_bytes or 0) // 10)

    def allows(self, size_bytes: int) -> bool:
        """Whether so many bytes fit into what is left of today."""
        left = self.left_bytes
        return left is None or size_bytes <= left

    def spend(self, size_bytes: int) -> None:
        """Notes bytes that were moved."""
        self._turn_page()
        self._spent += size_bytes
        if self.daily_bytes is not None and self._spent - self._saved >= SAVE_EVERY_BYTES:
            self.save()

    def save(self) -> None:
        """Keeps the count for the next life of the agent."""
        if self.daily_bytes is None or self._spent == self._saved:
            return
        plain = {"day": self._day.isoformat(), "bytes": self._spent}
        write_durably(self._path, json.dumps(plain).encode())
        self._saved = self._spent

    def _today(self) -> date:
        return datetime.fromtimestamp(self._clock()).date()

    def _turn_page(self) -> None:
        if (today := self._today()) != self._day:
            self._day, self._spent, self._saved = today, 0, 0
