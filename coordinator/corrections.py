"""What a run's own reports teach of each device: history in, one `Correction` per device out.

A pure function over the stored assignments, so that a restart knows exactly what was known before.
Predicted against measured memory and time correct the next predictions; a device that ran out of
memory is trusted with less of it, one that crashed or never answered with fewer steps, and gets
both back after good rounds. Knows records and reports; plans nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from coordinator.store.rows import AssignmentRecord
from profiles.cost import Correction

NEWEST = 0.3  # weight of the newest report in the means of logarithms
MEMORY_LIMITS = (0.7, 2.0)  # factors beyond these say more about the machine's other work
TIME_LIMITS = (0.2, 10.0)
FIRST_VARIATION = 0.1  # until there are reports; `profiles.work.Correction`
LEAST_VARIATION = 0.05

LESS_MEMORY = 0.8  # of what it was trusted with, each time a device runs out
LESS_WORK = 0.5  # of the steps, each time it fails otherwise or is not heard of again
MOST_STRIKES = 4  # later ones lower nothing further
GOOD_ROUNDS = 2  # until one strike is forgiven; doubled by each that came before

MEASURES = ("done",)
FAULTS = ("crashed",)  # no_data and base_mismatch are not for want of strength


@dataclass
class _Strikes:
    """Times that something went wrong, and how much of it is forgiven."""

    now: int = 0
    ever: int = 0
    good: int = 0

    def strike(self) -> None:
        self.now, self.ever, self.good = min(self.now + 1, MOST_STRIKES), self.ever + 1, 0

    def forgive(self) -> None:
        """One good round; one that fails again is trusted later, so that it does not flap."""
        if not self.now:
            return
        self.good += 1
        if self.good >= self.patience:
            self.now, self.good = self.now - 1, 0

    @property
    def patience(self) -> int:
        """Good rounds until one strike is forgiven."""
        return int(GOOD_ROUNDS * 2 ** (min(self.ever, 8) - 1))


@dataclass
class _Learnt:
    memory: float | None = None  # mean of log(measured / predicted)
    time: float | None = None
    error: float | None = None  # mean of |log| about the mean
    load_s: float | None = None
    memory_strikes: _Strikes = field(default_factory=_Strikes)
    work_strikes: _Strikes = field(default_factory=_Strikes)


def learnt(history: Sequence[AssignmentRecord], closed: Iterable[int]) -> dict[str, Correction]:
    """One correction for each device that was ever asked for anything.

    history: every assignment of the run, in any order. closed: the rounds that have ended; who
    sent nothing in one of these was not heard of again.
    """
    over = set(closed)
    found: dict[str, _Learnt] = {}
    for record in sorted(history, key=lambda r: (r.assignment.round, r.assignment.device_id)):
        known = found.setdefault(record.assignment.device_id, _Learnt())
        _learn(known, record, ended=record.assignment.round in over)
    return {device_id: _correction(known) for device_id, known in sorted(found.items())}


def _learn(known: _Learnt, record: AssignmentRecord, *, ended: bool) -> None:
    report = record.report
    if report is None:
        if ended:
            known.work_strikes.strike()
        return
    if report.outcome == "out_of_memory":
        known.memory_strikes.strike()
        return
    if report.outcome in FAULTS:
        known.work_strikes.strike()
        return
    if report.outcome not in MEASURES:
        return
    known.memory_strikes.forgive()
    known.work_strikes.forgive()
    predicted = record.predicted
    cost: Mapping[str, Any] = predicted.get("predicted", {})
    expected_peak = float(predicted.get("uncorrected_peak_bytes", 0))
    if report.peak_bytes > 0 and expected_peak > 0:
        low, high = map(math.log, MEMORY_LIMITS)
        seen = min(high, max(low, math.log(report.peak_bytes / expected_peak)))
        known.memory = _mean(known.memory, seen)
    factor = float(predicted.get("time_factor", 1.0))
    expected_s = (cost.get("train_s", 0.0) + cost.get("evaluate_s", 0.0)) / factor
    took_s = report.train_s + report.evaluate_s
    whole = not report.resumed_step  # a resumed round did the rest only
    if expected_s > 0 and took_s > 0 and record.assignment.trains and whole:
        least, most = TIME_LIMITS
        seen = math.log(min(most, max(least, took_s / expected_s)))  # a claim may round to 0
        off = abs(seen - (seen if known.time is None else known.time))
        known.error = off if known.error is None else _mean(known.error, off)
        known.time = _mean(known.time, seen)
    known.load_s = _mean(known.load_s, report.load_s)


def _mean(before: float | None, seen: float) -> float:
    return seen if before is None else (1 - NEWEST) * before + NEWEST * seen


def _correction(known: _Learnt) -> Correction:
    memory, work = known.memory_strikes, known.work_strikes
    notes = []
    if memory.now:
        left = memory.patience - memory.good
        notes.append(
            f"{LESS_MEMORY**memory.now:.0%} of its memory since it ran out {_times(memory.ever)}, "
            f"more after {left} good {'round' if left == 1 else 'rounds'}"
        )
    if work.now:
        left = work.patience - work.good
        notes.append(
            f"{LESS_WORK**work.now:.0%} of the steps since it failed or was not heard of "
            f"{_times(work.ever)}, more after {left} good {'round' if left == 1 else 'rounds'}"
        )
    variation = FIRST_VARIATION
    if known.error:
        variation = max(LEAST_VARIATION, math.expm1(known.error))
    return Correction(
        memory=math.exp(known.memory or 0.0),
        time=math.exp(known.time or 0.0),
        variation=variation,
        load_s=known.load_s or 0.0,
        memory_share=LESS_MEMORY**memory.now,
        work_share=LESS_WORK**work.now,
        note=" and ".join(notes),
    )


def _times(number: int) -> str:
    return "once" if number == 1 else f"{number} times"


def plans_before(
    history: Sequence[AssignmentRecord], *, measuring: bool
) -> dict[str, dict[str, Any]]:
    """By device, the recorded plan of the newest training round of this kind that it was in.

    Kind: whether the whole adapter was measured in that round, for that leaves less to training.
    Of a device that was in none of this kind, the newest of the other.
    """
    trained = [r for r in history if r.assignment.trains and r.predicted]
    alike = _measuring(history)
    ordered = sorted(
        trained,
        key=lambda r: ((r.assignment.round in alike) == measuring, r.assignment.round),
    )
    return {r.assignment.device_id: r.predicted for r in ordered}


def length_before(history: Sequence[AssignmentRecord], *, measuring: bool) -> float | None:
    """Length of the newest training round that did, or did not, measure the whole adapter."""
    alike = _measuring(history)
    lengths = {r.assignment.round: r.assignment.deadline_s for r in history if r.assignment.trains}
    rounds = [number for number in lengths if (number in alike) == measuring]
    return lengths[max(rounds)] if rounds else None


def _measuring(history: Sequence[AssignmentRecord]) -> set[int]:
    """Rounds in which some device measured the whole adapter."""
    return {r.assignment.round for r in history if r.assignment.evaluates_global}
