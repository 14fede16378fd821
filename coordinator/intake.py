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
from protos.layout import HEADER_BYTES, WrongAssignmentError, layout_of
from protos.transfer import CorruptChunkError, OffsetError, TransferError
from protos.unpacking import open_packed

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
        # Uploads that are growing, with the device they belong to: no query for each chunk.
        self._growing: dict[str, tuple[str, UploadRecord]] = {}

    def begin(
        self, device_id: str, assignment_id: str, digest: str, size_bytes: int
    ) -> tuple[str, int]:
        """(upload id, bytes already held). Raises `RefusalError` before any byte is taken."""
        record = self.own(device_id, assignment_id)
        assignment = record.assignment
        layout = layout_of(self._spec, assignment.update)
        most, fixed = layout.most_bytes, layout.fixed
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
        self._records.put_upload(UploadRecord(upload_id, assignment_id, digest, size_bytes))
        if record.update_digest == digest or self._blobs.holds(digest):
            return upload_id, size_bytes
        return upload_id, self._blobs.part(upload_id, size_bytes).length

    def put(self, device_id: str, upload_id: str, offset: int, data: bytes, checksum: int) -> int:
        """Takes a chunk; returns the length of the prefix held. Raises `RefusalError`."""
        upload = self._upload(device_id, upload_id)
        try:
            part = self._blobs.part(upload_id, upload.size_bytes)
            return part.write(offset, data, checksum)
        except CorruptChunkError as error:
            raise RefusalError(Reason.CORRUPT_CHUNK, str(error)) from error
        except OffsetError as error:
            raise RefusalError(Reason.WRONG_OFFSET, str(error)) from error

    async def commit(self, device_id: str, upload_id: str) -> tuple[UploadRecord, bool]:
        """(the upload, whether it is new). Repeating it is harmless. Raises `RefusalError`."""
        upload = self._upload(device_id, upload_id)
        record = self.own(device_id, upload.assignment_id)
        if record.update_digest is None:
            self._refuse_too_late(record.assignment)
            held = self._blobs.holds(upload.digest)  # bytes that others refer to, or an earlier try
            if not held:
                self._blobs.part(upload_id, upload.size_bytes)
                try:
                    await asyncio.to_thread(self._blobs.finish, upload_id, upload.digest)
                except TransferError as error:
                    raise RefusalError(Reason.DIGEST_MISMATCH, str(error)) from error
            path = self._blobs.path(upload.digest)
            try:
                await asyncio.to_thread(self._check, path, record.assignment)
            except WrongAssignmentError as error:
                if not held:
                    self._blobs.drop(upload.digest)
                raise RefusalError(
                    Reason.UNKNOWN_ASSIGNMENT,
                    "this update answers an earlier attempt at its round, which began anew since; "
                    "ask for a new task",
                ) from error
            except PackingError as error:
                if not held:
                    self._blobs.drop(upload.digest)
                raise RefusalError(Reason.BAD_UPDATE, str(error)) from error
            record = self.own(device_id, upload.assignment_id)
        _refuse_second(record, upload.digest)
        self._growing.pop(upload_id, None)
        if record.update_digest is not None:
            return upload, False
        self._records.put_update(
            upload.assignment_id, upload.digest, upload.size_bytes, self._clock()
        )
        return upload, True

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

    def _upload(self, device_id: str, upload_id: str) -> UploadRecord:
        owner, upload = self._growing.get(upload_id, ("", None))
        if upload is None:
            upload = self._records.upload(upload_id)
        if upload is None:
            raise RefusalError(Reason.UNKNOWN_UPLOAD, "no such upload; begin the push again")
        if owner != device_id:
            self.own(device_id, upload.assignment_id)
            self._growing[upload_id] = (device_id, upload)
        return upload

    def _refuse_too_late(self, assignment: Assignment) -> None:
        if (why := self._too_late(assignment)) is not None:
            raise RefusalError(Reason.TOO_LATE, f"{why}; drop it and ask for a new task")

    def _check(self, path: Path, assignment: Assignment) -> None:
        """Decodes every module, which refuses what is not finite. Raises `PackingError`."""
        reader = open_packed(
            path, self._spec, assignment.update, assignment_digest=assignment.digest
        )
        for name in reader.names:
            largest = max(float(np.abs(v).max()) for v in reader.module(name).values())
            if largest > LARGEST_CHANGE:
                raise PackingError(
                    f"{name} changes a weight by {largest:.1e}, no more than "
                    f"{LARGEST_CHANGE:.0e} is merged; training diverged, lower the learning rate"
                )


def _refuse_second(record: AssignmentRecord, digest: str) -> None:
    if record.update_digest not in (None, digest):
        raise RefusalError(
            Reason.EQUIVOCATION,
            f"another update for {record.assignment.assignment_id} was already accepted; the first "
            "one stands",
        )
