"""How many bytes each device's update may have: `[plan] bytes_per_round` and `bytes_per_day`.

A day's bytes are spread over the rounds that are left of it, by what was sent since its beginning,
as an owner's own budget is. Knows assignments and their records; what is done with the bytes is the
planner's choice. A day is one of UTC.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from protos.contract import ErrorCurve

if TYPE_CHECKING:  # planning for a fleet that does not exist needs no database
    from coordinator.store.rows import AssignmentRecord

DAY_S = 86_400.0
OFF_S = 5.0  # between two rounds; assumed


def allowances(
    history: Sequence[AssignmentRecord],
    devices: Iterable[str],
    now_s: float,
    *,
    per_round: int,
    per_day: int,
    length_s: float,
    rounds_left: int,
) -> dict[str, int]:
    """Bytes of each device's next update, at most; nobody is in it without a limit (0: none).

    now_s: Unix time. length_s: of a round. rounds_left: of the run, this one included.
    """
    if not per_round and not per_day:
        return {}
    limits = dict.fromkeys(devices, per_round)
    if per_day:
        midnight = now_s - now_s % DAY_S
        left = rounds_within(midnight + DAY_S - now_s, length_s, rounds_left)
        for device_id, limit in limits.items():
            sent = sum(
                record.update_bytes or 0
                for record in history
                if record.assignment.device_id == device_id
                and (record.received_at or 0.0) >= midnight
            )
            fair = max(0, per_day - sent) // left
            limits[device_id] = min(limit, fair) if limit else fair
    return limits


def rounds_within(seconds: float, length_s: float, rounds_left: int) -> int:
    """Rounds of a length that begin in a time, of those that are left; at least one."""
    return max(1, min(rounds_left, math.ceil(seconds / (length_s + OFF_S))))


def curves_of(history: Sequence[AssignmentRecord]) -> Mapping[str, tuple[ErrorCurve, ...]]:
    """By device, what its newest update would have lost in other settings."""
    ordered = sorted(history, key=lambda record: record.assignment.round)
    return {
        record.assignment.device_id: record.report.error_curves
        for record in ordered
        if record.report is not None and record.report.error_curves
    }
