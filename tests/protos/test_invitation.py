"""What an operator hands over, as the owner of a device may pass it on."""

from __future__ import annotations

import io

import pytest

from protos.invitation import InvitationError, read_invitation

SHORT = f"{'a' * 8}.{'B' * 32}@fleet.example:8471#sha256:{'c' * 43}"


def test_standard_input_keeps_the_token_out_of_the_list_of_processes(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{SHORT}\n"))
    assert read_invitation("-").short_form == SHORT == read_invitation(SHORT).short_form


def test_standard_input_that_holds_none_is_told(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("no invitation"))
    with pytest.raises(InvitationError, match="standard input is no join file"):
        read_invitation("-")


def test_a_terminal_that_gives_nothing_is_told(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    with pytest.raises(InvitationError, match="standard input is no join file"):
        read_invitation("-")
