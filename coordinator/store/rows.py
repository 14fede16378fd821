"""What rows of the tables say, as dataclasses, and how they are read."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from typing import Any

from profiles.device import DeviceProfile
from protos.contract import AdapterSpec, Assignment, LocalReport, from_json


@dataclass(frozen=True)
class DeviceRecord:
    """One enrolled device."""

    device_id: str
    enrolled_at: float
    last_seen_at: float
    profile: DeviceProfile | None


@dataclass(frozen=True)
class RoundRecord:
    """One round; `phase` is "open", "merging" or "merged"."""

    round: int
    phase: str
    evaluate_only: bool
    opened_at: float
    deadline_at: float
    closed_at: float | None
    merged_at: float | None
    detail: dict[str, Any]


@dataclass(frozen=True)
class AssignmentRecord:
    """One assignment and what came of it; `state` is "issued", "arrived" or "failed"."""

    assignment: Assignment
    predicted: dict[str, Any]
    state: str
    report: LocalReport | None
    update_digest: str | None
    update_bytes: int | None
    received_at: float | None
    merged_in: int | None

    @property
    def arrived(self) -> bool:
        """Whether it counts for its round: complete, and the device did its part."""
        return self.state == "arrived" and self.complete

    @property
    def complete(self) -> bool:
        """Whether all that was asked for is in: the report and, if it trains, the update."""
        return self.report is not None and (
            self.update_digest is not None or not self.assignment.trains
        )


@dataclass(frozen=True)
class UploadRecord:
    """An update that is arriving."""

    upload_id: str
    assignment_id: str
    digest: str
    size_bytes: int


@dataclass(frozen=True)
class RunRecord:
    """A run as it was started."""

    run_id: str
    created_at: float
    config: dict[str, Any]
    spec: AdapterSpec
    alive_at: float
    finished_at: float | None


def read_run(row: Any) -> RunRecord:
    """A row of `runs`."""
    return RunRecord(
        row.run_id, row.created_at, json.loads(row.config), from_json(AdapterSpec, row.spec),
        row.alive_at, row.finished_at,
    )  # fmt: skip


@functools.lru_cache(maxsize=1024)  # asked for when it is handed out, pushed, reported
def _task(text: str) -> Assignment:
    return from_json(Assignment, text)


def read_assignment(row: Any) -> AssignmentRecord:
    """A row of `assignments`."""
    return AssignmentRecord(
        _task(row.assignment), json.loads(row.predicted), row.state,
        from_json(LocalReport, row.report) if row.report else None,
        row.update_digest, row.update_bytes, row.received_at, row.merged_in,
    )  # fmt: skip


def read_upload(row: Any) -> UploadRecord:
    """A row of `uploads`."""
    return UploadRecord(row.upload_id, row.assignment_id, row.digest, row.size_bytes)
