"""Bytes by content: a folder of files named by their SHA-256, and uploads that grow beside it."""

from __future__ import annotations

import hashlib
import os
import threading
import uuid
from pathlib import Path

from profiles.errors import SketchfleetError
from protos.contract import BlobRef, Payload
from protos.transfer import PartFile, sha256_of, sync_folder, write_durably


class UnknownBlobError(SketchfleetError):
    """No blob of that digest is kept."""


class BlobStore:
    """`root/ab/abcdef…` for finished blobs, `root/uploads/ID` for what is still arriving.

    `root/drafts` holds files being written here; `drop_drafts` removes what a crash left.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "uploads").mkdir(parents=True, exist_ok=True)
        (root / "drafts").mkdir(exist_ok=True)
        self._parts: dict[str, PartFile] = {}
        self._opening = threading.Lock()

    def path(self, digest: str) -> Path:
        """Where the blob lies. Raises `UnknownBlobError`."""
        path = self._place(digest)
        if not path.is_file():
            raise UnknownBlobError(f"blob {digest[:12]} is not kept here; ask for a new task")
        return path

    def holds(self, digest: str) -> bool:
        """Whether the blob is kept here. Raises `UnknownBlobError` on what is no digest."""
        return self._place(digest).is_file()

    def put(self, data: bytes, payload: Payload) -> BlobRef:
        """Keeps bytes durably; idempotent."""
        digest = hashlib.sha256(data).hexdigest()
        path = self._place(digest)
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_durably(path, data)
        return BlobRef(digest, len(data), payload)

    def draft(self) -> Path:
        """A new path to write a large file to, then `adopt`."""
        return self.root / "drafts" / uuid.uuid4().hex

    def adopt(self, draft: Path, payload: Payload) -> BlobRef:
        """Keeps a finished draft durably."""
        with draft.open("rb") as stream:
            os.fsync(stream.fileno())
        digest, size = sha256_of(draft), draft.stat().st_size
        target = self._place(digest)
        target.parent.mkdir(parents=True, exist_ok=True)
        draft.replace(target)
        sync_folder(target.parent)
        return BlobRef(digest, size, payload)

    def drop_drafts(self) -> None:
        """Removes what an earlier life left half written."""
        for path in (self.root / "drafts").iterdir():
            path.unlink()

    def drop(self, digest: str) -> None:
        """Forgets a blob that nothing refers to any more."""
        self._place(digest).unlink(missing_ok=True)

    def part(self, upload_id: str, size_bytes: int) -> PartFile:
        """The growing file of an upload; survives a restart of this process. From any thread."""
        with self._opening:
            part = self._parts.get(upload_id)
            if part is None or part.size_bytes != size_bytes:
                part = PartFile(self.root / "uploads" / upload_id, size_bytes)
                self._parts[upload_id] = part
            return part

    def parts(self) -> list[str]:
        """Ids of the uploads that have begun and not finished."""
        return sorted(path.name for path in (self.root / "uploads").iterdir())

    def discard(self, upload_id: str) -> None:
        """Forgets what was received of an upload."""
        part = self._parts.pop(upload_id, None)
        if part is not None:
            part.close()
        (self.root / "uploads" / upload_id).unlink(missing_ok=True)

    def finish(self, upload_id: str, digest: str) -> Path:
        """Turns a complete upload into a blob. Raises `TransferError` when the bytes differ."""
        part = self._parts[upload_id]
        target = self._place(digest)
        part.finish(digest, target)
        del self._parts[upload_id]
        return target

    def _place(self, digest: str) -> Path:
        if len(digest) != 64 or not all(c in "0123456789abcdef" for c in digest):
            raise UnknownBlobError("a blob is named by 64 hexadecimal digits")
        return self.root / digest[:2] / digest
