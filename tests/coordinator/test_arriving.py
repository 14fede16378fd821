"""Chunks written beside the event loop: all of them, in order, and none too many at once."""

from __future__ import annotations

import asyncio
import threading

import pytest

from coordinator.arriving import HOP_BYTES, MOST_WAITING_BYTES, Arriving
from protos.chunk import Chunk
from protos.transfer import CHUNK_BYTES, CorruptChunkError


def large(number):
    return Chunk(number * CHUNK_BYTES, bytes(CHUNK_BYTES))


async def test_all_chunks_are_written_in_order_whatever_their_size():
    taken = []

    def put(chunk):
        taken.append(chunk)
        return chunk.offset + len(chunk.data)

    arriving = Arriving(put, 0)
    sent = [Chunk(0, b"small"), *map(large, range(9)), Chunk(9 * CHUNK_BYTES, b"end")]
    for chunk in sent:
        await arriving.take(chunk)
    assert await arriving.written() == 9 * CHUNK_BYTES + 3
    assert taken == sent


async def test_a_stream_is_held_up_while_too_much_waits():
    free, taken = threading.Event(), []

    def put(chunk):
        free.wait(10)
        taken.append(chunk)
        return 0

    arriving = Arriving(put, 0)
    most = HOP_BYTES + MOST_WAITING_BYTES  # being written, and waiting

    async def send():
        for number in range(most // CHUNK_BYTES + 5):
            await arriving.take(large(number))
            sent.append(number)

    sent = []
    sending = asyncio.create_task(send())
    await asyncio.sleep(0.1)
    assert not sending.done() and len(sent) * CHUNK_BYTES <= most
    free.set()
    await sending
    await arriving.written()
    assert len(taken) == len(sent)


async def test_what_a_chunk_is_refused_for_is_raised_at_the_next_look():
    def put(chunk):
        raise CorruptChunkError("send it again")

    arriving = Arriving(put, 0)
    await arriving.take(large(0))
    with pytest.raises(CorruptChunkError):
        await arriving.written()
    arriving.leave()


async def test_what_came_is_written_when_nobody_listens_any_more():
    taken, done = [], threading.Event()

    def put(chunk):
        taken.append(chunk)
        done.set()
        return 0

    arriving = Arriving(put, 0)
    await arriving.take(large(0))
    assert not taken, "one chunk is not worth a hop"
    arriving.leave()
    assert await asyncio.to_thread(done.wait, 5)
    assert taken == [large(0)]
