"""Fleets that do not exist yet: groups of known boards on known links, from a file or from words.

    [[group]]                          or   "12 orin-nano-8gb on lte, 4 rtx-4090 on fibre"
    count = 12
    board = "orin-nano-8gb"
    link = "lte"

Knows the catalogues and how people misspell names; plans nothing.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field

from profiles.boards import Board, load_boards
from profiles.catalogue import choose, suggestion
from profiles.device import DeviceProfile
from profiles.errors import SketchfleetError
from profiles.links import KnownLink, load_links
from profiles.settings import Section, load_settings

MOST_DEVICES = 2000  # each is planned by itself; more take minutes

WORDS = re.compile(r"(\d+)\s*x?\s+(\S+)\s+on\s+(\S+)", re.IGNORECASE)

Rate = Annotated[float, Field(gt=0)]


class FleetError(SketchfleetError):
    """A fleet that cannot be planned for, as it is described."""


class GroupSection(Section):
    """Devices of one kind on links of one kind. What is not given is as the catalogues have it."""

    count: int
    """How many devices."""
    board: str
    """Of the catalogue (`docs/boards.md`)."""
    link: str
    """Of the catalogue of links."""
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")] | None = None
    """The board's name when not given."""
    memory_mb: Annotated[int, Field(ge=64)] | None = None
    """Cap on the trainer, as [limits] memory_mb of agent.toml."""
    power_mode: str = ""
    """One of the board's, as nvpmodel names it."""
    daily_mb: Rate | None = None
    """What the owner lets the link carry a day, both ways together."""
    up_bps: Rate | None = None
    """From the device, instead of the link's."""
    down_bps: Rate | None = None
    """To the device, instead of the link's."""
    rtt_s: Rate | None = None
    """There and back, instead of the link's."""


class FleetFile(Section):
    """fleet.toml."""

    group: tuple[GroupSection, ...]


@dataclass(frozen=True)
class Group:
    """So many devices alike, none of which was ever seen."""

    name: str
    count: int
    board: Board
    link: KnownLink
    profile: DeviceProfile

    @property
    def device_ids(self) -> tuple[str, ...]:
        """A name each, "field-01" onwards; the group's alone for a single device."""
        if self.count == 1:
            return (self.name,)
        width = len(str(self.count))
        return tuple(f"{self.name}-{i:0{width}d}" for i in range(1, self.count + 1))


def read_fleet(path: Path) -> tuple[Group, ...]:
    """The groups of a fleet.toml. Raises `FleetError`, `CatalogueError`."""
    return _groups(load_settings(path, FleetFile, FleetError).group, str(path))


def parse_fleet(words: str) -> tuple[Group, ...]:
    """The groups of "12 orin-nano-8gb on lte, 4 rtx-4090 on fibre".

    Raises `FleetError`, `CatalogueError`.
    """
    sections = []
    for part in filter(None, (p.strip() for p in words.split(","))):
        found = WORDS.fullmatch(part)
        if found is None:
            raise FleetError(
                f'--devices: {part!r} is not of the form "12 orin-nano-8gb on lte"; '
                "`sketchfleet-coordinator plan --list` shows boards and links"
            )
        sections.append(GroupSection(count=int(found[1]), board=found[2], link=found[3]))
    return _groups(sections, "--devices")


def _groups(sections: Sequence[GroupSection], place: str) -> tuple[Group, ...]:
    if not sections:
        raise FleetError(f"{place} names no devices; give at least one group")
    groups: list[Group] = []
    for section in sections:
        group = _group(section, place)
        if group.name in {g.name for g in groups}:
            if section.name is not None:
                raise FleetError(f"{place} has two groups named {group.name!r}; name them apart")
            number = sum(g.board is group.board for g in groups) + 1
            group = dataclasses.replace(group, name=f"{group.name}-{section.link}-{number}")
        groups.append(group)
    if (devices := sum(g.count for g in groups)) > MOST_DEVICES:
        raise FleetError(
            f"{place} has {devices:,} devices, and at most {MOST_DEVICES:,} can be planned; plan "
            "for a share of them"
        )
    return tuple(groups)


def _group(section: GroupSection, place: str) -> Group:
    """Raises `FleetError`, `CatalogueError`."""
    if section.count < 1:
        raise FleetError(
            f"{place}: a count of {section.count} {section.board} cannot be; give at least 1, or "
            "leave the group out"
        )
    board = choose(section.board, load_boards(), "board")
    known = choose(section.link, load_links(), "link")
    modes = [mode.name for mode in board.power_modes]
    if section.power_mode and section.power_mode not in modes:
        raise FleetError(
            f"{place}: {board.name} has no power mode {section.power_mode!r}; "
            f"{suggestion(section.power_mode, modes) if modes else 'it has only one'}"
        )
    given = section.model_dump(include={"up_bps", "down_bps", "rtt_s"}, exclude_none=True)
    daily_bytes = None if section.daily_mb is None else int(section.daily_mb * 1e6)
    link = dataclasses.replace(known.profile(), budget_bytes=daily_bytes, **given)
    return Group(
        name=section.name or board.name,
        count=section.count,
        board=board,
        link=known,
        profile=board.profile(
            link=link,
            memory_cap_bytes=None if section.memory_mb is None else section.memory_mb * 10**6,
            power_mode=section.power_mode,
        ),
    )
