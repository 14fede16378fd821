"""What the agent is doing, as a small file that `sketchfleet-agent status` reads.

Written by the agent, read by anybody who may see its state folder. Knows no agent.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from profiles.errors import SketchfleetError

NAME = "status.json"
BEAT_S = 60.0  # between two signs of life where nothing changes
LONGEST_BEAT_S = 3 * BEAT_S
SHOWN: dict[str, Callable[[Any], str]] = {
    "round": lambda v: f"round {v}",
    "k": lambda v: f"k={v}",
    "message": str,
    "assignment": lambda v: f"assignment {v}",
    "loss": lambda v: f"loss {v:.3f}",
    "tokens_per_s": lambda v: f"{v:.0f} tokens/s",
    "memory_bytes": lambda v: f"{v / 1e9:.2f} GB",
    "temperature_c": lambda v: f"{v:.0f} °C",
    "joules": lambda v: f"{v / 1e3:.1f} kJ",
    "held_back": str,
}


class StatusError(SketchfleetError):
    """There is no status to show."""


class StatusFile:
    """Replaced as a whole, so that a reader never sees half of it."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / NAME
        self.phase, self.line = "starting", "starting"  # as shown last; `line` is for a person
        self.told = 0  # how often

    def __call__(self, phase: str, **fields: Any) -> None:
        """Shows this phase and these facts; None is left out."""
        told = {key: value for key, value in fields.items() if value is not None}
        plain = {"phase": phase, "at": time.time(), "pid": os.getpid(), **told}
        self.phase, self.line, self.told = phase, _line(phase, told), self.told + 1
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text(json.dumps(plain))
        temporary.replace(self._path)

    def beat(self) -> None:
        """A sign of life: what is shown still holds."""
        with contextlib.suppress(FileNotFoundError):
            os.utime(self._path)


def beats(folder: Path, now: float) -> bool:
    """Whether the agent has shown itself or given a sign of life lately. Raises `StatusError`."""
    running = bool(read_status(folder)["running"])
    return running and now - (folder / NAME).stat().st_mtime < LONGEST_BEAT_S


def read_status(folder: Path) -> dict[str, Any]:
    """What was shown last, with "running". Raises `StatusError`."""
    path = folder / NAME
    try:
        plain: dict[str, Any] = json.loads(path.read_text())
        plain["running"] = Path(f"/proc/{plain['pid']}").exists()
        float(plain["at"]), str(plain["phase"])
    except OSError as error:
        raise StatusError(
            f"no agent has run with this configuration ({path} is not there)"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise StatusError(f"{path} is damaged; the next `run` writes it anew") from error
    return plain


def describe(status: Mapping[str, Any], now: float) -> str:
    """One line for a person; `now`: seconds since the epoch."""
    phase = str(status["phase"])
    state = phase if status["running"] else f"not running (last: {phase})"
    return f"{_line(state, status)}, {now - status['at']:.0f} s ago"


def _line(state: str, status: Mapping[str, Any]) -> str:
    words = []
    if "step" in status:
        words.append(f"step {status['step']} of {status.get('steps', '?')}")
    elif "steps" in status:
        words.append(f"{status['steps']} steps")
    words += [say(status[key]) for key, say in SHOWN.items() if status.get(key) not in (None, "")]
    return f"{state}: {', '.join(words)}" if words else state
