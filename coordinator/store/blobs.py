"""Bytes by content: a folder of files named by their SHA-256, and uploads that grow beside it."""

from __future__ import annotations

import hashlib
import threading
import uuid
from pathlib import Path

from profiles.errors import SketchfleetError
from protos.contract import BlobRef, Payload
from protos.transfer import (
    PartFile,
    make_folder,
    move_durably,
    sha256_of,
    sync_folder,
    write_durably,
)


class UnknownBlobError(SketchfleetError):
    """No blob of that digest is kept."""


class BlobStore:
    """`root/ab/abcdef…` for finished blobs, `root/uploads/ID` for what is still arriving.

    `root/drafts` holds files being written here; `settle` removes what a crash left.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        make_folder(root / "uploads")
        make_folder(root / "drafts")
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

    def is_sound(self, digest: str) -> bool:
        """Whether the blob is kept here as it was. Reads all of it."""
        path = self._place(digest)
        return path.is_file() and sha256_of(path) == digest

    def put(self, data: bytes, payload: Payload) -> BlobRef:
        """Keeps bytes durably; idempotent."""
        digest = hashlib.sha256(data).hexdigest()
        path = self._place(digest)
        if not path.is_file():
            make_folder(path.parent)
            write_durably(path, data)
        return BlobRef(digest, len(data), payload)

    def draft(self) -> Path:
        """A new path to write a large file to, then `adopt`."""
        return self.root / "drafts" / uuid.uuid4().hex

    def adopt(self, draft: Path, payload: Payload) -> BlobRef:
        """Keeps a finished draft durably."""
        digest, size = sha256_of(draft), draft.stat().st_size
        move_durably(draft, self._place(digest))
        return BlobRef(digest, size, payload)

    def settle(self) -> None:
        """Removes what an earlier life left half written, and syncs the names that it gave.

        A blob that lies here is taken for durable; a kill may have come before its folder's sync.
        """
        for path in (self.root / "drafts").iterdir():
            path.unlink()
        for folder in self.root.iterdir():
            sync_folder(folder)

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

    def held(self, upload_id: str) -> int:
        """Bytes that an upload has brought, of those that this process began."""
        part = self._parts.get(upload_id)
        return 0 if part is None else part.length

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
