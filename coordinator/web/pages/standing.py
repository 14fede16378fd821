"""Where each device stands: what it does now, what it was given last, how it fares in the fleet."""

from __future__ import annotations

import math
from dataclasses import dataclass

from coordinator.ledger_types import LedgerRow
from coordinator.web import words
from coordinator.web.facts import Facts
from coordinator.web.pages.parts import Level
from profiles.device import DeviceProfile
from protos.contract import Progress

AWAY_AFTER_S = 120.0  # as the engine counts a device as lost


@dataclass(frozen=True)
class Standing:
    """One device of the fleet."""

    device_id: str
    state: str
    level: Level
    note: str  # to the state: how far, or why not
    at_work: bool
    profile: DeviceProfile | None
    last: LedgerRow | None  # of its newest training round
    loss: float | None  # of the whole adapter, as it last received one
    loss_round: int | None
    gap: float | None  # to the mean of all that measured the same adapter
    up_bytes: int
    down_bytes: int
    dense_bytes: int  # of dense updates in place of those it sent
    merged: int  # rounds with its update in the merge
    last_seen_at: float

    @property
    def board(self) -> str:
        """What it calls itself, and the kind of hardware where that is known."""
        return words.UNKNOWN if self.profile is None else self.profile.board or words.UNKNOWN

    @property
    def compression(self) -> float | None:
        """Dense bytes per byte sent."""
        return self.dense_bytes / self.up_bytes if self.up_bytes else None


def standings(facts: Facts) -> tuple[Standing, ...]:
    """Every device that is enrolled or was given work, by name."""
    records = {d.device_id: d for d in facts.devices}
    names = sorted(records.keys() | facts.rows_by_device.keys())
    newest = {name: newest_loss(facts, name) for name in names}
    found = []
    for name in names:
        rows, measured = facts.rows_by_device.get(name, ()), newest[name]
        loss = None if measured is None else measured.loss_received
        mean = None if measured is None else _mean_beside(facts, measured.round)
        trained = [r for r in rows if not r.evaluate_only]
        record = records.get(name)
        seen_at = record.last_seen_at if record is not None else 0.0
        state, level, note = _state(facts, name, seen_at)
        found.append(
            Standing(
                device_id=name,
                state=state,
                level=level,
                note=note,
                at_work=facts.live is not None and name in facts.live.state.waiting,
                profile=None if record is None else record.profile,
                last=trained[-1] if trained else None,
                loss=loss,
                loss_round=None if measured is None else measured.round,
                gap=loss - mean if loss is not None and mean is not None else None,
                up_bytes=sum(r.up_bytes for r in rows),
                down_bytes=sum(r.down_bytes or 0 for r in rows),
                dense_bytes=sum(r.dense_bytes for r in rows),
                merged=sum(r.merged for r in rows),
                last_seen_at=seen_at,
            )
        )
    return tuple(found)


def newest_loss(facts: Facts, device_id: str) -> LedgerRow | None:
    """The newest row of a closed round in which a device measured the whole adapter it received."""
    rounds = sorted(facts.measured, reverse=True)
    found = (facts.measured[number].get(device_id) for number in rounds)
    return next((row for row in found if row is not None), None)


def _mean_beside(facts: Facts, number: int) -> float | None:
    """Mean loss of the devices that measured the adapter of a round; None where it was but one."""
    losses = [r.loss_received for r in facts.measured[number].values()]
    known = [loss for loss in losses if loss is not None]
    return math.fsum(known) / len(known) if len(known) > 1 else None


def _state(facts: Facts, device_id: str, seen_at: float) -> tuple[str, Level, str]:
    """(what it does, how good that is, how far or why)."""
    age_s = facts.at - seen_at
    if facts.live is None or facts.run.finished_at is not None:
        return "idle", "", ""
    state = facts.live.state
    failed = dict(state.failed)
    if device_id in failed:
        return "failed", "bad", failed[device_id].replace("_", " ")
    if device_id in state.arrived and state.phase in ("open", "merging"):
        return "done", "good", f"round {state.round}"
    if device_id in facts.live.left_out:
        return "left out", "warn", facts.live.left_out[device_id]
    if age_s > AWAY_AFTER_S:
        return "away", "bad", f"not heard of for {words.duration(age_s)}"
    if device_id in state.waiting and state.phase == "open":
        return _working(facts.live.progress.get(device_id))
    if device_id in state.ready:
        return "ready", "good", ""
    return "joining", "", "to be measured"


def _working(progress: Progress | None) -> tuple[str, Level, str]:
    if progress is None:
        return "at work", "", "nothing told yet"
    if progress.paused:
        return "paused", "warn", progress.paused
    return "training", "good", f"step {progress.step} of {progress.steps}"
