"""A user-space TCP relay that gives a connection on this machine the manners of a real link.

    python -m trials.relay --target 50051 --up 400k --down 1M --delay-ms 50

Rate, one-way delay and outages are emulated for everything that passes through one relay, so a
device gets a link of its own by dialling its own relay. Needs no privileges. Knows bytes only:
nothing of gRPC. Not emulated: packet loss, reordering, and the delay of the TCP handshake.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import re
import signal
import socket
import struct
from collections import deque
from collections.abc import Coroutine
from dataclasses import dataclass

from profiles.errors import SketchfleetError

LOOPBACK = "127.0.0.1"
_BURST_S = 0.02
_MIN_CHUNK_BYTES = 1024
_MAX_CHUNK_BYTES = 64 * 1024
_MAX_HELD_BYTES = 64 * 1024 * 1024
_FACTORS = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9}


class RateError(SketchfleetError):
    """A rate that cannot be read."""


def parse_rate(text: str) -> float:
    """Bits per second from "9600", "400k", "1.5M" or "1G" (decimal); "unlimited" is infinite."""
    if text == "unlimited":
        return math.inf
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kmg]?)", text.strip().lower())
    if match is None or float(match[1]) == 0:
        raise RateError(f"{text!r} is not a rate; write bits per second such as 400k, 1M or 50M")
    return float(match[1]) * _FACTORS[match[2]]


@dataclass(frozen=True)
class LinkShape:
    """What the link is to feel like. Up is from the client to the target."""

    up_bps: float = math.inf
    down_bps: float = math.inf
    delay_s: float = 0.0
    """One way, so a round trip takes twice this longer."""


class Relay:
    """Listens on loopback and forwards to a port, through one emulated link.

    All connections share the link's rate, each direction on its own. A reader that stalls stalls
    its sender: no more than the link holds, plus small buffers, is ever kept here.
    """

    def __init__(
        self,
        target_port: int,
        shape: LinkShape,
        *,
        port: int = 0,
        target_host: str = LOOPBACK,
    ) -> None:
        self.port = port
        """Where to dial; chosen by `start` if 0 was given."""
        self.shape = shape
        self._target = (target_host, target_port)
        self._up = _Lane(shape.up_bps, shape.delay_s)
        self._down = _Lane(shape.down_bps, shape.delay_s)
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()
        self._is_cut = False

    @property
    def up_bytes(self) -> int:
        """Bytes handed to the target so far."""
        return self._up.delivered_bytes

    @property
    def down_bytes(self) -> int:
        """Bytes handed to clients so far."""
        return self._down.delivered_bytes

    async def start(self) -> None:
        """Begins to listen; raises OSError if the port is taken."""
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._up.limit_buffers(listener)
            listener.bind((LOOPBACK, self.port))
            listener.setblocking(False)
            self._server = await asyncio.start_server(
                self._accept, sock=listener, limit=self._up.chunk_bytes
            )
        except OSError:
            listener.close()
            raise
        self.port = listener.getsockname()[1]

    async def stop(self) -> None:
        """Stops listening and drops every connection."""
        if self._server is not None:
            self._server.close()
            self._server = None
        await self._drop_all()

    def change(self, up_bps: float, down_bps: float, delay_s: float) -> None:
        """Another link from now on; rates of 0: nothing passes, and connections stay."""
        self._up.change(up_bps, delay_s)
        self._down.change(down_bps, delay_s)

    async def cut(self) -> None:
        """Drops every connection, and every new one at once, until `restore`.

        The port stays bound, so that nobody else can take it meanwhile; a client sees a reset.
        """
        self._is_cut = True
        await self._drop_all()

    async def restore(self) -> None:
        """Ends a cut."""
        self._is_cut = False

    async def _drop_all(self) -> None:
        dropped = list(self._connections)
        for task in dropped:
            task.cancel()
        await asyncio.gather(*dropped, return_exceptions=True)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._is_cut:
            _reset(writer)
            return
        task = asyncio.ensure_future(self._serve(reader, writer))
        self._connections.add(task)
        task.add_done_callback(self._connections.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            try:
                onward = await self._dial()
            except BaseException:
                _reset(writer)
                raise
            far_reader, far_writer = onward
            try:
                await _both(
                    self._up.carry(reader, far_writer), self._down.carry(far_reader, writer)
                )
                far_writer.close()
                writer.close()
            except BaseException:
                _reset(far_writer)
                _reset(writer)
                raise

    async def _dial(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        try:
            self._down.limit_buffers(sock)
            sock.setblocking(False)
            await asyncio.get_running_loop().sock_connect(sock, self._target)
            return await asyncio.open_connection(sock=sock, limit=self._down.chunk_bytes)
        except BaseException:
            sock.close()
            raise


class _Lane:
    """One direction of the link: its rate is shared, its delay is the same for all."""

    def __init__(self, rate_bps: float, delay_s: float) -> None:
        if not (rate_bps > 0 and delay_s >= 0):
            raise RateError(f"a link of {rate_bps} bit/s and {delay_s} s delay cannot exist")
        self._is_open = asyncio.Event()
        self._is_open.set()
        self._bytes_per_s = rate_bps / 8
        self._delay_s = delay_s
        burst_bytes = min(self._bytes_per_s * _BURST_S, _MAX_CHUNK_BYTES)
        self.chunk_bytes = max(_MIN_CHUNK_BYTES, int(burst_bytes))
        self.delivered_bytes = 0
        self._free_at_s = -math.inf  # when the last byte accepted so far will have left

    def change(self, rate_bps: float, delay_s: float) -> None:
        """What enters from now on; at a rate of 0 nothing does, and what was on its way arrives."""
        self._delay_s = delay_s
        if rate_bps > 0:
            self._bytes_per_s = rate_bps / 8
            self._is_open.set()
        else:
            self._is_open.clear()

    def limit_buffers(self, sock: socket.socket) -> None:
        """Keeps the kernel from swallowing what the link could not have carried yet."""
        wanted = min(max(4 * self.chunk_bytes, 16 * 1024), 1024 * 1024)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, wanted)

    async def carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Moves one connection's bytes in this direction until its sender closes."""
        writer.transport.set_write_buffer_limits(high=self.chunk_bytes)
        # What the link holds at once; an unlimited one is taken for 10 Gbit/s.
        in_flight_bytes = int(min(self._bytes_per_s, 1.25e9) * self._delay_s)
        pipe = _Pipe(limit_bytes=min(in_flight_bytes, _MAX_HELD_BYTES) + 4 * self.chunk_bytes)
        await _both(self._enter(reader, pipe), self._leave(pipe, writer))

    async def _enter(self, reader: asyncio.StreamReader, pipe: _Pipe) -> None:
        now = asyncio.get_running_loop().time
        while data := await reader.read(self.chunk_bytes):
            await self._is_open.wait()
            # A bucket of _BURST_S worth: time the link stood idle counts, but no further back.
            self._free_at_s = max(self._free_at_s, now() - _BURST_S)
            self._free_at_s += len(data) / self._bytes_per_s
            await asyncio.sleep(self._free_at_s - now())
            await pipe.put(now() + self._delay_s, data)
        await pipe.put(now() + self._delay_s, b"")

    async def _leave(self, pipe: _Pipe, writer: asyncio.StreamWriter) -> None:
        now = asyncio.get_running_loop().time
        while True:
            due_s, data = await pipe.get()
            await asyncio.sleep(due_s - now())
            if not data:
                break
            writer.write(data)
            await writer.drain()
            self.delivered_bytes += len(data)
        if writer.can_write_eof():
            writer.write_eof()


