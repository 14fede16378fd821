"""Chunks of one push on their way to its file, written and hashed beside the event loop.

A hop to a thread costs as much as hashing a chunk, so one hop takes several, and all that come
meanwhile; the stream is read on while they are written. Knows no gRPC.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from protos.chunk import Chunk
from protos.transfer import CHUNK_BYTES, LARGE_CHUNK_BYTES

HOP_BYTES, MOST_WAITING_BYTES = 3 * CHUNK_BYTES, 6 * CHUNK_BYTES  # of one push


class Arriving:
    """Use from one event loop. `put(chunk)`, called from any thread, returns the bytes held.

    Both methods raise what `put` raised, of this chunk or an earlier one.
    """

    def __init__(self, put: Callable[[Chunk], int], held: int) -> None:
        self._put, self._held = put, held
        self._waiting: deque[Chunk] = deque()
        self._writing: asyncio.Future[None] | None = None

    async def take(self, chunk: Chunk) -> None:
        """Hands a chunk on; waits only while too many are waiting."""
        if self._writing is not None and self._writing.done():
            await self._wrote()
        if self._writing is None and not self._waiting and len(chunk.data) < LARGE_CHUNK_BYTES:
            self._held = self._put(chunk)
            return
        self._waiting.append(chunk)
        waiting_bytes = sum(len(waiting.data) for waiting in self._waiting)
        if self._writing is None and waiting_bytes >= HOP_BYTES:
            self._write()
        elif waiting_bytes >= MOST_WAITING_BYTES:
            await self.written()

    async def written(self) -> int:
        """The bytes held once all that came is written."""
        while self._writing is not None or self._waiting:
            if self._writing is None:
                self._write()
            await self._wrote()
        return self._held

    def leave(self) -> None:
        """Nobody listens any more; what came is still written, and need not be sent again."""
        if self._writing is None and self._waiting:
            self._write()
        if self._writing is not None:
            self._writing.add_done_callback(lambda done: done.cancelled() or done.exception())

    def _write(self) -> None:
        self._writing = asyncio.get_running_loop().run_in_executor(None, self._drain)

    async def _wrote(self) -> None:
        assert self._writing is not None
        await self._writing
        self._writing = None

    def _drain(self) -> None:
        while self._waiting:
            self._held = self._put(self._waiting.popleft())
