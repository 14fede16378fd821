"""The graphics card as nvidia-smi tells of it, and the one on a Jetson's chip; without torch.

Every call has a timeout, for nvidia-smi hangs on some boards; after three that gave nothing it is
left alone. Any field may be "[N/A]".
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

from edge_agent.board import BoardFacts
from edge_agent.machine import Machine
from profiles.device import GpuProfile

log = logging.getLogger("sketchfleet.agent")

MEBIBYTE = 2**20
GIVE_UP_AFTER = 3  # calls without an answer
FORMAT = "--format=csv,noheader,nounits"
CARDS = f"--query-gpu=name,memory.total,memory.free,compute_cap {FORMAT}"
STATE = f"--query-gpu=temperature.gpu,power.draw {FORMAT}"
PROCESSES = f"--query-compute-apps=pid {FORMAT}"


@dataclass(frozen=True)
class CardState:
    """One moment of all cards together."""

    temperature_c: float | None = None  # of the warmest
    watts: float | None = None  # of all
    pids: tuple[int, ...] = ()  # that compute on them


def find_gpu(
    machine: Machine, board: BoardFacts, memory_bytes: tuple[int, int]
) -> GpuProfile | None:
    """The accelerator that ought to be usable; None when there is none to be seen.

    `memory_bytes`: total and available memory of the host, which a Jetson's GPU shares.
    """
    if board.capability:
        total, available = memory_bytes
        return GpuProfile(board.model or board.soc, total, available, board.capability, True)
    for name, total_text, free_text, capability in _rows(machine, CARDS, 4):
        size, free = _number(total_text), _number(free_text)
        if size is None:  # a card that shares the host's memory does not tell (GB10)
            return GpuProfile(name, *memory_bytes, capability, True)
        free_bytes = int((size if free is None else free) * MEBIBYTE)
        return GpuProfile(name, int(size * MEBIBYTE), free_bytes, capability, False)
    return None


class NvidiaSmi:
    """Asks nvidia-smi now and then, as long as it answers."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._failures = 0

    def read(self) -> CardState:
        """Temperature, power and processes of this moment; nothing known when it is of no use."""
        if self._failures >= GIVE_UP_AFTER:
            return CardState()
        rows = _rows(self._machine, STATE, 2)
        if not rows:
            self._failures += 1
            return CardState()
        self._failures = 0
        warm = [c for c in (_number(row[0]) for row in rows) if c is not None]
        drawn = [w for w in (_number(row[1]) for row in rows) if w is not None]
        pids = [_number(row[0]) for row in _rows(self._machine, PROCESSES, 1)]
        return CardState(
            temperature_c=max(warm, default=None),
            watts=sum(drawn) if drawn else None,
            pids=tuple(int(pid) for pid in pids if pid is not None),
        )


def _rows(machine: Machine, words: str, columns: int) -> list[list[str]]:
    """The lines of a query that have as many cells as were asked for."""
    text = machine.tool("nvidia-smi", *words.split()) or ""
    rows = [[cell.strip() for cell in line.split(",")] for line in text.splitlines()]
    return [row for row in rows if len(row) == columns]


def _number(cell: str) -> float | None:
    try:
        value = float(cell)
    except ValueError:
        return None
    return value if value >= 0 else None
