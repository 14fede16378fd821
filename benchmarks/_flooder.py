"""One enrolled device that asks for everything at once, as fast as it can, in every way it knows.

`python -m benchmarks._flooder ADDRESS SHOWN`, which is a credential or, for mutual TLS, the folder
of an identity: prints a line when it has begun, and at SIGTERM one line of JSON with how often it
tried what. Takes no part in rounds, so that what it costs the others is the flood alone.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import json
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc

from edge_agent.identity import Identity
from protos.chunk import Chunk, chunk_message
from protos.sketchfleet.v1 import fleet_pb2 as pb

CHANNELS, WORKERS = 24, 4  # connections; loops of each kind
IDLE_SOCKETS, SLOW_STREAMS = 300, 100
FLEET, TRANSFER = "/sketchfleet.v1.FleetService/", "/sketchfleet.v1.TransferService/"
NOISE = os.urandom(512 * 1024)


class Flooder:
    """All that it does goes on until the process ends."""

    def __init__(self, address: str, shown: str) -> None:
        self._address = address
        self._credentials = Identity(Path(shown)).credentials if Path(shown).is_dir() else None
        self._metadata = () if self._credentials else (("authorization", f"Bearer {shown}"),)
        self.tried: collections.Counter[str] = collections.Counter()
        self._channels: list[Any] = [self._dial() for _ in range(CHANNELS)]
        self._next = 0

    def _dial(self) -> grpc.aio.Channel:
        options = [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0),
                   ("grpc.min_reconnect_backoff_ms", 50), ("grpc.max_reconnect_backoff_ms", 100),
                   ("grpc.initial_reconnect_backoff_ms", 50)]  # fmt: skip
        if self._credentials is not None:
            return grpc.aio.secure_channel(self._address, self._credentials, options=options)
        return grpc.aio.insecure_channel(self._address, options=options)

    def _channel(self) -> Any:
        self._next += 1
        return self._channels[self._next % CHANNELS]

    async def run(self) -> None:
        """Never returns."""
        poll = pb.NextTaskRequest(wait_s=0).SerializeToString()
        heavy = pb.NextTaskRequest(wait_s=0)
        heavy.profile.board = "x" * 60_000
        report = pb.ReportRequest(report=pb.LocalReport(assignment_id="bench.0.other"))
        ways: list[Callable[[], Awaitable[None]]] = [
            lambda: self._unary("poll", FLEET + "NextTask", poll),
            lambda: self._unary("long poll", FLEET + "NextTask",
                                pb.NextTaskRequest(wait_s=50).SerializeToString()),
            lambda: self._unary("profile", FLEET + "NextTask", heavy.SerializeToString()),
            lambda: self._unary("report", FLEET + "Report", report.SerializeToString()),
            lambda: self._unary("garbage", FLEET + "Report", NOISE[:1000]),
            lambda: self._unary("unknown call", FLEET + "Nothing", b""),
            self._reset, self._fetch, self._probe,
            lambda: self._push("push of 2^62 bytes", 2**62),
            lambda: self._push("push", 1000),
        ]  # fmt: skip
        asyncio.get_running_loop().create_task(self._sockets())
        slow = [self._loris() for _ in range(SLOW_STREAMS)]
        await asyncio.gather(*slow, *(self._forever(w) for w in ways for _ in range(WORKERS)))

    async def _forever(self, way: Callable[[], Awaitable[None]]) -> None:
        while True:
            with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
                await way()
            await asyncio.sleep(0)

    async def _unary(self, name: str, method: str, message: bytes) -> None:
        self.tried[name] += 1
        await self._channel().unary_unary(method)(message, metadata=self._metadata, timeout=60)

    async def _reset(self) -> None:
        """Begun and broken off at once: needs no slot that is free."""
        self.tried["broken off"] += 1
        call = self._channel().unary_unary(FLEET + "NextTask")(b"", metadata=self._metadata)
        await asyncio.sleep(0.002)
        call.cancel()

    async def _fetch(self) -> None:
        self.tried["fetch"] += 1
        request = pb.FetchRequest(digest="ab" * 32, chunk_bytes=1).SerializeToString()
        call = self._channel().unary_stream(TRANSFER + "Fetch")(request, metadata=self._metadata)
        async for _ in call:
            pass

    async def _probe(self) -> None:
        self.tried["probe"] += 1
        message = pb.ProbeRequest(payload=NOISE, reply_bytes=4 << 20).SerializeToString()

        async def payload() -> AsyncIterator[bytes]:
            for _ in range(100):
                yield message

        call = self._channel().stream_stream(FLEET + "Probe")(payload(), metadata=self._metadata)
        async for _ in call:
            pass

    async def _push(self, name: str, size_bytes: int) -> None:
        self.tried[name] += 1
        update = pb.PushedUpdate(assignment_id="bench.0.other", digest="ab" * 32,
                                 size_bytes=size_bytes)  # fmt: skip
        first = pb.PushRequest(update=update).SerializeToString()

        async def stream() -> AsyncIterator[bytes]:
            yield first
            for _ in range(1000):
                yield chunk_message(Chunk(0, NOISE, 0, True))

        call: Any = self._channel().stream_stream(TRANSFER + "Push")(
            stream(), metadata=self._metadata
        )
        async for _ in call:
            pass

    async def _loris(self) -> None:
        """A push that declares nothing, and goes on doing so."""
        while True:
            self.tried["silent stream"] += 1
            call = self._channel().stream_stream(TRANSFER + "Push")(metadata=self._metadata)
            with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
                await call.read()
            await asyncio.sleep(0.01)

    async def _sockets(self) -> None:
        """Connections without a word."""
        host, _, port = self._address.rpartition(":")
        held: collections.deque[socket.socket] = collections.deque(maxlen=IDLE_SOCKETS)
        while True:
            with contextlib.suppress(OSError):
                held.append(socket.create_connection((host, int(port)), timeout=1))
                self.tried["idle connection"] += 1
            await asyncio.sleep(0.02)


async def main() -> None:
    """Floods until SIGTERM."""
    flooder = Flooder(sys.argv[1], sys.argv[2])
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    running = asyncio.create_task(flooder.run())
    print("begun", flush=True)
    await stop.wait()
    running.cancel()
    print(json.dumps(flooder.tried), flush=True)
    os._exit(0)  # hundreds of calls are under way; nobody waits for them


if __name__ == "__main__":
    asyncio.run(main())
