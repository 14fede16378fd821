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

from edge_agent.link_estimate import Stretch, Transfer
from edge_agent.link_probe import Echo, measure
from profiles.device import DeviceProfile
from profiles.errors import SketchfleetError
from profiles.link import LinkProfile
from protos.contract import BlobRef, LocalReport, Progress, Reason, to_message
from protos.sketchfleet.v1 import fleet_pb2 as pb
from protos.sketchfleet.v1 import fleet_pb2_grpc as rpc
from protos.status import RESUMABLE, reason_of
from protos.transfer import (
    CHUNK_BYTES,
    MAX_MESSAGE_BYTES,
    WINDOW_CHUNKS,
    ChunkSize,
    CorruptChunkError,
    PartFile,
    TransferError,
    crc32,
    sha256_of,
)

log = logging.getLogger("sketchfleet.agent")

CONTROL_S = 15.0
STALL_S = 60.0  # without a byte, an attempt is given up and begun again where it stands
# What the owner's budget is charged beyond payloads (assumed): headers of HTTP/2, TCP and IP.
CALL_BYTES, HEADER_SHARE = 400, 0.03
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
    `resumes`, `fetched_bytes` and `moved_bytes` (both ways, headers estimated) count from the
    start. `on_transfer` hears of every stretch of bytes that was timed.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        self.patience_s = STALL_S
        self._chunk = ChunkSize()
        self.credential = ""
        self.resumes = 0
        self.fetched_bytes = 0
        self.moved_bytes = 0
        self.on_transfer: Callable[[Transfer], None] = lambda transfer: None
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
        self, profile: DeviceProfile | None, working_on: str, wait_s: float, patience_s: float,
        progress: Progress | None = None,
    ) -> Any:  # fmt: skip
        """One long poll, or a heartbeat with `progress`. Raises `RefusedError`, `LinkError`."""
        request = pb.NextTaskRequest(wait_s=wait_s, working_on=working_on)
        if profile is not None:
            request.profile.CopyFrom(to_message(profile, pb.DeviceProfile))
        if progress is not None:
            request.progress.CopyFrom(to_message(progress, pb.Progress))
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
            self._count(0)
            stream = self._transfer.Fetch(
                pb.FetchRequest(digest=blob.digest, offset=part.length), metadata=self._metadata
            )
            stretch = Stretch("down")
            try:
                while part.length < blob.size_bytes:
                    chunk = await asyncio.wait_for(stream.read(), timeout=STALL_S)
                    if chunk is grpc.aio.EOF:  # type: ignore[attr-defined]
                        break
                    part.write(chunk.offset, chunk.data, chunk.crc32)
                    self.fetched_bytes += len(chunk.data)
                    self._count(len(chunk.data), calls=0)
                    stretch.reached(part.length)
            finally:
                self._tell(stretch)
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
        held, stretch = 0, Stretch("up")

        async def attempt() -> tuple[str, str]:
            nonlocal held, stretch
            stretch = Stretch("up")
            self._count(0, calls=2)
            begun = await self._transfer.BeginPush(
                pb.BeginPushRequest(assignment_id=assignment_id, digest=digest, size_bytes=size),
                timeout=CONTROL_S, metadata=self._metadata,
            )  # fmt: skip
            held = begun.durable_bytes
            if 0 < held < size:
                log.info("push resumed", extra={"at_byte": held, "of_bytes": size})
            if held < size:
                self._chunk.most_bytes = min(begun.chunk_bytes, CHUNK_BYTES)
                try:
                    await self._put(path, begun.upload_id, held, advance)
                finally:
                    self._tell(stretch)
            done = await self._transfer.CommitPush(
                pb.CommitPushRequest(upload_id=begun.upload_id),
                timeout=STALL_S, metadata=self._metadata,
            )  # fmt: skip
            return str(done.receipt), str(done.outcome)

        def advance(durable: int) -> None:
            nonlocal held
            held = max(held, durable)
            stretch.reached(held)  # acknowledged: the first call pays for what the others do not

        return await self._resume(attempt, lambda: held)

    async def _put(
        self, path: Path, upload_id: str, offset: int, advance: Callable[[int], None]
    ) -> None:
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
                self._count(len(data))
                begun = time.monotonic()
                answer = await self._transfer.PutChunk(
                    request, timeout=2 * STALL_S, metadata=self._metadata
                )
                advance(answer.durable_bytes)
                self._chunk.took(time.monotonic() - begun)
            finally:
                window.release()

        try:
            with path.open("rb") as stream:
                stream.seek(offset)
                while True:
                    await window.acquire()
                    if not (data := stream.read(min(self._chunk.bytes, self._chunk.most_bytes))):
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

    def _count(self, payload_bytes: int, calls: int = 1) -> None:
        self.moved_bytes += calls * CALL_BYTES + payload_bytes + int(HEADER_SHARE * payload_bytes)

    def _tell(self, stretch: Stretch) -> None:
        if (transfer := stretch.transfer) is not None:
            self.on_transfer(transfer)

    async def probe(self, metered: bool) -> LinkProfile:
        """Measures the channel both ways with little data (`link_probe`)."""
        return await measure(self._probe_once, metered)

    async def ping(self) -> float:
        """Round trip of the smallest call, s. Raises `RefusedError` when it is not let in."""
        begun = time.perf_counter()
        await self._probe_once(1, 0)
        return time.perf_counter() - begun

    async def _probe_once(self, up_bytes: int, down_bytes: int) -> Echo:
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
        self._count(up_bytes + down_bytes)
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
        return Echo(up_bps, down_bps, max(up.timed_s if up is not None else 0.0, down_s))

    async def _persist(self, call: Callable[[], Awaitable[T]], patience_s: float) -> T:
        """Repeats an idempotent call with jittered back-off until it is answered."""
        until = time.monotonic() + patience_s
        pause_s = 0.2
        while True:
            self._count(0)
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
