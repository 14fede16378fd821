"""One run, driven: turns calls and the clock into events, and effects into plans and merges.

The decisions are elsewhere (`rounds`, `planner`, `methods`); what must last is in `store`. This
file only connects them, so that a restart finds its place from the database alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from coordinator import rounds
from coordinator.audit import Audit
from coordinator.closing import Closer
from coordinator.config import RunConfig
from coordinator.grants import names_blob
from coordinator.intake import Intake
from coordinator.issuing import Issuer, Recorded
from coordinator.limits import Traffic, Watermark
from coordinator.mending import DamagedError, Mender, require_sound
from coordinator.plausible import require_report_fits
from coordinator.restore import rebuilt
from coordinator.screened_rounds import ScreenedRounds
from coordinator.state import write_initial
from coordinator.store.blobs import BlobStore, UnknownBlobError
from coordinator.store.members import revoked_members
from coordinator.store.records import Records
from profiles.compat import timeout
from profiles.device import DeviceProfile
from profiles.model import ModelShape
from protos import faults
from protos.contract import (
    AdapterSpec,
    Assignment,
    LocalReport,
    ProfileRequest,
    Progress,
    Reason,
    RefusalError,
)
from protos.transfer import Buffer

log = logging.getLogger("sketchfleet.coordinator")

LOST_AFTER_S = 120.0  # without a poll; agents poll every 20 s while they train
PROFILE_TOKENS = 512  # of a row, where the run leaves its length open
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
        self._method = config.make_method()
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
        self._mirrors: dict[str, str] = {}  # what devices hold, of those that tell
        self._left_out: dict[str, str] = {}
        self._unfit: set[str] = set()
        self._changed = asyncio.Event()
        self._work: set[asyncio.Task[None]] = set()
        self._failure: BaseException | None = None
        self._planning = self._draining = False
        self._refused: set[str] = set()  # uploads of which the audit log tells
        self._begun: set[tuple[str, str]] = set()  # what devices began to fetch from here
        self.ticks = 0  # a service manager sees by them that the run is looked after
        self.progress: dict[str, Progress] = {}  # the newest of each device, while it works
        self._untold: set[str] = set()  # devices that do not know yet that the run is finished
        self._issuer = Issuer(
            config, spec, shape, records, blobs,
            method=self._method, recorded=recorded, clock=clock,
        )  # fmt: skip
        self._screening = ScreenedRounds(config, spec, self._method, records, blobs, clock)
        self._closer = Closer(
            config, spec, self._method, records, blobs, self._issuer, self._screening, clock
        )
        self._audit = Audit(records)
        self.traffic = Traffic(config.limits.mb_per_day, clock)
        room = Watermark(blobs.root, config.limits.disk_share)
        self._intake = Intake(spec, records, blobs, self._too_late, clock, self.traffic, room)
        self._intake.second = self._screening.second_update
        blobs.settle()
        self.state = self._restore()
        self._intake.tidy()

    # --- start, run, stop -----------------------------------------------------------------------

    def _restore(self) -> rounds.RunState:
        """The state of the run as the database has it; a new run gets its first adapter."""
        run_id, now = self.spec.run_id, self._clock()
        record = self._records.run(run_id)
        if record is None:
            initial = write_initial(self.spec, self._method, lambda role: self._blobs.draft())
            self._records.add_run(
                self.spec, self.config.model_dump(mode="json"), self._closer.kept(initial), now
            )
            return rounds.RunState()
        if record.spec.digest != self.spec.digest:
            raise RefusalError(
                Reason.BAD_REQUEST,
                f"run {run_id!r} was started with another base, adapter or seed; restore run.toml "
                "or choose a new [run] name",
            )
        before = record.config["method"]["name"]
        if before != self._method.name:
            raise RefusalError(
                Reason.BAD_REQUEST,
                f"run {run_id!r} was started with method {before}, run.toml now says "
                f"{self._method.name}; restore it or choose a new [run] name",
            )
        for device in self._records.all_devices():
            if device.profile is not None:
                self._profiles[device.device_id] = device.profile
        Mender(run_id, self._records, self._blobs, self._issuer, self._closer.merged_again).mend()
        history = self._records.all_rounds(run_id)
        given = self._records.assignments(run_id)
        state = rebuilt(history, given, self._policy, now - record.alive_at)
        if state.phase == "open":
            self._records.move_deadline(run_id, state.round, state.deadline_at_s)
            log.info("round resumed", extra={"round": state.round})
        if state.phase == "finished":
            self._untold = {a.assignment.device_id for a in given
                            if a.assignment.round == state.round}  # fmt: skip
            if record.finished_at is None:
                self._records.finish_run(run_id, now)
        return state

    async def run(self) -> None:
        """Ticks until the run is finished. Raises what a plan or a merge failed with."""
        noted = 0.0
        while self.state.phase != "finished":
            now = self._clock()
            self.ticks += 1
            gone = {d: "device lost" for d in self._ready if now - self._seen[d] > LOST_AFTER_S}
            if now - noted > 5:  # `revoke` is another process, so nobody tells
                shut_out = self._ready & revoked_members(self._records)
                gone |= dict.fromkeys(shut_out, "device revoked")
            for device, why in gone.items():
                self._ready.discard(device)
                log.warning(why, extra={"device_id": device})
                self._feed(rounds.DeviceLost(now, device))
            self._feed(rounds.Tick(now))
            if now - noted > 5:
                self._records.alive(self.spec.run_id, now)
                noted = now
            with contextlib.suppress(TimeoutError):
                async with timeout(0.5):  # 3.11's wait_for may swallow a cancellation
                    await self._changed.wait()
            if self._failure is not None:
                raise self._failure
        if self._failure is not None:
            raise self._failure

    async def drain(self, patience_s: float) -> None:
        """Begins nothing any more, sends who waits away, and lets a merge come to its end.

        What is not done after `patience_s` is done anew by the next process.
        """
        self._draining = True
        self._notify()
        if self._work:
            await asyncio.wait(self._work, timeout=patience_s)

    @property
    def left_out(self) -> dict[str, str]:
        """Why the last plan gave a device nothing; a copy."""
        return dict(self._left_out)

    def told_finished(self) -> bool:
        """Whether every device that was there at the end knows that the run is finished."""
        return not self._untold

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
        try:
            for effect in effects:
                self._carry_out(effect)
        except Exception as error:
            # The state has moved and the database has not: only a restart sets that right.
            self._failure = error
            self._notify()
            raise
        if self.state != before:
            self._notify()

    def _carry_out(self, effect: rounds.Effect) -> None:
        run_id, now = self.spec.run_id, self._clock()
        match effect:
            case rounds.PlanRound() if self._draining:
                log.info("the next process begins the round", extra={"round": effect.round})
            case rounds.PlanRound():
                if self.state.attempts:
                    attempts = {"round": effect.round, "attempts": self.state.attempts}
                    log.warning("nobody delivered; the round begins anew", extra=attempts)
                self._spawn(self._plan(effect))
            case rounds.CloseRound():
                detail = {"on_time": list(effect.on_time), "late": list(effect.late)}
                self._records.close_round(run_id, effect.round, detail, now)
                faults.point("round.closed")
                self._spawn(self._close(effect))
            case rounds.RefuseLate():
                log.warning("late update not merged: %s", effect.reason,
                            extra={"device_id": effect.device_id})  # fmt: skip
            case rounds.FinishRun():
                self._untold = set(self._ready)
                self._records.finish_run(run_id, now)
                log.info("run finished", extra={"run_id": run_id})

    # --- planning -------------------------------------------------------------------------------

    async def _plan(self, effect: rounds.PlanRound) -> None:
        """Plans a round, stores its slices and assignments, opens it."""
        if self._planning:  # for a fleet that has changed since; it will be asked for again
            return
        self._planning = True
        try:
            profiles = {d: self._profiles[d] for d in effect.device_ids if d in self._profiles}
            plan = await asyncio.to_thread(self._issuer.plan, effect, profiles)
            self._left_out, self._unfit = dict(plan.left_out), set(plan.unfit)
            for device, why in plan.left_out.items():
                log.warning("device left out: %s", why, extra={"device_id": device})
            if not plan.devices:
                self._notify()  # who does not fit is to be told
                return
            planned = await asyncio.to_thread(self._issuer.issue, effect, plan, dict(self._mirrors))
        finally:
            self._planning = False
        faults.point("round.cut")
        if self.state.phase != "gathering" or self.state.round != effect.round:
            return
        now = self._clock()
        names = tuple(a.device_id for a, _ in planned)
        self._feed(rounds.RoundPlanned(now, effect.round, names, plan.round_s))
        with self._records.transaction():
            self._records.open_round(
                self.spec.run_id, effect.round, effect.evaluate_only, now,
                self.state.deadline_at_s, planned,
            )  # fmt: skip
            self._audit.record(
                "assigned", run_id=self.spec.run_id, round=effect.round, devices=list(names)
            )
        faults.point("round.opened")
        log.info("round opened", extra={"round": effect.round, "devices": len(planned),
                                        "round_s": round(plan.round_s, 1)})  # fmt: skip

    async def _close(self, effect: rounds.CloseRound) -> None:
        await self._closer.close(effect)
        self._feed(rounds.Merged(self._clock(), effect.round))
        self._intake.tidy()
        self._issuer.forget(effect.round - self._policy.late_rounds)

    # --- what devices call ----------------------------------------------------------------------

    async def next_task(
        self,
        device_id: str,
        profile: DeviceProfile | None,
        working_on: str,
        wait_s: float,
        progress: Progress | None = None,
        mirror: str | None = None,
    ) -> Task:
        """The device's next piece of work, waiting up to `wait_s` for one.

        mirror: the digest of the one it holds, "" for none, None where it cannot keep one.
        """
        now = self._clock()
        self._seen[device_id] = now
        if mirror is None:
            self._mirrors.pop(device_id, None)
        else:
            self._mirrors[device_id] = mirror
        if progress is not None and working_on:
            self.progress[device_id] = progress
        elif not working_on:
            self.progress.pop(device_id, None)
        if profile is not None:
            profile = profile.completed_by(self._profiles.get(device_id))
            self._profiles[device_id] = profile
        self._records.seen(device_id, now, profile)
        if self.state.phase == "finished":
            return self._farewell(device_id, working_on)
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
            if self._draining:
                return Task("wait", self.spec, message="the coordinator restarts; it comes back")
            if (task := self._task_now(device_id, working_on)) is not None:
                return task
            left = until - asyncio.get_running_loop().time()
            if left <= 0:
                why = self._left_out.get(device_id) or self._screening.told(device_id)
                return Task("wait", self.spec, message=why)
            with contextlib.suppress(TimeoutError):
                async with timeout(left):
                    await changed.wait()

    def _task_now(self, device_id: str, working_on: str) -> Task | None:
        state = self.state
        if state.phase == "finished":
            return self._farewell(device_id, working_on)
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
        told = self._screening.told(device_id)
        return Task("assignment", self.spec, record.assignment, remaining_s, message=told)

    def _farewell(self, device_id: str, working_on: str) -> Task:
        if not working_on:  # the answer to a heartbeat may be lost with the work it breaks off
            self._untold.discard(device_id)
        return Task("finished", self.spec)

    def _profile_request(self) -> ProfileRequest:
        t = self.config.training
        return ProfileRequest(
            precision="nf4" if t.precision == "auto" else t.precision,
            sequence_tokens=PROFILE_TOKENS if t.sequence_tokens == "auto" else t.sequence_tokens,
            micro_batch=t.micro_batch,
            rank=max(1, self.config.adapter.rank // 4),
        )

    def blob_path(self, device_id: str, digest: str) -> Path:
        """The file of a blob that a device was sent for. Raises `UnknownBlobError`."""
        run_id, newest = self.spec.run_id, self.state.round
        if not names_blob(self._records, run_id, device_id, newest, digest):
            raise UnknownBlobError("this device was sent for no such blob; ask for a new task")
        return self._blobs.path(digest)

    async def suspect(self, device_id: str, digest: str) -> None:
        """A device that begins a file once more may have got other bytes than it was promised.

        Raises `DamagedError` when the blob is damaged, and ends the run: a restart mends it.
        """
        if (device_id, digest) not in self._begun:
            self._begun.add((device_id, digest))
            return
        try:
            await asyncio.to_thread(require_sound, self._blobs, [digest])
        except DamagedError as error:
            self._failure = error
            self._notify()
            raise

    async def begin_push(
        self, device_id: str, assignment_id: str, digest: str, size_bytes: int
    ) -> tuple[str, int]:
        """(upload id, bytes already held). Raises `RefusalError` before any byte is taken."""
        self._seen[device_id] = self._clock()
        return await self._intake.begin(device_id, assignment_id, digest, size_bytes)

    def put_chunk(
        self, device_id: str, upload_id: str, offset: int, data: Buffer, checksum: int | None
    ) -> int:
        """Takes a chunk; returns the length of the prefix held. Raises `RefusalError`.

        May be called from any thread.
        """
        self._seen[device_id] = self._clock()  # a device that pushes for minutes is not lost
        return self._intake.put(device_id, upload_id, offset, data, checksum)

    async def commit_push(self, device_id: str, upload_id: str) -> tuple[str, str]:
        """(receipt, "accepted" or "late"). Repeating it returns the same. Raises `RefusalError`."""
        try:
            update = await self._intake.commit(device_id, upload_id)
        except RefusalError as error:
            if error.reason is Reason.BAD_UPDATE and upload_id not in self._refused:
                self._refused.add(upload_id)  # once, however often it comes
                self._audit.record(
                    "update refused", run_id=self.spec.run_id, device_id=device_id, why=str(error)
                )
            raise
        assignment = update.assignment
        if update.new and update.reported:  # else the report tells
            self._consider(assignment.assignment_id)
        outcome = "late" if self._closed_without(assignment) else "accepted"
        return f"{assignment.assignment_id}:{update.digest}", outcome

    def report(self, device_id: str, report: LocalReport) -> None:
        """Takes the report of an assignment. Raises `RefusalError`."""
        record = self._intake.own(device_id, report.assignment_id)
        require_report_fits(report, record.assignment)
        step = record.assignment.mirror
        if record.report is None and report.outcome == "done" and step is not None:
            self._mirrors[device_id] = step.result.digest  # the next round may not await its poll
        self._records.put_report(report)
        faults.point("report.kept")
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
        elif record.arrived:
            self._feed(rounds.Arrived(now, a.round, a.device_id))

    def _closed_without(self, assignment: Assignment) -> bool:
        """Whether the round of an assignment closed before its update and report were in."""
        if self.state.phase == "open" and self.state.round == assignment.round:
            return False
        history = self._records.all_rounds(self.spec.run_id)
        own = next(r for r in history if r.round == assignment.round)
        return own.phase != "open" and assignment.device_id not in own.detail["on_time"]

    def _too_late(self, assignment: Assignment) -> str | None:
        return rounds.too_late(self.state, assignment.round, self._policy)
