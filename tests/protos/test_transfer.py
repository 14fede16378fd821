"""Bytes that arrive in any order, twice, late or damaged make the file that was promised, or none.

Chunks and windows are made small here, so that every case fits a few dozen bytes.
"""

from __future__ import annotations

import hashlib
import os
import random
import tempfile
import threading
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protos import transfer
from protos.chunk import Chunk, chunk_message, message_of_file, messages_of_file, read_chunk
from protos.sketchfleet.v1 import fleet_pb2 as pb
from protos.transfer import (
    CHUNK_BYTES,
    LARGE_CHUNK_BYTES,
    LEAST_CHUNK_BYTES,
    MAX_MESSAGE_BYTES,
    ChunkSize,
    CorruptChunkError,
    OffsetError,
    PartFile,
    TransferError,
    checksum_of,
    crc32,
    sha256_of,
    write_durably,
)

CHUNK = 8


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(transfer, "CHUNK_BYTES", CHUNK)


def make_data(size, seed=0):
    return random.Random(seed).randbytes(size)


def digest_of(data):
    return hashlib.sha256(data).hexdigest()


def put(part, data, start, end):
    piece = data[start:end]
    return part.write(start, piece, crc32(piece))


def cut(size, step=CHUNK):
    return [(start, min(start + step, size)) for start in range(0, size, step)]


@settings(max_examples=150, deadline=None)
@given(size=st.integers(1, 100), sizes=st.lists(st.integers(1, CHUNK), min_size=1), data=st.data())
def test_pieces_of_any_size_some_of_them_twice_make_the_file(size, sizes, data):
    content = make_data(size)
    with tempfile.TemporaryDirectory() as folder, small():
        part = PartFile(Path(folder) / "x.part", size)
        start = turn = 0
        while start < size:
            end = min(size, start + sizes[turn % len(sizes)])
            assert put(part, content, start, end) == end
            if data.draw(st.booleans()):
                put(part, content, start, end)  # the answer was lost, so it comes again
            assert part.path.read_bytes() == content[:end]
            start, turn = end, turn + 1
        part.finish(digest_of(content), Path(folder) / "x")
        assert (Path(folder) / "x").read_bytes() == content


@settings(max_examples=150, deadline=None)
@given(
    size=st.integers(1, 120),
    noise=st.lists(st.tuples(st.integers(-2, 130), st.integers(0, CHUNK + 1)), max_size=40),
    reopen_at=st.integers(0, 40),
)
def test_overlapping_pieces_never_break_the_prefix(size, noise, reopen_at):
    content = make_data(size)
    with tempfile.TemporaryDirectory() as folder, small():
        path = Path(folder) / "x.part"
        part = PartFile(path, size)
        for turn, (start, count) in enumerate(noise):
            if turn == reopen_at:
                part.close()
                part = PartFile(path, size)
            piece = content[max(0, start) : max(0, start) + count].ljust(count, b"?")
            try:
                length = part.write(start, piece, crc32(piece))
            except OffsetError:
                length = part.length
            assert path.read_bytes() == content[:length]
        for start, end in cut(size):
            put(part, content, start, end)
        assert part.length == size
        part.finish(digest_of(content), Path(folder) / "x")


def small():
    """For hypothesis, which runs many examples in one fixture."""
    return mock.patch.object(transfer, "CHUNK_BYTES", CHUNK)


def test_a_chunk_again_changes_nothing(tmp_path):
    data = make_data(3 * CHUNK)
    part = PartFile(tmp_path / "x", len(data))
    assert put(part, data, 0, CHUNK) == CHUNK
    assert put(part, data, 0, CHUNK) == CHUNK
    assert put(part, data, 3, CHUNK + 3) == CHUNK + 3, "an overlap brings what is new in it"
    assert part.path.read_bytes() == data[: CHUNK + 3]


