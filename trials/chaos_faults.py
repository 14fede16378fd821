"""The faults of a chaos trial: which there are, drawn from a seed, for whom."""

from __future__ import annotations

import errno
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from protos.faults import Fault

COORDINATOR = "coordinator"
COORDINATOR_STEPS = ("upload.kept", "upload.accepted", "report.kept", "round.cut", "round.opened",
                     "round.closed", "round.merged", "round.published", "moved")  # fmt: skip
AGENT_STEPS = ("agent.fetched", "agent.trained", "journal.taken", "agent.journalled",
               "agent.pushed", "agent.reported", "moved")  # fmt: skip
JUMP_S = 2 * 86400.0
Way = Literal[
    "kill", "power", "plant", "plant power", "stop", "clock", "half-open", "cut", "trainer",
    "corrupt", "drain", "restore",
]  # fmt: skip


@dataclass(frozen=True)
class Planned:
    """One fault: its kind in words, whom it hits, how, and with what."""

    kind: str
    target: str
    way: Way
    point: str = ""
    fault: Fault | None = None
    seconds: float = 0.0

    @property
    def words(self) -> str:
        """For a log."""
        return f"{self.kind}, {self.target}" + (f" at {self.point}" if self.point else "")


# Kind -> how often it is drawn for the coordinator, and for an agent.
SHARES: dict[str, tuple[int, int]] = {
    "kill -9": (5, 4),
    "kill -9 at a step": (8, 7),
    "power cut": (3, 2),
    "power cut at a step": (5, 4),
    "disk full": (3, 3),
    "read-only disk": (2, 2),
    "disk error": (2, 2),
    "disk stalls": (2, 2),
    "process stopped": (2, 2),
    "clock jumps": (3, 2),
    "corrupt blob": (3, 3),
    "graceful stop": (3, 0),
    "restored from a backup": (1, 0),
    "trainer killed": (0, 3),
    "half-open connection": (0, 3),
    "connection reset": (0, 4),
    "message twice": (0, 4),
    "message late and out of order": (0, 4),
}

IMMEDIATE = ("kill -9", "power cut", "process stopped", "clock jumps", "graceful stop",
             "half-open connection", "connection reset")  # fmt: skip


@dataclass
class Outcome:
    """A fault and what came of it."""

    planned: Planned
    met: bool = False
    notes: list[str] = field(default_factory=list)


def draw(count: int, agents: Sequence[str], random_: random.Random) -> list[Planned]:
    """So many faults: every kind in turn as far as they reach, then by their shares, shuffled."""
    kinds = list(SHARES)
    random_.shuffle(kinds)
    weights = [SHARES[k][0] + SHARES[k][1] for k in kinds]
    chosen = kinds[:count] + random_.choices(kinds, weights, k=max(0, count - len(kinds)))
    random_.shuffle(chosen)
    return [one(kind, agents, random_) for kind in chosen]


def spread(planned: Sequence[Planned], rounds: int) -> list[tuple[int, Planned]]:
    """Each fault with the round it is due in, in order; as many in every round.

    A device's trainer dies at most once a round: after a second death over one assignment the
    device gives it up, as it should, and from there on the two runs merge different updates.
    """
    due: list[tuple[int, Planned]] = []
    killed: set[tuple[str, int]] = set()
    for index, fault in enumerate(planned):
        round_ = index * rounds // len(planned)
        if fault.way == "trainer":
            later = (n % rounds for n in range(round_, round_ + rounds))
            round_ = next((n for n in later if (fault.target, n) not in killed), round_)
            killed.add((fault.target, round_))
        due.append((round_, fault))
    return sorted(due, key=lambda pair: pair[0])


def one(kind: str, agents: Sequence[str], random_: random.Random) -> Planned:
    """A fault of a kind, its victim and its particulars drawn."""
    mine, theirs = SHARES[kind]
    of_coordinator = random_.random() < mine / (mine + theirs)
    target = COORDINATOR if of_coordinator else random_.choice(list(agents))
    steps = COORDINATOR_STEPS if of_coordinator else AGENT_STEPS
    disk = random_.choice(("disk", "db")) if of_coordinator else "disk"

    def failing(number: int) -> Planned:
        times = random_.randint(1, 3)
        return Planned(kind, target, "plant", disk, Fault("error", number=number, times=times))

    match kind:
        case "kill -9":
            return Planned(kind, target, "kill")
        case "kill -9 at a step":
            return Planned(kind, target, "plant", random_.choice(steps), Fault("kill"))
        case "power cut":
            return Planned(kind, target, "power")
        case "power cut at a step":
            return Planned(kind, target, "plant power", random_.choice(steps), Fault("kill"))
        case "disk full":
            return failing(errno.ENOSPC)
        case "read-only disk":
            return failing(errno.EROFS)
        case "disk error":
            return failing(errno.EIO)
        case "disk stalls":
            wait = Fault("wait", seconds=random_.uniform(0.2, 1.0), times=2)
            return Planned(kind, target, "plant", disk, wait)
        case "process stopped":
            return Planned(kind, target, "stop", seconds=random_.uniform(0.5, 2.0))
        case "clock jumps":
            return Planned(kind, target, "clock", seconds=random_.uniform(-JUMP_S, JUMP_S))
        case "corrupt blob":
            return Planned(kind, target, "corrupt")
        case "graceful stop":
            return Planned(kind, target, "drain")
        case "restored from a backup":
            return Planned(kind, target, "restore")
        case "trainer killed":
            return Planned(kind, target, "trainer")
        case "half-open connection":
            return Planned(kind, target, "half-open", seconds=random_.uniform(1.0, 3.0))
        case "connection reset":
            return Planned(kind, target, "cut", seconds=random_.uniform(0.1, 0.6))
        case "message twice":
            return Planned(kind, target, "plant", "link.answered", Fault("again"))
        case _:
            late = Fault("late", seconds=random_.uniform(0.5, 3.0))
            return Planned(kind, target, "plant", "link.answered", late)
