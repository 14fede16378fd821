"""Rounds go by time that passes, not by a clock that somebody sets."""

from __future__ import annotations

import time

import pytest

from coordinator.clock import SteadyClock
from coordinator.restore import rebuilt
from coordinator.rounds import RoundPolicy
from coordinator.store.rows import RoundRecord
from protos import faults

POLICY = RoundPolicy(rounds=2, min_devices=1, gather_s=1.0, quorum=1.0, late_rounds=0)
OPEN = RoundRecord(0, "open", False, 1000.0, 1100.0, None, None, {})


def test_a_wall_clock_that_jumps_is_not_heeded_until_the_next_start(tmp_path):
    faults.arm(tmp_path)
    try:
        clock = SteadyClock()
        before = clock()
        (tmp_path / "clock").write_text("172800")
        assert 0 <= clock() - before < 1.0
        assert SteadyClock()() - before > 172000
    finally:
        faults.arm(None)
    assert abs(clock() - time.time()) < 1.0


@pytest.mark.parametrize("now", [1040.0 + 500.0, 1040.0 - 172800.0])
def test_a_round_has_as_long_to_go_as_when_the_coordinator_stopped(now):
    """It stopped at 1040, 60 s before the deadline; the clock was set meanwhile."""
    state = rebuilt([OPEN], [], POLICY, now - 1040.0)
    assert state.deadline_at_s - now == 60.0
