"""Updates on their way in: declared, received chunk by chunk, checked, accepted exactly once.

Knows uploads, blobs and the records of assignments. What an accepted update means for a round is
the engine's business; whether one may still come, it is told.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from coordinator.limits import Traffic, Watermark
from coordinator.store.blobs import BlobStore
from coordinator.store.group_commit import GroupCommit
from coordinator.store.records import Records
from coordinator.store.rows import AssignmentRecord, UploadRecord
from protos import faults
from protos.codecs import PackingError
from protos.contract import AdapterSpec, Assignment, Reason, RefusalError
from protos.layout import HEADER_BYTES, WrongAssignmentError, most_update_bytes
from protos.transfer import Buffer, CorruptChunkError, OffsetError, TransferError
from protos.unpacking import open_update

# No training moves an adapter weight this far; merges of such values leave float32.
LARGEST_CHANGE = 1e4
AT_ONCE = 16  # updates being synced and decoded: the disk takes many at once, most of it is waiting


@dataclass(frozen=True)
class Accepted:
    """An update that stands, on disk. `new`: since this call; `reported`: its report is in too."""

    assignment: Assignment
    digest: str
    new: bool = False
    reported: bool = False


@dataclass(frozen=True)
class _Growing:
    """An upload under way. `recorded`: its row is on disk."""

    record: AssignmentRecord
    upload: UploadRecord
    recorded: asyncio.Future[None]


class Intake:
    """One run's uploads. Call from one event loop; `too_late` says why an update comes in vain."""

    def __init__(
        self,
        spec: AdapterSpec,
        records: Records,
        blobs: BlobStore,
        too_late: Callable[[Assignment], str | None],
        clock: Callable[[], float],
        traffic: Traffic,
        room: Watermark,
    ) -> None:
        self._spec, self._records, self._blobs = spec, records, blobs
        self._too_late, self._clock = too_late, clock
        self._traffic, self._room = traffic, room
        # Told of another update (digest) for an assignment that a first one has answered.
        self.second: Callable[[Assignment, str, str], None] = lambda task, first, other: None
        # Uploads that are growing, with what they answer: no query for each chunk.
        self._growing: dict[str, _Growing] = {}
        self._open: dict[str, str] = {}  # by assignment, the upload that counts
        self._committing: dict[str, asyncio.Future[Accepted]] = {}
        self._writes = GroupCommit(records)
        self._threads = ThreadPoolExecutor(AT_ONCE, "accept")

    async def begin(
        self, device_id: str, assignment_id: str, digest: str, size_bytes: int
    ) -> tuple[str, int]:
        """(upload id, bytes already held). Raises `RefusalError` before any byte is taken."""
        upload_id = hashlib.sha256(f"{assignment_id}\0{digest}".encode()).hexdigest()[:32]
        upload = UploadRecord(upload_id, assignment_id, digest, size_bytes)
        # Beside the event loop: each look at the disk would hold up all other pushes.
        loop = asyncio.get_running_loop()
        record, held = await loop.run_in_executor(self._threads, self._admit, device_id, upload)
        self._refuse_second(record.assignment, record.update_digest, digest)
        other = self._open.get(assignment_id, upload_id)
        if other != upload_id:  # one open upload per assignment
            self._blobs.discard(other)
            self._growing.pop(other, None)
        self._open[assignment_id] = upload_id
        # Nobody waits for it but the commit: a crash before costs the bytes of a moment.
        recorded = asyncio.ensure_future(
            self._writes.write(lambda: self._records.put_upload(upload))
        )
        self._growing[upload_id] = _Growing(record, upload, recorded)
        return upload_id, held

    def _admit(self, device_id: str, upload: UploadRecord) -> tuple[AssignmentRecord, int]:
        """What an upload is for, and how many of its bytes are held. Raises `RefusalError`."""
        record = self.own(device_id, upload.assignment_id)
        assignment, size_bytes = record.assignment, upload.size_bytes
        most, fixed = most_update_bytes(self._spec, assignment)
        if size_bytes > most or size_bytes < (most if fixed else HEADER_BYTES):
            raise RefusalError(
                Reason.WRONG_SIZE,
                f"update of {size_bytes:,} bytes, but k={assignment.rank} as "
                f"{assignment.update.encoding} is {'' if fixed else 'at most '}{most:,}; agent and "
                "coordinator disagree about the assignment, restart the agent",
            )
        if record.update_digest is None:
            self._refuse_too_late(assignment)
            self._room.require(size_bytes + self._due_bytes(but=assignment.assignment_id))
        if record.update_digest not in (None, upload.digest):
            return record, 0
        if record.update_digest == upload.digest or self._blobs.holds(upload.digest):
            return record, size_bytes
        return record, self._blobs.part(upload.upload_id, size_bytes).length

    def put(
        self, device_id: str, upload_id: str, offset: int, data: Buffer, checksum: int | None
    ) -> int:
        """Takes a chunk; returns the length of the prefix held. Raises `RefusalError`.

        May be called from any thread once the upload has begun here.
        """
        upload = self._upload(device_id, upload_id).upload
        self._traffic.take(device_id, upload.assignment_id, upload.size_bytes, len(data))
        self._room.require(len(data))
        try:
            part = self._blobs.part(upload_id, upload.size_bytes)
            return part.write(offset, data, checksum)
        except CorruptChunkError as error:
            raise RefusalError(Reason.CORRUPT_CHUNK, str(error)) from error
        except OffsetError as error:
            raise RefusalError(Reason.WRONG_OFFSET, str(error)) from error

    async def commit(self, device_id: str, upload_id: str) -> Accepted:
        """Checks an update that is complete and makes it stand. Raises `RefusalError`.

        Repeating it is harmless, even while it goes on: a device whose connection broke asks again,
        and what it had asked for first is carried out once, whether anybody still listens or not.
        """
        if upload_id not in self._growing and (receipt := self._accepted(device_id, upload_id)):
            return receipt  # another stream of this device brought it to its end meanwhile
        growing = self._upload(device_id, upload_id)
        going_on = self._committing.get(upload_id)
        if going_on is None and growing.record.update_digest is None:
            self._refuse_incomplete(growing.upload)
        if going_on is None:
            going_on = asyncio.ensure_future(self._commit(device_id, upload_id))
            self._committing[upload_id] = going_on
            going_on.add_done_callback(lambda _: self._committing.pop(upload_id))
        return await asyncio.shield(going_on)

    async def _commit(self, device_id: str, upload_id: str) -> Accepted:
        growing = self._upload(device_id, upload_id)
        record, upload = growing.record, growing.upload
        assignment, digest = record.assignment, upload.digest
        if record.update_digest is not None:
            self._forget(upload)
            return Accepted(assignment, digest)
        self._refuse_too_late(assignment)
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._threads, self._keep, upload, assignment)
        await growing.recorded
        faults.point("upload.kept")
        standing, new, reported = await self._writes.write(
            lambda: self._records.put_update(
                assignment.assignment_id, digest, upload.size_bytes, self._clock()
            )
        )
        faults.point("upload.accepted")
        self._refuse_second(assignment, standing, digest)  # another may have come since
        self._forget(upload)
        return Accepted(assignment, digest, new, reported)

    def _keep(self, upload: UploadRecord, assignment: Assignment) -> None:
        """Makes a blob of an upload, durably, if it is sound. Raises `RefusalError`."""
        held = self._blobs.holds(upload.digest)  # bytes that others refer to, or an earlier try
        try:
            if not held:
                self._blobs.finish(upload.upload_id, upload.digest)
            check_update(self._blobs.path(upload.digest), self._spec, assignment)
        except TransferError as error:
            raise RefusalError(Reason.DIGEST_MISMATCH, str(error)) from error
        except PackingError as error:
            if not held:
                self._blobs.drop(upload.digest)
            raise _refusal(error) from error

    def _due_bytes(self, *, but: str) -> int:
        """What uploads under way have still to bring, `but` those for one assignment."""
        others = [u.upload for u in tuple(self._growing.values())]  # from any thread
        return sum(
            upload.size_bytes - self._blobs.held(upload.upload_id)
            for upload in others
            if upload.assignment_id != but and not self._blobs.holds(upload.digest)
        )

    def _forget(self, upload: UploadRecord) -> None:
        self._growing.pop(upload.upload_id, None)
        if self._open.get(upload.assignment_id) == upload.upload_id:
            del self._open[upload.assignment_id]

    def own(self, device_id: str, assignment_id: str) -> AssignmentRecord:
        """The assignment, which must be this device's. Raises `RefusalError`."""
        record = self._records.assignment(assignment_id)
        if record is None or record.assignment.device_id != device_id:
            raise RefusalError(
                Reason.UNKNOWN_ASSIGNMENT,
                f"assignment {assignment_id[:80]!r} is not this device's; ask for a new task",
            )
        return record

    def tidy(self) -> None:
        """Forgets half-received updates that nobody will complete."""
        for upload_id in self._blobs.parts():
            growing = self._growing.get(upload_id)  # whose row may not be written yet
            upload = growing.upload if growing else self._records.upload(upload_id)
            record = None if upload is None else self._records.assignment(upload.assignment_id)
            if record is None or record.update_digest or self._too_late(record.assignment):
                self._blobs.discard(upload_id)
                self._growing.pop(upload_id, None)
            elif upload is not None:
                self._open[upload.assignment_id] = upload_id

    def _upload(self, device_id: str, upload_id: str) -> _Growing:
        found = self._growing.get(upload_id)
        if found is None or found.record.assignment.device_id != device_id:
            raise RefusalError(Reason.UNKNOWN_UPLOAD, "no such upload; begin the push again")
        return found

    def _accepted(self, device_id: str, upload_id: str) -> Accepted | None:
        """What `commit` answers for an upload that is the update of its assignment already."""
        if (upload := self._records.upload(upload_id)) is None:
            return None
        record = self.own(device_id, upload.assignment_id)
        if record.update_digest != upload.digest:
            return None
        return Accepted(record.assignment, upload.digest)

    def _refuse_incomplete(self, upload: UploadRecord) -> None:
        if self._blobs.holds(upload.digest):
            return
        length = self._blobs.part(upload.upload_id, upload.size_bytes).length
        if length < upload.size_bytes:
            raise RefusalError(
                Reason.DIGEST_MISMATCH,
                f"only {length} of {upload.size_bytes} bytes arrived; resume at {length}",
            )

    def _refuse_too_late(self, assignment: Assignment) -> None:
        if (why := self._too_late(assignment)) is not None:
            raise RefusalError(Reason.TOO_LATE, f"{why}; drop it and ask for a new task")

    def _refuse_second(self, assignment: Assignment, standing: str | None, digest: str) -> None:
        if standing is None or standing == digest:
            return
        self.second(assignment, standing, digest)
        raise RefusalError(
            Reason.EQUIVOCATION,
            f"another update for {assignment.assignment_id} was already accepted; the first "
            "one stands",
        )


def check_update(path: Path, spec: AdapterSpec, assignment: Assignment) -> None:
    """Decodes every module, which refuses what is not finite. Raises `PackingError`."""
    reader = open_update(path, spec, assignment)
    for name in reader.names:
        parts, energy = reader.measured(name)
        if energy < 0.9 * LARGEST_CHANGE**2:  # then none of them is, however sums are rounded
            continue
        largest = max(float(np.abs(v).max()) for v in parts.values())
        if largest > LARGEST_CHANGE:
            raise PackingError(
                f"{name} changes a weight by {largest:.1e}, no more than "
                f"{LARGEST_CHANGE:.0e} is merged; training diverged, lower the learning rate"
            )


def _refusal(error: PackingError) -> RefusalError:
    if isinstance(error, WrongAssignmentError):
        return RefusalError(
            Reason.UNKNOWN_ASSIGNMENT,
            "this update answers an earlier attempt at its round, which began anew since; ask for "
            "a new task",
        )
    return RefusalError(Reason.BAD_UPDATE, str(error))
