"""Logs for people, for the journal and for programs."""

from __future__ import annotations

import json
import logging
import os
import pty
import subprocess
import sys

import pytest

from profiles.events import JournalLines, JsonLines, TextLines

SAY = """
import logging
from profiles.events import set_up_logging
set_up_logging()
log = logging.getLogger("sketchfleet")
log.info("update accepted", extra={"round": 3})
log.warning("device lost")
"""


def record(level=logging.INFO, message="update accepted", error=None, **fields):
    made = logging.makeLogRecord(
        {"levelno": level, "levelname": logging.getLevelName(level), "msg": message}
        | {"created": 1.5, "msecs": 500.0, **fields}
    )
    if error is not None:
        made.exc_info = (type(error), error, None)
    return made


def test_json_lines_carry_time_level_event_and_fields():
    assert json.loads(JsonLines().format(record(round=3))) == {
        "ts": "1970-01-01T00:00:01.500Z", "level": "info", "event": "update accepted", "round": 3,
    }  # fmt: skip


def test_text_is_for_people():
    line = TextLines().format(record(logging.WARNING, round=3, why="two words", who="a.b"))
    assert line[8:] == ' warning: update accepted  round=3 why="two words" who=a.b'


@pytest.mark.parametrize(
    "level, priority", [("DEBUG", 7), ("INFO", 6), ("WARNING", 4), ("ERROR", 3), ("CRITICAL", 2)]
)
def test_the_journal_gets_a_priority_and_no_time(level, priority):
    line = JournalLines().format(record(getattr(logging, level), round=3))
    assert line == f"<{priority}>update accepted  round=3"


def test_every_line_of_a_traceback_has_its_priority():
    told = JournalLines().format(record(logging.ERROR, error=ValueError("a\nb"))).splitlines()
    assert len(told) >= 3
    assert all(line.startswith("<3>") for line in told)


def test_who_is_named_in_a_message_cannot_begin_a_line():
    told = JournalLines().format(record(message="hello\n<0>the end", name_given="x\n<0>y"))
    assert len(told.splitlines()) == 1


def run(stream, **environ):
    return subprocess.run(
        [sys.executable, "-c", SAY], stderr=stream, check=True, timeout=30,
        env={**os.environ, **environ},
    )  # fmt: skip


def test_a_file_or_pipe_gets_json():
    said = run(subprocess.PIPE).stderr.decode().splitlines()
    assert [json.loads(line)["level"] for line in said] == ["info", "warning"]


def test_standard_error_in_the_journal_gets_the_journals_form():
    reading, writing = os.pipe()
    found = os.fstat(writing)
    run(writing, JOURNAL_STREAM=f"{found.st_dev}:{found.st_ino}")
    os.close(writing)
    with os.fdopen(reading) as said:
        assert said.read() == "<6>update accepted  round=3\n<4>device lost\n"


def test_the_error_that_ends_a_service_is_one_in_the_journal_too():
    ends = (
        "import sys; from profiles.errors import SketchfleetError; "
        "from profiles.program import perform\n"
        "def no(): raise SketchfleetError('no disk')\n"
        "sys.exit(perform('sketchfleet-agent', no, extra='agent', packages=frozenset()))"
    )
    reading, writing = os.pipe()
    found = os.fstat(writing)
    environ = {**os.environ, "JOURNAL_STREAM": f"{found.st_dev}:{found.st_ino}"}
    done = subprocess.run(
        [sys.executable, "-c", ends], stderr=writing, check=False, timeout=30, env=environ
    )
    os.close(writing)
    with os.fdopen(reading) as said:
        assert said.read() == "<3>sketchfleet-agent: no disk\n"
    assert done.returncode == 1


def test_a_terminal_gets_text():
    main, side = pty.openpty()
    run(side)
    said = os.read(main, 4096).decode()
    os.close(side)
    os.close(main)
    assert " update accepted  round=3" in said
    assert "{" not in said and "<6>" not in said