@pytest.mark.parametrize("held", [0, 1, CHUNK - 1, CHUNK, CHUNK + 5])
def test_a_part_file_resumes_at_any_byte_after_a_restart(tmp_path, held):
    data = make_data(5 * CHUNK + 3)
    (tmp_path / "x.part").write_bytes(data[:held])  # what a kill left, mid-chunk or not
    source = tmp_path / "source"
    source.write_bytes(data)
    part = PartFile(tmp_path / "x.part", len(data))
    assert part.length == held
    for message in messages_of_file(source, part.length, ChunkSize(CHUNK)):
        chunk = read_chunk(message)
        part.write(chunk.offset, chunk.data, chunk.crc32)
    part.finish(digest_of(data), tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == data
    assert not (tmp_path / "x.part").exists()


def test_a_part_longer_than_the_file_starts_over(tmp_path):
    (tmp_path / "x").write_bytes(bytes(50))
    assert PartFile(tmp_path / "x", 10).length == 0


def test_a_corrupt_chunk_is_refused_and_leaves_no_trace(tmp_path):
    data = make_data(2 * CHUNK)
    part = PartFile(tmp_path / "x", len(data))
    with pytest.raises(CorruptChunkError, match="chunk at byte 0 is corrupt; send it again"):
        part.write(0, data[:CHUNK], crc32(data[:CHUNK]) ^ 1)
    assert part.length == 0 and part.path.read_bytes() == b""
    assert put(part, data, 0, CHUNK) == CHUNK


@pytest.mark.parametrize(
    ("offset", "count"), [(-1, 4), (20, 1), (16, 5), (2**62, 1), (0, CHUNK + 1)]
)
def test_a_chunk_outside_the_file_or_too_large_is_refused(tmp_path, offset, count):
    part = PartFile(tmp_path / "x", 20)
    with pytest.raises(OffsetError, match="lies outside the 20 bytes declared"):
        part.write(offset, bytes(count), crc32(bytes(count)))


def test_a_chunk_ahead_of_what_is_held_is_refused_and_says_where_to_resume(tmp_path):
    data = make_data(3 * CHUNK)
    part = PartFile(tmp_path / "x", len(data))
    put(part, data, 0, CHUNK)
    with pytest.raises(OffsetError, match="chunk at byte 9 is ahead of the 8 bytes held; resume"):
        put(part, data, CHUNK + 1, 2 * CHUNK)
    assert part.path.read_bytes() == data[:CHUNK]


def test_large_chunks_have_no_checksum_and_damage_is_found_at_the_end(tmp_path, monkeypatch):
    assert checksum_of(bytes(LARGE_CHUNK_BYTES)) is None
    assert checksum_of(b"little") == crc32(b"little")
    data = make_data(3 * CHUNK)
    part = PartFile(tmp_path / "x.part", len(data))
    for start, end in cut(len(data)):
        part.write(start, bytes(CHUNK) if start else data[start:end], None)
    with pytest.raises(TransferError, match="send them again"):
        part.finish(digest_of(data), tmp_path / "x")
    assert part.length == 0


def test_a_last_write_of_a_broken_transfer_and_the_next_one_make_one_file(tmp_path):
    """Both may be in threads at once; what overlaps is taken once."""
    data = make_data(400 * CHUNK)
    part = PartFile(tmp_path / "x.part", len(data))

    def send():
        for start, end in cut(len(data)):
            put(part, data, start, end)

    threads = [threading.Thread(target=send) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    part.finish(digest_of(data), tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == data


def test_an_incomplete_file_is_not_finished_and_says_where_to_resume(tmp_path):
    part = PartFile(tmp_path / "x.part", 20)
    put(part, bytes(20), 0, CHUNK)
    with pytest.raises(TransferError, match="only 8 of 20 bytes arrived; resume at 8"):
        part.finish(digest_of(bytes(20)), tmp_path / "x")
    assert part.length == CHUNK, "what was held is still held"
    assert not (tmp_path / "x").exists()


def test_a_wrong_digest_starts_over_and_the_right_bytes_then_pass(tmp_path):
    data = make_data(CHUNK)
    part = PartFile(tmp_path / "x.part", CHUNK)
    put(part, bytes(CHUNK), 0, CHUNK)
    with pytest.raises(TransferError, match=r"not the promised .*; send them again"):
        part.finish(digest_of(data), tmp_path / "x")
    assert part.length == 0 and not (tmp_path / "x").exists()
    put(part, data, 0, CHUNK)
    part.finish(digest_of(data), tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == data


@pytest.fixture
def disk(monkeypatch):
    """What was synced and renamed, in order."""
    done = []
    sync, replace = os.fsync, Path.replace

    def note_sync(handle):
        done.append(("sync", Path(f"/proc/self/fd/{handle}").resolve()))
        sync(handle)

    def note_replace(self, target):
        done.append(("rename", self, Path(target)))
        return replace(self, target)

    monkeypatch.setattr(transfer.os, "fsync", note_sync)
    monkeypatch.setattr(Path, "replace", note_replace)
    return done


def test_finishing_syncs_the_bytes_then_renames_then_syncs_the_folder(tmp_path, disk):
    part = PartFile(tmp_path / "x.part", 3)
    put(part, b"abc", 0, 3)
    target = tmp_path / "done" / "x"
    part.finish(digest_of(b"abc"), target)
    assert disk == [("sync", part.path), ("sync", tmp_path),  # of the new folder's name
                    ("rename", part.path, target), ("sync", target.parent)]  # fmt: skip


def test_a_durable_write_syncs_renames_and_syncs_the_folder(tmp_path, disk):
    write_durably(tmp_path / "x", b"new")
    assert [what for what, *_ in disk] == ["sync", "rename", "sync"]
    assert disk[1][2] == tmp_path / "x" and disk[2][1] == tmp_path
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_a_durable_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    write_durably(tmp_path / "x", b"old")

    def fail(handle):
        raise OSError("no space left on device")

    monkeypatch.setattr(transfer.os, "fsync", fail)
    with pytest.raises(OSError, match="no space"):
        write_durably(tmp_path / "x", b"new")
    assert (tmp_path / "x").read_bytes() == b"old"


def test_chunks_cover_the_file_from_any_offset(tmp_path):
    data = make_data(3 * CHUNK + 1)
    (tmp_path / "x").write_bytes(data)
    for offset in range(len(data) + 2):
        pieces = [read_chunk(m) for m in messages_of_file(tmp_path / "x", offset, ChunkSize(CHUNK))]
        assert b"".join(piece.data for piece in pieces) == data[offset:]
        assert all(p.data == data[p.offset : p.offset + len(p.data)] for p in pieces)
    assert sha256_of(tmp_path / "x") == digest_of(data)


@pytest.mark.parametrize("size", [1, 1000, LARGE_CHUNK_BYTES - 1, LARGE_CHUNK_BYTES, CHUNK_BYTES])
@pytest.mark.parametrize("acknowledge", [False, True])
def test_a_message_read_from_a_file_is_that_of_its_chunk(tmp_path, size, acknowledge):
    data = os.urandom(CHUNK_BYTES + 7)
    (tmp_path / "x").write_bytes(data)
    with (tmp_path / "x").open("rb") as stream:
        message = message_of_file(stream.fileno(), 7, size, acknowledge=acknowledge)
        with pytest.raises(EOFError, match="was cut while in use"):
            message_of_file(stream.fileno(), len(data) - size + 1, size)
    piece = data[7 : 7 + size]
    assert message == chunk_message(Chunk(7, piece, checksum_of(piece), acknowledge))


def test_messages_with_a_whole_chunk_stay_far_below_the_limit():
    chunk = Chunk(2**63 - 1, bytes(CHUNK_BYTES), 2**32 - 1, True)
    assert len(chunk_message(chunk)) < 0.6 * MAX_MESSAGE_BYTES


def test_chunks_are_what_the_link_carries_in_a_moment():
    size = ChunkSize()
    for _ in range(9):
        size.took(size.bytes, size.bytes / 125_000)  # 1 Mbit/s
    assert size.bytes == pytest.approx(12_500, rel=0.01)
    for _ in range(9):
        size.took(size.bytes, 1e-7)  # at once
    assert size.bytes == CHUNK_BYTES
    for _ in range(9):
        size.took(size.bytes, size.bytes / 1000)  # 8 kbit/s
    assert size.bytes == LEAST_CHUNK_BYTES
    assert ChunkSize(1000).bytes == 1000


def test_one_burst_through_a_buffer_does_not_make_a_chunk_of_many_seconds():
    size = ChunkSize(first_bytes=8 * 1024)
    size.took(8 * 1024, 1e-7)
    assert size.bytes == 16 * 1024


@settings(deadline=None)
@given(
    offset=st.integers(-(2**63), 2**63 - 1), data=st.binary(max_size=300),
    checksum=st.none() | st.integers(0, 2**32 - 1), acknowledge=st.booleans(),
)  # fmt: skip
def test_chunks_are_protobuf_messages_either_way(offset, data, checksum, acknowledge):
    message = chunk_message(Chunk(offset, data, checksum, acknowledge))
    push, fetched = pb.PushRequest.FromString(message), pb.FetchResponse.FromString(message)
    for read in (push, fetched):
        assert (read.offset, read.data) == (offset, data)
        assert (read.crc32 if read.HasField("crc32") else None) == checksum
    assert push.acknowledge == acknowledge
    if data:
        same = read_chunk(message)
        assert (same.offset, bytes(same.data), same.crc32, same.acknowledge) == (
            offset, data, checksum, acknowledge,
        )  # fmt: skip


@given(st.binary(max_size=40))
def test_what_is_no_chunk_is_none(junk):
    found = read_chunk(junk)
    if found is not None:
        assert junk.endswith(bytes(found.data))
    update = pb.PushRequest(update=pb.PushedUpdate(assignment_id="a", size_bytes=3))
    assert read_chunk(update.SerializeToString()) is None
