"""When and how hard this device may train: the owner's [policy], readings, the clock -> a verdict.

Pure. Each rule has two thresholds, one that begins a restraint and an easier one that ends it, and
a time for which it must have been quiet, so that a verdict does not flap. The strictest rule wins.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from edge_agent.readings import Readings
from profiles.compat import StrEnum
from profiles.settings import Section

HALF = 0.5  # of the time
TRIP_PAUSE_C, TRIP_SLOW_C, TRIP_RESUME_C = 1.0, 5.0, 8.0  # below the nearest trip point
COOL_BY_C = 10.0  # how far below pause_above_c training goes on, unless given
BUSY, QUIET = 0.25, 0.10  # share of the processor that others use
BATTERY_BACK = 3.0  # percent above the limit before training goes on
MEMORY_BACK = 1.25  # times what is to be left
RANGE = re.compile(r"([01]?\d|2[0-4]):([0-5]\d)\s*-\s*([01]?\d|2[0-4]):([0-5]\d)")
DAY_MINUTES = 24 * 60


class Cause(StrEnum):
    """Why a device holds back."""

    HOURS = "hours"
    BATTERY = "battery"
    HEAT = "heat"
    OWNER = "owner"
    MEMORY = "memory"


# Seconds without a sign of the cause before the restraint ends.
CALM_S = {Cause.HOURS: 0, Cause.BATTERY: 10, Cause.HEAT: 10, Cause.OWNER: 30, Cause.MEMORY: 10}


def _battery(value: Any) -> Any:
    sure = isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= 99
    if sure or value in ("never", "always"):
        return value
    raise ValueError('must be "never", "always" or a percentage from 1 to 99')


class Policy(Section):
    """When training may use this device."""

    hours: tuple[str, ...] = ()
    """Local times of day at which to train, ["22:00-06:30"]; empty: at any time."""
    on_battery: Annotated[str | int, BeforeValidator(_battery)] = "never"
    """"never", "always", or above this percentage."""
    pause_above_c: Annotated[float, Field(ge=30, le=120)] | None = None
    """Of the warmest zone, °C; the board's own trip points when not given."""
    resume_below_c: Annotated[float, Field(ge=20, le=120)] | None = None
    """10 °C less than `pause_above_c` when not given."""
    owner: Literal["dedicated", "background", "idle-only"] = "dedicated"
    """While other programs use processor or GPU: go on, at half speed, or not at all."""
    leave_memory_mb: Annotated[int, Field(ge=0)] = 0
    """Memory that other programs keep, MB; training is planned without it and waits below it."""

    @field_validator("hours")
    @classmethod
    def _ranges(cls, hours: tuple[str, ...]) -> tuple[str, ...]:
        for text in hours:
            _minutes(text)
        return hours

    @model_validator(mode="after")
    def _in_order(self) -> Policy:
        pause_c, resume_c = self.pause_above_c, self.resume_below_c
        if resume_c is not None and (pause_c is None or resume_c >= pause_c):
            raise ValueError("resume_below_c must be below pause_above_c, which it needs")
        return self


@dataclass(frozen=True)
class Verdict:
    """The share of time in which to train, and why it is not all of it."""

    duty: float = 1.0  # 0: pause
    why: str = ""
    cause: Cause | None = None
    seen_at_s: float = 0.0  # when the cause was last seen, on the monotonic clock

    @property
    def pauses(self) -> bool:
        """Whether training is to wait."""
        return self.duty == 0.0

    @property
    def is_lasting(self) -> bool:
        """Whether waiting it out takes hours rather than minutes."""
        return self.pauses and self.cause in (Cause.HOURS, Cause.BATTERY)

    @property
    def control(self) -> dict[str, Any]:
        """What the trainer's control file is to hold."""
        if self.pauses:
            return {"pause": self.why}
        return {} if self.duty >= 1.0 else {"duty": self.duty}


FREE = Verdict()


def decide(
    policy: Policy, found: Readings, local: datetime, at_s: float, before: Verdict = FREE
) -> Verdict:
    """The verdict now. `local`: wall clock of the owner; `at_s`: monotonic; `before`: the last."""
    seen = []
    for cause, rule in _RULES.items():
        verdict = rule(policy, found, local, before.cause is cause)
        if verdict is not None:
            seen.append(replace(verdict, cause=cause, seen_at_s=at_s))
    now = min(seen, key=lambda verdict: verdict.duty, default=FREE)
    if before.cause is None or now.duty <= before.duty:
        return now
    if now.cause is before.cause:  # the heat that ends a pause may still halve the speed
        return now
    calm = at_s - before.seen_at_s >= CALM_S[before.cause]
    return now if calm else before


