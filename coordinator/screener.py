"""Screens the round at hand: what arrived, and what is remembered, become verdicts.

Joins what `likeness` measures and `screening` decides for whoever merges: the engine, whose memory
is in the database, and simulated rounds, which keep theirs (`ScreeningMemory`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from coordinator.likeness import Sent, likeness
from coordinator.methods import Method
from coordinator.screening import screen
from coordinator.screening_types import Claims, Entry, Outcome, Quarantine, Screened
from protos.contract import AdapterSpec, Assignment, LocalReport


@dataclass(frozen=True)
class Delivered:
    """An update that arrived with its report. own_step_s: of the device's own measurements."""

    assignment: Assignment
    path: Path
    report: LocalReport
    own_step_s: float = 0.0


@dataclass
class ScreeningMemory:
    """What screening goes by besides the round: earlier updates, and who stands apart.

    offences: quarantines of each device so far, those that run included.
    """

    past: list[Screened] = field(default_factory=list)
    quarantined: dict[str, Quarantine] = field(default_factory=dict)
    offences: dict[str, int] = field(default_factory=dict)

    def note(self, outcome: Outcome) -> None:
        """Remembers a round."""
        self.past.extend(outcome.screened)
        for device in outcome.served:
            del self.quarantined[device]
        for held in (*outcome.ran, *outcome.imposed):
            self.quarantined[held.device_id] = held
        for held in outcome.imposed:
            self.offences[held.device_id] = self.offences.get(held.device_id, 0) + 1


@dataclass(frozen=True)
class Screener:
    """The rules of one run. key: of signatures, which devices must not know."""

    spec: AdapterSpec
    method: Method
    optimizer: str  # the devices'
    clean_rounds: int
    key: str

    def screen(
        self, round_: int, delivered: Sequence[Delivered], memory: ScreeningMemory
    ) -> Outcome:
        """Judges what would be merged into a round. Raises `PackingError`, `OSError`."""
        ordered = sorted(delivered, key=lambda d: d.assignment.assignment_id)
        prunes = self.method.pruning is not None
        sent = [Sent(d.assignment, d.path, d.report.kept_rank if prunes else 0) for d in ordered]
        # Slices of different rounds, too, start from other values; they are few and close.
        common = not self.method.fresh
        found = likeness(self.spec, sent, common_basis=common, key=self.key)
        return screen(
            round_, [self._entry(d) for d in ordered], found, memory.past, memory.quarantined,
            clean_rounds=self.clean_rounds, offences=memory.offences,
        )  # fmt: skip

    def _entry(self, delivered: Delivered) -> Entry:
        task, report = delivered.assignment, delivered.report
        received = report.evaluation("slice", "received")
        rows = task.local_steps * task.micro_batch * task.accumulation
        claims = Claims(
            examples=report.train_examples,
            train_loss=report.train_loss,
            received_loss=received.loss if received else None,
            tokens=report.train_tokens,
            most_tokens=rows * task.sequence_tokens,
            step_s=report.step_s,
            own_step_s=delivered.own_step_s,
        )
        # AdamW's steps are as long whatever the gradient; SGD's follow the adapter's scale.
        scale = self.method.device_scale(self.spec, task.rank) if self.optimizer == "sgd" else 1.0
        return Entry(task.assignment_id, task.device_id, claims, task.local_steps, scale)
