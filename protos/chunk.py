"""Chunks on the wire, without protobuf's copies of their data.

A chunk is what PushRequest and FetchResponse of fleet.proto have in common: an offset, data, and
perhaps a checksum. Their bytes are protobuf's, with the data at the end; so the head is read here
and the data is a view of the message. (Through protobuf's objects the data is copied twice more at
either end, a third of the time of a fast transfer.)

From files they are read into the message itself: to join a head and what was read takes five times
as long as reading, for both are large enough that their memory is mapped afresh each time.
"""

from __future__ import annotations

import io
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from protos.transfer import LARGE_CHUNK_BYTES, Buffer, ChunkSize, checksum_of

# Field numbers of fleet.proto.
OFFSET, CRC32, ACKNOWLEDGE, DATA = 1, 3, 4, 40
VARINT, LENGTH_DELIMITED = 0, 2
MOST_FIELDS, MOST_VARINT_BYTES = 8, 10  # before the data; more is no chunk, and is not read through


@dataclass(frozen=True, slots=True)
class Chunk:
    """Bytes of a file from `offset` on. `acknowledge`: the sender waits to hear of it."""

    offset: int
    data: Buffer
    crc32: int | None = None
    acknowledge: bool = False


def chunk_message(chunk: Chunk) -> bytes:
    """The chunk as a PushRequest, or a FetchResponse."""
    return b"".join((_head(chunk, len(chunk.data)), chunk.data))


def message_of_file(file: int, offset: int, size_bytes: int, *, acknowledge: bool = False) -> bytes:
    """`chunk_message` of so many bytes of an open file. Raises `EOFError` when it ends before."""
    if size_bytes < LARGE_CHUNK_BYTES:
        data = bytearray(size_bytes)
        _fill(memoryview(data), file, offset)
        return chunk_message(Chunk(offset, memoryview(data), checksum_of(data), acknowledge))
    head = _head(Chunk(offset, b"", None, acknowledge), size_bytes)
    message = io.BytesIO()
    message.seek(len(head) + size_bytes - 1)
    message.write(b"\0")  # the whole size at once, so that `getvalue` need not copy
    message.seek(0)
    message.write(head)
    with message.getbuffer() as view:
        _fill(view[len(head) :], file, offset)
    return message.getvalue()


def messages_of_file(path: Path, offset: int, size: ChunkSize) -> Iterator[bytes]:
    """A file from `offset` on, as chunks; tells `size` how long each was held up."""
    with path.open("rb", buffering=0) as stream:
        size_bytes = os.fstat(stream.fileno()).st_size
        while (length := min(size.bytes, size_bytes - offset)) > 0:
            message = message_of_file(stream.fileno(), offset, length)
            begun = time.monotonic()
            yield message
            size.took(length, time.monotonic() - begun)
            offset += length


def _fill(data: memoryview, file: int, offset: int) -> None:
    at = 0
    while at < len(data):
        count = os.preadv(file, [data[at:]], offset + at)
        if not count:
            raise EOFError(f"the file ends at byte {offset + at}; it was cut while in use")
        at += count


def read_chunk(message: bytes) -> Chunk | None:
    """The chunk of such a message; None when it does not end with data, as a first request."""
    values = {OFFSET: 0, ACKNOWLEDGE: 0}
    try:
        tag, at = _varint(message, 0)
        for _ in range(MOST_FIELDS):
            if tag & 7 != VARINT:
                break
            values[tag >> 3], at = _varint(message, at)
            tag, at = _varint(message, at)
        if tag != DATA << 3 | LENGTH_DELIMITED:
            return None
        length, at = _varint(message, at)
    except IndexError:
        return None
    if at + length != len(message):
        return None
    offset = values[OFFSET] - (2**64 if values[OFFSET] >= 2**63 else 0)
    checksum = values.get(CRC32)
    return Chunk(offset, memoryview(message)[at:], checksum, bool(values[ACKNOWLEDGE]))


def _head(chunk: Chunk, data_bytes: int) -> bytearray:
    head = bytearray()
    fields = ((OFFSET, chunk.offset), (CRC32, chunk.crc32), (ACKNOWLEDGE, chunk.acknowledge))
    for number, value in fields:
        if value or (number == CRC32 and value is not None):
            _put_varint(head, number << 3 | VARINT)
            _put_varint(head, int(value) % 2**64)
    _put_varint(head, DATA << 3 | LENGTH_DELIMITED)
    _put_varint(head, data_bytes)
    return head


def _put_varint(head: bytearray, value: int) -> None:
    while value > 127:
        head.append(value & 127 | 128)
        value >>= 7
    head.append(value)


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """(value, below 2**64, where it ends). Raises `IndexError` where the message does."""
    value = 0
    for place in range(MOST_VARINT_BYTES):
        byte = message[at + place]
        value |= (byte & 127) << 7 * place
        if byte < 128:
            return value % 2**64, at + place + 1
    raise IndexError("a varint has ten bytes at most")
