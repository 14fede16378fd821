"""How bytes move and resume: chunks with offsets and checksums, part files, digests.

Both ends use the same two file classes of thought: a *part file* whose length is the number of
bytes that need not be sent again, and a finished file named by its SHA-256. Knows no gRPC.
"""

from __future__ import annotations

import hashlib
import os
import threading
import zlib
from pathlib import Path
from typing import IO

from profiles.compat import file_digest
from profiles.errors import SketchfleetError
from protos import faults

LEAST_CHUNK_BYTES, FIRST_CHUNK_BYTES, CHUNK_BYTES = 4 * 1024, 32 * 1024, 512 * 1024
CHUNK_S = 0.1  # of a link's rate is a chunk: what an interruption costs, and what heartbeats wait
LARGE_CHUNK_BYTES = 128 * 1024  # hashed and written beside an event loop, and not checked alone
MAX_MESSAGE_BYTES = 1 << 20


Buffer = bytes | bytearray | memoryview


class TransferError(SketchfleetError):
    """Bytes that arrived are not the bytes that were promised."""


class CorruptChunkError(TransferError):
    """A chunk's CRC-32 does not match its data."""


class OffsetError(TransferError):
    """A chunk does not continue what is already there."""


def crc32(data: Buffer) -> int:
    """CRC-32 of a chunk, as zlib computes it."""
    return zlib.crc32(data)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, hex."""
    with path.open("rb") as stream:
        return file_digest(stream).hexdigest()


def checksum_of(data: Buffer) -> int | None:
    """The checksum a chunk carries; None for a large one.

    Where chunks are large, sending a file again takes moments, and its SHA-256 tells.
    """
    return crc32(data) if len(data) < LARGE_CHUNK_BYTES else None


class ChunkSize:
    """Bytes of the next chunk: what the link carries in `CHUNK_S`, within the limits.

    Large chunks cost few messages; what an interruption loses is at most one on its way.
    """

    def __init__(self, most_bytes: int = CHUNK_BYTES, first_bytes: int = FIRST_CHUNK_BYTES) -> None:
        self.most_bytes = most_bytes
        self.bytes = min(most_bytes, max(LEAST_CHUNK_BYTES, first_bytes))

    def took(self, size_bytes: int, seconds: float) -> None:
        """So many bytes got through in so long. At once means buffers, so it only doubles."""
        wanted = int(size_bytes * CHUNK_S / max(seconds, 1e-6))
        near = min(2 * self.bytes, max(self.bytes // 2, wanted))
        self.bytes = min(self.most_bytes, max(LEAST_CHUNK_BYTES, near))


def sync_folder(folder: Path) -> None:
    """Makes a rename inside `folder` survive a power cut."""
    faults.point("disk", folder)
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
    faults.synced_folder(folder)


def sync_file(path: Path) -> None:
    """Makes the bytes of a file survive a power cut; its name is its folder's."""
    faults.point("disk", path)
    with path.open("rb") as stream:
        os.fsync(stream.fileno())
    faults.synced_file(path)


def make_folder(folder: Path) -> None:
    """Makes a folder, and those it lies in, so that they survive a power cut."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)


def move_durably(source: Path, target: Path) -> None:
    """Gives a file another name in one instant; once it has that, its bytes are on disk."""
    sync_file(source)
    make_folder(target.parent)
    source.replace(target)
    faults.point("moved", target)
    sync_folder(target.parent)


def write_durably(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Writes a whole file so that after a crash it is there entirely or not at all."""
    faults.point("disk", path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    with os.fdopen(handle, "wb") as stream:
        stream.write(data)
    move_durably(temporary, path)


class PartFile:
    """A file that grows to `size` bytes; its length is what need not be sent again.

    Chunks arrive in order, or again. Bytes are hashed as they come, unless an earlier life left
    some. May be used from several threads: of a broken transfer a last write may be under way.
    """

    def __init__(self, path: Path, size_bytes: int) -> None:
        self.path = path
        self.size_bytes = size_bytes
        make_folder(path.parent)
        self._stream: IO[bytes] = path.open("ab", buffering=0)
        self._lock = threading.Lock()
        self.length = path.stat().st_size
        self._sha256 = None if self.length else hashlib.sha256()  # of all that is there
        if self.length > size_bytes:
            self.restart()

    def restart(self) -> None:
        """Forgets everything received."""
        self._stream.truncate(0)
        self._sha256 = hashlib.sha256()
        self.length = 0

    def write(self, offset: int, data: Buffer, checksum: int | None = None) -> int:
        """Takes a chunk; returns the length of the prefix held.

        Raises `CorruptChunkError` on a bad checksum, `OffsetError` on a chunk beyond the size or
        ahead of what is held.
        """
        if checksum is not None and crc32(data) != checksum:
            raise CorruptChunkError(f"chunk at byte {offset} is corrupt; send it again")
        if offset < 0 or offset + len(data) > self.size_bytes or len(data) > CHUNK_BYTES:
            raise OffsetError(
                f"chunk of {len(data)} bytes at {offset} lies outside the {self.size_bytes} bytes "
                "declared; begin the push again"
            )
        faults.point("disk", self.path)
        with self._lock:
            if offset > self.length:
                raise OffsetError(
                    f"chunk at byte {offset} is ahead of the {self.length} bytes held; resume there"
                )
            rest = memoryview(data)[self.length - offset :]
            while rest:  # an unbuffered write may take a part only
                written = self._stream.write(rest)
                if self._sha256 is not None:
                    self._sha256.update(rest[:written])
                self.length += written
                rest = rest[written:]
            return self.length

    def finish(self, digest: str, target: Path, *, durable: bool = True) -> None:
        """Verifies length and SHA-256, syncs if it is to be durable, and renames to `target`.

        Raises `TransferError`; on a wrong digest the part file starts over from nothing.
        """
        if self.length != self.size_bytes:
            raise TransferError(
                f"only {self.length} of {self.size_bytes} bytes arrived; resume at {self.length}"
            )
        found = self._sha256.hexdigest() if self._sha256 is not None else sha256_of(self.path)
        if found != digest:
            self.restart()
            raise TransferError(
                f"the bytes have digest {found[:12]}, not the promised {digest[:12]}; "
                "send them again"
            )
        self.close()
        if durable:
            move_durably(self.path, target)
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            self.path.replace(target)

    def close(self) -> None:
        """Closes the file; what it holds stays for a later resume."""
        self._stream.close()
