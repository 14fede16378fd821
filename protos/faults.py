"""Places where a test makes things go wrong; inert, at the price of one comparison, otherwise.

`SKETCHFLEET_FAULTS` names a folder. What lies in its `todo` under the name of a point happens the
next time that point is passed, in whatever process, and is noted in `done`: the process dies, an
error comes as from a full or broken disk, time passes, a file is cut short. `todo` may be filled
while the processes run. The same folder keeps account of what was synced, so that a test can take
away what a power cut would have (`trials.power`).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

VARIABLE = "SKETCHFLEET_FAULTS"
Deed = Literal["kill", "error", "wait", "hold", "truncate", "again", "late"]


@dataclass(frozen=True)
class Fault:
    """What is to happen at a point.

    kill: SIGKILL to the process itself. error: an `OSError` of this number. wait: so many seconds.
    hold: until the folder `go` has a file that is called as the one at hand. truncate: the file
    at hand loses its second half. again, late: for the caller, who sends a message twice, or once
    more after so many seconds.
    """

    do: Deed
    number: int = 0
    seconds: float = 0.0
    times: int = 1  # it happens at so many passages


_folder: Path | None = None
_late: set[asyncio.Task[None]] = set()


def arm(folder: Path | None) -> None:
    """Takes faults from this folder from now on; None: from nowhere."""
    global _folder  # noqa: PLW0603 - one for the process, as its environment is
    _folder = folder
    if folder is not None:
        for name in ("todo", "kept"):
            (folder / name).mkdir(parents=True, exist_ok=True)


def plant(folder: Path, point: str, fault: Fault) -> None:
    """Has a fault happen at a point in the processes of this folder."""
    (folder / "todo").mkdir(parents=True, exist_ok=True)
    draft = folder / f"{point}.{os.getpid()}.tmp"
    draft.write_text(json.dumps(asdict(fault)))
    draft.replace(folder / "todo" / point)


def happened(folder: Path) -> list[dict[str, Any]]:
    """The faults that were met, in order: point, fault, pid, and when (monotonic, s)."""
    with contextlib.suppress(FileNotFoundError):
        return [json.loads(line) for line in (folder / "done").read_text().splitlines()]
    return []


def point(name: str, path: Path | None = None) -> Fault | None:
    """A place where something may go wrong; `path`: the file at hand.

    Returns the fault if it is the caller's to carry out. Raises the `OSError` that was asked for.
    """
    return None if _folder is None else _meet(_folder, name, path)


async def repeat(name: str, message: Callable[[], Awaitable[Any]]) -> None:
    """After a message was answered: the place where it may be sent again, at once or late."""
    if (fault := point(name)) is None:
        return

    async def again() -> None:
        await asyncio.sleep(fault.seconds)
        with contextlib.suppress(Exception):  # whatever comes of it, the first answer stands
            await message()

    task = asyncio.create_task(again())
    if fault.do == "late":
        _late.add(task)
        task.add_done_callback(_late.discard)
    else:
        await task


def now() -> float:
    """The wall clock, Unix seconds, as far as it is told right."""
    if _folder is None:
        return time.time()
    with contextlib.suppress(OSError, ValueError):
        return time.time() + float((_folder / "clock").read_text())
    return time.time()


def synced_file(path: Path) -> None:
    """Notes that the bytes of a file are on disk now."""
    if _folder is not None:
        _note(_folder, {"file": _keep(_folder, path), "size": path.stat().st_size})


def synced_folder(path: Path) -> None:
    """Notes that the names in a folder are on disk now."""
    if _folder is not None:
        entries = {entry.name: _keep(_folder, entry) for entry in path.iterdir()}
        _note(_folder, {"folder": str(path.resolve()), "entries": entries})


def _meet(folder: Path, name: str, path: Path | None) -> Fault | None:
    taken = folder / f"{name}.{os.getpid()}.taken"
    try:
        (folder / "todo" / name).rename(taken)
    except FileNotFoundError:
        return None
    plain = json.loads(taken.read_text())
    taken.unlink()
    fault = Fault(**plain)
    if fault.times > 1:
        plant(folder, name, Fault(**{**plain, "times": fault.times - 1}))
    told = {"point": name, "pid": os.getpid(), "at": time.monotonic(), **plain}
    with (folder / "done").open("a") as stream:
        stream.write(json.dumps(told) + "\n")
    match fault.do:
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "error":
            raise OSError(fault.number, os.strerror(fault.number), str(path or name))
        case "wait":
            time.sleep(fault.seconds)
        case "hold" if path is not None:
            while not (folder / "go" / path.name).exists():
                time.sleep(0.05)
        case "truncate" if path is not None and path.is_file():
            os.truncate(path, path.stat().st_size // 2)
        case "again" | "late":
            return fault
    return None


def _keep(folder: Path, path: Path) -> str:
    """The name of what lies at a path, whatever it is called later; files stay at hand under it."""
    with contextlib.suppress(FileNotFoundError):
        found = path.lstat()
        name = str(found.st_ino)
        if path.is_dir():
            return f"folder {name}"
        with contextlib.suppress(FileExistsError):
            os.link(path, folder / "kept" / name)
        return name
    return ""


def _note(folder: Path, what: dict[str, Any]) -> None:
    with (folder / "synced").open("a") as stream:
        stream.write(json.dumps(what) + "\n")


if VARIABLE in os.environ:
    arm(Path(os.environ[VARIABLE]))
