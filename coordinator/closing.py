"""What becomes of a closed round: its updates screened, weighed, merged and published.

Repeatable after a crash from the same bytes, up to the one transaction that publishes. It knows
updates and models; when a round closes and what comes next, the engine knows.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from coordinator import rounds
from coordinator.audit import Audit
from coordinator.config import RunConfig
from coordinator.issuing import Issuer
from coordinator.ledger_types import Contribution
from coordinator.mending import read_by_merge, require_sound
from coordinator.merge import Merger, MergeResult, StoredUpdate
from coordinator.methods import Method
from coordinator.screened_rounds import ScreenedRounds, facts_of, kept_out
from coordinator.state import StateFile
from coordinator.store.blobs import BlobStore
from coordinator.store.records import Records
from coordinator.store.rows import AssignmentRecord
from coordinator.weights import Voice
from protos import faults
from protos.contract import AdapterSpec, Assignment, BlobRef

log = logging.getLogger("sketchfleet.coordinator")


class Closer:
    """Merges the closed rounds of one run."""

    def __init__(
        self,
        config: RunConfig,
        spec: AdapterSpec,
        method: Method,
        records: Records,
        blobs: BlobStore,
        issuer: Issuer,
        screening: ScreenedRounds,
        clock: Callable[[], float],
    ) -> None:
        self._run_id, self._method = spec.run_id, method
        self._records, self._blobs, self._issuer = records, blobs, issuer
        self._screening, self._clock = screening, clock
        self._weights, self._audit = config.make_weight_rule(), Audit(records)
        self._merger = Merger(
            spec, method, config.make_server_optimizer(), issuer.model,
            lambda role: blobs.draft(), config.make_robust(),
        )  # fmt: skip

    async def close(self, effect: rounds.CloseRound) -> None:
        """Merges what a closed round holds and publishes the model."""
        started = time.monotonic()
        detail: dict[str, Any] = {
            "on_time": list(effect.on_time), "late": [list(pair) for pair in effect.late],
        }  # fmt: skip
        taken = self._taken(effect)
        read = read_by_merge(self._records, self._run_id, taken)
        files: dict[str, BlobRef] = {}
        given: dict[str, Contribution] = {}
        outcome = await asyncio.to_thread(self._screening.screen, effect.round, taken)
        out = kept_out(outcome)
        taken = [r for r in taken if r.assignment.assignment_id not in out]
        detail |= {"dropped": out, **facts_of(outcome)}
        if taken:
            updates, detail["weight_memory"] = self._weighed(taken, effect.round)
            result, dropped = await asyncio.to_thread(self._merge, effect.round, updates)
            for assignment_id, why in dropped.items():
                log.error("update not merged: %s", why, extra={"assignment_id": assignment_id})
            taken = [r for r in taken if r.assignment.assignment_id not in dropped]
            detail["dropped"] = out | dropped
            if result is not None:
                files = await asyncio.to_thread(self.kept, result.files)
                given = result.contributions
                detail |= {
                    "weights": {u.assignment.assignment_id: u.weight for u in updates},
                    "coverage": [float(c) for c in result.coverage],
                    "aggregation_error": result.error,
                    "aggregation_errors": result.errors,
                    "aggregation_error_exact": result.exact,
                    "attribution_s": result.attribution_s,
                    "robust": result.robust,
                    "merge_s": time.monotonic() - started,
                }
        faults.point("round.merged")
        await asyncio.to_thread(require_sound, self._blobs, read)
        with self._records.transaction():
            merged = [r.assignment.assignment_id for r in taken]
            self._records.publish_round(
                self._run_id, effect.round, files, merged, detail, self._clock(), given
            )
            self._screening.keep(outcome)
            self._audit.record(
                "merged", run_id=self._run_id, round=effect.round,
                updates={r.assignment.assignment_id: r.update_digest for r in taken},
                files={role: blob.digest for role, blob in files.items()},
            )  # fmt: skip
        faults.point("round.published")
        log.info("round merged", extra={
            "round": effect.round, "updates": len(taken),
            "aggregation_error": detail.get("aggregation_error"),
        })  # fmt: skip

    def merged_again(
        self, round_: int, merged: Sequence[AssignmentRecord], weights: Mapping[str, float]
    ) -> dict[str, BlobRef]:
        """The files of a model that was lost, from the updates that made it."""
        updates = [self._stored(r, weights[r.assignment.assignment_id]) for r in merged]
        model = self._issuer.model(round_)
        return self.kept(self._merger.merge(round_, round_ + 1, model, updates).files)

    def kept(self, files: Mapping[str, StateFile]) -> dict[str, BlobRef]:
        """Drafts of a model as blobs, by role."""
        return {role: self._blobs.adopt(f.path, f.payload) for role, f in files.items()}

    def _merge(
        self, round_: int, updates: Sequence[StoredUpdate]
    ) -> tuple[MergeResult | None, dict[str, str]]:
        current = self._issuer.model()  # reads files: not for the event loop
        return self._merger.merge_sound(round_, round_ + 1, current, updates)

    def _taken(self, effect: rounds.CloseRound) -> list[AssignmentRecord]:
        chosen = [f"{self._run_id}.{effect.round}.{d}" for d in effect.on_time]
        chosen += [f"{self._run_id}.{r}.{d}" for d, r in effect.late]
        return [
            record
            for assignment_id in chosen
            if (record := self._records.assignment(assignment_id)) is not None
            and record.update_digest is not None
            and record.report is not None
        ]

    def _weighed(
        self, taken: Sequence[AssignmentRecord], into: int
    ) -> tuple[list[StoredUpdate], dict[str, float]]:
        """The updates with their weights, and what the weight rule is to remember."""
        voices = []
        for record in taken:
            a, report = record.assignment, record.report
            assert report is not None
            received = report.evaluation("slice", "received")
            examples = report.train_examples * rounds.late_discount(into - a.round)
            voices.append(Voice(a.device_id, examples, received.loss if received else None))
        history = self._records.all_rounds(self._run_id)
        known = [r.detail["weight_memory"] for r in history if "weight_memory" in r.detail]
        weights, memory = self._weights.weigh(voices, known[-1] if known else {})
        return [self._stored(r, w) for r, w in zip(taken, weights, strict=True)], memory

    def _stored(self, record: AssignmentRecord, weight: float) -> StoredUpdate:
        assert record.update_digest is not None and record.report is not None
        return StoredUpdate(
            device_id=record.assignment.device_id,
            assignment=record.assignment,
            path=self._blobs.path(record.update_digest),
            weight=weight,
            kept=record.report.kept_rank if self._method.pruning is not None else 0,
            start=self._sparse_start(record.assignment),
        )

    def _sparse_start(self, task: Assignment) -> tuple[StateFile, ...]:
        """The files of a slice that travelled without its small values; none for others."""
        sparse = any(blob.payload.density < 1 for blob in task.slice)
        return tuple(
            StateFile(self._blobs.path(blob.digest), blob.payload) for blob in task.slice if sparse
        )
