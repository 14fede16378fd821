"""A plain gRPC program that moves bytes in one stream per client: what transfers are compared with.

Server and clients use grpc.aio, as ours do, and messages without protobuf. "memory": messages are
made once and thrown away where they arrive; nothing is read, written or checked. "files": clients
read files and the server writes them, or the other way round, and the receiver takes the SHA-256,
as whoever needs the bytes would; no resuming, no fsync, no accounts.
"""

from __future__ import annotations

import asyncio
import hashlib
import multiprocessing
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc

SERVICE = "bare.Bare"


def _messages(source: str, size_bytes: int, message_bytes: int) -> Iterator[bytes]:
    if not source:
        block = bytes(message_bytes)
        for start in range(0, size_bytes, message_bytes):
            yield block[: size_bytes - start]
        return
    with Path(source).open("rb", buffering=0) as stream:
        while data := stream.read(message_bytes):
            yield data


async def _receive(messages: AsyncIterator[bytes], target: str) -> tuple[int, str]:
    """(bytes, SHA-256 if written to a file)."""
    received = 0
    if not target:
        async for message in messages:
            received += len(message)
        return received, ""
    digest = hashlib.sha256()
    with Path(target).open("wb", buffering=0) as stream:
        async for message in messages:
            stream.write(message)
            digest.update(message)
            received += len(message)
    return received, digest.hexdigest()


async def _serve(port: Any, message_bytes: int) -> None:
    async def take(messages: AsyncIterator[bytes], context: Any) -> bytes:
        target = dict(context.invocation_metadata()).get("target", "")
        received, digest = await _receive(messages, str(target))
        return f"{received} {digest}".encode()

    async def give(request: bytes, context: Any) -> AsyncIterator[bytes]:
        size, _, source = request.decode().partition(" ")
        for message in _messages(source, int(size), message_bytes):
            yield message

    options = [("grpc.max_receive_message_length", -1)]
    server = grpc.aio.server(options=options)
    methods = {
        "Take": grpc.stream_unary_rpc_method_handler(take),
        "Give": grpc.unary_stream_rpc_method_handler(give),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, methods),))
    port.send(server.add_insecure_port("127.0.0.1:0"))
    await server.start()
    await server.wait_for_termination()


def _run_server(port: Any, message_bytes: int) -> None:
    asyncio.run(_serve(port, message_bytes))


async def _clients(
    port: int, clients: int, size_bytes: int, message_bytes: int, files: Sequence[Path], to: Path
) -> tuple[float, float]:
    """Bytes per second of all clients up, then down."""
    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", -1)]
    channels = [
        grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=options) for _ in range(clients)
    ]
    for channel in channels:
        await channel.channel_ready()

    async def each(messages: Iterator[bytes]) -> AsyncIterator[bytes]:
        for message in messages:
            yield message

    async def up(index: int) -> None:
        source = str(files[index]) if files else ""
        metadata = (("target", str(to / f"{index}.up")),) if files else ()
        call: Any = channels[index].stream_unary(f"/{SERVICE}/Take", None, None)
        messages = each(_messages(source, size_bytes, message_bytes))
        answer = await call(messages, metadata=metadata)
        assert int(answer.split()[0]) == size_bytes

    async def down(index: int) -> None:
        source = str(files[index]) if files else ""
        target = str(to / f"{index}.down") if files else ""
        call: Any = channels[index].unary_stream(f"/{SERVICE}/Give", None, None)
        received, _ = await _receive(call(f"{size_bytes} {source}".encode()), target)
        assert received == size_bytes

    rates = []
    for work in (up, down):
        began = time.perf_counter()
        await asyncio.gather(*map(work, range(clients)))
        rates.append(clients * size_bytes / (time.perf_counter() - began))
    for channel in channels:
        await channel.close(None)
    return rates[0], rates[1]


def bare_rates(
    clients: int,
    size_bytes: int,
    message_bytes: int,
    files: Sequence[Path] = (),
    to: Path = Path(),
) -> tuple[float, float]:
    """(up, down) in bytes per second, one server process and one client process.

    With `files`, one per client, these are moved, and copies written below `to`.
    """  # fmt: skip
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    server = context.Process(target=_run_server, args=(sender, message_bytes), daemon=True)
    server.start()
    try:
        port = receiver.recv()
        return asyncio.run(_clients(port, clients, size_bytes, message_bytes, files, to))
    finally:
        server.terminate()
        server.join()
