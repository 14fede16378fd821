"""The emulated link: its rate, its delay, its outages, and that bytes pass unharmed."""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import TypeVar

import pytest

from trials.relay import LinkShape, RateError, Relay, parse_rate

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
T = TypeVar("T")
Dialled = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()
    writer.close()


async def swallow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Reads to the end, then answers with what arrived."""
    digest = hashlib.sha256()
    while data := await reader.read(65536):
        digest.update(data)
    writer.write(digest.digest())
    writer.close()


def give(content: bytes) -> Handler:
    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(content)
        await writer.drain()
        writer.close()

    return handler


@asynccontextmanager
async def relayed(handler: Handler, shape: LinkShape) -> AsyncIterator[Relay]:
    server = await asyncio.start_server(handler, "127.0.0.1", 0)
    relay = Relay(server.sockets[0].getsockname()[1], shape)
    await relay.start()
    try:
        yield relay
    finally:
        await relay.stop()
        server.close()


async def dial(relay: Relay) -> Dialled:
    return await asyncio.open_connection("127.0.0.1", relay.port)


def run(main: Coroutine[None, None, T]) -> T:
    return asyncio.run(asyncio.wait_for(main, timeout=20))


def random_bytes(count: int) -> bytes:
    return random.Random(7).randbytes(count)


@pytest.mark.parametrize(
    ("text", "bps"),
    [("9600", 9600), ("400k", 4e5), ("1M", 1e6), ("1.5m", 1.5e6), ("2G", 2e9)],
)
def test_rates_are_read_in_decimal_bits_per_second(text: str, bps: float) -> None:
    assert parse_rate(text) == bps


def test_an_unlimited_rate_is_infinite() -> None:
    assert math.isinf(parse_rate("unlimited"))


@pytest.mark.parametrize("text", ["", "0", "fast", "-1M", "1Mbit/s", "1e6", "k"])
def test_an_unreadable_rate_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(RateError, match="400k"):
        parse_rate(text)


def test_upload_and_download_run_at_the_asked_rates() -> None:
    content = random_bytes(200_000)

    async def upload() -> float:
        async with relayed(swallow, LinkShape(up_bps=1e6)) as relay:
            reader, writer = await dial(relay)
            started = time.monotonic()
            writer.write(content)
            writer.write_eof()
            assert await reader.read() == hashlib.sha256(content).digest()
            assert relay.up_bytes == len(content)
            return time.monotonic() - started

    async def download() -> float:
        async with relayed(give(content), LinkShape(down_bps=1.5e6)) as relay:
            started = time.monotonic()
            reader, _ = await dial(relay)
            assert await reader.read() == content
            assert relay.down_bytes == len(content)
            return time.monotonic() - started

    async def both() -> tuple[float, float]:
        return await asyncio.gather(upload(), download())

    up_s, down_s = run(both())
    assert len(content) * 8 / up_s == pytest.approx(1e6, rel=0.15)
    assert len(content) * 8 / down_s == pytest.approx(1.5e6, rel=0.15)


def test_a_fast_link_is_not_throttled_by_the_relay_or_its_delay() -> None:
    content = random_bytes(6_000_000)

    async def download() -> float:
        async with relayed(give(content), LinkShape(down_bps=50e6, delay_s=0.1)) as relay:
            started = time.monotonic()
            reader, _ = await dial(relay)
            assert await reader.read() == content
            return time.monotonic() - started

    took_s = run(download()) - 0.1
    assert len(content) * 8 / took_s == pytest.approx(50e6, rel=0.15)


def test_connections_share_one_link() -> None:
    content = random_bytes(60_000)

    async def two_downloads() -> float:
        async with relayed(give(content), LinkShape(down_bps=1e6)) as relay:
            started = time.monotonic()
            dialled = [await dial(relay), await dial(relay)]
            received = await asyncio.gather(*(reader.read() for reader, _ in dialled))
            assert received == [content, content]
            return time.monotonic() - started

    assert 2 * len(content) * 8 / run(two_downloads()) == pytest.approx(1e6, rel=0.15)


def test_the_delay_is_added_in_each_direction() -> None:
    async def round_trips() -> list[float]:
        async with relayed(echo, LinkShape(delay_s=0.05)) as relay:
            reader, writer = await dial(relay)
            took: list[float] = []
            for _ in range(5):
                started = time.monotonic()
                writer.write(b"ping")
                assert await reader.readexactly(4) == b"ping"
                took.append(time.monotonic() - started)
            writer.close()
            return took

    assert min(run(round_trips())) == pytest.approx(0.1, abs=0.03)


def test_bytes_arrive_intact_both_ways_at_once() -> None:
    content = random_bytes(3_000_000)

    async def echoed() -> bytes:
        async with relayed(echo, LinkShape(up_bps=80e6, down_bps=60e6, delay_s=0.01)) as relay:
            reader, writer = await dial(relay)

            async def send() -> None:
                writer.write(content)
                await writer.drain()
                writer.write_eof()

            _, received = await asyncio.gather(send(), reader.read())
            return received

    assert hashlib.sha256(run(echoed())).digest() == hashlib.sha256(content).digest()


def test_a_stalled_reader_stalls_its_sender() -> None:
    async def sent_before_stalling() -> tuple[int, int]:
        release = asyncio.Event()

        async def stalled(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await release.wait()
            writer.close()

        async with relayed(stalled, LinkShape(up_bps=400e6, delay_s=0.001)) as relay:
            _, writer = await dial(relay)
            sent = 0
            try:
                while sent < 200_000_000:
                    writer.write(bytes(65536))
                    await asyncio.wait_for(writer.drain(), 0.5)
                    sent += 65536
            except TimeoutError:
                pass
            release.set()
            writer.transport.abort()
            return sent, relay.up_bytes

    sent, passed = run(sent_before_stalling())
    assert sent < 40_000_000, "the relay keeps taking bytes that nobody reads"
    assert sent - passed < 8_000_000


def test_a_cut_drops_connections_and_refuses_new_ones_until_restored() -> None:
    async def through_an_outage() -> None:
        async with relayed(echo, LinkShape(delay_s=0.001)) as relay:
            reader, writer = await dial(relay)
            writer.write(b"before")
            assert await reader.readexactly(6) == b"before"

            await relay.cut()
            with pytest.raises(ConnectionError):
                await reader.readexactly(1)
            with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
                reader, writer = await dial(relay)
                writer.write(b"during")
                await reader.readexactly(6)

            await relay.restore()
            reader, writer = await dial(relay)
            writer.write(b"after")
            assert await reader.readexactly(5) == b"after"
            writer.close()

    run(through_an_outage())


def test_a_target_that_is_gone_looks_like_a_reset() -> None:
    async def dial_nothing() -> None:
        relay = Relay(1, LinkShape())
        await relay.start()
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
            reader, _ = await dial(relay)
            await reader.readexactly(1)
        await relay.stop()

    run(dial_nothing())


def test_as_a_process_it_tells_its_port_obeys_signals_and_counts() -> None:
    async def through_a_process() -> None:
        server = await asyncio.start_server(echo, "127.0.0.1", 0)
        target = str(server.sockets[0].getsockname()[1])
        command = [sys.executable, "-m", "trials.relay", "--target", target, "--up", "1M"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            assert process.stdout is not None
            port = json.loads(await asyncio.to_thread(process.stdout.readline))["port"]
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"hello")
            assert await reader.readexactly(5) == b"hello"
            os.kill(process.pid, signal.SIGUSR1)
            with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
                await reader.readexactly(1)
            process.terminate()
            last = await asyncio.to_thread(process.stdout.readline)
            assert json.loads(last) == {"up_bytes": 5, "down_bytes": 5}
            assert await asyncio.to_thread(process.wait, 5) == 0
        finally:
            process.kill()
            process.wait()
            server.close()

    run(through_a_process())


@pytest.mark.parametrize(
    "arguments", [["--up", "fast"], ["--delay-ms", "-1"], ["--listen", "{taken}"]]
)
def test_a_bad_argument_is_one_sentence_and_a_failure(arguments: list[str]) -> None:
    async def take_a_port_and_run() -> subprocess.CompletedProcess[str]:
        server = await asyncio.start_server(echo, "127.0.0.1", 0)
        taken = str(server.sockets[0].getsockname()[1])
        filled = [argument.format(taken=taken) for argument in arguments]
        command = [sys.executable, "-m", "trials.relay", "--target", "9", *filled]
        return await asyncio.to_thread(
            subprocess.run, command, capture_output=True, text=True, timeout=10, check=False
        )

    done = run(take_a_port_and_run())
    assert done.returncode != 0
    assert len(done.stderr.splitlines()) == 1, done.stderr
