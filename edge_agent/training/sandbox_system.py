"""What the warden of the sandbox asks of the system: processes, memory, folders, pipes.

Reads /proc and the file system of the warden, not the program's. Imports only what the standard
library has.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import resource
import select
import shutil
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

BLOCK_BYTES = 512  # the unit of st_blocks, whatever the file system's own


def library_folders() -> list[str]:
    """What an interpreter reads after its start: its library, and the system's shared objects."""
    own = [sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib")]
    if sys.base_prefix not in ("/usr", "/"):
        own.append(f"{sys.base_prefix}/lib")
    shared = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib")
    there = [p for p in dict.fromkeys((*shared, *map(os.path.realpath, own))) if Path(p).is_dir()]
    # One that lies in another comes with it.
    return [
        path
        for path in there
        if Path(path).is_symlink()
        or not any(path.startswith(f"{other}/") for other in there if other != path)
    ]


def others_can_read() -> bool:
    """Whether a user without rights reaches the standard library."""
    place = Path(sysconfig.get_path("stdlib")).resolve()
    return all(folder.stat().st_mode & 0o001 for folder in (place, *place.parents))


def write(path: str, text: str) -> None:
    """Writes to one of the kernel's own files. Raises `OSError`."""
    Path(path).write_text(text)


def descendants(of: int) -> Iterator[int]:
    """Children of a process, their children, and so on."""
    children: dict[int, list[int]] = {}
    for process, parent in _processes():
        children.setdefault(parent, []).append(process)
    waiting = list(children.get(of, ()))
    while waiting:
        process = waiting.pop()
        yield process
        waiting += children.get(process, ())


def _processes() -> Iterator[tuple[int, int]]:
    """(process, its parent) of all that can be seen."""
    for place in Path("/proc").iterdir():
        if not place.name.isdigit():
            continue
        with contextlib.suppress(OSError):  # it ended meanwhile
            # The name in brackets may hold anything, brackets too.
            parent = (place / "stat").read_text(errors="replace").rpartition(")")[2].split()[1]
            yield int(place.name), int(parent)


def resident_bytes(process: int) -> int:
    """Memory that a process has to itself: without what it shares, as the interpreter."""
    with contextlib.suppress(OSError):  # it ended meanwhile
        words = Path(f"/proc/{process}/statm").read_text().split()
        return (int(words[1]) - int(words[2])) * resource.getpagesize()
    return 0


def threads_of(user: int) -> int:
    """How many threads a user's processes have."""
    count = 0
    for process, _ in _processes():
        place = Path(f"/proc/{process}")
        with contextlib.suppress(OSError):  # it ended meanwhile
            if place.stat().st_uid == user:
                count += sum(1 for _ in (place / "task").iterdir())
    return count


def remove(folder: str) -> None:
    """Removes a folder whose processes have ended, with what lies in it; no link is followed."""
    for path, folders, _ in os.walk(folder):
        for place in (Path(path, name) for name in folders):
            if not place.is_symlink():
                place.chmod(0o700)  # else its owner could neither list nor empty it
    shutil.rmtree(folder)


def folder_bytes(folder: str) -> int:
    """What lies in a folder, a file system block for each entry included."""
    total = 0
    for path, folders, names in os.walk(folder):
        for name in (*folders, *names):
            with contextlib.suppress(OSError):  # it went meanwhile
                total += Path(path, name).lstat().st_blocks * BLOCK_BYTES + 4096
    return total


# --- pipes --------------------------------------------------------------------------------------


def moved(fd: int) -> int:
    """The same open file at a number drawn from the system's randomness."""
    high = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 64 + random.SystemRandom().randrange(900))
    os.close(fd)
    return high


def read_some(pipes: dict[int, bytearray], ended: set[int], wait_s: float) -> None:
    """Takes what there is, or waits for some; pipes at their end are noted in `ended`."""
    for fd in select.select([fd for fd in pipes if fd not in ended], [], [], wait_s)[0]:
        chunk = os.read(fd, 65536)
        pipes[fd] += chunk
        if not chunk:
            ended.add(fd)


def drain(pipes: dict[int, bytearray], most: int) -> None:
    """What was written before the end, up to `most` bytes."""
    for fd, kept in pipes.items():
        os.set_blocking(fd, False)
        with contextlib.suppress(BlockingIOError):
            while len(kept) < most and (chunk := os.read(fd, 65536)):
                kept.extend(chunk)
