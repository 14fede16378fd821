"""The gRPC client: dial, authenticate, fetch and push with resume, probe, back off.

Two channels, so that bulk bytes never delay a poll. gRPC's own retries are off on the transfer
channel: on client streams they lose messages (grpc/grpc#40283), so resuming is done here, by
offset. A transfer fails only after `patience_s` without a single new byte.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import grpc

from profiles.device import DeviceProfile
from profiles.errors import SketchfleetError
from profiles.link import LinkProfile
from protos.contract import BlobRef, LocalReport, Reason, to_message
from protos.sketchfleet.v1 import fleet_pb2 as pb
from protos.sketchfleet.v1 import fleet_pb2_grpc as rpc
from protos.status import RESUMABLE, reason_of
from protos.transfer import (
    CHUNK_BYTES,
    MAX_MESSAGE_BYTES,
    WINDOW_CHUNKS,
    CorruptChunkError,
    PartFile,
    TransferError,
    crc32,
    sha256_of,
)

log = logging.getLogger("sketchfleet.agent")

CONTROL_S = 15.0
STALL_S = 60.0  # without a byte, an attempt is given up and begun again where it stands
FIRST_CHUNK_BYTES = 32 * 1024
LEAST_CHUNK_BYTES = 4 * 1024
QUICK_CHUNK_S, SLOW_CHUNK_S = 2.0, 10.0  # chunks grow below and shrink above
PROBE_START_BYTES = 64 * 1024
PROBE_MOST_BYTES = 4 << 20
PROBE_METERED_BYTES = 512 * 1024
PROBE_ENOUGH_S = 1.5
T = TypeVar("T")

_OPTIONS = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 120_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.min_reconnect_backoff_ms", 500),
    ("grpc.max_reconnect_backoff_ms", 5_000),
    ("grpc.enable_retries", 0),
]


class LinkError(SketchfleetError):
    """The coordinator cannot be reached."""


class RefusedError(SketchfleetError):
    """The coordinator turned a request down; `reason` says what kind it was."""

    def __init__(self, reason: Reason, sentence: str) -> None:
        super().__init__(sentence)
        self.reason = reason


def _holds(path: Path, blob: BlobRef) -> bool:
    """Whether this file is the blob. A file that is not is removed."""
    if not path.is_file():
        return False
    if path.stat().st_size == blob.size_bytes and sha256_of(path) == blob.digest:
        return True
    log.warning("a kept file is damaged and is fetched again", extra={"digest": blob.digest[:12]})
    path.unlink()
    return False


class Link:
    """A device's connection to its coordinator. Use from one event loop.

    `patience_s` is how long a transfer goes on without a byte before it raises `LinkError`.
    `resumes` and `fetched_bytes` count from the start.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        self.patience_s = STALL_S
        self._chunk_bytes = FIRST_CHUNK_BYTES
        self.credential = ""
        self.resumes = 0
        self.fetched_bytes = 0
        self._control = grpc.aio.insecure_channel(address, options=_OPTIONS)
        self._bulk = grpc.aio.insecure_channel(
            address, options=[*_OPTIONS, ("grpc.use_local_subchannel_pool", 1)]
        )
        self._enrolment = rpc.EnrolmentServiceStub(self._control)
        self._fleet = rpc.FleetServiceStub(self._control)
        self._transfer = rpc.TransferServiceStub(self._bulk)
        self._probe = rpc.FleetServiceStub(self._bulk)

    async def close(self) -> None:
        """Hangs up."""
        await self._control.close(None)
        await self._bulk.close(None)

    @property
    def _metadata(self) -> tuple[tuple[str, str], ...]:
        return (("authorization", f"Bearer {self.credential}"),)

    async def enroll(self, token: str, device_name: str, version: str, patience_s: float) -> float:
        """Takes a credential; returns how many seconds it is valid.

        Raises `RefusedError` on a wrong token, `LinkError` after `patience_s` without an answer.
        """
        request = pb.EnrollRequest(token=token, device_name=device_name, agent_version=version)
        answer = await self._persist(
            lambda: self._enrolment.Enroll(request, timeout=CONTROL_S), patience_s
        )
        self.credential = answer.credential
        return float(answer.expires_in_s)

    async def renew(self) -> float:
        """Replaces the credential; returns how many seconds the new one is valid."""
        answer = await self._persist(
            lambda: self._fleet.Renew(
                pb.RenewRequest(), timeout=CONTROL_S, metadata=self._metadata
            ),
            CONTROL_S,
        )
        self.credential = answer.credential
        return float(answer.expires_in_s)

    async def next_task(
        self, profile: DeviceProfile | None, working_on: str, wait_s: float, patience_s: float
    ) -> Any:
        """One long poll. Raises `RefusedError`, `LinkError`."""
        request = pb.NextTaskRequest(wait_s=wait_s, working_on=working_on)
        if profile is not None:
            request.profile.CopyFrom(to_message(profile, pb.DeviceProfile))
        return await self._persist(
            lambda: self._fleet.NextTask(
                request, timeout=wait_s + CONTROL_S, metadata=self._metadata
            ),
            patience_s,
        )

    async def report(self, report: LocalReport, patience_s: float) -> None:
        """Delivers a report; repeating it is harmless."""
        request = pb.ReportRequest(report=to_message(report, pb.LocalReport))
        await self._persist(
            lambda: self._fleet.Report(request, timeout=CONTROL_S, metadata=self._metadata),
            patience_s,
        )

    async def fetch(self, blob: BlobRef, folder: Path) -> Path:
        """Fetches a blob into `folder`, resuming what an earlier attempt left.

        A file that is there already is used if its digest is right, and else replaced. Raises
        `RefusedError`, or `LinkError` when no byte arrives for `patience_s`.
        """
        target = folder / blob.digest
        if await asyncio.to_thread(_holds, target, blob):
            return target
        part = PartFile(folder / f"{blob.digest}.part", blob.size_bytes)

        async def attempt() -> None:
            stream = self._transfer.Fetch(
                pb.FetchRequest(digest=blob.digest, offset=part.length), metadata=self._metadata
            )
            while part.length < blob.size_bytes:
                chunk = await asyncio.wait_for(stream.read(), timeout=STALL_S)
                if chunk is grpc.aio.EOF:  # type: ignore[attr-defined]
                    break
                part.write(chunk.offset, chunk.data, chunk.crc32)
                self.fetched_bytes += len(chunk.data)
            part.finish(blob.digest, target)

        try:
            await self._resume(attempt, lambda: part.length)
        finally:
            part.close()
        return target

    async def push(self, assignment_id: str, digest: str, path: Path) -> tuple[str, str]:
        """Pushes an update in a window of chunks; returns (receipt, outcome).

        Raises `RefusedError`, or `LinkError` when nothing is acknowledged for `patience_s`.
        """
        size = path.stat().st_size
        held = 0

        async def attempt() -> tuple[str, str]:
            nonlocal held
            begun = await self._transfer.BeginPush(
                pb.BeginPushRequest(assignment_id=assignment_id, digest=digest, size_bytes=size),
                timeout=CONTROL_S, metadata=self._metadata,
            )  # fmt: skip
            held = begun.durable_bytes
            if 0 < held < size:
                log.info("push resumed", extra={"at_byte": held, "of_bytes": size})
            if held < size:
                most = min(begun.chunk_bytes, CHUNK_BYTES)
                await self._put(path, begun.upload_id, held, most, advance)
            done = await self._transfer.CommitPush(
                pb.CommitPushRequest(upload_id=begun.upload_id),
                timeout=STALL_S, metadata=self._metadata,
            )  # fmt: skip
            return str(done.receipt), str(done.outcome)

        def advance(durable: int) -> None:
            nonlocal held
            held = max(held, durable)

        return await self._resume(attempt, lambda: held)

    async def _put(
        self, path: Path, upload_id: str, offset: int, most_bytes: int,
        advance: Callable[[int], None],
    ) -> None:  # fmt: skip
        """Sends the rest of a file, `WINDOW_CHUNKS` unary calls in flight.

        The link sets the size of chunks, so that on the slowest one calls still end in time.
        """
        window = asyncio.Semaphore(WINDOW_CHUNKS)
        in_flight: set[asyncio.Task[None]] = set()

        async def send(at: int, data: bytes) -> None:
            try:
                request = pb.PutChunkRequest(
                    upload_id=upload_id, offset=at, data=data, crc32=crc32(data)
                )
                begun = time.monotonic()
                answer = await self._transfer.PutChunk(
                    request, timeout=2 * STALL_S, metadata=self._metadata
                )
                advance(answer.durable_bytes)
                self._adapt(time.monotonic() - begun, most_bytes)
            finally:
                window.release()

        try:
            with path.open("rb") as stream:
                stream.seek(offset)
                while True:
                    await window.acquire()
                    if not (data := stream.read(min(self._chunk_bytes, most_bytes))):
                        break
                    for task in [t for t in in_flight if t.done()]:
                        in_flight.discard(task)
                        task.result()
                    in_flight.add(asyncio.create_task(send(offset, data)))
                    offset += len(data)
            await asyncio.gather(*in_flight)
        finally:
            for task in in_flight:
                task.cancel()
            await asyncio.gather(*in_flight, return_exceptions=True)

    def _adapt(self, chunk_s: float, most_bytes: int) -> None:
        if chunk_s < QUICK_CHUNK_S:
            self._chunk_bytes = min(most_bytes, 2 * self._chunk_bytes)
        elif chunk_s > SLOW_CHUNK_S:
            self._chunk_bytes = max(LEAST_CHUNK_BYTES, self._chunk_bytes // 2)

    async def probe(self, metered: bool) -> LinkProfile:
        """Measures the channel both ways with little data: doubles until a transfer takes 1.5 s.

        Each direction is timed by its receiver, after the first message.
        """
        rtts = []
        for _ in range(4):
            begun = time.perf_counter()
            await self._probe_once(1, 0)
            rtts.append(time.perf_counter() - begun)
        most = PROBE_METERED_BYTES if metered else PROBE_MOST_BYTES
        size = PROBE_START_BYTES
        while True:
            up_bps, down_bps, slowest_s = await self._probe_once(size, size)
            if slowest_s >= PROBE_ENOUGH_S or size >= most:
                return LinkProfile(up_bps, down_bps, min(rtts), metered)
            size *= 2

    async def _probe_once(self, up_bytes: int, down_bytes: int) -> tuple[float, float, float]:
        """(up bit/s, down bit/s, seconds of the slower direction)."""
        block = os.urandom(min(16 * 1024, up_bytes))

        async def payload() -> AsyncIterator[Any]:
            sent = 0
            while sent < up_bytes:
                piece = block[: up_bytes - sent]
                sent += len(piece)
                last = sent >= up_bytes
                yield pb.ProbeRequest(payload=piece, last=last, reply_bytes=down_bytes)

        up: Any = None
        started, timed = 0.0, 0
        try:
            async for message in self._probe.Probe(
                payload(), timeout=STALL_S, metadata=self._metadata
            ):
                if up is None:
                    up = message
                elif started == 0.0:
                    started = time.perf_counter()
                else:
                    timed += len(message.payload)
        except grpc.aio.AioRpcError as error:
            raise self._failure(error) from error
        down_s = time.perf_counter() - started if started else 0.0
        up_bps = 8 * up.timed_bytes / up.timed_s if up is not None and up.timed_s else 0.0
        down_bps = 8 * timed / down_s if down_s else 0.0
        return up_bps, down_bps, max(up.timed_s if up is not None else 0.0, down_s)

    async def _persist(self, call: Callable[[], Awaitable[T]], patience_s: float) -> T:
        """Repeats an idempotent call with jittered back-off until it is answered."""
        until = time.monotonic() + patience_s
        pause_s = 0.2
        while True:
            try:
                return await call()
            except grpc.aio.AioRpcError as error:
                failure = self._failure(error)
                if isinstance(failure, RefusedError) or time.monotonic() + pause_s > until:
                    raise failure from error
            await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))  # noqa: S311 - jitter
            pause_s = min(5.0, 2 * pause_s)

    async def _resume(self, attempt: Callable[[], Awaitable[T]], progress: Callable[[], int]) -> T:
        """Repeats a transfer from where it stands while bytes still move."""
        moved_at, held, pause_s = time.monotonic(), progress(), 0.5
        while True:
            try:
                return await attempt()
            except grpc.aio.AioRpcError as error:
                failure: Exception = self._failure(error)
                if isinstance(failure, RefusedError) and failure.reason not in (
                    Reason.WRONG_OFFSET, Reason.CORRUPT_CHUNK, Reason.DIGEST_MISMATCH,
                    Reason.UNKNOWN_UPLOAD,
                ):  # fmt: skip
                    raise failure from error
            except (CorruptChunkError, TransferError, TimeoutError) as error:
                failure = error
            if progress() > held:
                moved_at, held = time.monotonic(), progress()
                pause_s = 0.5
            if time.monotonic() - moved_at > self.patience_s:
                raise LinkError(
                    f"no byte moved to or from {self.address} for {self.patience_s:.0f} s: "
                    f"{failure}"
                ) from failure
            log.info("transfer interrupted: %s", failure, extra={"at_byte": held})
            self.resumes += 1
            await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))  # noqa: S311 - jitter
            pause_s = min(5.0, 2 * pause_s)

    def _failure(self, error: grpc.aio.AioRpcError) -> LinkError | RefusedError:
        reason, sentence = reason_of(error)
        if reason is not None and reason is not Reason.INTERNAL:
            return RefusedError(reason, sentence)
        if error.code() in RESUMABLE:
            return LinkError(
                f"the coordinator at {self.address} does not answer ({error.code().name.lower()}); "
                "check that it runs and that [coordinator] address is right"
            )
        return LinkError(f"the coordinator at {self.address} answered {sentence!r}")
