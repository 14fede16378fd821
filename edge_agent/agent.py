"""The network process: poll, fetch, hand to the trainer, push, report; survives anything.

Imports no torch. What it has finished is in the journal before the first byte leaves, so a kill at
any instant costs at most the local steps in progress, which are deterministic and run again.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import importlib.metadata
import json
import logging
import math
import os
import re
import time
from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import Any

from edge_agent.config import AgentConfig
from edge_agent.journal import Entry, Journal
from edge_agent.link import Link, LinkError, RefusedError
from edge_agent.membership import Membership
from edge_agent.probe import probe
from edge_agent.trainer_process import TrainerError, TrainerProcess
from edge_agent.training.corpus import first_source
from profiles.device import ComputeProfile, DeviceProfile, GpuProfile
from profiles.errors import SketchfleetError
from profiles.link import LinkProfile
from profiles.model import ModelError, base_digest, resolve_base
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
from protos.sketchfleet.v1 import fleet_pb2 as pb

log = logging.getLogger("sketchfleet.agent")

POLL_S = 45.0
HEARTBEAT_S = 20.0
RETRY_S = 5.0
NEVER_WANTED = (Reason.TOO_LATE, Reason.UNKNOWN_ASSIGNMENT, Reason.EQUIVOCATION, Reason.WRONG_SIZE,
                Reason.BAD_UPDATE)  # fmt: skip


FILE_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,190}")  # ids and digests become file names here
DIGEST = re.compile(r"[0-9a-f]{64}")
OWNER_MUST_ACT = ("no_data", "base_mismatch")  # trying again next round would fail alike


class AgentError(SketchfleetError):
    """The agent cannot go on until its owner acts."""


def _told(outcome: str, assignment: Assignment) -> str:
    """What the coordinator is told of a failure: never paths or text of this device."""
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


def version() -> str:
    """The installed version of Sketchfleet."""
    try:
        return importlib.metadata.version("sketchfleet")
    except importlib.metadata.PackageNotFoundError:
        return "0"


class Agent:
    """One device."""

    def __init__(self, config: AgentConfig) -> None:
        self.config = config
        self.folder = config.state.folder
        self.journal = Journal(self.folder)
        self.link = Link(config.coordinator.address)
        self.fleet = Membership(config, self.link, version())
        self.trainer = TrainerProcess(
            config.trainer.python, config.limits.threads, self.folder / "trainer.log"
        )
        self._profile: DeviceProfile | None = None
        self._profile_sent = False
        self._over = False
        self._checked: dict[str, Path] = {}
        for name in ("blobs", "work"):
            (self.folder / name).mkdir(exist_ok=True)

    async def run(self) -> None:
        """Works until the run is finished. Raises `SketchfleetError` when it cannot."""
        self.status("starting")
        self.journal.sweep()
        self._clear("work")
        data = self.config.data
        await asyncio.to_thread(
            first_source, data.include, exclude=data.exclude, languages=data.languages
        )
        self.status("enrolling")
        await self.fleet.sign_on()
        idle_since = time.monotonic()
        try:
            await self._send_pending()
            while True:
                answer = await self._poll()
                self.link.patience_s = math.inf  # it was there: from now on only a break
                if answer.kind == pb.NextTaskResponse.KIND_RUN_FINISHED:
                    self._clear("blobs")
                    self.status("finished")
                    log.info("run finished")
                    return
                spec = from_message(answer.spec, AdapterSpec)
                if answer.kind == pb.NextTaskResponse.KIND_PROFILE:
                    request = from_message(answer.profile_request, ProfileRequest)
                    await self._measure(spec, request)
                elif answer.kind == pb.NextTaskResponse.KIND_ASSIGNMENT:
                    task = from_message(answer.assignment, Assignment)
                    told = {"round": task.round, "remaining_s": round(answer.remaining_s)}
                    log.info("assignment: %s", task.reason, extra=told)
                    await self._work(spec, task)
                else:
                    self.status("waiting", message=answer.message)
                    if time.monotonic() - idle_since > self.config.trainer.idle_s:
                        await self.trainer.stop()
                    continue
                idle_since = time.monotonic()
        finally:
            await self.trainer.stop()
            await self.link.close()
            self.journal.close()

    async def _poll(self) -> Any:
        """One long poll; carries the profile when the coordinator has not seen it yet."""
        if self._profile is None:
            self._profile = self._known_profile()
        profile = None if self._profile_sent else self._profile
        answer = await self.fleet.call(lambda: self.link.next_task(profile, "", POLL_S, math.inf))
        self._profile_sent = True
        return answer

    # --- what this device is --------------------------------------------------------------------

    @property
    def _memory_cap_bytes(self) -> int | None:
        megabytes = self.config.limits.memory_mb
        return None if megabytes is None else megabytes * 10**6

    @property
    def _ditto(self) -> float:
        return self.config.personal.ditto

    def _known_profile(self) -> DeviceProfile:
        return probe(
            version=version(), state=self.folder, board=self.config.device.board,
            memory_cap_bytes=self._memory_cap_bytes,
        )  # fmt: skip

    async def _measure(self, spec: AdapterSpec, request: ProfileRequest) -> None:
        """Measures link and compute for this base; the next poll carries the profile."""
        self.status("measuring link")
        link = await self._measured_link()
        self.status("measuring compute")
        known = self._known_profile()  # before the trainer takes memory of its own
        folder = await self._base(spec)
        job = {"job": "profile", "base_folder": str(folder), "spec": to_plain(spec),
               "request": to_plain(request),
               "memory_cap_bytes": self._memory_cap_bytes}  # fmt: skip
        try:
            result = await self.trainer.run(job)
        except TrainerError as error:
            raise AgentError(f"this device cannot train {spec.base}: {error}") from error
        gpu = result.get("gpu")
        compute = from_plain(ComputeProfile, result["compute"])
        if self._ditto > 0:
            # Every step for the fleet is followed by one for the device's own adapter, so towards
            # the run a token takes twice as long; the planner's times are right only with this.
            compute = dataclasses.replace(compute, tokens_per_s=compute.tokens_per_s / 2)
        self._profile = dataclasses.replace(
            known,
            gpu=None if gpu is None else from_plain(GpuProfile, gpu),
            compute=compute,
            link=link,
        )
        self._profile_sent = False
        log.info("profile", extra={"tokens_per_s": round(self._profile.compute.tokens_per_s)
                                   if self._profile.compute else None,
                                   "up_bps": round(link.up_bps)})  # fmt: skip

    async def _measured_link(self) -> LinkProfile:
        while True:
            try:
                return await self.fleet.call(lambda: self.link.probe(metered=False))
            except LinkError as error:
                log.warning("link not measured, trying again: %s", error)
                await asyncio.sleep(RETRY_S)

    async def _base(self, spec: AdapterSpec) -> Path:
        """The folder of the run's base, its digest checked. Raises `ModelError`."""
        if spec.base_digest not in self._checked:
            where = self.config.model.base or spec.base
            folder = await asyncio.to_thread(resolve_base, where, spec.base_revision or None)
            digest = await asyncio.to_thread(base_digest, folder)
            if digest != spec.base_digest:
                raise ModelError(
                    f"base model {folder} has digest {digest[:12]}, but the run needs "
                    f"{spec.base_digest[:12]}; fetch the same revision or correct [model] base"
                )
            self._checked[spec.base_digest] = folder
        return self._checked[spec.base_digest]

    # --- one assignment -------------------------------------------------------------------------

    async def _work(self, spec: AdapterSpec, assignment: Assignment) -> None:
        """Fetches, trains, journals, pushes, reports."""
        if not FILE_NAME.fullmatch(assignment.assignment_id) or not all(
            DIGEST.fullmatch(blob.digest) for blob in assignment.blobs
        ):
            raise AgentError("the coordinator gave names that are no file names; do not trust it")
        training = asyncio.ensure_future(self._train(spec, assignment))
        beat = asyncio.create_task(self._heartbeat(assignment.assignment_id, training))
        cause: AgentError | None = None
        try:
            report, update, home = await training
        except (TrainerError, ModelError) as error:
            outcome = error.outcome if isinstance(error, TrainerError) else "base_mismatch"
            log.error("assignment failed: %s", error, extra={"round": assignment.round})
            report = from_plain(LocalReport, {
                "assignment_id": assignment.assignment_id, "outcome": outcome,
                "message": _told(outcome, assignment),
            })  # fmt: skip
            update, home = None, None
            if outcome in OWNER_MUST_ACT:
                cause = AgentError(str(error))
        except asyncio.CancelledError:
            if not self._over:
                training.cancel()
                raise
            log.info("the run ended while training; the rest is dropped")
            return
        finally:
            beat.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await beat
        await self._send(self.journal.add(report, update, home))
        self._clear("work")
        if cause is not None:
            raise cause

    async def _heartbeat(self, assignment_id: str, training: asyncio.Future[Any]) -> None:
        """Polls while the trainer works, so that the coordinator knows this device lives."""
        while True:
            await asyncio.sleep(HEARTBEAT_S)
            with contextlib.suppress(LinkError, RefusedError):
                answer = await self.link.next_task(None, assignment_id, 0.0, 0.0)
                if answer.kind == pb.NextTaskResponse.KIND_RUN_FINISHED:
                    self._over = True
                    training.cancel()
                    return

    async def _train(
        self, spec: AdapterSpec, assignment: Assignment
    ) -> tuple[LocalReport, Path | None, tuple[AdapterSpec, Path] | None]:
        """The report, the update and the run's new home; the last two if there are any."""
        status = {"round": assignment.round, "k": assignment.rank, "steps": assignment.local_steps}
        self.status("fetching", **status)
        folder = await self._base(spec)
        begun, before = time.monotonic(), self.link.fetched_bytes
        await self._fetch(assignment)
        fetch_s, fetched = time.monotonic() - begun, self.link.fetched_bytes - before
        work = self.folder / "work"
        update = work / f"{assignment.assignment_id}.update"
        new_home = work / f"{assignment.assignment_id}.home"
        # What is kept from before the first round is of an earlier run of the same name.
        home = self.journal.home_path(spec) if assignment.round else None
        side, global_side = assignment.side, assignment.global_side
        data = self.config.data
        job = {
            "job": "train",
            "base_folder": str(folder),
            "spec": to_plain(spec),
            "assignment": to_plain(assignment),
            "data": {
                "include": list(data.include), "exclude": list(data.exclude),
                "languages": list(data.languages), "max_files": data.max_files,
            },
            "slice_paths": [self._place(blob) for blob in assignment.slice],
            "side_path": None if side is None else self._place(side),
            "global_paths": [self._place(blob) for blob in assignment.global_adapter],
            "global_side_path": None if global_side is None else self._place(global_side),
            "update_path": str(update) if assignment.trains else None,
            "home_path": None if home is None else str(home),
            "home_out": str(new_home) if assignment.trains else None,
            "personal_weight": self._ditto,
            "memory_cap_bytes": self._memory_cap_bytes,
        }  # fmt: skip
        self.status("training" if assignment.trains else "evaluating", step=0, **status)

        def progress(event: dict[str, Any]) -> None:
            shown = {**status, "step": event["step"], "loss": event["loss"]}
            self.status("training", **shown)

        try:
            result = await self.trainer.run(job, progress)
        except TrainerError as error:
            if not error.died:
                raise
            log.warning("the trainer died, trying once more: %s", error)
            result = await self.trainer.run(job, progress)
        report = from_plain(LocalReport, result["report"])
        report = dataclasses.replace(report, fetch_s=fetch_s, fetched_bytes=fetched)
        return (
            report,
            update if assignment.trains else None,
            (spec, new_home) if assignment.trains and new_home.is_file() else None,
        )

    async def _fetch(self, assignment: Assignment) -> None:
        """Has every blob of the assignment in blobs/, and nothing else but what is on its way.

        What an earlier round left stays if it is named again: a factor that did not change
        costs nothing.
        """
        named = [blob.digest for blob in assignment.blobs]
        self._clear("blobs", but={*named, *(f"{digest}.part" for digest in named)})
        for blob in assignment.blobs:
            await self.fleet.call(partial(self.link.fetch, blob, self.folder / "blobs"))

    def _place(self, blob: BlobRef) -> str:
        return str(self.folder / "blobs" / blob.digest)

    async def _send(self, entry: Entry) -> None:
        """Pushes and reports a journal entry; what is no longer wanted is dropped, with a line."""
        report = entry.report
        try:
            if entry.digest and not entry.committed:
                self.status("pushing", assignment=entry.assignment_id)
                before, begun = self.link.resumes, time.monotonic()
                path = self.journal.update_path(entry.digest)
                size = path.stat().st_size
                receipt, outcome = await self.fleet.call(
                    partial(self.link.push, entry.assignment_id, entry.digest, path)
                )
                report = dataclasses.replace(
                    report, push_s=time.monotonic() - begun, pushed_bytes=size,
                    resumes=report.resumes + self.link.resumes - before,
                )  # fmt: skip
                self.journal.committed(entry.assignment_id, report)
                log.info("update accepted", extra={"receipt": receipt, "outcome": outcome})
            await self.fleet.call(partial(self.link.report, report, math.inf))
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
            log.info("resuming", extra={"assignment_id": entry.assignment_id})
            await self._send(entry)

    def _clear(self, folder: str, but: Collection[str] = ()) -> None:
        for path in (self.folder / folder).iterdir():
            if path.name not in but:
                path.unlink()

    def status(self, phase: str, **fields: Any) -> None:
        """Shows what the agent is doing, for `sketchfleet-agent status`."""
        path = self.folder / "status.json"
        temporary = path.with_suffix(".tmp")
        plain = {"phase": phase, "at": time.time(), "pid": os.getpid(), **fields}
        temporary.write_text(json.dumps(plain))
        temporary.replace(path)
