"""The run as a state machine: events in, effects out.

Decides when a round is planned, when it closes and with whose updates, and when the run ends.
Knows device names and times, nothing of plans, bytes or merges; has no clock of its own: every
event says when it happened. A state rebuilt from stored facts goes on at the next `Tick`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

Phase = Literal["gathering", "open", "merging", "finished"]


@dataclass(frozen=True)
class RoundPolicy:
    """When to begin, when to close, when to give up waiting."""

    rounds: int  # training rounds; one evaluate-only round follows
    min_devices: int = 1
    gather_s: float = 0.0  # wait this long for more devices once there are enough
    quorum: float = 0.8  # share of assigned devices that lets a round close at its deadline
    grace: float = 0.25  # share of round_s added to the deadline
    late_rounds: int = 0  # accept an update this many rounds after its own
    retry_s: float = 30.0  # patience: before planning again, and with devices that went away


@dataclass(frozen=True)
class DeviceReady:
    """A device is connected, profiled and may be given work."""

    at_s: float
    device_id: str


@dataclass(frozen=True)
class DeviceLost:
    """A device has not been heard of for too long, or was revoked."""

    at_s: float
    device_id: str


@dataclass(frozen=True)
class RoundPlanned:
    """The plan asked for is made. No devices: nobody can take part at present."""

    at_s: float
    round: int
    device_ids: tuple[str, ...]
    round_s: float


@dataclass(frozen=True)
class Arrived:
    """Update and report of a device are both stored."""

    at_s: float
    round: int
    device_id: str


@dataclass(frozen=True)
class Failed:
    """A device reported that it cannot do its part."""

    at_s: float
    round: int
    device_id: str
    reason: str


@dataclass(frozen=True)
class Merged:
    """The new adapter of a closed round is committed."""

    at_s: float
    round: int


@dataclass(frozen=True)
class Tick:
    """Time has passed."""

    at_s: float


Event = DeviceReady | DeviceLost | RoundPlanned | Arrived | Failed | Merged | Tick


@dataclass(frozen=True)
class PlanRound:
    """Plan this round for these devices (sorted) and answer with `RoundPlanned`."""

    round: int
    device_ids: tuple[str, ...]
    evaluate_only: bool


@dataclass(frozen=True)
class CloseRound:
    """Merge exactly these updates, none if evaluate-only, and answer with `Merged`."""

    round: int
    on_time: tuple[str, ...]
    late: tuple[tuple[str, int], ...]  # (device, the round its update belongs to)
    evaluate_only: bool = False


@dataclass(frozen=True)
class RefuseLate:
    """Tell the device that its update will not be merged, and why."""

    device_id: str
    round: int
    reason: str


@dataclass(frozen=True)
class FinishRun:
    """Nothing is left to do."""


Effect = PlanRound | CloseRound | RefuseLate | FinishRun


@dataclass(frozen=True)
class RunState:
    """Where a run stands. Rebuilt after a restart without `asked_at_s`, so `Tick` asks again."""

    phase: Phase = "gathering"
    round: int = 0
    ready: frozenset[str] = frozenset()
    assigned: frozenset[str] = frozenset()
    arrived: frozenset[str] = frozenset()
    failed: tuple[tuple[str, str], ...] = ()  # (device, reason) of this round, sorted
    outstanding: frozenset[tuple[str, int]] = frozenset()  # owed from closed rounds
    late: tuple[tuple[str, int], ...] = ()  # in from closed rounds, for the next close
    opened_at_s: float = 0.0  # when the present phase began
    deadline_at_s: float = math.inf
    enough_since_s: float | None = None  # since when min_devices are ready
    not_before_s: float = -math.inf  # do not plan earlier
    evaluating: bool = False
    asked_at_s: float | None = None  # when the effect this phase waits on was issued
    quiet_since_s: float | None = None  # since when no device that still owes is connected
    closing: CloseRound | None = None  # what is being merged, frozen at the close
    attempts: int = 0  # how often this round was gathered again because nobody delivered

    @property
    def waiting(self) -> frozenset[str]:
        """Assigned devices that neither arrived nor failed."""
        return self.assigned - self.arrived - {device for device, _ in self.failed}


def late_discount(rounds_late: int) -> float:
    """Weight factor of an update this many rounds late: FedBuff's (1 + tau)^-0.5."""
    return 1 / math.sqrt(1 + rounds_late)


