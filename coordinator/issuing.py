"""A round's plan and what is handed out for it: slices cut and packed, assignments written.

What a device gets follows from what the method declares, not from its name. Runs beside the event
loop, in a thread: packing a large adapter takes seconds. Keeps no state.
"""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from coordinator.allowance import allowances, curves_of
from coordinator.config import RunConfig
from coordinator.corrections import learnt, length_before, plans_before
from coordinator.cutting import Cutter
from coordinator.methods import Method
from coordinator.plan_types import DENSE, UpdateTerms, update_payload
from coordinator.planner import DevicePlan, Level, PlanError, PlanPolicy, RoundPlan, plan_round
from coordinator.rounds import PlanRound
from coordinator.state import SIDE, StateFile, StateReader
from coordinator.store.blobs import BlobStore
from coordinator.store.records import Records
from coordinator.store.rows import AssignmentRecord
from profiles.device import DeviceProfile
from profiles.errors import SketchfleetError
from profiles.model import ModelShape
from protos.contract import (
    AdapterSpec,
    Assignment,
    BlobRef,
    Encoding,
    Part,
    from_plain,
    to_plain,
)
from protos.mirror import sent_whole

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
        method: Method,
        recorded: Recorded | None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._config, self._spec, self._shape = config, spec, shape
        self._records, self._blobs = records, blobs
        self._method, self._recorded, self._clock = method, recorded, clock

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
                terms=self._terms(policy, profiles, history),
            )  # fmt: skip
        except PlanError as error:
            return error.plan

    def _terms(
        self,
        policy: PlanPolicy,
        devices: Iterable[str],
        history: Sequence[AssignmentRecord],
    ) -> dict[str, UpdateTerms]:
        """The byte budgets of devices, and what their updates lose."""
        plan, curves = self._config.plan, curves_of(history)
        before_s = length_before(history, measuring=policy.evaluates_global)
        limits = allowances(
            history, devices, self._clock(), per_round=plan.bytes_per_round,
            per_day=plan.bytes_per_day, length_s=before_s or policy.deadline_s,
            rounds_left=policy.rounds_left,
        )  # fmt: skip
        return {d: UpdateTerms(limits.get(d), curves.get(d, ())) for d in {*limits, *curves}}

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
        """Drops slices and updates of rounds that are over; the models of all rounds stay.

        Of mirrors the newest of each device stays, however old.
        """
        wanted = self._records.model_digests(self._spec.run_id)
        old: set[str] = set()
        history = self._records.assignments(self._spec.run_id)
        wanted.update(mirror.digest for mirror in _newest_mirrors(history).values())
        for record in history:
            task = record.assignment
            digests = {blob.digest for blob in task.blobs}
            if task.mirror is not None:
                digests.add(task.mirror.result.digest)
            if record.update_digest is not None:
                digests.add(record.update_digest)
            (old if task.round < before_round else wanted).update(digests)
        for digest in old - wanted:
            self._blobs.drop(digest)

    # --- issuing --------------------------------------------------------------------------------

    def issue(
        self, asked: PlanRound, plan: RoundPlan, mirrors: Mapping[str, str] | None = None
    ) -> list[tuple[Assignment, dict[str, Any]]]:
        """The assignments of a plan, each with the plan it came from; their blobs are stored.

        mirrors: device -> digest of the mirror that it is known to hold, of those that keep one.
        """
        version, files = self.files()
        side_rank = files[SIDE].payload.rank if SIDE in files else 0
        travels = self._config.wire.delta and self._files(version)
        held = self._held(mirrors) if mirrors and travels else {}
        cutter = Cutter(
            self._config.wire, self._spec, self._method, self._blobs,
            StateReader(self._spec, files), groups=self._files(version), side_rank=side_rank,
        )  # fmt: skip
        issued = []
        for planned in plan.devices:
            blank = self._blank(asked, version, planned, plan.round_s)
            issued.append((self._filled(blank, planned, cutter, held), to_plain(planned)))
        return issued

    def cut_again(self, record: AssignmentRecord) -> None:
        """Stores the files of an assignment of the newest round anew, as they were.

        They come from the same model; a mirror's step also from the mirror that it begins with.
        """
        task = record.assignment
        _, files = self.files()
        blank = dataclasses.replace(
            task, slice=(), side=None, global_adapter=(), global_side=None, mirror=None
        )
        held = {} if task.mirror is None else {task.device_id: task.mirror.base}
        side_rank = files[SIDE].payload.rank if SIDE in files else 0
        version = self.files()[0]
        cutter = Cutter(
            self._config.wire, self._spec, self._method, self._blobs,
            StateReader(self._spec, files), groups=self._files(version), side_rank=side_rank,
        )  # fmt: skip
        self._filled(blank, from_plain(DevicePlan, record.predicted), cutter, held)

    def _blank(
        self, asked: PlanRound, version: int, plan: DevicePlan, round_s: float
    ) -> Assignment:
        """What a device is asked, without the files it takes."""
        c, spec, method = self._config, self._spec, self._method
        trains = not asked.evaluate_only
        scale = method.device_scale(spec, plan.rank)
        sent = self._sent(version)
        return Assignment(
            assignment_id=f"{spec.run_id}.{asked.round}.{plan.device_id}",
            run_id=spec.run_id,
            round=asked.round,
            device_id=plan.device_id,
            method=method.name,
            rank=plan.rank,
            rows=method.rows,
            sketch_offset=plan.sketch_offset,
            alpha=scale * spec.divisor(plan.rank),
            trained=self._trained(version),
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
            budget=plan.budget if trains else None,
            update=plan.update
            or update_payload(
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
            objective=c.fairness.objective,
            pruning=method.pruning,
            fill_in_middle=c.training.fill_in_middle,
            completions=c.evaluation.completions,
            local_only=c.evaluation.local_only and trains,
        )

    def _filled(
        self, task: Assignment, plan: DevicePlan, cutter: Cutter, held: Mapping[str, BlobRef | None]
    ) -> Assignment:
        """With its files: as a step of the device's mirror, if it keeps one.

        What is sparse is so on purpose, and travels as it is.
        """
        device, evaluates = task.device_id, task.evaluates_global
        mirrored = device in held and plan.density == 1 and (task.trains or evaluates)
        scale = self._method.device_scale(self._spec, task.rank)
        given: dict[str, Any] = {}
        if mirrored:
            given["mirror"] = cutter.mirror(task, scale, held[device])
        if task.trains:
            if not mirrored:
                given["slice"] = cutter.slice(task, scale, plan.density)
            given["side"] = cutter.branch(task)
        if evaluates:
            if not mirrored:
                given["global_adapter"] = cutter.whole()
            given["global_side"] = cutter.side(sent_whole(self._config.wire.global_adapter))
        return dataclasses.replace(task, **given)

    def _held(self, mirrors: Mapping[str, str]) -> dict[str, BlobRef | None]:
        """What devices hold for certain: what they were last sent, if they say that they took it.

        One that names an older mirror may still be about to take the newest step.
        """
        newest = _newest_mirrors(self._records.assignments(self._spec.run_id))
        found: dict[str, BlobRef | None] = {}
        for device, digest in mirrors.items():
            sent = newest.get(device)
            sure = sent is not None and sent.digest == digest and self._blobs.holds(digest)
            found[device] = sent if sure else None
        return found

    def _encoding(self, plan: DevicePlan) -> Encoding:
        """What an update travels as; plans recorded before it could vary leave it to the run."""
        if plan.update_encoding is not None:
            return plan.update_encoding
        return "int8" if self._config.wire.update == "auto" else self._config.wire.update


def _newest_mirrors(history: Sequence[AssignmentRecord]) -> dict[str, BlobRef]:
    """Device -> the mirror that its newest step ends with; `history` by round."""
    tasks = [record.assignment for record in history]
    return {t.device_id: t.mirror.result for t in tasks if t.mirror is not None}


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
