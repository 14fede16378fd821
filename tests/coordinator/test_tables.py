"""Tables: as wide as the terminal, legible in a narrow one, a line a row for programs."""

from __future__ import annotations

import io
import re
import sys

import pytest

from coordinator.tables import print_table

COLUMNS = ("device", "board", "why")
ROWS = [
    ("field-board", "Jetson Orin Nano 8GB", "its link sends that much; see [round] round_s"),
    ("a-device-with-a-long-name", "RTX 4090", "all"),
]
COLOUR = re.compile(r"\x1b\[[0-9;]*3[0-9]")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def shown(monkeypatch):
    """Prints the rows at a terminal so wide; returns what was sent to it."""

    def show(width: int, **environment: str) -> str:
        for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE"):
            monkeypatch.delenv(name, raising=False)
        for name, value in {"TERM": "xterm-256color", "COLUMNS": str(width), **environment}.items():
            monkeypatch.setenv(name, value)
        out = Terminal()
        with monkeypatch.context() as patched:
            patched.setattr(sys, "stdout", out)
            print_table(COLUMNS, ROWS)
        return out.getvalue()

    return show


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


@pytest.mark.parametrize("width", [30, 50, 70, 100])
def test_no_line_is_wider_than_the_terminal_and_nothing_is_lost(shown, width):
    lines = plain(shown(width)).splitlines()
    assert max(map(len, lines)) <= width
    words = " ".join(lines).split()
    for word in ("Jetson", "Orin", "8GB", "RTX", "4090", "[round]", "round_s"):
        assert word in words, lines


def test_where_words_would_be_cut_each_row_is_a_card(shown):
    lines = plain(shown(40)).splitlines()
    assert lines[0] == "device  field-board" and "board   Jetson Orin Nano 8GB" in lines
    assert lines.count("") == len(ROWS)


def test_for_programs_every_row_is_one_line_without_escapes(monkeypatch, capsys):
    monkeypatch.delenv("COLUMNS", raising=False)
    long = [(f"device-{n}", "board " * 40, "why") for n in range(3)]
    print_table(COLUMNS, long)
    out = capsys.readouterr().out
    assert sum("device-" in line for line in out.splitlines()) == 3
    assert len([line for line in out.splitlines() if line.strip()]) == 5  # a head, a rule, three
    assert "\x1b" not in out


def test_no_color_and_a_dumb_terminal_are_heeded(shown):
    assert "\x1b[1m" in shown(100), "the head is bold at a terminal"
    assert not COLOUR.search(shown(100, NO_COLOR="1"))
    assert "\x1b" not in shown(100, TERM="dumb")


def test_nothing_to_show_is_said_in_words(capsys):
    print_table(COLUMNS, [], "no device has joined yet")
    assert capsys.readouterr().out == "no device has joined yet\n"
