"""One enrolled device that asks for everything at once, as fast as it can, in every way it knows.

`python -m benchmarks._flooder ADDRESS SHOWN HOW`. SHOWN is a credential or, for mutual TLS, the
folder of an identity. HOW is "all" ways at once; only "dials", or "frames" of HTTP/2 that are no
calls; or "beneath" all limits, so that it is never shut out. Prints a line when it has begun, and
at SIGTERM one line of JSON with how often it tried what. Takes no part in rounds, so that what it
costs the others is the flood alone.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import functools
import json
import os
import signal
import socket
import ssl
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import hpack

from edge_agent.identity import Identity
from protos.chunk import Chunk, chunk_message
from protos.sketchfleet.v1 import fleet_pb2 as pb

CHANNELS, WORKERS = 24, 4  # connections; loops of each kind
IDLE_SOCKETS, SLOW_STREAMS = 300, 100
DIALS = 16  # that go on at once and end with the handshake
SILENT_S = 1.0  # without an answer: dialled anew
FLEET, TRANSFER = "/sketchfleet.v1.FleetService/", "/sketchfleet.v1.TransferService/"
NOISE = os.urandom(512 * 1024)


def _frame(kind: int, payload: bytes, flags: int = 0, stream: int = 0) -> bytes:
    """RFC 9113, 4.1."""
    head = len(payload).to_bytes(3, "big") + bytes([kind, flags])
    return head + stream.to_bytes(4, "big") + payload


PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + _frame(4, b"")
FRAMES = {  # no window is opened so often that it would be an error
    "settings": _frame(4, b""), "window update": _frame(8, bytes([0, 0, 0, 1])),
    "priority": _frame(2, bytes(5), stream=1), "unknown": _frame(99, b""),
    "ping": _frame(6, bytes(8)),
}  # fmt: skip


class Flooder:
    """All that it does goes on until the process ends."""

    def __init__(self, address: str, shown: str) -> None:
        self._address = address
        identity = Identity(Path(shown)) if Path(shown).is_dir() else None
        self._credentials = identity.credentials if identity else None
        self._tls = _context(identity) if identity else None
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
        return self._channels[self._next % len(self._channels)]

    async def beneath(self) -> None:
        """Never returns. 20 calls a second, of which a probe counts as ten, and 20 connections."""
        del self._channels[8:]
        often = [(9.0, self._profile), (9.0, lambda: self._push("push", 1000)),
                 (0.2, self._probe), (19.0, self._dialled)]  # fmt: skip

        async def at(per_s: float, way: Callable[[], Awaitable[None]]) -> None:
            under_way = set()
            while True:
                under_way.add(task := asyncio.ensure_future(self._once(way)))
                task.add_done_callback(under_way.discard)
                await asyncio.sleep(1 / per_s)

        await asyncio.gather(*(at(*each) for each in often))

    async def dials(self) -> None:
        """Never returns."""
        await asyncio.gather(*(self._forever(self._dialled) for _ in range(4 * DIALS)))

    async def frames(self) -> None:
        """Never returns. Each kind over connections of a device, and over a stranger's."""
        await asyncio.gather(
            *(self._forever(functools.partial(self._framed, kind, known))
              for kind in FRAMES for known in (True, False))
        )  # fmt: skip

    async def all(self) -> None:
        """Never returns."""
        poll = pb.NextTaskRequest(wait_s=0).SerializeToString()
        report = pb.ReportRequest(report=pb.LocalReport(assignment_id="bench.0.other"))
        ways: list[Callable[[], Awaitable[None]]] = [
            lambda: self._unary("poll", FLEET + "NextTask", poll),
            lambda: self._unary("long poll", FLEET + "NextTask",
                                pb.NextTaskRequest(wait_s=50).SerializeToString()),
            self._profile,
            lambda: self._unary("report", FLEET + "Report", report.SerializeToString()),
            lambda: self._unary("garbage", FLEET + "Report", NOISE[:1000]),
            lambda: self._unary("unknown call", FLEET + "Nothing", b""),
            self._reset, self._fetch, self._probe,
            lambda: self._push("push of 2^62 bytes", 2**62),
            lambda: self._push("push", 1000),
        ]  # fmt: skip
        await asyncio.gather(
            self._sockets(), *(self._forever(self._loris) for _ in range(SLOW_STREAMS)),
            *(self._forever(self._dialled) for _ in range(DIALS)),
            *(self._redial(number, poll) for number in range(CHANNELS)),
            *(self._forever(way) for way in ways for _ in range(WORKERS)),
        )  # fmt: skip

    async def _forever(self, way: Callable[[], Awaitable[None]]) -> None:
        while True:
            await self._once(way)
            await asyncio.sleep(0)

    async def _once(self, way: Callable[[], Awaitable[None]]) -> None:
        # A channel that is dialled anew cancels the calls it had.
        with contextlib.suppress(
            grpc.aio.AioRpcError, grpc.aio.UsageError, asyncio.InvalidStateError, OSError,
            TimeoutError, asyncio.CancelledError,
        ):  # fmt: skip
            await way()

    async def _redial(self, number: int, poll: bytes) -> None:
        """Waits for no connection that is not heard."""
        while True:
            asked = self._channels[number].unary_unary(FLEET + "NextTask")
            try:
                await asked(poll, metadata=self._metadata, timeout=SILENT_S)
            except grpc.aio.AioRpcError as error:
                if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                    self.tried["redial"] += 1
                    silent, self._channels[number] = self._channels[number], self._dial()
                    await silent.close()
            await asyncio.sleep(SILENT_S / 4)

    async def _dialled(self) -> None:
        """A connection for its own sake: over TLS, a handshake."""
        self.tried["dial"] += 1
        _, writer = await self._connected()
        self.tried["dialled"] += 1
        writer.close()

    async def _unary(self, name: str, method: str, message: bytes) -> None:
        self.tried[name] += 1
        await self._channel().unary_unary(method)(message, metadata=self._metadata, timeout=60)

    async def _profile(self) -> None:
        heavy = pb.NextTaskRequest(wait_s=0)
        heavy.profile.board = "x" * 60_000
        await self._unary("profile", FLEET + "NextTask", heavy.SerializeToString())

    async def _framed(self, kind: str, known: bool) -> None:
        """A connection full of frames; a known one has made a call."""
        reader, writer = await self._connected()
        writer.write(PREFACE)
        if known:
            writer.write(self._poll_frames())
            await reader.read(1)
            await asyncio.sleep(0.3)
        hung_up = asyncio.ensure_future(_read_all(reader))
        while not hung_up.done():
            self.tried[f"frames: {kind}"] += 2000
            writer.write(2000 * FRAMES[kind])
            await asyncio.wait_for(writer.drain(), 2 * SILENT_S)
            await asyncio.sleep(0)
        writer.close()

    def _poll_frames(self) -> bytes:
        told = {":method": "POST", ":scheme": "https" if self._tls else "http", ":authority": "-",
                ":path": FLEET + "NextTask", "content-type": "application/grpc", "te": "trailers",
                **dict(self._metadata)}  # fmt: skip
        headers = hpack.Encoder().encode(told.items())
        return _frame(1, headers, flags=4, stream=1) + _frame(0, bytes(5), flags=1, stream=1)

    async def _connected(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        host, _, port = self._address.rpartition(":")
        dialling = asyncio.open_connection(host, int(port), ssl=self._tls)
        return await asyncio.wait_for(dialling, SILENT_S)

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
        self.tried["silent stream"] += 1
        call = self._channel().stream_stream(TRANSFER + "Push")(metadata=self._metadata)
        await call.read()

    async def _sockets(self) -> None:
        """Connections without a word."""
        host, _, port = self._address.rpartition(":")
        held: collections.deque[socket.socket] = collections.deque(maxlen=IDLE_SOCKETS)
        while True:
            with contextlib.suppress(OSError):
                held.append(socket.create_connection((host, int(port)), timeout=1))
                self.tried["idle connection"] += 1
            await asyncio.sleep(0.02)


async def _read_all(reader: asyncio.StreamReader) -> None:
    while await reader.read(1 << 16):
        continue


def _context(identity: Identity) -> ssl.SSLContext:
    """Shows the device's certificate, and does not look at the coordinator's: that is dear."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    with tempfile.NamedTemporaryFile() as file:
        Path(file.name).write_bytes(identity.pair.key + identity.pair.chain)
        context.load_cert_chain(file.name)
    return context


async def main() -> None:
    """Floods until SIGTERM."""
    flooder = Flooder(sys.argv[1], sys.argv[2])
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    ways = {"all": flooder.all, "dials": flooder.dials, "frames": flooder.frames,
            "beneath": flooder.beneath}  # fmt: skip
    running = asyncio.create_task(ways[sys.argv[3]]())
    print("begun", flush=True)
    await stop.wait()
    running.cancel()
    print(json.dumps(flooder.tried), flush=True)
    os._exit(0)  # hundreds of calls are under way; nobody waits for them


if __name__ == "__main__":
    asyncio.run(main())
