"""A plain gRPC program that moves bytes in one stream per client: what transfers are compared with.

    python -m benchmarks._bare_grpc serve|join FRAMES CERTIFICATES

FRAMES: "large" for HTTP/2 frames as large as ours, "" for gRPC's 16 KiB. CERTIFICATES: a folder
(`_throwaway_certificates`) for mutual TLS, "" for plain text.

Server and clients use grpc.aio, as ours do, and messages without protobuf; no resuming, no
accounts, no acknowledgement but the last. How much is done with the bytes is asked call by call:

"memory": messages are made once and thrown away where they arrive.
"files": the sender reads a file and the receiver writes one and takes its SHA-256, in the event
loop, as a plain program would.
"durable": as "files", and the server syncs what it received before it answers.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc

from benchmarks._crowd import obey
from protos.transfer import MAX_MESSAGE_BYTES
from trials.fleet import environment

SERVICE = "bare.Bare"
OPTIONS = [("grpc.max_receive_message_length", -1), ("grpc.use_local_subchannel_pool", 1)]
if "large" in sys.argv:
    OPTIONS.append(("grpc.http2.max_frame_size", MAX_MESSAGE_BYTES))


def _messages(source: str, size_bytes: int, message_bytes: int) -> Iterator[bytes]:
    if not source:
        block = bytes(message_bytes)
        for start in range(0, size_bytes, message_bytes):
            yield block if size_bytes - start >= message_bytes else block[: size_bytes - start]
        return
    with Path(source).open("rb", buffering=0) as stream:
        while data := stream.read(message_bytes):
            yield data


async def _receive(messages: AsyncIterator[bytes], target: str, sync: bool) -> int:
    """Bytes received."""
    received = 0
    if not target:
        async for message in messages:
            received += len(message)
        return received
    digest = hashlib.sha256()
    with Path(target).open("wb", buffering=0) as stream:
        async for message in messages:
            stream.write(message)
            digest.update(message)
            received += len(message)
        if sync:
            await asyncio.to_thread(os.fsync, stream.fileno())
    digest.hexdigest()
    return received


async def serve() -> None:
    """Prints its port and serves until it is terminated."""

    async def take(messages: AsyncIterator[bytes], context: Any) -> bytes:
        told = dict(context.invocation_metadata())
        received = await _receive(messages, str(told.get("target", "")), "sync" in told)
        return str(received).encode()

    async def give(request: bytes, context: Any) -> AsyncIterator[bytes]:
        size, message_bytes, source = request.decode().split(" ", 2)
        for message in _messages(source, int(size), int(message_bytes)):
            yield message

    server = grpc.aio.server(options=OPTIONS)
    methods = {
        "Take": grpc.stream_unary_rpc_method_handler(take),
        "Give": grpc.unary_stream_rpc_method_handler(give),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, methods),))
    certificates = sys.argv[3]
    port = (
        server.add_secure_port("127.0.0.1:0", _server_credentials(Path(certificates)))
        if certificates
        else server.add_insecure_port("127.0.0.1:0")
    )
    print(port, flush=True)
    await server.start()
    await server.wait_for_termination()


def _server_credentials(folder: Path) -> Any:
    pair = (folder / "server.key").read_bytes(), (folder / "server.pem").read_bytes()
    authority = (folder / "ca.pem").read_bytes()
    return grpc.ssl_server_credentials([pair], authority, require_client_auth=True)


def _channel(address: str, certificates: str) -> Any:
    if not certificates:
        return grpc.aio.insecure_channel(address, options=OPTIONS)
    authority, key, own = (
        (Path(certificates) / name).read_bytes() for name in ("ca.pem", "client.key", "client.pem")
    )
    credentials = grpc.ssl_channel_credentials(authority, key, own)
    return grpc.aio.secure_channel(address, credentials, options=OPTIONS)


@contextlib.contextmanager
def bare_server(frames: str, certificates: str = "") -> Iterator[tuple[int, int]]:
    """A server's process: (its port, its id)."""
    command = [sys.executable, "-m", "benchmarks._bare_grpc", "serve", frames, certificates]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment()) as process:
        assert process.stdout is not None
        try:
            yield int(process.stdout.readline()), process.pid
        finally:
            process.terminate()


class _Clients:
    """Those of one process; each has a channel of its own."""

    async def dial(self, task: dict[str, Any]) -> dict[str, Any]:
        """Connects `names` to `port`."""
        self._channels = {
            name: _channel(f"127.0.0.1:{task['port']}", sys.argv[3]) for name in task["names"]
        }
        for channel in self._channels.values():
            await channel.channel_ready()
        return {}

    async def up(self, task: dict[str, Any]) -> dict[str, Any]:
        await asyncio.gather(*(self._up(name, **task) for name in self._channels))
        return {}

    async def down(self, task: dict[str, Any]) -> dict[str, Any]:
        await asyncio.gather(*(self._down(name, **task) for name in self._channels))
        return {}

    async def round(self, task: dict[str, Any]) -> dict[str, Any]:
        """Down, then up, each client in its own time."""

        async def one(name: str) -> None:
            await self._down(name, **task)
            await self._up(name, **task)

        await asyncio.gather(*map(one, self._channels))
        return {}

    async def _up(self, name: str, size_bytes: int, message_bytes: int, kind: str, folder: str
    ) -> None:  # fmt: skip
        async def each() -> AsyncIterator[bytes]:
            source = "" if kind == "memory" else f"{folder}/{name}/update"
            for message in _messages(source, size_bytes, message_bytes):
                yield message

        metadata = [] if kind == "memory" else [("target", f"{folder}/{name}/up")]
        if kind == "durable":
            metadata.append(("sync", "1"))
        call: Any = self._channels[name].stream_unary(f"/{SERVICE}/Take", None, None)
        assert int(await call(each(), metadata=metadata)) == size_bytes

    async def _down(self, name: str, size_bytes: int, message_bytes: int, kind: str, folder: str
    ) -> None:  # fmt: skip
        source = "" if kind == "memory" else f"{folder}/{name}/update"
        target = "" if kind == "memory" else f"{folder}/{name}/down"
        call: Any = self._channels[name].unary_stream(f"/{SERVICE}/Give", None, None)
        stream = call(f"{size_bytes} {message_bytes} {source}".encode())
        assert await _receive(stream, target, False) == size_bytes


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        asyncio.run(serve())
    else:
        clients = _Clients()
        asyncio.run(obey({"dial": clients.dial, "up": clients.up, "down": clients.down,
                          "round": clients.round}))  # fmt: skip
