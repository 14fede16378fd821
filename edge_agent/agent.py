"""The network process: poll, fetch, hand to the trainer, push, report; survives anything.

Imports no torch. What it has finished is in the journal before the first byte leaves, so a kill at
any instant costs at most the local steps in progress, which are deterministic and run again.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import math
import re
import sqlite3
import time
from collections.abc import Collection, Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from edge_agent.access import membership, open_link
from edge_agent.activity import Activity
from edge_agent.bases import Bases
from edge_agent.config import AgentConfig
from edge_agent.failures import OWNER_MUST_ACT, BudgetError, failed, is_of_disk
from edge_agent.held import keep
from edge_agent.journal import Entry, Journal
from edge_agent.link import LinkError, RefusedError
from edge_agent.machine import Machine
from edge_agent.mirror import Mirror
from edge_agent.network import DailyBudget, carried_bytes
from edge_agent.pace import Courtesy, Pace
from edge_agent.policy import FREE, decide
from edge_agent.profiler import Profiler
from edge_agent.readings import Sensors
from edge_agent.status import StatusFile
from edge_agent.trainer_process import TrainerError, TrainerProcess
from edge_agent.training.connectors import require_usable
from edge_agent.watch import RoundWatch
from profiles.errors import SketchfleetError
from profiles.model import ModelError
from profiles.program import version
from protos import faults
from protos.codecs import PackingError
from protos.contract import (
    AdapterSpec,
    Assignment,
    BlobRef,
    LocalReport,
    ProfileRequest,
    Reason,
    from_message,
    from_plain,
    to_plain,
)
from protos.layout import most_update_bytes
from protos.sketchfleet.v1 import fleet_pb2 as pb
from protos.transfer import sha256_of

log = logging.getLogger("sketchfleet.agent")

POLL_S = 45.0
HEARTBEAT_S = 20.0
DISK_S = 5.0  # between two tries to write where the disk said no
AGAIN_S = 2.0  # before work is asked for again that the coordinator took back
AWAY_S = 30.0  # between two looks at whether the owner lets it work again
CHECKPOINT = ".checkpoint"
NEVER_WANTED = (Reason.TOO_LATE, Reason.UNKNOWN_ASSIGNMENT, Reason.EQUIVOCATION, Reason.WRONG_SIZE,
                Reason.BAD_UPDATE)  # fmt: skip


FILE_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,190}")  # ids and digests become file names here
DIGEST = re.compile(r"[0-9a-f]{64}")


class AgentError(SketchfleetError):
    """The agent cannot go on until its owner acts."""


class DamagedError(SketchfleetError):
    """What a device trained from rotted meanwhile."""


async def _end(tasks: Sequence[asyncio.Task[None]]) -> None:
    """Ends what ran beside the training; a defect in it is told, and costs no round."""
    for task in tasks:
        task.cancel()
    for ended in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(ended, Exception):
            log.error("watching the round failed", exc_info=ended)


class Agent:
    """One device."""

    def __init__(self, config: AgentConfig, machine: Machine | None = None) -> None:
        self.config = config
        self.folder = config.state.folder
        if not self.folder.exists():
            with contextlib.suppress(OSError):  # the journal says what is wrong with it
                self.folder.mkdir(mode=0o700, parents=True)  # it will hold the credential
        self.journal = Journal(self.folder)
        machine = machine or Machine()
        self.link = open_link(config, Pace(config.network.most_bps))
        if config.policy.owner != "dedicated":
            self.link.pace.courtesy = Courtesy(
                partial(carried_bytes, machine), lambda: self.link.moved_bytes
            )
        self.fleet = membership(config, self.link, version())
        self.trainer = TrainerProcess(
            config.trainer.python, config.limits.threads, self.folder / "trainer.log"
        )
        self.bases = Bases(config.model.base)
        self.status = StatusFile(self.folder)
        daily_mb = config.network.daily_mb
        self.budget = DailyBudget(
            self.folder / "traffic.json", None if daily_mb is None else daily_mb * 10**6
        )
        self.profiler = Profiler(
            config, version(), self.link, self.fleet, self.bases, machine, self.budget
        )
        self.activity = Activity(Sensors(machine), config.policy.owner != "dedicated")
        self._charged_bytes = 0
        self._over = False
        self._idle_since = self._ready_since = time.monotonic()
        for name in ("blobs", "work"):
            (self.folder / name).mkdir(exist_ok=True)
        self.mirror = Mirror(self.folder / "mirror")

    async def run(self) -> None:
        """Works until the run is finished. Raises `SketchfleetError` when it cannot."""
        self.status("starting")
        self.journal.sweep()
        self._clear("work", but=self._checkpoints())
        await asyncio.to_thread(require_usable, self.config.selection)
        self.status("enrolling")
        await self.fleet.sign_on()
        try:
            self._idle_since = self._ready_since = time.monotonic()
            while True:
                try:
                    await self._send_pending()
                    if await self._turn():
                        return
                except (OSError, sqlite3.Error) as error:
                    if not is_of_disk(error):
                        raise
                    log.error("state folder cannot be written: %s; trying again", error)
                    await asyncio.sleep(DISK_S)
        finally:
            await self.trainer.stop()
            await self.link.close()
            self._charge()
            self.budget.save()
            self.profiler.keep()
            self.journal.close()

    async def _turn(self) -> bool:
        """Asks for work once and does it. Returns whether the run is finished."""
        self._ready_since += await self._stay_away()
        answer = await self._poll(POLL_S)
        self.link.patience_s = math.inf  # it was there: from now on only a break
        if answer.kind == pb.NextTaskResponse.KIND_RUN_FINISHED:
            self._clear("blobs")
            self._clear("work")
            self.mirror.clear()
            self.status("finished")
            log.info("run finished")
            return True
        spec = from_message(answer.spec, AdapterSpec)
        if answer.kind == pb.NextTaskResponse.KIND_PROFILE:
            self.status("measuring")
            request = from_message(answer.profile_request, ProfileRequest)
            await self.profiler.measure(spec, request, self.trainer)
        elif answer.kind == pb.NextTaskResponse.KIND_ASSIGNMENT:
            task = from_message(answer.assignment, Assignment)
            told = {"round": task.round, "remaining_s": round(answer.remaining_s)}
            log.info("assignment: %s", task.reason, extra=told)
            if answer.message:
                log.warning("the coordinator says: %s", answer.message)
            await self._work(spec, task, time.monotonic() - self._ready_since)
        else:
            self.status("waiting", message=answer.message)
            if time.monotonic() - self._idle_since > self.config.trainer.idle_s:
                await self.trainer.stop()
            return False
        self._idle_since = self._ready_since = time.monotonic()
        return False

    async def _poll(self, wait_s: float) -> Any:
        """One long poll; carries the profile when the coordinator has not seen it yet."""
        await self.profiler.refresh()
        profile = self.profiler.profile if self.profiler.is_due else None
        answer = await self.fleet.call(
            lambda: self.link.next_task(profile, "", wait_s, math.inf, mirror=self.mirror.digest)
        )
        self._charge()
        if profile is not None:
            self.profiler.sent()
        return answer

    # --- what the owner allows ------------------------------------------------------------------

    async def _stay_away(self) -> float:
        """Waits while no work may be asked for: for hours, so the fleet had better not count on it.

        Returns for how long, s. What passes sooner (heat, other programs) holds a round up instead
        of missing it.
        """
        verdict, told, begun = FREE, False, time.monotonic()
        while True:
            found = await asyncio.to_thread(self.activity.read, True)
            verdict = decide(self.config.policy, found, datetime.now(), time.monotonic(), verdict)
            why = verdict.why if verdict.is_lasting else ""
            if self.budget.is_used_up:
                why = "today's data budget is used up; goes on at midnight"
                if not told:  # once, so that the fleet plans without this device
                    await self._poll(0.0)
                    told = True
            if not why:
                return time.monotonic() - begun
            await self.trainer.stop()
            self.status("away", message=why)
            await asyncio.sleep(AWAY_S)

    def _charge(self) -> None:
        """Charges the owner's budget with what moved since the last time."""
        moved = self.link.moved_bytes
        self.budget.spend(moved - self._charged_bytes)
        self._charged_bytes = moved

    async def _await_budget(self, size_bytes: int) -> None:
        """Waits until tomorrow if a finished update does not fit into today's budget any more."""
        day = self.budget.day
        while not self.budget.allows(size_bytes) and self.budget.day == day:
            self.status("away", message="an update waits for tomorrow's data budget")
            await asyncio.sleep(AWAY_S)

    def _require_budget(self, spec: AdapterSpec, assignment: Assignment) -> None:
        """Raises `BudgetError` when today's bytes do not suffice for this assignment."""
        held = {path.name for path in (self.folder / "blobs").iterdir()}
        need = sum(b.size_bytes for b in self._wanted(assignment) if b.digest not in held)
        if assignment.trains:
            need += most_update_bytes(spec, assignment)[0]
        if not self.budget.allows(need):
            raise BudgetError(
                f"the assignment needs {need / 1e6:.1f} MB and today's data budget has "
                f"{(self.budget.left_bytes or 0) / 1e6:.1f} MB left"
            )

    # --- one assignment -------------------------------------------------------------------------

    async def _work(self, spec: AdapterSpec, assignment: Assignment, wait_s: float) -> None:
        """Fetches, trains, journals, pushes, reports; `wait_s`: how long it was ready for this."""
        named = [blob.digest for blob in assignment.blobs]
        if assignment.mirror is not None:
            named.append(assignment.mirror.result.digest)
        if not FILE_NAME.fullmatch(assignment.assignment_id) or not all(
            map(DIGEST.fullmatch, named)
        ):
            raise AgentError("the coordinator gave names that are no file names; do not trust it")
        self._clear("work", but=(f"{assignment.assignment_id}{CHECKPOINT}",))
        watch = RoundWatch(
            assignment, self.config.policy, self.activity, self.folder / "control.json",
            release_after_s=self.config.trainer.idle_s,
            changed=lambda: self.status(watch.phase, **watch.shown()),
        )  # fmt: skip
        training = asyncio.ensure_future(self._train(spec, assignment, watch))
        beside = (
            asyncio.create_task(self._heartbeat(assignment.assignment_id, watch, training)),
            asyncio.create_task(watch.run()),
        )
        cause: AgentError | None = None
        try:
            report, update, home = await training
        except (TrainerError, ModelError, BudgetError) as error:
            log.error("assignment failed: %s", error, extra={"round": assignment.round})
            report = failed(assignment, error)
            update, home = None, None
            if report.outcome in OWNER_MUST_ACT:
                cause = AgentError(str(error))
        except RefusedError as error:
            if error.reason is not Reason.UNKNOWN_BLOB:
                raise
            # The round began anew, or the coordinator was restored from a backup.
            log.warning("%s", error, extra={"round": assignment.round})
            await asyncio.sleep(AGAIN_S)
            return
        except DamagedError as error:
            log.warning("%s", error, extra={"round": assignment.round})
            self._clear("work")
            return
        except asyncio.CancelledError:
            if not self._over:
                training.cancel()
                raise
            log.info("the run ended while training; the rest is dropped")
            return
        finally:
            await _end(beside)
        report = dataclasses.replace(report, wait_s=wait_s)
        faults.point("agent.trained")
        entry = self.journal.add(report, update, home)
        faults.point("agent.journalled")
        await self._send(entry)
        self._clear("work")
        if cause is not None:
            raise cause

    async def _heartbeat(
        self, assignment_id: str, watch: RoundWatch, training: asyncio.Future[Any]
    ) -> None:
        """Polls while the trainer works, so that the coordinator knows how this device is."""
        while True:
            await asyncio.sleep(HEARTBEAT_S)
            with contextlib.suppress(LinkError, RefusedError):
                await self.profiler.refresh(may_measure=False)
                profile = self.profiler.profile if self.profiler.is_due else None
                beat = partial(self.link.next_task, profile, assignment_id, 0.0, 0.0,
                               watch.progress(), self.mirror.digest)  # fmt: skip
                answer = await self.fleet.call(beat)
                self._charge()
                if profile is not None:
                    self.profiler.sent()
                if answer.kind == pb.NextTaskResponse.KIND_RUN_FINISHED:
                    self._over = True
                    training.cancel()
                    return

    async def _train(
        self, spec: AdapterSpec, assignment: Assignment, watch: RoundWatch
    ) -> tuple[LocalReport, Path | None, tuple[AdapterSpec, Path] | None]:
        """The report, the update and the run's new home; the last two if there are any."""
        watch.phase = "fetching"
        self._require_budget(spec, assignment)
        folder = await self.bases.folder(spec)
        begun, before = time.monotonic(), self.link.fetched_bytes
        resumes, resent = self.link.resumes, self.link.resent_bytes
        await self._fetch(assignment)
        faults.point("agent.fetched", self.folder / "work" / assignment.assignment_id)
        await self._take_mirror(spec, assignment)
        mirror = self.mirror.path if assignment.mirror is not None else None
        await asyncio.to_thread(keep, self.folder, spec, assignment, mirror)
        self._charge()
        fetch_s, fetched = time.monotonic() - begun, self.link.fetched_bytes - before
        resumes, resent = self.link.resumes - resumes, self.link.resent_bytes - resent
        job = self._job(spec, assignment, folder)
        watch.phase = "training" if assignment.trains else "evaluating"
        result = await watch.carry_out(job, self.trainer)
        await asyncio.to_thread(self._require_whole, assignment)
        report = watch.completed(from_plain(LocalReport, result["report"]))
        report = dataclasses.replace(
            report, fetch_s=fetch_s, fetched_bytes=fetched, resumes=resumes, resent_bytes=resent
        )
        update, home = job["update_path"], job["home_out"]
        return (
            report,
            None if update is None else Path(update),
            (spec, Path(home)) if home is not None and Path(home).is_file() else None,
        )

    def _job(self, spec: AdapterSpec, assignment: Assignment, folder: Path) -> dict[str, Any]:
        """The trainer's job: the assignment, where its files lie, what the owner allows."""
        work, name = self.folder / "work", assignment.assignment_id
        # What is kept from before the first round is of an earlier run of the same name.
        home = self.journal.home_path(spec) if assignment.round else None
        side, global_side = assignment.side, assignment.global_side
        return {
            "job": "train",
            "base_folder": str(folder),
            "spec": to_plain(spec),
            "assignment": to_plain(assignment),
            "data": to_plain(self.config.selection),
            "slice_paths": [self._place(blob) for blob in assignment.slice],
            "side_path": None if side is None else self._place(side),
            "global_paths": [self._place(blob) for blob in assignment.global_adapter],
            "global_side_path": None if global_side is None else self._place(global_side),
            "mirror_path": None if assignment.mirror is None else str(self.mirror.path),
            "update_path": str(work / f"{name}.update") if assignment.trains else None,
            "home_path": None if home is None else str(home),
            "home_out": str(work / f"{name}.home") if assignment.trains else None,
            "checkpoint_path": str(work / f"{name}{CHECKPOINT}") if assignment.trains else None,
            "control_path": str(self.folder / "control.json"),
            "personal_weight": self.config.personal.ditto,
            "memory_cap_bytes": self.profiler.memory_cap_bytes,
        }  # fmt: skip

    async def _fetch(self, assignment: Assignment) -> None:
        """Has every blob of the assignment in blobs/, and nothing else but what is on its way.

        What an earlier round left stays if it is named again: a factor that did not change
        costs nothing.
        """
        wanted = self._wanted(assignment)
        named = [blob.digest for blob in wanted]
        self._clear("blobs", but={*named, *(f"{digest}.part" for digest in named)})
        for blob in wanted:
            await self.fleet.call(partial(self.link.fetch, blob, self.folder / "blobs"))

    def _wanted(self, assignment: Assignment) -> tuple[BlobRef, ...]:
        """What this device must have in blobs/ for an assignment."""
        if assignment.mirror is None:
            return assignment.blobs
        rest = dataclasses.replace(assignment, mirror=None).blobs
        return tuple(dict.fromkeys((*rest, *self.mirror.wanted(assignment.mirror))))

    def _require_whole(self, assignment: Assignment) -> None:
        """Raises `DamagedError` where what was trained from is no longer what was fetched."""
        blobs = dataclasses.replace(assignment, mirror=None).blobs
        named = {self.folder / "blobs" / blob.digest: blob.digest for blob in blobs}
        if assignment.mirror is not None:
            named[self.mirror.path] = assignment.mirror.result.digest
        for path, digest in named.items():
            if not path.is_file() or sha256_of(path) != digest:
                path.unlink(missing_ok=True)
                if path == self.mirror.path:
                    self.mirror.clear()
                raise DamagedError(
                    f"{digest[:12]} was damaged on this device's disk while it trained; the round "
                    "is begun again (check the disk if this happens again)"
                )

    async def _take_mirror(self, spec: AdapterSpec, assignment: Assignment) -> None:
        """Brings the mirror to where the assignment wants it, at worst by fetching it whole."""
        if assignment.mirror is None:
            return
        blobs = self.folder / "blobs"
        try:
            await asyncio.to_thread(self.mirror.take, spec, assignment, blobs)
        except (PackingError, OSError) as error:
            log.warning("mirror fetched whole: %s", error, extra={"round": assignment.round})
            self.mirror.clear()
            result = assignment.mirror.result
            await self.fleet.call(partial(self.link.fetch, result, blobs))
            whole = dataclasses.replace(assignment.mirror, files=(), base=result)
            await asyncio.to_thread(
                self.mirror.take, spec, dataclasses.replace(assignment, mirror=whole), blobs
            )

    def _place(self, blob: BlobRef) -> str:
        return str(self.folder / "blobs" / blob.digest)

    async def _send(self, entry: Entry) -> None:
        """Pushes and reports a journal entry; what is no longer wanted is dropped, with a line."""
        report = entry.report
        try:
            if entry.digest and not entry.committed:
                if not await asyncio.to_thread(self.journal.holds, entry):
                    log.error("an update is damaged on this disk; its round is done again",
                              extra={"assignment_id": entry.assignment_id})  # fmt: skip
                    self.journal.done(entry)
                    return
                self.status("pushing", assignment=entry.assignment_id)
                path = self.journal.update_path(entry.digest)
                size = path.stat().st_size
                await self._await_budget(size)
                resumes, resent, begun = (
                    self.link.resumes, self.link.resent_bytes, time.monotonic()
                )  # fmt: skip
                push = partial(self.link.push, entry.assignment_id, entry.digest, path)
                receipt, outcome = await self.fleet.call(push)
                await faults.repeat("link.answered", push)
                report = dataclasses.replace(
                    report, push_s=time.monotonic() - begun, pushed_bytes=size,
                    resumes=report.resumes + self.link.resumes - resumes,
                    resent_bytes=report.resent_bytes + self.link.resent_bytes - resent,
                )  # fmt: skip
                faults.point("agent.pushed")
                self.journal.committed(entry.assignment_id, report)
                self._charge()
                log.info("update accepted", extra={"receipt": receipt, "outcome": outcome})
            tell = partial(self.link.report, report, math.inf)
            await self.fleet.call(tell)
            await faults.repeat("link.answered", tell)
            faults.point("agent.reported")
        except RefusedError as error:
            if error.reason not in NEVER_WANTED:
                raise
            log.error("update dropped: %s", error, extra={"reason": str(error.reason)})
            if error.reason is Reason.BAD_UPDATE:
                with contextlib.suppress(RefusedError):
                    await self.link.report(dataclasses.replace(
                        report, outcome="crashed", message="its update was refused"
                    ), math.inf)  # fmt: skip
        self.journal.done(entry)

    async def _send_pending(self) -> None:
        for entry in self.journal.pending():
            self.link.patience_s = math.inf  # it was let in before: the coordinator comes back
            log.info("resuming", extra={"assignment_id": entry.assignment_id})
            await self._send(entry)

    def _checkpoints(self) -> list[str]:
        """Of assignments that may come again."""
        return [p.name for p in (self.folder / "work").iterdir() if p.suffix == CHECKPOINT]

    def _clear(self, folder: str, but: Collection[str] = ()) -> None:
        for path in (self.folder / folder).iterdir():
            if path.name not in but:
                path.unlink()
