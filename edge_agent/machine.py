"""The files and tools of this machine that say what it is, under a root that tests replace.

What cannot be read is None, never an error: boards switch sensors off, containers hide files, and
half of what is asked for exists on half of the machines. Knows no board and no unit.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

READ_BYTES = 64 * 1024  # of a file; the kernel's are smaller
TOOL_S = 5.0  # nvidia-smi hangs for longer on some boards

Tool = Callable[[Sequence[str], float], str | None]


def run_tool(words: Sequence[str], timeout_s: float = TOOL_S) -> str | None:
    """What a program prints; None when it is not there, fails or takes longer than `timeout_s`."""
    program = shutil.which(words[0])
    if program is None:
        return None
    try:
        done = subprocess.run(  # noqa: S603 - the words are ours, no shell
            [program, *words[1:]], capture_output=True, timeout=timeout_s, check=False,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.decode("utf-8", "replace") if done.returncode == 0 else None


class Machine:
    """Reads what the kernel says. Paths are absolute, as on the machine itself."""

    def __init__(self, root: Path = Path("/"), tool: Tool = run_tool) -> None:
        self.root = root
        self._tool = tool

    def path(self, where: str) -> Path:
        """Where a file of the machine lies for this process."""
        return self.root / where.lstrip("/")

    def text(self, where: str) -> str | None:
        """A file without the white space and NUL bytes around it; None when it cannot be read."""
        try:
            with self.path(where).open("rb") as stream:
                data = stream.read(READ_BYTES)
        except (OSError, ValueError):
            return None
        return data.decode("utf-8", "replace").strip(" \t\r\n\0")

    def strings(self, where: str) -> tuple[str, ...]:
        """NUL-terminated strings, as device trees hold them."""
        return tuple(part for part in (self.text(where) or "").split("\0") if part)

    def number(self, where: str) -> float | None:
        """A file that holds one number; None when it does not."""
        text = self.text(where)
        try:
            return None if text is None else float(int(text))
        except ValueError:
            return None

    def found(self, pattern: str) -> list[str]:
        """Paths that match, in order; none when the folder cannot be read."""
        try:
            paths = sorted(self.root.glob(pattern.lstrip("/")))
        except OSError:
            return []
        return ["/" + str(path.relative_to(self.root)) for path in paths]

    def tool(self, *words: str, timeout_s: float = TOOL_S) -> str | None:
        """What a program prints, always within `timeout_s`; None when it is of no use."""
        return self._tool(words, timeout_s)