def _hours(policy: Policy, found: Readings, local: datetime, holds: bool) -> Verdict | None:
    minute = local.hour * 60 + local.minute
    if not policy.hours or any(_within(minute, *_minutes(text)) for text in policy.hours):
        return None
    begins = min((_minutes(text)[0] for text in policy.hours),
                 key=lambda begin: (begin - minute) % DAY_MINUTES)  # fmt: skip
    at = f"{begins // 60 % 24:02d}:{begins % 60:02d}"
    return Verdict(0.0, f"outside the hours its owner allows; goes on at {at} local time")


def _on_battery(policy: Policy, found: Readings, local: datetime, holds: bool) -> Verdict | None:
    if policy.on_battery == "always" or not found.on_battery:
        return None
    if policy.on_battery == "never":
        return Verdict(0.0, "on battery; goes on when plugged in")
    least = float(policy.on_battery)
    percent = found.battery_percent
    if percent is not None and percent >= least + (BATTERY_BACK if holds else 0.0):
        return None
    charge = "an unknown charge" if percent is None else f"{percent:.0f} %"
    return Verdict(0.0, f"on battery at {charge}; goes on above {least:.0f} % or when plugged in")


def _heat(policy: Policy, found: Readings, local: datetime, holds: bool) -> Verdict | None:
    pause_c, now_c = policy.pause_above_c, found.temperature_c
    if pause_c is not None:
        resume_c = pause_c - COOL_BY_C if policy.resume_below_c is None else policy.resume_below_c
        if now_c is None or now_c < (resume_c if holds else pause_c):
            return None
        return Verdict(0.0, f"{now_c:.0f} °C; goes on below {resume_c:.0f} °C")
    room_c = found.headroom_c
    if room_c is None or room_c >= (TRIP_RESUME_C if holds else TRIP_SLOW_C):
        return None
    if room_c < TRIP_PAUSE_C:
        return Verdict(0.0, f"{room_c:.0f} °C below where the board protects itself; cooling down")
    return Verdict(HALF, f"half speed: {room_c:.0f} °C below where the board protects itself")


def _owner(policy: Policy, found: Readings, local: datetime, holds: bool) -> Verdict | None:
    if policy.owner == "dedicated":
        return None
    cpu = found.others_cpu is not None and found.others_cpu > (QUIET if holds else BUSY)
    if not cpu and not found.others_gpu:
        return None
    what = "GPU" if found.others_gpu else "processor"
    if policy.owner == "idle-only":
        return Verdict(0.0, f"other programs use the {what}; goes on when they are done")
    return Verdict(HALF, f"half speed: other programs use the {what}")


def _memory(policy: Policy, found: Readings, local: datetime, holds: bool) -> Verdict | None:
    left = found.memory_available_bytes
    least = policy.leave_memory_mb * 10**6
    if left is None or left >= least * (MEMORY_BACK if holds else 1.0):
        return None
    return Verdict(
        0.0, f"{left / 1e6:.0f} MB of memory left of the {least / 1e6:.0f} its owner keeps"
    )


_RULES: dict[Cause, Callable[[Policy, Readings, datetime, bool], Verdict | None]] = {
    Cause.HOURS: _hours,
    Cause.BATTERY: _on_battery,
    Cause.HEAT: _heat,
    Cause.OWNER: _owner,
    Cause.MEMORY: _memory,
}


def _minutes(text: str) -> tuple[int, int]:
    """Begin and end of "22:00-06:30" in minutes of the day. Raises `ValueError`."""
    found = RANGE.fullmatch(text.strip())
    if found is not None:
        begin, end = (int(found[i]) * 60 + int(found[i + 1]) for i in (1, 3))
        if begin < DAY_MINUTES and end <= DAY_MINUTES and begin != end:
            return begin, end
    raise ValueError(f'{text!r} must be a range of local times, for example "22:00-06:30"')


def _within(minute: int, begin: int, end: int) -> bool:
    if begin < end:
        return begin <= minute < end
    return minute >= begin or minute < end
