"""What becomes of a local round that failed: what the coordinator is told, and who must act.

The sentence travels, so it never holds paths or text of this device.
"""

from __future__ import annotations

import sqlite3

from edge_agent.trainer_process import TrainerError
from profiles.errors import DISK_ERRORS, SketchfleetError
from profiles.model import ModelError
from protos.contract import Assignment, LocalReport, Outcome, from_plain

OWNER_MUST_ACT = ("no_data", "base_mismatch")  # trying again next round would fail alike

SQLITE_DISK_ERRORS = {  # sqlite.org/rescode.html; before Python 3.11 told in words only
    13: "database or disk is full",
    10: "disk I/O error",
    8: "attempt to write a readonly database",
}


class BudgetError(SketchfleetError):
    """Today's data budget does not suffice."""


def is_of_disk(error: OSError | sqlite3.Error) -> bool:
    """Whether a disk that is full, read-only or failing says so, which may pass."""
    if isinstance(error, OSError):
        return error.errno in DISK_ERRORS
    code = getattr(error, "sqlite_errorcode", None)
    if code is None:
        return str(error) in SQLITE_DISK_ERRORS.values()
    return code & 0xFF in SQLITE_DISK_ERRORS


def failed(assignment: Assignment, error: TrainerError | ModelError | BudgetError) -> LocalReport:
    """The report of a round that could not be done."""
    match error:
        case TrainerError():
            outcome, message = error.outcome, _told(error.outcome, assignment)
        case ModelError():
            outcome, message = "base_mismatch", _told("base_mismatch", assignment)
        case BudgetError():
            outcome, message = "crashed", str(error)
    plain = {
        "assignment_id": assignment.assignment_id, "outcome": outcome, "message": message,
    }  # fmt: skip
    return from_plain(LocalReport, plain)


def _told(outcome: Outcome | str, assignment: Assignment) -> str:
    match outcome:
        case "out_of_memory":
            return (
                f"training ran out of memory at {assignment.precision}, k={assignment.rank}, "
                f"micro-batch {assignment.micro_batch} of {assignment.sequence_tokens} tokens"
            )
        case "no_data":
            return "too little source code to train on and to hold out"
        case "base_mismatch":
            return "its base model is not the run's"
    return "the trainer failed; the log on the device says why"