def extended(state: RunState, downtime_s: float) -> RunState:
    """The state with its deadline moved by the time the coordinator was away."""
    return replace(state, deadline_at_s=state.deadline_at_s + downtime_s)


def too_late(state: RunState, round_: int, policy: RoundPolicy) -> str | None:
    """Why an update of this round can no longer be merged; None if it can."""
    if state.phase == "open" and round_ == state.round and not state.evaluating:
        return None
    merges_in = state.round + 1 if state.phase == "merging" else state.round
    behind = merges_in - round_
    if state.phase == "finished" or merges_in >= policy.rounds:
        return f"update of round {round_}: the last training round is closed, nothing is merged"
    if behind > policy.late_rounds:
        return (
            f"update of round {round_}: it comes {behind} rounds late, this run accepts "
            f"{policy.late_rounds}"
        )
    return None


def advance(
    state: RunState, event: Event, policy: RoundPolicy
) -> tuple[RunState, tuple[Effect, ...]]:
    """The state after an event, and what the caller must now do, in order.

    Events that no longer matter (duplicates, answers to an earlier question) change nothing.
    """
    effects: tuple[Effect, ...] = ()
    match event:
        case DeviceReady(device_id=device):
            state = _counted(state, state.ready | {device}, event.at_s, policy)
        case DeviceLost(device_id=device):
            state = _counted(state, state.ready - {device}, event.at_s, policy)
        case RoundPlanned():
            state = _opened(state, event, policy)
        case Arrived():
            state, effects = _arrived(state, event, policy)
        case Failed():
            state = _failed(state, event)
        case Merged():
            state, effects = _merged(state, event, policy)
        case Tick():
            pass
    state, more = _settle(state, event.at_s, policy)
    return state, effects + more


def _counted(state: RunState, ready: frozenset[str], at_s: float, policy: RoundPolicy) -> RunState:
    enough = len(ready) >= max(1, policy.min_devices)
    since = None
    if enough:
        since = at_s if state.enough_since_s is None else state.enough_since_s
    # Another fleet may be planned for at once, even if the last question had no answer.
    ask = state.phase == "gathering" and ready != state.ready
    asked = None if ask else state.asked_at_s
    return replace(state, ready=ready, enough_since_s=since, asked_at_s=asked)


def _opened(state: RunState, event: RoundPlanned, policy: RoundPolicy) -> RunState:
    if state.phase != "gathering" or event.round != state.round or not event.device_ids:
        return state  # without devices: asked again after `retry_s`, or when the fleet changes
    return replace(
        state,
        phase="open",
        asked_at_s=None,
        quiet_since_s=None,
        assigned=frozenset(event.device_ids),
        evaluating=event.round >= policy.rounds,
        opened_at_s=event.at_s,
        deadline_at_s=event.at_s + event.round_s * (1 + policy.grace),
    )


def _arrived(
    state: RunState, event: Arrived, policy: RoundPolicy
) -> tuple[RunState, tuple[Effect, ...]]:
    device = event.device_id
    if state.phase == "open" and event.round == state.round and device in state.assigned:
        failed = tuple(pair for pair in state.failed if pair[0] != device)
        return replace(state, arrived=state.arrived | {device}, failed=failed), ()
    owed = (device, event.round)
    if owed not in state.outstanding:
        return state, ()  # counted before, or never asked for
    state = replace(state, outstanding=state.outstanding - {owed})
    if (why := too_late(state, event.round, policy)) is not None:
        return state, (RefuseLate(device, event.round, why),)
    return replace(state, late=tuple(sorted((*state.late, owed)))), ()


def _failed(state: RunState, event: Failed) -> RunState:
    device = event.device_id
    if event.round != state.round and (device, event.round) in state.outstanding:
        return replace(state, outstanding=state.outstanding - {(device, event.round)})
    if state.phase != "open" or event.round != state.round or device not in state.waiting:
        return state
    return replace(state, failed=tuple(sorted((*state.failed, (device, event.reason)))))


