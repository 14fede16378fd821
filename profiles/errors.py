"""The one base class of errors that a person can act on, and how programs end.

Command-line programs print such an error as one sentence and exit with its code; anything else that
escapes is a defect and keeps its traceback. `profiles.program` does both.
"""

from __future__ import annotations

import errno
from enum import IntEnum
from typing import ClassVar

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)
"""Of a disk that is full, read-only or failing; they may pass."""


class ExitCode(IntEnum):
    """How every program ends. 75 and 78 are as in BSD's sysexits.h."""

    OK = 0
    ERROR = 1
    USAGE = 2
    LATER = 75
    SETTINGS = 78
    INTERRUPTED = 130

    @property
    def meaning(self) -> str:
        """In words."""
        return _MEANINGS[self]


_MEANINGS = {
    ExitCode.OK: "done; also when the reader of its output, say `head`, has seen enough",
    ExitCode.ERROR: "it cannot be done, or was found wanting; the last line on standard error says "
    "what to do",
    ExitCode.USAGE: "the command line is wrong",
    ExitCode.LATER: "not now: somebody else holds what it needs, nobody answers, or the operator "
    "has yet to approve; the same again later may do",
    ExitCode.SETTINGS: "a settings file, SKETCHFLEET_... variable or --set is wrong; starting it "
    "again does not help",
    ExitCode.INTERRUPTED: "ended by Ctrl-C; nothing is half done",
}


class SketchfleetError(Exception):
    """Says what is wrong, which limit was met, and what to do, in one sentence."""

    exit_code: ClassVar[ExitCode] = ExitCode.ERROR


class MissingExtraError(SketchfleetError):
    """A package of an optional extra is not installed."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(
            f"{package} is not installed; install it with: pip install 'sketchfleet[{extra}]'"
        )
