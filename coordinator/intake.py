"""Updates on their way in: declared, received chunk by chunk, checked, accepted exactly once.

Knows uploads, blobs and the records of assignments. What an accepted update means for a round is
the engine's business; whether one may still come, it is told.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from coordinator.store.blobs import BlobStore
from coordinator.store.records import AssignmentRecord, Records, UploadRecord
from protos.codecs import PackingError
from protos.contract import AdapterSpec, Assignment, Reason, RefusalError
from protos.layout import HEADER_BYTES, WrongAssignmentError, most_update_bytes
from protos.transfer import Buffer, CorruptChunkError, OffsetError, TransferError
from protos.unpacking import open_update

# No training moves an adapter weight this far; merges of such values leave float32.
LARGEST_CHANGE = 1e4


class Intake:
    """One run's uploads. Call from one event loop; `too_late` says why an update comes in vain."""

    def __init__(
        self,
        spec: AdapterSpec,
        records: Records,
        blobs: BlobStore,
        too_late: Callable[[Assignment], str | None],
        clock: Callable[[], float],
    ) -> None:
        self._spec, self._records, self._blobs = spec, records, blobs
        self._too_late, self._clock = too_late, clock
        # Uploads that are growing, with what they answer: no query for each chunk.
        self._growing: dict[str, tuple[AssignmentRecord, UploadRecord]] = {}
        self._committing: dict[str, asyncio.Future[tuple[Assignment, str, bool]]] = {}

    def begin(
        self, device_id: str, assignment_id: str, digest: str, size_bytes: int
    ) -> tuple[str, int]:
        """(upload id, bytes already held). Raises `RefusalError` before any byte is taken."""
        record = self.own(device_id, assignment_id)
        assignment = record.assignment
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
        _refuse_second(record, digest)
        upload_id = hashlib.sha256(f"{assignment_id}\0{digest}".encode()).hexdigest()[:32]
        for other in self._records.uploads_of(assignment_id):
            if other.upload_id != upload_id:  # one open upload per assignment
                self._blobs.discard(other.upload_id)
                self._growing.pop(other.upload_id, None)
        upload = UploadRecord(upload_id, assignment_id, digest, size_bytes)
        self._records.put_upload(upload)
        self._growing[upload_id] = (record, upload)
        if record.update_digest == digest or self._blobs.holds(digest):
            return upload_id, size_bytes
        return upload_id, self._blobs.part(upload_id, size_bytes).length

    def put(
        self, device_id: str, upload_id: str, offset: int, data: Buffer, checksum: int | None
    ) -> int:
        """Takes a chunk; returns the length of the prefix held. Raises `RefusalError`.

        May be called from any thread once the upload has begun here.
        """
        _, upload = self._upload(device_id, upload_id)
        try:
            part = self._blobs.part(upload_id, upload.size_bytes)
            return part.write(offset, data, checksum)
        except CorruptChunkError as error:
            raise RefusalError(Reason.CORRUPT_CHUNK, str(error)) from error
        except OffsetError as error:
            raise RefusalError(Reason.WRONG_OFFSET, str(error)) from error

    async def commit(self, device_id: str, upload_id: str) -> tuple[Assignment, str, bool]:
        """(assignment, digest of the update, whether it is new). Raises `RefusalError`.

        Repeating it is harmless, even while it goes on: a device whose connection broke asks again,
        and what it had asked for first is carried out once, whether anybody still listens or not.
        """
        if upload_id not in self._growing and (receipt := self._accepted(device_id, upload_id)):
            return receipt  # another stream of this device brought it to its end meanwhile
        record, upload = self._upload(device_id, upload_id)
        going_on = self._committing.get(upload_id)
        if going_on is None and record.update_digest is None:
            self._refuse_incomplete(upload)
        if going_on is None:
            going_on = asyncio.ensure_future(self._commit(device_id, upload_id))
            self._committing[upload_id] = going_on
            going_on.add_done_callback(lambda _: self._committing.pop(upload_id))
        return await asyncio.shield(going_on)

    async def _commit(self, device_id: str, upload_id: str) -> tuple[Assignment, str, bool]:
        record, upload = self._upload(device_id, upload_id)
        assignment, digest = record.assignment, upload.digest
        if record.update_digest is None:
            self._refuse_too_late(assignment)
            held = self._blobs.holds(digest)  # bytes that others refer to, or an earlier try
            if not held:
                try:
                    await asyncio.to_thread(self._blobs.finish, upload_id, digest)
                except TransferError as error:
                    raise RefusalError(Reason.DIGEST_MISMATCH, str(error)) from error
            try:
                await asyncio.to_thread(self._check, self._blobs.path(digest), assignment)
            except PackingError as error:
                if not held:
                    self._blobs.drop(digest)
                raise _refusal(error) from error
            record = self.own(device_id, assignment.assignment_id)  # another may have come since
        _refuse_second(record, digest)
        self._growing.pop(upload_id, None)
        if record.update_digest is not None:
            return assignment, digest, False
        self._records.put_update(assignment.assignment_id, digest, upload.size_bytes, self._clock())
        return assignment, digest, True

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
            upload = self._records.upload(upload_id)
            record = None if upload is None else self._records.assignment(upload.assignment_id)
            if record is None or record.update_digest or self._too_late(record.assignment):
                self._blobs.discard(upload_id)
                self._growing.pop(upload_id, None)

    def _upload(self, device_id: str, upload_id: str) -> tuple[AssignmentRecord, UploadRecord]:
        found = self._growing.get(upload_id)
        if found is None or found[0].assignment.device_id != device_id:
            raise RefusalError(Reason.UNKNOWN_UPLOAD, "no such upload; begin the push again")
        return found

    def _accepted(self, device_id: str, upload_id: str) -> tuple[Assignment, str, bool] | None:
        """What `commit` answers for an upload that is the update of its assignment already."""
        if (upload := self._records.upload(upload_id)) is None:
            return None
        record = self.own(device_id, upload.assignment_id)
        if record.update_digest != upload.digest:
            return None
        return record.assignment, upload.digest, False

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

    def _check(self, path: Path, assignment: Assignment) -> None:
        """Decodes every module, which refuses what is not finite. Raises `PackingError`."""
        reader = open_update(path, self._spec, assignment)
        for name in reader.names:
            largest = max(float(np.abs(v).max()) for v in reader.module(name).values())
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


def _refuse_second(record: AssignmentRecord, digest: str) -> None:
    if record.update_digest not in (None, digest):
        raise RefusalError(
            Reason.EQUIVOCATION,
            f"another update for {record.assignment.assignment_id} was already accepted; the first "
            "one stands",
        )
