"""Logs of both services: events with fields, one line each, on standard error.

For a person at a terminal, for systemd's journal (which knows the time itself), or as JSON for
programs. Never prompts, code or file contents.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal, TextIO

from profiles.settings import Section

Form = Literal["auto", "text", "journal", "json"]
Level = Literal["debug", "info", "warning", "error"]

BARE = re.compile(r"[\w.:/@%+,-]+")


class LogSection(Section):
    """What the service tells of itself, on standard error."""

    format: Form = "auto"
    """"text" for people, "journal" for systemd's journal, "json" for programs; "auto" is the first
    at a terminal, the second as a service of systemd and the third elsewhere."""
    level: Level = "info"
    """The least that is told."""


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    return {key: value for key, value in vars(record).items() if key not in _PLAIN}


_PLAIN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class JsonLines(logging.Formatter):
    """`ts` (RFC 3339, UTC), `level`, `event`, then the fields given as `extra`."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line."""
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line = {
            "ts": f"{seconds}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **_fields(record),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class TextLines(logging.Formatter):
    """Local time, the level where it is a warning or worse, the event, then fields as key=value."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as a line, a traceback below it."""
        at = time.strftime("%H:%M:%S", time.localtime(record.created))
        worse = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        return f"{at} {worse}{self._told(record)}"

    def _told(self, record: logging.LogRecord) -> str:
        pairs = [f"{key}={_value(value)}" for key, value in _fields(record).items()]
        line = "  ".join([_one_line(record.getMessage()), *([" ".join(pairs)] if pairs else [])])
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class JournalLines(TextLines):
    """The same without the time, each line under the syslog priority that journald reads."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as lines."""
        priority = next(number for level, number in _PRIORITIES if record.levelno >= level)
        return "\n".join(f"<{priority}>{line}" for line in self._told(record).splitlines())


_PRIORITIES = (
    (logging.CRITICAL, 2),
    (logging.ERROR, 3),
    (logging.WARNING, 4),
    (logging.INFO, 6),
    (logging.NOTSET, 7),
)
_FORMS: Mapping[str, Callable[[], logging.Formatter]] = {
    "text": TextLines, "journal": JournalLines, "json": JsonLines,
}  # fmt: skip


def set_up_logging(form: Form = "auto", level: Level = "info") -> None:
    """Sends every logger of this process to standard error in that form."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_FORMS[suits(sys.stderr) if form == "auto" else form]())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)


def suits(stream: TextIO) -> Form:
    """The form for whoever reads the stream: "text", "journal" or "json"."""
    try:
        found = os.fstat(stream.fileno())
    except (OSError, ValueError):  # not a file, as in tests
        return "json"
    if os.environ.get("JOURNAL_STREAM", "") == f"{found.st_dev}:{found.st_ino}":
        return "journal"
    return "text" if stream.isatty() else "json"


def _value(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if BARE.fullmatch(text) else json.dumps(text, ensure_ascii=False)


def _one_line(text: str) -> str:
    """Nobody who names a device or a run can begin a line of the log."""
    return text.replace("\r", "\\r").replace("\n", "\\n")
