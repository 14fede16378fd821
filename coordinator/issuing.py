"""A round's plan and what is handed out for it: slices cut and packed, assignments written.

Runs beside the event loop, in a thread: packing a large adapter takes seconds. Keeps no state.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from coordinator.config import RunConfig
from coordinator.lowrank import Bundle
from coordinator.merge import adapter_from_factors, adapter_to_factors, cut_slice
from coordinator.planner import DevicePlan, PlanError, PlanPolicy, RoundPlan, plan_round
from coordinator.rounds import PlanRound
from coordinator.store.blobs import BlobStore
from coordinator.store.records import AssignmentRecord, Records
from profiles.device import DeviceProfile
from profiles.errors import SketchfleetError
from profiles.model import ModelShape
from protos.contract import AdapterSpec, Assignment, BlobRef, to_plain
from protos.packing import pack, unpack

Recorded = Mapping[int, tuple[float, Sequence[DevicePlan]]]
"""Round -> (length in seconds, plans), to be used instead of planning."""


class ReplayError(SketchfleetError):
    """Recorded plans do not cover this run."""


class Issuer:
    """Plans and issues rounds of one run."""

    def __init__(
        self,
        config: RunConfig,
        spec: AdapterSpec,
        shape: ModelShape,
        records: Records,
        blobs: BlobStore,
        *,
        heterogeneous: bool,
        recorded: Recorded | None,
    ) -> None:
        self._config, self._spec, self._shape = config, spec, shape
        self._records, self._blobs = records, blobs
        self._heterogeneous, self._recorded = heterogeneous, recorded

    def plan(self, asked: PlanRound, profiles: Mapping[str, DeviceProfile]) -> RoundPlan:
        """The plan for these devices; no devices in it when none can take part.

        Raises `ReplayError` when plans were recorded but not for this round.
        """
        if self._recorded is not None:
            return self._replayed(asked.round, profiles)
        policy = self._policy(asked.round, asked.evaluate_only)
        try:
            return plan_round(self._shape, self._spec, policy, profiles)
        except PlanError as error:
            return error.plan

    def _replayed(self, round_: int, profiles: Mapping[str, DeviceProfile]) -> RoundPlan:
        assert self._recorded is not None
        if round_ not in self._recorded:
            raise ReplayError(
                f"the recorded plans hold no round {round_}; record them from a finished run with "
                "as many rounds"
            )
        round_s, plans = self._recorded[round_]
        missing = sorted({p.device_id for p in plans} - profiles.keys())
        if missing:  # wait for them: a replay without them would be another run
            waiting = f"waiting for {', '.join(missing)}, which the recorded plans name"
            return RoundPlan(round_s, (), dict.fromkeys(profiles, waiting))
        return RoundPlan(round_s, tuple(plans))

    def issue(self, asked: PlanRound, plan: RoundPlan) -> list[tuple[Assignment, dict[str, Any]]]:
        """The assignments of a plan, each with the plan it came from; their blobs are stored."""
        adapter = self.adapter()
        whole: BlobRef | None = None
        if any(p.evaluates_global for p in plan.devices):
            encoding = self._config.wire.global_adapter
            packed = pack(
                self._spec, self._spec.rank, adapter_to_factors(adapter), encoding=encoding
            )
            whole = self._blobs.put(packed, encoding)
        return [
            (self._assignment(asked, p, plan.round_s, adapter, whole), to_plain(p))
            for p in plan.devices
        ]

    def adapter(self) -> dict[str, Bundle]:
        """The newest global adapter."""
        digest = self._records.adapter_digest(self._spec.run_id)
        assert digest is not None
        packed = self._blobs.path(digest).read_bytes()
        return adapter_from_factors(self._spec, unpack(packed, self._spec, self._spec.rank))

    def forget(self, before_round: int) -> None:
        """Drops slices and updates of rounds that are over; the adapters of all rounds stay."""
        wanted = set(self._records.adapter_digests(self._spec.run_id))
        old: set[str] = set()
        for record in self._records.assignments(self._spec.run_id):
            blobs = (record.assignment.slice, record.assignment.global_adapter)
            digests = {b.digest for b in blobs if b is not None}
            if record.update_digest is not None:
                digests.add(record.update_digest)
            (old if record.assignment.round < before_round else wanted).update(digests)
        for digest in old - wanted:
            self._blobs.drop(digest)

    def _policy(self, round_: int, evaluate_only: bool) -> PlanPolicy:
        c = self._config
        return PlanPolicy(
            rank=c.adapter.rank,
            min_rank=c.round.min_rank,
            rank_multiple=c.round.rank_multiple,
            precision=c.training.precision,
            sequence_tokens=c.training.sequence_tokens,
            micro_batch=c.training.micro_batch,
            accumulation=c.training.accumulation,
            local_steps=0 if evaluate_only else c.training.local_steps,
            min_local_steps=c.training.min_local_steps,
            checkpointing=c.training.checkpointing,
            update_encoding=c.wire.update,
            slice_encoding=c.wire.slice,
            global_encoding=c.wire.global_adapter,
            coverage=c.round.coverage,
            round_s=c.round.round_s or None,
            max_round_s=c.round.max_round_s,
            evaluation_sequences=c.evaluation.sequences,
            heterogeneous=self._heterogeneous,
            evaluates_global=evaluate_only or round_ % c.evaluation.every_rounds == 0,
        )

    def _assignment(
        self,
        asked: PlanRound,
        plan: DevicePlan,
        round_s: float,
        adapter: Mapping[str, Bundle],
        whole: BlobRef | None,
    ) -> Assignment:
        c, spec = self._config, self._spec
        slice_ref: BlobRef | None = None
        if not asked.evaluate_only:
            factors = cut_slice(spec, adapter, asked.round, plan.sketch_offset, plan.rank)
            packed = pack(spec, plan.rank, factors, encoding=c.wire.slice)
            slice_ref = self._blobs.put(packed, c.wire.slice)
        return Assignment(
            assignment_id=f"{spec.run_id}.{asked.round}.{plan.device_id}",
            run_id=spec.run_id,
            round=asked.round,
            device_id=plan.device_id,
            method=c.method.name,
            rank=plan.rank,
            sketch_offset=plan.sketch_offset,
            precision=plan.precision,
            sequence_tokens=plan.sequence_tokens,
            micro_batch=plan.micro_batch,
            accumulation=plan.accumulation,
            checkpointing=plan.checkpointing,
            local_steps=plan.local_steps,
            learning_rate=c.training.learning_rate,
            optimizer=c.training.optimizer,
            update_encoding=c.wire.update,
            evaluation_sequences=c.evaluation.sequences,
            held_out_share=c.evaluation.held_out_share,
            seed=_seed(spec.seed, asked.round, plan.device_id),
            deadline_s=round_s,
            reason=plan.reason,
            slice=slice_ref,
            global_adapter=whole if plan.evaluates_global else None,
        )


def _seed(seed: int, round_: int, device_id: str) -> int:
    """A device's own seed for a round; the same in every run with this seed."""
    digest = hashlib.sha256(f"{seed}/{round_}/{device_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def recorded_plans(records: Sequence[AssignmentRecord]) -> list[dict[str, Any]]:
    """The plans of a run in the form that `serve --replay` reads."""
    return [
        {"round": r.assignment.round, "round_s": r.assignment.deadline_s, "plan": r.predicted}
        for r in records
    ]