class _Pipe:
    """A queue of (when due, bytes), bounded in bytes. One putter, one getter."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._held_bytes = 0
        self._items: deque[tuple[float, bytes]] = deque()
        self._changed = asyncio.Condition()

    async def put(self, due_s: float, data: bytes) -> None:
        async with self._changed:
            await self._changed.wait_for(lambda: self._held_bytes < self._limit_bytes)
            self._items.append((due_s, data))
            self._held_bytes += len(data)
            self._changed.notify_all()

    async def get(self) -> tuple[float, bytes]:
        async with self._changed:
            await self._changed.wait_for(lambda: bool(self._items))
            due_s, data = self._items.popleft()
            self._held_bytes -= len(data)
            self._changed.notify_all()
            return due_s, data


async def _both(first: Coroutine[None, None, None], second: Coroutine[None, None, None]) -> None:
    """Runs two tasks to their end; if one fails or this is cancelled, neither is left behind."""
    tasks = [asyncio.ensure_future(first), asyncio.ensure_future(second)]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _reset(writer: asyncio.StreamWriter) -> None:
    """Closes with a reset, as a link that vanished looks to the peer; nothing is flushed."""
    sock = writer.get_extra_info("socket")
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


def main(arguments: list[str] | None = None) -> int:
    """Relays until SIGTERM or SIGINT; SIGUSR1 cuts the link and SIGUSR2 restores it.

    The first line printed is {"port": n}, the last {"up_bytes": n, "down_bytes": n}.
    """
    parser = argparse.ArgumentParser(prog="python -m trials.relay", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--listen", type=int, default=0, help="port on loopback; 0 takes any")
    parser.add_argument("--target", type=int, required=True, help="port on loopback")
    parser.add_argument("--up", default="unlimited", help="bit/s to the target, such as 400k")
    parser.add_argument("--down", default="unlimited", help="bit/s back, such as 1M")
    parser.add_argument("--delay-ms", type=float, default=0.0, help="one way")
    asked = parser.parse_args(arguments)
    try:
        shape = LinkShape(parse_rate(asked.up), parse_rate(asked.down), asked.delay_ms / 1000)
        relay = Relay(asked.target, shape, port=asked.listen)
        asyncio.run(_run_until_told(relay))
    except (OSError, SketchfleetError) as error:
        parser.exit(1, f"{error}\n")
    return 0


async def _run_until_told(relay: Relay) -> None:
    loop = asyncio.get_running_loop()
    told = asyncio.Event()
    cuts: set[asyncio.Task[None]] = set()

    def begin(action: Coroutine[None, None, None]) -> None:
        task = asyncio.ensure_future(action)
        cuts.add(task)
        task.add_done_callback(cuts.discard)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, told.set)
    loop.add_signal_handler(signal.SIGUSR1, lambda: begin(relay.cut()))
    loop.add_signal_handler(signal.SIGUSR2, lambda: begin(relay.restore()))
    await relay.start()
    print(json.dumps({"port": relay.port}), flush=True)
    await told.wait()
    await relay.stop()
    print(json.dumps({"up_bytes": relay.up_bytes, "down_bytes": relay.down_bytes}), flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
