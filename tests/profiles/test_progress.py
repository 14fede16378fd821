"""What is said while something takes long: on a terminal, after a while, and nothing is left."""

from __future__ import annotations

import io
import time

import pytest

from profiles import progress as module
from profiles.progress import ERASE, Progress, progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(module, "PATIENCE_S", 0.02)
    monkeypatch.setattr(module, "EVERY_S", 0.01)
    monkeypatch.setenv("TERM", "xterm")


def test_on_a_terminal_a_line_tells_and_goes():
    out = Terminal()
    with progress("copying", 4, "blobs", out) as told:
        told.step(3)
        until = time.monotonic() + 5
        while "3 of 4 blobs" not in out.getvalue() and time.monotonic() < until:
            time.sleep(0.01)
    text = out.getvalue()
    assert "copying …  3 of 4 blobs" in text and "left" in text
    assert text.endswith(ERASE) and "\n" not in text


def test_elsewhere_nothing_is_said(monkeypatch):
    plain = io.StringIO()
    with progress("copying", stream=plain):
        time.sleep(0.05)
    assert plain.getvalue() == ""
    monkeypatch.setenv("TERM", "dumb")
    dumb = Terminal()
    with progress("copying", stream=dumb):
        time.sleep(0.05)
    assert dumb.getvalue() == ""


def test_what_is_over_soon_is_not_told(monkeypatch):
    monkeypatch.setattr(module, "PATIENCE_S", 60.0)
    out = Terminal()
    began = time.monotonic()
    with progress("copying", stream=out):
        pass
    assert out.getvalue() == "" and time.monotonic() - began < 5


def test_an_error_within_is_not_swallowed_and_leaves_a_clean_line():
    out = Terminal()
    with pytest.raises(KeyboardInterrupt), progress("copying", stream=out):
        time.sleep(0.05)
        raise KeyboardInterrupt
    assert out.getvalue().endswith(ERASE)


@pytest.mark.parametrize("width", [20, 40, 80])
def test_the_line_fits_the_terminal(width):
    told = Progress("a long name of what is being done here", 1000, "sequences", began_at=0.0)
    told.step(400)
    assert len(told.line(30.0, width)) < width
    assert Progress("x", began_at=0.0).line(61.4, 80) == "x …  61 s"
    assert Progress("x", 10, done=5, began_at=0.0).line(300, 80) == "x …  5 of 10  5 min left"
