"""One run, driven: turns calls and the clock into events, and effects into plans and merges.

The decisions are elsewhere (`rounds`, `planner`, `methods`); what must last is in `store`. This
file only connects them, so that a restart finds its place from the database alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from coordinator import rounds
from coordinator.config import RunConfig
from coordinator.lowrank import Bundle, initial_adapter
from coordinator.merge import (
    StoredUpdate,
    adapter_from_factors,
    adapter_to_factors,
    cut_slice,
    merge_round,
)
from coordinator.methods import make as make_method
from coordinator.planner import DevicePlan, PlanError, PlanPolicy, RoundPlan, plan_round
from coordinator.store.blobs import BlobStore
from coordinator.store.records import AssignmentRecord, Records, RoundRecord, UploadRecord
from profiles.device import DeviceProfile
from profiles.model import ModelShape, base_digest, read_shape
from protos.contract import (
    AdapterSpec,
    Assignment,
    BlobRef,
    Encoding,
    LocalReport,
    ProfileRequest,
    Reason,
    RefusalError,
    to_plain,
)
from protos.packing import PackedReader, PackingError, open_packed, pack, packed_bytes, unpack
from protos.transfer import CorruptChunkError, OffsetError, TransferError

log = logging.getLogger("sketchfleet.coordinator")

LOST_AFTER_S = 120.0  # without a poll; agents poll every 20 s while they train
MASTER_ENCODING: Encoding = "float32"
TaskKind = Literal["wait", "profile", "assignment", "finished"]


@dataclass(frozen=True)
class Task:
    """What a device is told when it asks for work."""

    kind: TaskKind
    spec: AdapterSpec
    assignment: Assignment | None = None
    remaining_s: float = 0.0
    profile_request: ProfileRequest | None = None
    message: str = ""


Recorded = Mapping[int, tuple[float, Sequence[DevicePlan]]]
"""Round -> (length in seconds, plans), to be used instead of planning."""


def build_spec(config: RunConfig, folder: Path) -> tuple[AdapterSpec, ModelShape]:
    """The contract of a run over the base in `folder`. Raises `ModelError`."""
    shape = read_shape(folder)
    spec = AdapterSpec(
        run_id=config.run.name,
        base=config.model.base,
        base_revision=config.model.revision,
        base_digest=base_digest(folder),
        rank=config.adapter.rank,
        alpha=config.adapter.alpha,
        use_rslora=config.adapter.rslora,
        seed=config.run.seed,
        modules=shape.modules(config.model.targets),
    )
    return spec, shape


class Engine:
    """Serves one run until it is finished. Not thread-safe: call it from its event loop."""

    def __init__(
        self,
        config: RunConfig,
        spec: AdapterSpec,
        shape: ModelShape,
        records: Records,
        blobs: BlobStore,
        *,
        recorded: Recorded | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.config, self.spec, self.shape = config, spec, shape
        self._records, self._blobs, self._clock = records, blobs, clock
        self._recorded = recorded
        self._method = make_method(
            config.method.name,
            normalisation=config.method.normalisation,
            optimizer=config.training.optimizer,
        )
        self._policy = rounds.RoundPolicy(
            rounds=config.run.rounds,
            min_devices=config.round.min_devices,
            gather_s=config.round.gather_s,
            quorum=config.round.quorum,
            late_rounds=config.round.late_rounds,
        )
        self._profiles: dict[str, DeviceProfile] = {}
        self._seen: dict[str, float] = {}
        self._ready: set[str] = set()
        self._left_out: dict[str, str] = {}
        self._unfit: set[str] = set()
        self._changed = asyncio.Event()
        self._work: set[asyncio.Task[None]] = set()
        self._failure: BaseException | None = None
        self.state = self._restore()

    # --- start, run, stop -----------------------------------------------------------------------

    def _restore(self) -> rounds.RunState:
        """The state of the run as the database has it; a new run gets its first adapter."""
        run_id, now = self.spec.run_id, self._clock()
        record = self._records.run(run_id)
        if record is None:
            factors = adapter_to_factors(initial_adapter(self.spec))
            packed = pack(self.spec, self.spec.rank, factors, encoding=MASTER_ENCODING)
            initial = self._blobs.put(packed, MASTER_ENCODING)
            self._records.add_run(
                self.spec, self.config.model_dump(mode="json"), initial.digest, now
            )
            return rounds.RunState()
        if record.spec.digest != self.spec.digest:
            raise RefusalError(
                Reason.BAD_REQUEST,
                f"run {run_id!r} was started with another base, adapter or seed; restore run.toml "
                "or choose a new [run] name",
            )
        for device in self._records.all_devices():
            if device.profile is not None:
                self._profiles[device.device_id] = device.profile
        history = self._records.all_rounds(run_id)
        if not history:
            return rounds.RunState()
        return self._rebuilt(history, now - record.alive_at)

    def _rebuilt(self, history: Sequence[RoundRecord], away_s: float) -> rounds.RunState:
        """The state as stored facts tell it, its deadline moved by the outage."""
        last = history[-1]
        given = self._records.assignments(self.spec.run_id)
        here = [a for a in given if a.assignment.round == last.round]
        earlier = [a for a in given if a.assignment.trains and a.merged_in is None
                   and (a.assignment.round < last.round or last.phase != "open")]  # fmt: skip
        owed = rounds.RunState(
            round=last.round,
            outstanding=frozenset(_key(a) for a in earlier if not _arrived(a)),
        )
        if last.phase == "merged":
            if last.evaluate_only:
                return dataclasses.replace(owed, phase="finished")
            return self._with_late(dataclasses.replace(owed, round=last.round + 1), earlier)
        state = dataclasses.replace(
            owed,
            evaluating=last.evaluate_only,
            assigned=frozenset(a.assignment.device_id for a in here),
            arrived=frozenset(a.assignment.device_id for a in here if _arrived(a)),
            failed=tuple(sorted((a.assignment.device_id, a.report.outcome)
                                for a in here if a.state == "failed" and a.report is not None)),
            opened_at_s=last.opened_at,
            deadline_at_s=last.deadline_at,
        )  # fmt: skip
        if last.phase == "merging":
            on_time = tuple(last.detail["on_time"])
            late = tuple((device, int(number)) for device, number in last.detail["late"])
            closing = rounds.CloseRound(last.round, on_time, late, last.evaluate_only)
            taken = {*late, *((device, last.round) for device in on_time)}
            missed = [a for a in earlier if _key(a) not in taken]
            state = dataclasses.replace(state, phase="merging", closing=closing)
            return self._with_late(state, missed)
        state = self._with_late(dataclasses.replace(state, phase="open"), earlier)
        state = rounds.extended(state, max(0.0, away_s))
        self._records.move_deadline(self.spec.run_id, last.round, state.deadline_at_s)
        log.info("round resumed", extra={"round": last.round, "away_s": round(away_s, 1)})
        return state

    def _with_late(
        self, state: rounds.RunState, owed: Sequence[AssignmentRecord]
    ) -> rounds.RunState:
        """The state with those of the owed updates that are in and may still be merged."""
        late = sorted(
            _key(a)
            for a in owed
            if _arrived(a) and rounds.too_late(state, a.assignment.round, self._policy) is None
        )
        return dataclasses.replace(state, late=tuple(late))

    async def run(self) -> None:
        """Ticks until the run is finished and every device has been told."""
        noted = 0.0
        while self.state.phase != "finished":
            now = self._clock()
            for device in [d for d in self._ready if now - self._seen[d] > LOST_AFTER_S]:
                self._ready.discard(device)
                log.warning("device lost", extra={"device_id": device})
                self._feed(rounds.DeviceLost(now, device))
            self._feed(rounds.Tick(now))
            if now - noted > 5:
                self._records.alive(self.spec.run_id, now)
                noted = now
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.5):  # 3.11's wait_for may swallow a cancellation
                    await self._changed.wait()
            if self._failure is not None:
                raise self._failure

    def told_finished(self) -> bool:
        """Whether nothing is left to say to any device that is still connected."""
        return not self._ready

    def _spawn(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._work.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._work.discard(task)
        if not task.cancelled() and task.exception() is not None:
            self._failure = task.exception()
            self._notify()

    def _notify(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def _feed(self, event: rounds.Event) -> None:
        """Advances the state machine and carries its effects out."""
        before = self.state
        self.state, effects = rounds.advance(self.state, event, self._policy)
        for effect in effects:
            match effect:
                case rounds.PlanRound():
                    self._plan(effect)
                case rounds.CloseRound():
                    detail = {"on_time": list(effect.on_time), "late": list(effect.late)}
                    self._records.close_round(self.spec.run_id, effect.round, detail, self._clock())
                    self._spawn(self._close(effect))
                case rounds.RefuseLate():
                    log.warning("late update refused", extra={"device_id": effect.device_id})
                case rounds.FinishRun():
                    self._records.finish_run(self.spec.run_id, self._clock())
                    log.info("run finished", extra={"run_id": self.spec.run_id})
        if self.state != before:
            self._notify()

    # --- planning -------------------------------------------------------------------------------

    def _plan_policy(self, round_: int, evaluate_only: bool) -> PlanPolicy:
        c = self.config
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
            heterogeneous=self._method.heterogeneous,
            evaluates_global=evaluate_only or round_ % c.evaluation.every_rounds == 0,
        )

    def _plan(self, effect: rounds.PlanRound) -> None:
        """Plans a round, cuts the slices, stores everything, opens it."""
        policy = self._plan_policy(effect.round, effect.evaluate_only)
        profiles = {d: self._profiles[d] for d in effect.device_ids if d in self._profiles}
        if self._recorded is not None:
            round_s, plans = self._recorded.get(effect.round, (policy.max_round_s, ()))
            if missing := {p.device_id for p in plans} - set(profiles):
                log.info("waiting for recorded devices", extra={"missing": sorted(missing)})
                return
            plan = RoundPlan(round_s, tuple(plans), {})
        else:
            try:
                plan = plan_round(self.shape, self.spec, policy, profiles)
            except PlanError as error:
                plan = error.plan
        self._left_out, self._unfit = dict(plan.left_out), set(plan.unfit)
        for device, why in plan.left_out.items():
            log.warning("device left out: %s", why, extra={"device_id": device})
        if not plan.devices:
            self._notify()  # who does not fit is to be told
            return
        adapter = self._adapter()
        whole: BlobRef | None = None
        if any(p.evaluates_global for p in plan.devices):
            encoding = self.config.wire.global_adapter
            factors = adapter_to_factors(adapter)
            whole = self._blobs.put(
                pack(self.spec, self.spec.rank, factors, encoding=encoding), encoding
            )
        planned = [
            (self._assignment(effect, p, plan.round_s, adapter, whole), to_plain(p))
            for p in plan.devices
        ]
        now = self._clock()
        self._feed(rounds.RoundPlanned(
            now, effect.round, tuple(a.device_id for a, _ in planned), plan.round_s
        ))  # fmt: skip
        self._records.open_round(
            self.spec.run_id, effect.round, effect.evaluate_only, now, self.state.deadline_at_s,
            planned,
        )  # fmt: skip
        log.info("round opened", extra={"round": effect.round, "devices": len(planned),
                                        "round_s": round(plan.round_s, 1)})  # fmt: skip

    def _assignment(
        self,
        effect: rounds.PlanRound,
        plan: DevicePlan,
        round_s: float,
        adapter: Mapping[str, Bundle],
        whole: BlobRef | None,
    ) -> Assignment:
        c = self.config
        slice_ref: BlobRef | None = None
        if not effect.evaluate_only:
            factors = cut_slice(self.spec, adapter, effect.round, plan.sketch_offset, plan.rank)
            packed = pack(self.spec, plan.rank, factors, encoding=c.wire.slice)
            slice_ref = self._blobs.put(packed, c.wire.slice)
        return Assignment(
            assignment_id=f"{self.spec.run_id}.{effect.round}.{plan.device_id}",
            run_id=self.spec.run_id,
            round=effect.round,
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
            seed=_seed(self.spec.seed, effect.round, plan.device_id),
            deadline_s=round_s,
            reason=plan.reason,
            slice=slice_ref,
            global_adapter=whole if plan.evaluates_global else None,
        )

    def _adapter(self) -> dict[str, Bundle]:
        digest = self._records.adapter_digest(self.spec.run_id)
        assert digest is not None
        packed = self._blobs.path(digest).read_bytes()
        return adapter_from_factors(self.spec, unpack(packed, self.spec, self.spec.rank))

    # --- merging --------------------------------------------------------------------------------

    async def _close(self, effect: rounds.CloseRound) -> None:
        """Merges what a closed round holds; repeatable after a crash from the same bytes."""
        run_id, started = self.spec.run_id, time.monotonic()
        detail: dict[str, Any] = {
            "on_time": list(effect.on_time), "late": [list(pair) for pair in effect.late],
        }  # fmt: skip
        chosen = [f"{run_id}.{effect.round}.{d}" for d in effect.on_time]
        chosen += [f"{run_id}.{r}.{d}" for d, r in effect.late]
        taken = [
            record
            for assignment_id in chosen
            if (record := self._records.assignment(assignment_id)) is not None
            and record.update_digest is not None
            and record.report is not None
        ]
        digest: str | None = None
        if taken:
            updates = [self._stored(record, effect.round) for record in taken]
            result = await asyncio.to_thread(
                merge_round, self.spec, self._method, self._adapter(), updates
            )
            packed = pack(self.spec, self.spec.rank, adapter_to_factors(result.adapter),
                          encoding=MASTER_ENCODING)  # fmt: skip
            digest = self._blobs.put(packed, MASTER_ENCODING).digest
            detail |= {
                "share": result.share,
                "coverage": [float(c) for c in result.coverage],
                "aggregation_error": result.aggregation_error,
                "merge_s": time.monotonic() - started,
            }
        self._records.publish_round(
            run_id, effect.round, digest,
            [r.assignment.assignment_id for r in taken], detail, self._clock(),
        )  # fmt: skip
        log.info("round merged", extra={"round": effect.round, "updates": len(taken)})
        self._feed(rounds.Merged(self._clock(), effect.round))

    def _stored(self, record: AssignmentRecord, into: int) -> StoredUpdate:
        assert record.update_digest is not None and record.report is not None
        discount = rounds.late_discount(into - record.assignment.round)
        return StoredUpdate(
            device_id=record.assignment.device_id,
            assignment=record.assignment,
            path=self._blobs.path(record.update_digest),
            weight=record.report.train_examples * discount,
        )

    # --- what devices call ----------------------------------------------------------------------

    async def next_task(
        self, device_id: str, profile: DeviceProfile | None, working_on: str, wait_s: float
    ) -> Task:
        """The device's next piece of work, waiting up to `wait_s` for one."""
        now = self._clock()
        self._seen[device_id] = now
        self._records.seen(device_id, now, profile)
        if profile is not None:
            self._profiles[device_id] = profile
        if self.state.phase == "finished":
            self._ready.discard(device_id)
            self._notify()
            return Task("finished", self.spec)
        known = self._profiles.get(device_id)
        if known is None or known.compute is None or known.link is None or (
            known.compute.base_digest != self.spec.base_digest
        ):  # fmt: skip
            return Task("profile", self.spec, profile_request=self._profile_request())
        if device_id not in self._ready:
            self._ready.add(device_id)
            self._feed(rounds.DeviceReady(now, device_id))
        until = asyncio.get_running_loop().time() + (0.0 if working_on else wait_s)
        while True:
            changed = self._changed
            if (task := self._task_now(device_id, working_on)) is not None:
                return task
            left = until - asyncio.get_running_loop().time()
            if left <= 0:
                return Task("wait", self.spec, message=self._left_out.get(device_id, ""))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left):
                    await changed.wait()

    def _task_now(self, device_id: str, working_on: str) -> Task | None:
        state = self.state
        if state.phase == "finished":
            self._ready.discard(device_id)
            self._notify()
            return Task("finished", self.spec)
        if device_id in self._unfit:
            self._unfit.discard(device_id)  # a device that comes back with more may try again
            self._ready.discard(device_id)
            self._feed(rounds.DeviceLost(self._clock(), device_id))
            raise RefusalError(Reason.DOES_NOT_FIT, self._left_out[device_id])
        if state.phase != "open" or device_id not in state.assigned:
            return None
        if device_id in state.arrived or device_id in dict(state.failed):
            return None
        assignment_id = f"{self.spec.run_id}.{state.round}.{device_id}"
        record = self._records.assignment(assignment_id)
        if record is None or assignment_id == working_on:
            return None
        remaining_s = max(0.0, state.deadline_at_s - self._clock())
        return Task("assignment", self.spec, record.assignment, remaining_s)

    def _profile_request(self) -> ProfileRequest:
        t = self.config.training
        return ProfileRequest(
            precision="nf4" if t.precision == "auto" else t.precision,
            sequence_tokens=t.sequence_tokens,
            micro_batch=t.micro_batch,
            rank=max(1, self.config.adapter.rank // 4),
        )

    def blob_path(self, digest: str) -> Path:
        """The file of a blob that devices may fetch. Raises `UnknownBlobError`."""
        return self._blobs.path(digest)

    def begin_push(
        self, device_id: str, assignment_id: str, digest: str, size_bytes: int
    ) -> tuple[str, int]:
        """(upload id, bytes already held). Raises `RefusalError` before any byte is taken."""
        record = self._own(device_id, assignment_id)
        assignment = record.assignment
        expected = packed_bytes(self.spec, assignment.rank, assignment.update_encoding)
        if size_bytes != expected:
            raise RefusalError(
                Reason.WRONG_SIZE,
                f"update of {size_bytes:,} bytes, but k={assignment.rank} as "
                f"{assignment.update_encoding} is {expected:,}; agent and coordinator disagree "
                "about the assignment, restart the agent",
            )
        if record.update_digest is None:
            self._refuse_too_late(assignment)
        _refuse_second(record, digest)
        upload_id = hashlib.sha256(f"{assignment_id}\0{digest}".encode()).hexdigest()[:32]
        self._records.put_upload(UploadRecord(upload_id, assignment_id, digest, size_bytes))
        if record.update_digest == digest or self._blobs.holds(digest):
            return upload_id, size_bytes
        return upload_id, self._blobs.part(upload_id, size_bytes).length

    def put_chunk(
        self, device_id: str, upload_id: str, offset: int, data: bytes, checksum: int
    ) -> int:
        """Takes a chunk; returns the length of the prefix held. Raises `RefusalError`."""
        upload = self._upload(device_id, upload_id)
        try:
            part = self._blobs.part(upload_id, upload.size_bytes)
            return part.write(offset, data, checksum)
        except CorruptChunkError as error:
            raise RefusalError(Reason.CORRUPT_CHUNK, str(error)) from error
        except OffsetError as error:
            raise RefusalError(Reason.WRONG_OFFSET, str(error)) from error

    async def commit_push(self, device_id: str, upload_id: str) -> tuple[str, str]:
        """(receipt, "accepted" or "late"). Repeating it returns the same. Raises `RefusalError`."""
        upload = self._upload(device_id, upload_id)
        record = self._own(device_id, upload.assignment_id)
        if record.update_digest is None:
            self._refuse_too_late(record.assignment)
            held = self._blobs.holds(upload.digest)  # bytes that others refer to, or an earlier try
            if not held:
                self._blobs.part(upload_id, upload.size_bytes)
                try:
                    self._blobs.finish(upload_id, upload.digest)
                except TransferError as error:
                    raise RefusalError(Reason.DIGEST_MISMATCH, str(error)) from error
            path = self._blobs.path(upload.digest)
            try:
                await asyncio.to_thread(self._check_update, path, record.assignment)
            except PackingError as error:
                if not held:
                    self._blobs.drop(upload.digest)
                raise RefusalError(Reason.BAD_UPDATE, str(error)) from error
            record = self._own(device_id, upload.assignment_id)
        _refuse_second(record, upload.digest)
        if record.update_digest is None:
            self._records.put_update(
                upload.assignment_id, upload.digest, upload.size_bytes, self._clock()
            )
            self._consider(upload.assignment_id)
        outcome = "late" if self._closed_without(record.assignment) else "accepted"
        return f"{upload.assignment_id}:{upload.digest}", outcome

    def report(self, device_id: str, report: LocalReport) -> None:
        """Takes the report of an assignment. Raises `RefusalError`."""
        record = self._own(device_id, report.assignment_id)
        if report.outcome == "done" and record.assignment.trains and report.train_examples < 1:
            raise RefusalError(Reason.BAD_REQUEST, "a report of training names no examples")
        self._records.put_report(report)
        self._consider(report.assignment_id)

    def _consider(self, assignment_id: str) -> None:
        """Tells the state machine once an assignment is complete or has failed."""
        record = self._records.assignment(assignment_id)
        if record is None or record.report is None:
            return
        a, now = record.assignment, self._clock()
        if record.state == "failed":
            log.warning("device failed: %s", record.report.message,
                        extra={"device_id": a.device_id, "round": a.round})  # fmt: skip
            self._feed(rounds.Failed(now, a.round, a.device_id, record.report.outcome))
        elif _arrived(record):
            self._feed(rounds.Arrived(now, a.round, a.device_id))

    def _closed_without(self, assignment: Assignment) -> bool:
        """Whether the round of an assignment closed before its update and report were in."""
        history = self._records.all_rounds(self.spec.run_id)
        own = next(r for r in history if r.round == assignment.round)
        return own.phase != "open" and assignment.device_id not in own.detail["on_time"]

    def _own(self, device_id: str, assignment_id: str) -> AssignmentRecord:
        record = self._records.assignment(assignment_id)
        if record is None or record.assignment.device_id != device_id:
            raise RefusalError(
                Reason.UNKNOWN_ASSIGNMENT,
                f"assignment {assignment_id[:80]!r} is not this device's; ask for a new task",
            )
        return record

    def _upload(self, device_id: str, upload_id: str) -> UploadRecord:
        upload = self._records.upload(upload_id)
        if upload is None:
            raise RefusalError(Reason.UNKNOWN_UPLOAD, "no such upload; begin the push again")
        self._own(device_id, upload.assignment_id)
        return upload

    def _refuse_too_late(self, assignment: Assignment) -> None:
        why = rounds.too_late(self.state, assignment.round, self._policy)
        if why is not None:
            raise RefusalError(Reason.TOO_LATE, f"{why}; drop it and ask for a new task")

    def _check_update(self, path: Path, assignment: Assignment) -> None:
        reader: PackedReader = open_packed(
            path, self.spec, assignment.rank,
            assignment_digest=assignment.digest, encoding=assignment.update_encoding,
        )  # fmt: skip
        for module in self.spec.modules:
            reader.module(module.name)  # refuses what is not finite


def _refuse_second(record: AssignmentRecord, digest: str) -> None:
    if record.update_digest not in (None, digest):
        raise RefusalError(
            Reason.EQUIVOCATION,
            f"another update for {record.assignment.assignment_id} was already accepted; the first "
            "one stands",
        )


def _key(record: AssignmentRecord) -> tuple[str, int]:
    return record.assignment.device_id, record.assignment.round


def _arrived(record: AssignmentRecord) -> bool:
    return record.state == "arrived" and record.complete


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
