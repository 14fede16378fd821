"""The state of a run as stored facts tell it: what makes a restart go on where it stopped.

Pure: records in, a `RunState` out. Nothing is read or written here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from coordinator import rounds
from coordinator.store.rows import AssignmentRecord, RoundRecord


def rebuilt(
    history: Sequence[RoundRecord],
    given: Sequence[AssignmentRecord],
    policy: rounds.RoundPolicy,
    away_s: float,
) -> rounds.RunState:
    """The state after these rounds and assignments, its deadline moved by the outage."""
    if not history:
        return rounds.RunState()
    last = history[-1]
    dropped = {name for r in history for name in r.detail.get("dropped", {})}
    here = [a for a in given if a.assignment.round == last.round]
    earlier = [
        a
        for a in given
        if a.assignment.trains
        and a.merged_in is None
        and a.assignment.assignment_id not in dropped
        and (a.assignment.round < last.round or last.phase != "open")
    ]
    owed = rounds.RunState(
        round=last.round, outstanding=frozenset(key(a) for a in earlier if not a.arrived)
    )
    if last.phase == "merged":
        if last.evaluate_only:
            return dataclasses.replace(owed, phase="finished")
        return _with_late(dataclasses.replace(owed, round=last.round + 1), earlier, policy)
    state = dataclasses.replace(
        owed,
        evaluating=last.evaluate_only,
        assigned=frozenset(a.assignment.device_id for a in here),
        arrived=frozenset(a.assignment.device_id for a in here if a.arrived),
        failed=tuple(
            sorted(
                (a.assignment.device_id, a.report.outcome)
                for a in here
                if a.state == "failed" and a.report is not None
            )
        ),
        opened_at_s=last.opened_at,
        deadline_at_s=last.deadline_at,
    )
    if last.phase == "merging":
        on_time = tuple(last.detail["on_time"])
        late = tuple((device, int(number)) for device, number in last.detail["late"])
        closing = rounds.CloseRound(last.round, on_time, late, last.evaluate_only)
        taken = {*late, *((device, last.round) for device in on_time)}
        missed = [a for a in earlier if key(a) not in taken]
        state = dataclasses.replace(state, phase="merging", closing=closing)
        return _with_late(state, missed, policy)
    state = _with_late(dataclasses.replace(state, phase="open"), earlier, policy)
    return rounds.extended(state, away_s)  # below 0 where the clock was set back meanwhile


def key(record: AssignmentRecord) -> tuple[str, int]:
    """(device, round): how the state machine names an update."""
    return record.assignment.device_id, record.assignment.round


def _with_late(
    state: rounds.RunState, owed: Sequence[AssignmentRecord], policy: rounds.RoundPolicy
) -> rounds.RunState:
    """The state with those of the owed updates that are in and may still be merged."""
    late = sorted(
        key(a)
        for a in owed
        if a.arrived and rounds.too_late(state, a.assignment.round, policy) is None
    )
    return dataclasses.replace(state, late=tuple(late))
