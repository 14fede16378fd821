"""A round's plan and what is handed out for it: slices cut and packed, assignments written.

What a device gets follows from what the method declares, not from its name. Runs beside the event
loop, in a thread: packing a large adapter takes seconds. Keeps no state.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from coordinator.config import RunConfig
from coordinator.corrections import learnt, length_before, plans_before
from coordinator.lowrank import Bundle, Rows
from coordinator.methods import Method
from coordinator.plan_types import DENSE, update_payload
from coordinator.planner import DevicePlan, Level, PlanError, PlanPolicy, RoundPlan, plan_round
from coordinator.rounds import PlanRound
from coordinator.state import SIDE, StateFile, StateReader
from coordinator.store.blobs import BlobStore
from coordinator.store.records import AssignmentRecord, Records
from profiles.device import DeviceProfile
from profiles.errors import SketchfleetError
from profiles.model import ModelShape
from protos.contract import (
    AdapterSpec,
    Assignment,
    BlobRef,
    Encoding,
    Objective,
    Part,
    Payload,
    from_plain,
    to_plain,
)
from protos.layout import Parts
from protos.packing import PackedWriter, pack
from protos.sketch import slice_rows

Recorded = Mapping[int, tuple[float, Sequence[DevicePlan]]]
"""Round -> (length in seconds, plans), to be used instead of planning."""


class ReplayError(SketchfleetError):
    """Recorded plans do not cover this run."""


@dataclass
class _Issue:
    """One round being handed out: the model it starts from, and files already packed for it."""

    asked: PlanRound
    version: int
    model: StateReader
    side_rank: int
    packed: dict[Any, BlobRef] = field(default_factory=dict)


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
        method: Method,
        recorded: Recorded | None,
    ) -> None:
        self._config, self._spec, self._shape = config, spec, shape
        self._records, self._blobs = records, blobs
        self._method, self._recorded = method, recorded

    # --- planning -------------------------------------------------------------------------------

    def plan(self, asked: PlanRound, profiles: Mapping[str, DeviceProfile]) -> RoundPlan:
        """The plan for these devices; no devices in it when none can take part.

        Raises `ReplayError` when plans were recorded but not for this round.
        """
        if self._recorded is not None:
            return self._replayed(asked.round, profiles)
        policy = self._policy(asked.round, asked.evaluate_only)
        history = self._records.assignments(self._spec.run_id)
        # This round, if it is tried again, ended without anything that could be merged.
        closed = range(asked.round + 1)
        measuring = policy.evaluates_global
        before = {} if asked.evaluate_only else plans_before(history, measuring=measuring)
        try:
            return plan_round(
                self._shape, self._spec, policy, profiles, self._pruned(history),
                corrections=learnt(history, closed),
                before={d: from_plain(DevicePlan, plain) for d, plain in before.items()},
                before_s=length_before(history, measuring=measuring),
            )  # fmt: skip
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

    def _pruned(self, given: Sequence[AssignmentRecord]) -> dict[str, int]:
        """The rows that devices have left after pruning themselves, by the newest report."""
        if self._method.pruning is None:
            return {}
        return {
            a.assignment.device_id: a.report.kept_rank
            for a in given
            if a.report is not None and a.report.kept_rank
        }

    def _policy(self, round_: int, evaluate_only: bool) -> PlanPolicy:
        c, method = self._config, self._method
        version, files = self.files()
        most = None
        if not method.keeps_basis and method.heterogeneous:
            most = StateReader(self._spec, files).useful_rank()
        return c.plan_policy(
            method,
            evaluate_only=evaluate_only,
            most_rank=most,
            files=self._files(version),
            resting=self._resting(version),
            update_parts=self._sent(version),
            side_rank=files[SIDE].payload.rank if SIDE in files else 0,
            evaluates_global=evaluate_only or round_ % c.evaluation.every_rounds == 0,
            rounds_left=max(1, c.run.rounds + 1 - round_),
        )

    def _resting(self, version: int) -> tuple[tuple[Part, ...], ...]:
        """Files that did not change since the version before, in a round that all fetch alike.

        A device that took part before holds them; who is new fetches them once more than planned.
        """
        if version == 0 or self._method.heterogeneous:
            return ()  # other rows than last time are another file
        before = version - 1
        moved = set(self._trained(before))
        return tuple(group for group in self._files(version) if not moved & set(group))

    def _files(self, version: int) -> tuple[tuple[Part, ...], ...]:
        """What travels down, file by file; dense tensors in one of their own."""
        return self._method.files(version) + ((DENSE,) if self._spec.dense else ())

    def _sent(self, version: int) -> tuple[Part, ...]:
        return self._method.sent(version) + (DENSE if self._spec.dense else ())

    def _trained(self, version: int) -> tuple[Part, ...]:
        return self._method.trained(version) + (DENSE if self._spec.dense else ())

    # --- the model ------------------------------------------------------------------------------

    def files(self, at_most: int | None = None) -> tuple[int, dict[str, StateFile]]:
        """(version, files by role) of the newest model, or as it was after so many rounds."""
        found = self._records.model(self._spec.run_id, at_most)
        assert found is not None, "a run has a model from its start"
        version, blobs = found
        return version, {
            role: StateFile(self._blobs.path(blob.digest), blob.payload)
            for role, blob in blobs.items()
        }

    def model(self, at_most: int | None = None) -> StateReader:
        """Reads the newest model, or the one that slices of a round were cut from."""
        return StateReader(self._spec, self.files(at_most)[1])

    def forget(self, before_round: int) -> None:
        """Drops slices and updates of rounds that are over; the models of all rounds stay."""
        wanted = self._records.model_digests(self._spec.run_id)
        old: set[str] = set()
        for record in self._records.assignments(self._spec.run_id):
            digests = {blob.digest for blob in record.assignment.blobs}
            if record.update_digest is not None:
                digests.add(record.update_digest)
            (old if record.assignment.round < before_round else wanted).update(digests)
        for digest in old - wanted:
            self._blobs.drop(digest)

    # --- issuing --------------------------------------------------------------------------------

    def issue(self, asked: PlanRound, plan: RoundPlan) -> list[tuple[Assignment, dict[str, Any]]]:
        """The assignments of a plan, each with the plan it came from; their blobs are stored."""
        version, files = self.files()
        side_rank = files[SIDE].payload.rank if SIDE in files else 0
        issue = _Issue(asked, version, StateReader(self._spec, files), side_rank)
        return [(self._assignment(issue, p, plan.round_s), to_plain(p)) for p in plan.devices]

    def _assignment(self, issue: _Issue, plan: DevicePlan, round_s: float) -> Assignment:
        c, spec, method, asked = self._config, self._spec, self._method, issue.asked
        trains = not asked.evaluate_only
        scale = method.device_scale(spec, plan.rank)
        sent = self._sent(issue.version)
        blank = Assignment(
            assignment_id=f"{spec.run_id}.{asked.round}.{plan.device_id}",
            run_id=spec.run_id,
            round=asked.round,
            device_id=plan.device_id,
            method=method.name,
            rank=plan.rank,
            rows=method.rows,
            sketch_offset=plan.sketch_offset,
            alpha=scale * spec.divisor(plan.rank),
            trained=self._trained(issue.version),
            personal=method.personal,
            keeps_basis=method.keeps_basis,
            keeps_state=c.training.keep_optimizer,
            error_feedback=c.wire.error_feedback,
            fresh=method.fresh,
            precision=plan.precision,
            sequence_tokens=plan.sequence_tokens,
            micro_batch=plan.micro_batch,
            accumulation=plan.accumulation,
            checkpointing=plan.checkpointing,
            local_steps=plan.local_steps if trains else 0,
            learning_rate=c.training.learning_rate,
            optimizer=c.training.optimizer,
            update=update_payload(
                Level(plan.rank, plan.density),
                self._encoding(plan),
                sent,
                group=c.wire.group,
                compressed=c.wire.compressed,
            ),
            evaluation_sequences=c.evaluation.sequences,
            held_out_share=c.evaluation.held_out_share,
            evaluates_global=plan.evaluates_global,
            seed=_seed(spec.seed, asked.round, plan.device_id),
            deadline_s=round_s,
            reason=plan.reason,
            objective=self._objective(),
            pruning=method.pruning,
            fill_in_middle=c.training.fill_in_middle,
            completions=c.evaluation.completions,
        )
        given: dict[str, Any] = {}
        if trains:
            given["slice"] = self._slice(issue, blank, scale, plan.density)
            given["side"] = self._branch(issue, blank)
        if plan.evaluates_global:
            given["global_adapter"] = self._whole(issue)
            given["global_side"] = self._side(issue, c.wire.global_adapter)
        return dataclasses.replace(blank, **given)

    def _encoding(self, plan: DevicePlan) -> Encoding:
        """What an update travels as; plans recorded before it could vary leave it to the run."""
        if plan.update_encoding is not None:
            return plan.update_encoding
        return "int8" if self._config.wire.update == "auto" else self._config.wire.update

    def _objective(self) -> Objective | None:
        f = self._config.fairness
        plain = f.loss == "plain"
        return None if plain else Objective(f.propfair_ceiling, f.propfair_margin)

    def _slice(
        self, issue: _Issue, task: Assignment, scale: float, density: float
    ) -> tuple[BlobRef, ...]:
        """The rows a device is to train, one file for each group of parts."""

        def cut(name: str) -> Parts:
            rows = slice_rows(self._spec, task, name)
            state = self._method.cut(issue.model.module(name), rows, scale)
            parts = [part for part in ("up", "down", "core") if part in wanted]
            return {part: state.values(part) for part in parts}

        refs = []
        for wanted in self._files(issue.version):
            if wanted == DENSE:
                refs.append(self._dense(issue, self._config.wire.slice, density))
                continue
            payload = Payload(task.rank, self._config.wire.slice, wanted, density)
            which: tuple[Any, ...] = (task.rows, task.sketch_offset)
            if task.rows == "independent":
                which = (task.device_id,)
            elif task.rows == "prefix" or task.rank == self._spec.rank:
                which = ()
            refs.append(self._packed(issue, ("slice", scale, *which), payload, cut))
        return tuple(refs)

    def _whole(self, issue: _Issue) -> tuple[BlobRef, ...]:
        """The whole adapter, to be evaluated."""

        def whole(name: str) -> Parts:
            state = issue.model.module(name)
            return {part: state.values(part) for part in wanted}

        refs = []
        for wanted in self._files(issue.version):
            if wanted == DENSE:
                refs.append(self._dense(issue, self._config.wire.global_adapter))
                continue
            payload = Payload(self._spec.rank, self._config.wire.global_adapter, wanted)
            scale = self._method.device_scale(self._spec, self._spec.rank)
            # A slice of all rows in this encoding is the same file.
            refs.append(self._packed(issue, ("slice", scale), payload, whole))
        return tuple(refs)

    def _dense(self, issue: _Issue, encoding: Encoding, density: float = 1.0) -> BlobRef:
        """The tensors trained whole: one file for every device, whatever its k."""
        payload = Payload(self._spec.rank, encoding, DENSE, density)
        return self._packed(issue, ("dense",), payload, lambda name: {})

    def _branch(self, issue: _Issue, task: Assignment) -> BlobRef | None:
        """The frozen branch that a device trains beside."""
        if not self._method.complement:
            return self._side(issue, self._config.wire.slice)
        rank = self._spec.rank - task.rank + issue.side_rank
        if not rank:
            return None

        def others(name: str) -> Parts:
            rows: Rows = slice_rows(self._spec, task, name)
            branch = self._method.branch(issue.model.module(name), rows)
            assert branch is not None
            return _sides(branch)

        payload = Payload(rank, self._config.wire.slice)
        return self._packed(issue, ("branch", task.device_id), payload, others)

    def _side(self, issue: _Issue, encoding: Encoding) -> BlobRef | None:
        """The branch that is part of the global model."""
        if not issue.side_rank:
            return None

        def side(name: str) -> Parts:
            branch = issue.model.module(name).side
            assert branch is not None
            return _sides(branch)

        return self._packed(issue, ("side",), Payload(issue.side_rank, encoding), side)

    def _packed(self, issue: _Issue, key: tuple[Any, ...], payload: Payload, cut: Any) -> BlobRef:
        """The blob of what `cut` gives for each module; packed once for equal keys."""
        key = (*key, payload)
        if key not in issue.packed:
            issue.packed[key] = self._pack(issue, payload, cut)
        return issue.packed[key]

    def _pack(self, issue: _Issue, payload: Payload, cut: Any) -> BlobRef:
        names = [] if payload.parts == DENSE else [m.name for m in self._spec.modules]
        dense = [t.name for t in self._spec.dense] if "dense" in payload.parts else []
        if payload.density < 1:  # which values travel depends on all of them
            factors = {name: cut(name) for name in names}
            factors |= {name: {"dense": issue.model.dense(name)[0]} for name in dense}
            return self._blobs.put(pack(self._spec, payload, factors), payload)
        draft: Path = self._blobs.draft()
        with draft.open("wb") as stream:
            writer = PackedWriter(stream, self._spec, payload)
            for name in names:
                writer.write(name, cut(name))
            for name in dense:
                writer.write(name, {"dense": issue.model.dense(name)[0]})
            writer.finish()
        return self._blobs.adopt(draft, payload)


def _sides(branch: Bundle) -> Parts:
    """A branch as it travels: at scale 1."""
    branch = branch.at_scale(1.0)
    return {"up": branch.up, "down": branch.down}


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