def _merged(
    state: RunState, event: Merged, policy: RoundPolicy
) -> tuple[RunState, tuple[Effect, ...]]:
    if state.phase != "merging" or event.round != state.round:
        return state, ()
    if state.evaluating:
        return replace(state, phase="finished", closing=None), (FinishRun(),)
    return _gathering(state, event.round + 1, event.at_s, policy), ()


def _gathering(state: RunState, number: int, at_s: float, policy: RoundPolicy) -> RunState:
    """Back to gathering, for the next round or for this one again."""
    return replace(
        state,
        phase="gathering",
        round=number,
        assigned=frozenset(),
        arrived=frozenset(),
        failed=(),
        opened_at_s=at_s,
        deadline_at_s=math.inf,
        evaluating=number >= policy.rounds,
        asked_at_s=None,
        quiet_since_s=None,
        closing=None,
    )


def _settle(
    state: RunState, at_s: float, policy: RoundPolicy
) -> tuple[RunState, tuple[Effect, ...]]:
    """What is due now, whatever the event was."""
    match state.phase:
        case "gathering":
            return _settle_gathering(state, at_s, policy)
        case "open":
            return _settle_open(state, at_s, policy)
        case "merging" if state.asked_at_s is None and state.closing is not None:
            return replace(state, asked_at_s=at_s), (state.closing,)
    return state, ()


def _settle_gathering(
    state: RunState, at_s: float, policy: RoundPolicy
) -> tuple[RunState, tuple[Effect, ...]]:
    evaluating = state.round >= policy.rounds
    state = replace(state, evaluating=evaluating)
    if at_s < state.not_before_s:
        return state, ()
    if state.asked_at_s is not None and at_s - state.asked_at_s < policy.retry_s:
        return state, ()
    enough = state.enough_since_s is not None and at_s - state.enough_since_s >= policy.gather_s
    # The run is trained: who does not come back in time is not waited for.
    patient = evaluating and at_s - state.opened_at_s >= max(policy.gather_s, policy.retry_s)
    if patient and not state.ready:
        return replace(state, phase="finished"), (FinishRun(),)
    if not enough and not patient:
        return state, ()
    plan = PlanRound(state.round, tuple(sorted(state.ready)), evaluating)
    return replace(state, asked_at_s=at_s), (plan,)


def _settle_open(
    state: RunState, at_s: float, policy: RoundPolicy
) -> tuple[RunState, tuple[Effect, ...]]:
    overdue = at_s >= state.deadline_at_s
    if state.evaluating:
        return _closed(state, at_s) if overdue or not state.waiting else (state, ())
    if not state.waiting and state.arrived:
        return _closed(state, at_s)
    needed = max(1, math.ceil(policy.quorum * len(state.assigned) - 1e-9))
    if overdue and len(state.arrived) >= needed:
        return _closed(state, at_s)
    # A device may stay connected and never deliver: what it had is given once more, no longer.
    spare_s = max(policy.retry_s, state.deadline_at_s - state.opened_at_s)
    if state.waiting and at_s < state.deadline_at_s + spare_s:
        if state.waiting & state.ready:
            return replace(state, quiet_since_s=None), ()
        since_s = at_s if state.quiet_since_s is None else state.quiet_since_s
        if not (overdue and at_s - since_s >= policy.retry_s):
            # They may come back: after a restart nobody is connected at first.
            return replace(state, quiet_since_s=since_s), ()
    if state.arrived:
        return _closed(state, at_s)
    # Nobody delivered: the same round again, but not in a tight loop.
    again = replace(
        _gathering(state, state.round, at_s, policy),
        not_before_s=state.opened_at_s + policy.retry_s,
        attempts=state.attempts + 1,
    )
    return _settle_gathering(again, at_s, policy)


def _closed(state: RunState, at_s: float) -> tuple[RunState, tuple[Effect, ...]]:
    owed = {(device, state.round) for device in state.assigned - state.arrived}
    close = CloseRound(
        state.round,
        tuple(sorted(state.arrived)),
        () if state.evaluating else state.late,
        evaluate_only=state.evaluating,
    )
    state = replace(
        state,
        phase="merging",
        outstanding=state.outstanding if state.evaluating else state.outstanding | owed,
        late=(),
        opened_at_s=at_s,
        deadline_at_s=math.inf,
        closing=close,
        asked_at_s=at_s,
        attempts=0,
    )
    return state, (close,)
