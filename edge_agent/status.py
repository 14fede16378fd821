"""What the agent is doing, as a small file that `sketchfleet-agent status` reads.

Written by the agent, read by anybody who may see its state folder. Knows no agent.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from profiles.errors import SketchfleetError

NAME = "status.json"
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

    def __call__(self, phase: str, **fields: Any) -> None:
        """Shows this phase and these facts; None is left out."""
        told = {key: value for key, value in fields.items() if value is not None}
        plain = {"phase": phase, "at": time.time(), "pid": os.getpid(), **told}
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text(json.dumps(plain))
        temporary.replace(self._path)


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
    words = []
    if "step" in status:
        words.append(f"step {status['step']} of {status.get('steps', '?')}")
    elif "steps" in status:
        words.append(f"{status['steps']} steps")
    words += [say(status[key]) for key, say in SHOWN.items() if status.get(key) not in (None, "")]
    state = phase if status["running"] else f"not running (last: {phase})"
    return f"{state}{': ' + ', '.join(words) if words else ''}, {now - status['at']:.0f} s ago"
