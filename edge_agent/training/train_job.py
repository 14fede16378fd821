"""A local round as it is asked for: the assignment, where its files lie, what the owner allows.

Knows facts and whether they fit together. It opens no file.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from edge_agent.training.connectors import DataSelection
from profiles.errors import SketchfleetError
from protos.contract import AdapterSpec, Assignment


class JobError(SketchfleetError):
    """A job that this trainer cannot read or carry out."""


@dataclass(frozen=True)
class TrainJob:
    """One local round. Paths stand in the order of the assignment's blobs."""

    base_folder: Path
    spec: AdapterSpec
    assignment: Assignment
    data: DataSelection
    slice_paths: tuple[Path, ...] = ()
    side_path: Path | None = None
    global_paths: tuple[Path, ...] = ()
    global_side_path: Path | None = None
    mirror_path: Path | None = None  # what slice and whole adapter are cut from, in their place
    update_path: Path | None = None  # where the packed delta goes
    home_path: Path | None = None  # what the device kept so far; only read, need not exist
    home_out: Path | None = None  # where what it keeps now goes, if there is anything
    personal_weight: float = 0.0  # Ditto's lambda; 0: the device trains no adapter of its own
    memory_cap_bytes: int | None = None
    checkpoint_path: Path | None = None  # where the round is kept while it trains; removed after
    control_path: Path | None = None  # what holds it up (`pace`); need not exist

    @property
    def key(self) -> str:
        """Of the round: what is trained, from what, and how. Only the same may be resumed."""
        facts = (self.assignment.digest.hex(), self.spec.digest.hex(), repr(self.personal_weight))
        return hashlib.sha256("\n".join(facts).encode()).hexdigest()


def require_consistent(job: TrainJob) -> None:
    """Raises `JobError` when the files are not the assignment's, or it contradicts itself."""
    task = job.assignment
    named = (
        (len(task.slice), len(job.slice_paths)),
        (len(task.global_adapter), len(job.global_paths)),
        (task.side is None, job.side_path is None),
        (task.global_side is None, job.global_side_path is None),
        (task.mirror is None, job.mirror_path is None),
    )
    if any(want != given for want, given in named):
        raise JobError("the files of the job are not those that its assignment names")
    if not task.trains:
        return
    if job.update_path is None:
        raise JobError("an assignment that trains needs update_path")
    if leaving := [part for part in task.update.parts if part in task.personal]:
        raise JobError(
            f"the assignment asks to send {', '.join(leaving)}, which it also says stays at home; "
            "nothing was trained or sent"
        )
