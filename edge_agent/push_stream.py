"""One attempt at sending an update: a stream of chunks out, acknowledgements back.

Knows gRPC's stream and the file; why an attempt is made, and what comes after it, is `link`'s.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc

from edge_agent.pace import Pace
from profiles.compat import timeout
from protos.chunk import Chunk, chunk_message, message_of_file
from protos.sketchfleet.v1 import fleet_pb2 as pb
from protos.transfer import CHUNK_BYTES, CHUNK_S, ChunkSize, TransferError

# Without a byte, an attempt is given up and begun again where it stands. Until then TCP has tried
# seven times, 38 s the latest; the next time would be as long after that.
STALL_S = 45.0
# May be unacknowledged: what the link carries in so long, within limits. More than is on the way
# at any time, or the sender would wait for answers; less than an hour of a slow link.
WINDOW_S, LEAST_WINDOW_BYTES, MOST_WINDOW_BYTES = 2.0, 128 * 1024, 8 * CHUNK_BYTES
ACKNOWLEDGE_S = 0.25


class PushStream:
    """Use once: `begin`, then `send`; `cancel` in any case. `sent`: where the file was read to.

    `call(metadata=…)` opens the stream; `count` hears of payload as it goes.
    """

    def __init__(
        self, call: Callable[..., Any], metadata: Any, size: ChunkSize, pace: Pace,
        count: Callable[[int], None],
    ) -> None:  # fmt: skip
        self._call = call(metadata=metadata)
        self._size, self._pace, self._count = size, pace, count
        self._acknowledged = self.sent = 0
        self._heard = asyncio.Event()

    async def begin(self, update: Any) -> int:
        """Declares a PushedUpdate; returns how many of its bytes are held there."""
        request = pb.PushRequest(update=update)
        answer = await self._within(self._exchange(request.SerializeToString()))
        self._size.most_bytes = min(self._size.most_bytes, answer.chunk_bytes)
        self._acknowledged = self.sent = answer.durable_bytes
        return int(answer.durable_bytes)

    async def send(
        self, path: Path, offset: int, advance: Callable[[int], None]
    ) -> tuple[str, str]:
        """Sends the file from `offset` on; returns (receipt, outcome).

        `advance` hears what is held there. Raises `TimeoutError` when nothing moves for `STALL_S`.
        """
        hearing = asyncio.ensure_future(self._hear(advance))
        sending = asyncio.ensure_future(self._send(path, offset))
        try:
            await asyncio.wait((hearing, sending), return_when=asyncio.FIRST_EXCEPTION)
            # A sender whose stream is over does not know why; the listener hears it.
            if not hearing.done() and not isinstance(
                sending.exception(), asyncio.InvalidStateError
            ):
                sending.result()
            return await hearing
        finally:
            hearing.cancel()
            sending.cancel()
            await asyncio.gather(hearing, sending, return_exceptions=True)

    def cancel(self) -> None:
        """Ends the stream if it has not ended."""
        self._call.cancel()

    async def _exchange(self, message: bytes) -> Any:
        await self._call.write(message)
        return await self._read()

    async def _read(self) -> Any:
        answer = await self._call.read()
        if answer is grpc.aio.EOF:  # type: ignore[attr-defined]
            raise TransferError("the coordinator ended a push without a receipt")
        return answer

    async def _hear(self, advance: Callable[[int], None]) -> tuple[str, str]:
        heard_at = time.monotonic()
        while True:
            answer = await self._within(self._read())
            now, moved = time.monotonic(), answer.durable_bytes - self._acknowledged
            if moved > 0:
                self._size.took(moved, now - heard_at)
            if answer.receipt:
                return str(answer.receipt), str(answer.outcome)
            heard_at = now
            self._acknowledged = answer.durable_bytes
            advance(answer.durable_bytes)
            self._heard.set()

    async def _send(self, path: Path, offset: int) -> None:
        asked, asked_at = offset, time.monotonic()
        size_bytes = path.stat().st_size
        with path.open("rb", buffering=0) as stream:
            while (length := min(self._size.bytes, size_bytes - self.sent)) > 0:
                await self._pace.take("up", length)
                now, end = time.monotonic(), self.sent + length
                ask = (
                    # Of little, the receipt tells as soon.
                    (end == size_bytes and asked > offset)
                    or end - asked >= self._window // 2
                    or now - asked_at > ACKNOWLEDGE_S
                )
                if ask:
                    asked, asked_at = end, now
                message = message_of_file(stream.fileno(), self.sent, length, acknowledge=ask)
                await self._within(self._call.write(message))
                self.sent = end
                self._count(length)
                while self.sent - self._acknowledged >= self._window:
                    if asked < self.sent:  # the window became smaller since
                        asked = self.sent
                        await self._within(
                            self._call.write(chunk_message(Chunk(asked, b"", None, True)))
                        )
                    self._heard.clear()
                    await self._heard.wait()
        await self._call.done_writing()

    @property
    def _window(self) -> int:
        wanted = int(self._size.bytes * WINDOW_S / CHUNK_S)
        return min(MOST_WINDOW_BYTES, max(LEAST_WINDOW_BYTES, wanted))

    async def _within(self, step: Any) -> Any:
        async with timeout(STALL_S):
            return await step
