"""How bytes move and resume: chunks with offsets and checksums, part files, digests.

Both ends use the same two file classes of thought: a *part file* whose length is the number of
bytes that need not be sent again, and a finished file named by its SHA-256. Knows no gRPC.
"""

from __future__ import annotations

import hashlib
import os
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from profiles.errors import SketchfleetError

CHUNK_BYTES = 512 * 1024  # at most
FIRST_CHUNK_BYTES = 32 * 1024
LEAST_CHUNK_BYTES = 4 * 1024
QUICK_CHUNK_S, SLOW_CHUNK_S = 2.0, 10.0  # chunks grow below and shrink above
WINDOW_CHUNKS = 4
MAX_MESSAGE_BYTES = 1 << 20


class TransferError(SketchfleetError):
    """Bytes that arrived are not the bytes that were promised."""


class CorruptChunkError(TransferError):
    """A chunk's CRC-32 does not match its data."""


class OffsetError(TransferError):
    """A chunk does not continue what is already there."""


def crc32(data: bytes) -> int:
    """CRC-32 of a chunk, as zlib computes it."""
    return zlib.crc32(data)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


class ChunkSize:
    """Bytes of the next chunk: as large as a link carries in a few seconds.

    Large chunks cost few calls; what an interruption loses is at most those on their way.
    """

    def __init__(self, most_bytes: int = CHUNK_BYTES) -> None:
        self.most_bytes = most_bytes
        self.bytes = min(FIRST_CHUNK_BYTES, most_bytes)

    def took(self, seconds: float) -> None:
        """A chunk has been delivered, after so long."""
        if seconds < QUICK_CHUNK_S:
            self.bytes = min(self.most_bytes, 2 * self.bytes)
        elif seconds > SLOW_CHUNK_S:
            self.bytes = max(LEAST_CHUNK_BYTES, self.bytes // 2)


def chunks(path: Path, offset: int, size: ChunkSize) -> Iterator[tuple[int, bytes]]:
    """(offset, data) of a file from `offset` on; tells `size` how long each was held up."""
    with path.open("rb", buffering=0) as stream:
        stream.seek(offset)
        while data := stream.read(size.bytes):
            begun = time.monotonic()
            yield offset, data
            size.took(time.monotonic() - begun)
            offset += len(data)


def sync_folder(folder: Path) -> None:
    """Makes a rename inside `folder` survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_durably(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Writes a whole file so that after a crash it is there entirely or not at all."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    with os.fdopen(handle, "wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)
    sync_folder(path.parent)


class PartFile:
    """A file that grows to `size` bytes; its length is what need not be sent again.

    Chunks may arrive a window out of order: those ahead wait in memory, at most
    `WINDOW_CHUNKS` of them, so that the length always means a whole prefix.
    """

    def __init__(self, path: Path, size_bytes: int) -> None:
        self.path = path
        self.size_bytes = size_bytes
        path.parent.mkdir(parents=True, exist_ok=True)
        self._stream: IO[bytes] = path.open("ab", buffering=0)
        self._ahead: dict[int, bytes] = {}
        self.length = path.stat().st_size
        if self.length > size_bytes:
            self.restart()

    def restart(self) -> None:
        """Forgets everything received."""
        self._stream.truncate(0)
        self._ahead.clear()
        self.length = 0

    def write(self, offset: int, data: bytes, checksum: int) -> int:
        """Takes a chunk; returns the length of the prefix held.

        Raises `CorruptChunkError` on a bad checksum, `OffsetError` on a chunk beyond the size or
        further ahead than the window.
        """
        if crc32(data) != checksum:
            raise CorruptChunkError(f"chunk at byte {offset} is corrupt; send it again")
        if offset < 0 or offset + len(data) > self.size_bytes or len(data) > CHUNK_BYTES:
            raise OffsetError(
                f"chunk of {len(data)} bytes at {offset} lies outside the {self.size_bytes} bytes "
                "declared; begin the push again"
            )
        if offset > self.length:
            if offset - self.length > WINDOW_CHUNKS * CHUNK_BYTES:
                raise OffsetError(
                    f"chunk at byte {offset} is too far ahead of the {self.length} bytes held; "
                    "resume there"
                )
            if len(self._ahead) >= 2 * WINDOW_CHUNKS:  # many tiny chunks would fill memory
                raise OffsetError(f"too many chunks ahead of byte {self.length}; resume there")
            self._ahead[offset] = data
            return self.length
        self._append(data[self.length - offset :])
        for start in sorted(self._ahead):
            if start > self.length:
                break
            self._append(self._ahead.pop(start)[self.length - start :])
        return self.length

    def _append(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest:  # an unbuffered write may take a part only
            written = self._stream.write(rest)
            self.length += written
            rest = rest[written:]

    def finish(self, digest: str, target: Path) -> None:
        """Verifies length and SHA-256, syncs, and renames to `target`.

        Raises `TransferError`; on a wrong digest the part file starts over from nothing.
        """
        if self.length != self.size_bytes:
            raise TransferError(
                f"only {self.length} of {self.size_bytes} bytes arrived; resume at {self.length}"
            )
        os.fsync(self._stream.fileno())
        if (found := sha256_of(self.path)) != digest:
            self.restart()
            raise TransferError(
                f"the bytes have digest {found[:12]}, not the promised {digest[:12]}; "
                "send them again"
            )
        self.close()
        target.parent.mkdir(parents=True, exist_ok=True)
        self.path.replace(target)
        sync_folder(target.parent)

    def close(self) -> None:
        """Closes the file; what it holds stays for a later resume."""
        self._stream.close()
