"""Where the bytes and seconds of a run went: per device and phase, round by round.

Works on what devices reported and what the coordinator noted; knows no tables and no pictures. An
emulated link is known to whoever emulates it; here the link is what a device estimated of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from coordinator.store.rows import AssignmentRecord, RoundRecord
from profiles.device import DeviceProfile
from protos.contract import LocalReport

# In the order in which a round goes through them. Evaluations come before and after training and
# are told as one; paused: the owner, the heat or the hour held it up.
PHASES = ("wait", "fetch", "load", "train", "evaluate", "paused", "pack", "push")


@dataclass(frozen=True)
class DeviceTime:
    """One device in one round. Seconds by phase, as `PHASES`; `begun_at` is the end of "wait".

    Begun as the device's own seconds say when its update was in, or as the round opened when it
    sent none; clocks of devices are not believed.
    """

    device_id: str
    round: int
    begun_at: float  # Unix seconds
    seconds: Mapping[str, float]
    up_bytes: int
    down_bytes: int
    resent_bytes: int
    resumes: int

    @property
    def up_bps(self) -> float | None:
        """Goodput of the update, bit/s; None when nothing was sent."""
        return goodput_bps(self.up_bytes, self.seconds["push"])

    @property
    def down_bps(self) -> float | None:
        """Goodput of what was fetched, bit/s; None when nothing was."""
        return goodput_bps(self.down_bytes, self.seconds["fetch"])


@dataclass(frozen=True)
class DevicePhases:
    """The same, of all rounds of one device."""

    device_id: str
    seconds: Mapping[str, float]
    up_bytes: int
    down_bytes: int
    resent_bytes: int
    resumes: int
    up_bps: float | None  # goodput
    down_bps: float | None
    link_up_bps: float | None  # as the device estimates it
    link_down_bps: float | None

    @property
    def payload_bytes(self) -> int:
        """Both ways, each byte counted once."""
        return self.up_bytes + self.down_bytes

    @property
    def resent_share(self) -> float:
        """Bytes that crossed again per byte of payload."""
        return self.resent_bytes / self.payload_bytes if self.payload_bytes else 0.0

    def plain(self) -> dict[str, Any]:
        """JSON values."""
        return {**asdict(self), "resent_share": self.resent_share}


def goodput_bps(size_bytes: int, seconds: float) -> float | None:
    """Payload per second, in bits; None when nothing moved."""
    return 8 * size_bytes / seconds if size_bytes and seconds > 0 else None


def device_times(
    given: Iterable[AssignmentRecord], rounds: Sequence[RoundRecord]
) -> tuple[DeviceTime, ...]:
    """Every device in every round that it reported of, by round and device."""
    opened = {r.round: r.opened_at for r in rounds}
    found = []
    for record in given:
        a, report = record.assignment, record.report
        if report is None or a.round not in opened:
            continue
        seconds = seconds_by_phase(report)
        begun_at = opened[a.round]
        if record.received_at is not None:
            at_work_s = math.fsum(s for phase, s in seconds.items() if phase != "wait")
            begun_at = max(begun_at, record.received_at - at_work_s)
        found.append(
            DeviceTime(
                a.device_id, a.round, begun_at, seconds, report.pushed_bytes,
                report.fetched_bytes, report.resent_bytes, report.resumes,
            )
        )  # fmt: skip
    return tuple(found)


def device_phases(
    times: Iterable[DeviceTime], profiles: Mapping[str, DeviceProfile]
) -> tuple[DevicePhases, ...]:
    """One for every device, by name."""
    by_device: dict[str, list[DeviceTime]] = {}
    for time in times:
        by_device.setdefault(time.device_id, []).append(time)
    found = []
    for device, of in sorted(by_device.items()):
        seconds = {phase: math.fsum(t.seconds[phase] for t in of) for phase in PHASES}
        up_bytes, down_bytes = sum(t.up_bytes for t in of), sum(t.down_bytes for t in of)
        profile = profiles.get(device)
        link = None if profile is None else profile.link
        found.append(
            DevicePhases(
                device_id=device,
                seconds=seconds,
                up_bytes=up_bytes,
                down_bytes=down_bytes,
                resent_bytes=sum(t.resent_bytes for t in of),
                resumes=sum(t.resumes for t in of),
                up_bps=goodput_bps(up_bytes, seconds["push"]),
                down_bps=goodput_bps(down_bytes, seconds["fetch"]),
                link_up_bps=None if link is None else link.up_bps,
                link_down_bps=None if link is None else link.down_bps,
            )
        )
    return tuple(found)


def seconds_by_phase(report: LocalReport) -> dict[str, float]:
    """The seconds of a report, as `PHASES`."""
    return {phase: float(getattr(report, f"{phase}_s")) for phase in PHASES}


PHASE_COLUMNS = (
    "device", *PHASES, "MB\ndown / up", "sent twice", "goodput Mbit/s\ndown / up",
    "of the link\ndown / up",
)  # fmt: skip


def phase_table(
    phases: Sequence[DevicePhases],
    links: Mapping[str, tuple[float | None, float | None]] | None = None,
) -> list[list[str]]:
    """Text cells, one row a device, columns as `PHASE_COLUMNS`; phases in seconds.

    `links`: bit/s (up, down) by device, where the link is known better than devices estimate it.
    """
    rows = []
    for p in phases:
        up, down = (links or {}).get(p.device_id, (p.link_up_bps, p.link_down_bps))
        rows.append([
            p.device_id,
            *(_seconds(p.seconds[phase]) for phase in PHASES),
            f"{p.down_bytes / 1e6:.2f} / {p.up_bytes / 1e6:.2f}",
            f"{p.resent_share:.2%}",
            f"{_megabits(p.down_bps)} / {_megabits(p.up_bps)}",
            f"{_share(p.down_bps, down)} / {_share(p.up_bps, up)}",
        ])  # fmt: skip
    return rows


def _seconds(value: float) -> str:
    if value < 0.05:
        return "-"
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}"


def _megabits(bps: float | None) -> str:
    return "-" if bps is None else f"{bps / 1e6:.3g}"


def _share(bps: float | None, of_bps: float | None) -> str:
    return "-" if bps is None or not of_bps else f"{bps / of_bps:.0%}"
