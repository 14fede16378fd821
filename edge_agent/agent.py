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
import time
from pathlib import Path
from typing import Any

from edge_agent.config import AgentConfig
from edge_agent.journal import Entry, Journal
from edge_agent.link import Link, LinkError, RefusedError
from edge_agent.probe import probe
from edge_agent.trainer_process import TrainerError, TrainerProcess
from edge_agent.training.corpus import scan
from profiles.device import ComputeProfile, DeviceProfile, GpuProfile
from profiles.errors import SketchfleetError
from profiles.model import ModelError, base_digest, resolve_base
from protos.contract import (
    AdapterSpec,
    Assignment,
    LocalReport,
    ProfileRequest,
    Reason,
    from_message,
    from_plain,
    to_plain,
)
from protos.sketchfleet.v1 import fleet_pb2 as pb
from protos.transfer import write_durably

log = logging.getLogger("sketchfleet.agent")

FIRST_CONTACT_S = 30.0
POLL_S = 45.0
HEARTBEAT_S = 20.0
RENEW_AT = 2 / 3  # of a credential's life
NEVER_WANTED = (Reason.TOO_LATE, Reason.UNKNOWN_ASSIGNMENT, Reason.EQUIVOCATION, Reason.WRONG_SIZE,
                Reason.BAD_UPDATE)  # fmt: skip


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
        self.trainer = TrainerProcess(
            config.trainer.python, config.limits.threads, self.folder / "trainer.log"
        )
        self._profile: DeviceProfile | None = None
        self._profile_sent = False
        self._renew_at = math.inf
        self._checked: dict[str, Path] = {}
        for name in ("blobs", "work"):
            (self.folder / name).mkdir(exist_ok=True)

    async def run(self) -> None:
        """Works until the run is finished. Raises `SketchfleetError` when it cannot."""
        self.status("starting")
        data = self.config.data
        corpus = await asyncio.to_thread(
            scan, data.include, exclude=data.exclude, languages=data.languages,
            max_files=data.max_files,
        )  # fmt: skip
        log.info("corpus", extra=dataclasses.asdict(corpus.summary))
        del corpus
        await self._sign_on()
        idle_since = time.monotonic()
        try:
            await self._send_pending()
            while True:
                answer = await self._poll("", POLL_S)
                if answer.kind == pb.NextTaskResponse.KIND_RUN_FINISHED:
                    self.status("finished")
                    log.info("run finished")
                    return
                spec = from_message(answer.spec, AdapterSpec)
                if answer.kind == pb.NextTaskResponse.KIND_PROFILE:
                    request = from_message(answer.profile_request, ProfileRequest)
                    await self._measure(spec, request)
                elif answer.kind == pb.NextTaskResponse.KIND_ASSIGNMENT:
                    await self._work(spec, from_message(answer.assignment, Assignment))
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

    # --- identity -------------------------------------------------------------------------------

    async def _sign_on(self) -> None:
        """Uses the kept credential, or enrols with the join token."""
        kept = self.folder / "credential.json"
        if kept.is_file():
            try:
                plain = json.loads(kept.read_text())
                self.link.credential = str(plain["credential"])
                self._renew_at = float(plain["renew_at"])
            except (ValueError, KeyError, TypeError):
                log.warning("credential file unreadable; enrolling again")
            else:
                return
        path = self.config.coordinator.token_file
        try:
            token = path.read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            why = error.strerror if isinstance(error, OSError) else "not text"
            raise AgentError(
                f"join token {path} cannot be read ({why}); copy it from the "
                "coordinator's state folder and set [coordinator] token_file"
            ) from error
        self.status("enrolling")
        valid_s = await self.link.enroll(token, self.config.device.name, version(), FIRST_CONTACT_S)
        self._keep_credential(valid_s)

    def _keep_credential(self, valid_s: float) -> None:
        self._renew_at = time.time() + RENEW_AT * valid_s
        path = self.folder / "credential.json"
        path.touch(mode=0o600)
        plain = {"credential": self.link.credential, "renew_at": self._renew_at}
        write_durably(path, json.dumps(plain).encode())
        path.chmod(0o600)

    async def _poll(self, working_on: str, wait_s: float) -> Any:
        """One long poll; enrols again when the credential is no longer known."""
        if self._profile is None:
            self._profile = self._known_profile()
        profile = None if self._profile_sent else self._profile
        try:
            if time.time() > self._renew_at:
                with contextlib.suppress(LinkError):  # the poll below waits for the coordinator
                    self._keep_credential(await self.link.renew())
            answer = await self.link.next_task(profile, working_on, wait_s, math.inf)
        except RefusedError as error:
            if error.reason is not Reason.BAD_CREDENTIAL:
                raise
            (self.folder / "credential.json").unlink(missing_ok=True)
            await self._sign_on()
            self._profile_sent = False
            return await self.link.next_task(self._profile, working_on, wait_s, math.inf)
        self._profile_sent = True
        return answer

    # --- what this device is --------------------------------------------------------------------

    @property
    def _memory_cap_bytes(self) -> int | None:
        megabytes = self.config.limits.memory_mb
        return None if megabytes is None else megabytes * 10**6

    def _known_profile(self) -> DeviceProfile:
        return probe(
            version=version(), state=self.folder, board=self.config.device.board,
            memory_cap_bytes=self._memory_cap_bytes,
        )  # fmt: skip

    async def _measure(self, spec: AdapterSpec, request: ProfileRequest) -> None:
        """Measures link and compute for this base; the next poll carries the profile."""
        self.status("measuring link")
        link = await self.link.probe(metered=False)
        self.status("measuring compute")
        folder = await self._base(spec)
        job = {"job": "profile", "base_folder": str(folder), "spec": to_plain(spec),
               "request": to_plain(request)}  # fmt: skip
        try:
            result = await self.trainer.run(job)
        except TrainerError as error:
            raise AgentError(f"this device cannot train {spec.base}: {error}") from error
        gpu = result.get("gpu")
        self._profile = probe(
            version=version(), state=self.folder, board=self.config.device.board,
            memory_cap_bytes=self._memory_cap_bytes,
            gpu=None if gpu is None else from_plain(GpuProfile, gpu),
            compute=from_plain(ComputeProfile, result["compute"]),
            link=link,
        )  # fmt: skip
        self._profile_sent = False
        log.info("profile", extra={"tokens_per_s": round(self._profile.compute.tokens_per_s)
                                   if self._profile.compute else None,
                                   "up_bps": round(link.up_bps)})  # fmt: skip

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
        beat = asyncio.create_task(self._heartbeat(assignment.assignment_id))
        cause: AgentError | None = None
        try:
            try:
                report, update = await self._train(spec, assignment)
            except (TrainerError, ModelError) as error:
                outcome = error.outcome if isinstance(error, TrainerError) else "base_mismatch"
                log.error("assignment failed: %s", error, extra={"round": assignment.round})
                report = from_plain(LocalReport, {
                    "assignment_id": assignment.assignment_id, "outcome": outcome,
                    "message": _told(outcome, assignment),
                })  # fmt: skip
                update = None
                if outcome in OWNER_MUST_ACT:
                    cause = AgentError(str(error))
            await self._send(self.journal.add(report, update))
        finally:
            beat.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await beat
        for name in ("blobs", "work"):
            for path in (self.folder / name).iterdir():
                path.unlink()
        if cause is not None:
            raise cause

    async def _heartbeat(self, assignment_id: str) -> None:
        while True:
            await asyncio.sleep(HEARTBEAT_S)
            with contextlib.suppress(LinkError, RefusedError):
                await self.link.next_task(None, assignment_id, 0.0, 0.0)

    async def _train(
        self, spec: AdapterSpec, assignment: Assignment
    ) -> tuple[LocalReport, Path | None]:
        status = {"round": assignment.round, "k": assignment.rank, "steps": assignment.local_steps}
        self.status("fetching", **status)
        folder = await self._base(spec)
        begun, fetched = time.monotonic(), 0
        places: dict[str, Path] = {}
        for name in ("slice", "global_adapter"):
            if (blob := getattr(assignment, name)) is not None:
                places[name] = await self.link.fetch(blob, self.folder / "blobs")
                fetched += blob.size_bytes
        fetch_s = time.monotonic() - begun
        update = self.folder / "work" / f"{assignment.assignment_id}.update"
        data = self.config.data
        job = {
            "job": "train",
            "base_folder": str(folder),
            "spec": to_plain(spec),
            "assignment": to_plain(assignment),
            "slice_path": str(places["slice"]) if "slice" in places else None,
            "global_path": str(places["global_adapter"]) if "global_adapter" in places else None,
            "update_path": str(update) if assignment.trains else None,
            "data": {
                "include": list(data.include), "exclude": list(data.exclude),
                "languages": list(data.languages), "max_files": data.max_files,
            },
            "memory_cap_bytes": self._memory_cap_bytes,
        }  # fmt: skip
        self.status("training" if assignment.trains else "evaluating", step=0, **status)

        def progress(event: dict[str, Any]) -> None:
            shown = {**status, "step": event["step"], "loss": event["loss"]}
            self.status("training", **shown)

        try:
            result = await self.trainer.run(job, progress)
        except TrainerError as error:
            if error.outcome != "crashed":
                raise
            log.warning("trainer crashed, trying once more: %s", error)
            result = await self.trainer.run(job, progress)
        report = from_plain(LocalReport, result["report"])
        report = dataclasses.replace(report, fetch_s=fetch_s, fetched_bytes=fetched)
        return report, update if assignment.trains else None

    async def _send(self, entry: Entry) -> None:
        """Pushes and reports a journal entry; what is no longer wanted is dropped, with a line."""
        report = entry.report
        try:
            if entry.digest and not entry.committed:
                self.status("pushing", assignment=entry.assignment_id)
                before, begun = self.link.resumes, time.monotonic()
                path = self.journal.update_path(entry.digest)
                size = path.stat().st_size
                receipt, outcome = await self.link.push(entry.assignment_id, entry.digest, path)
                report = dataclasses.replace(
                    report, push_s=time.monotonic() - begun, pushed_bytes=size,
                    resumes=report.resumes + self.link.resumes - before,
                )  # fmt: skip
                self.journal.committed(entry.assignment_id, report)
                log.info("update accepted", extra={"receipt": receipt, "outcome": outcome})
            await self.link.report(report, math.inf)
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

    def status(self, phase: str, **fields: Any) -> None:
        """Shows what the agent is doing, for `sketchfleet-agent status`."""
        path = self.folder / "status.json"
        temporary = path.with_suffix(".tmp")
        plain = {"phase": phase, "at": time.time(), "pid": os.getpid(), **fields}
        temporary.write_text(json.dumps(plain))
        temporary.replace(path)
