"""The gRPC client: dial, authenticate, fetch and push with resume, probe, back off.

Two channels, so that bulk bytes never delay a poll. gRPC's own retries are off on the transfer
channel: on client streams they lose messages (grpc/grpc#40283), so resuming is done here, by
offset. A transfer fails only after `patience_s` without a single new byte.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import grpc

from edge_agent.link_estimate import Direction, Stretch, Transfer
from edge_agent.link_probe import Echo, measure
from edge_agent.pace import Pace
from edge_agent.push_stream import STALL_S, PushStream
from profiles.compat import timeout
from profiles.device import DeviceProfile
from profiles.errors import ExitCode, SketchfleetError
from profiles.link import LinkProfile
from protos.chunk import read_chunk
from protos.contract import BlobRef, LocalReport, Progress, Reason, to_message
from protos.sketchfleet.v1 import fleet_pb2 as pb
from protos.sketchfleet.v1 import fleet_pb2_grpc as rpc
from protos.status import RESUMABLE, reason_of, retry_after_s
from protos.transfer import (
    CHUNK_BYTES,
    CHUNK_S,
    FIRST_CHUNK_BYTES,
    LEAST_CHUNK_BYTES,
    MAX_MESSAGE_BYTES,
    ChunkSize,
    CorruptChunkError,
    PartFile,
    TransferError,
    sha256_of,
)

log = logging.getLogger("sketchfleet.agent")

CONTROL_S = 15.0
# Without a byte, a download goes on over a new connection, for TCP tries an old one ever more
# rarely: after an outage of 20 s in 20 s more. Nothing is sent twice by that. Doubled while it is
# in vain, up to `STALL_S`. An update's connection is kept that long: it holds what was sent.
SILENT_S = 8.0
LEAVE_S = 3600.0  # for transfers over a connection whose certificate was renewed meanwhile
LONGEST_AWAY_S = 300.0  # that a coordinator may ask for
LONGEST_ROUND_TRIP_S = 1.0  # of links that are used: a geostationary one's and its queue
# What the owner's budget is charged beyond payloads (assumed): headers of HTTP/2, TCP and IP.
CALL_BYTES, HEADER_SHARE = 400, 0.03
T = TypeVar("T")

_OPTIONS = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 120_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.min_reconnect_backoff_ms", 500),
    ("grpc.max_reconnect_backoff_ms", 5_000),
    ("grpc.enable_retries", 0),
    ("grpc.use_local_subchannel_pool", 1),  # or channels with equal options share a connection
]
# Also TCP's. Calls are small and repeated: a new connection is there sooner after an outage than
# one that tries again ever more rarely.
_CONTROL_OPTIONS = [("grpc.keepalive_timeout_ms", 10_000)]
_BULK_OPTIONS = [
    ("grpc.http2.max_frame_size", MAX_MESSAGE_BYTES),  # a chunk in one frame, not in 32
    # A connection outlives an outage, so that what it holds need not be sent again. A ping's answer
    # waits behind all that: at gRPC's minute for it, slow downloads ended after every outage.
    ("grpc.keepalive_timeout_ms", 60_000),
    ("grpc.http2.ping_timeout_ms", 300_000),
]


class LinkError(SketchfleetError):
    """The coordinator cannot be reached."""

    exit_code: ClassVar[ExitCode] = ExitCode.LATER


class BusyError(LinkError):
    """The coordinator asks to be left alone for `retry_s`; nothing is lost."""

    def __init__(self, sentence: str, retry_s: float) -> None:
        super().__init__(sentence)
        self.retry_s = min(LONGEST_AWAY_S, max(1.0, retry_s))


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
    `resumes`, `fetched_bytes`, `moved_bytes` (both ways, headers estimated) and `resent_bytes` (of
    files, both ways: at most so many crossed the link again) count from the start. `on_transfer`
    hears of every stretch of bytes that was timed. `pace` holds transfers back. Without
    `credentials` plain text is spoken. `valid_until`: when the certificate ends, Unix s;
    `on_trust` hears of roots (PEM) other than those of `trust_digest`.
    """

    def __init__(
        self, address: str, pace: Pace | None = None,
        credentials: grpc.ChannelCredentials | None = None,
    ) -> None:  # fmt: skip
        self.address = address
        self._credentials = credentials
        self._leaving: set[asyncio.Task[None]] = set()
        self.valid_until = math.inf
        self.trust_digest = b""
        self.on_trust: Callable[[bytes], None] = lambda trust: None
        self.pace = pace or Pace()
        self.patience_s = STALL_S
        self.credential = ""
        self._rates_bps: dict[Direction, float] = {}  # as last seen
        self.resumes = 0
        self.resent_bytes = 0
        self.fetched_bytes = 0
        self.moved_bytes = 0
        self.on_transfer: Callable[[Transfer], None] = lambda transfer: None
        self._dial_control()
        self._dial_bulk()

    def _channel(self, options: list[tuple[str, int]]) -> grpc.aio.Channel:
        if self._credentials is None:
            return grpc.aio.insecure_channel(self.address, options=options)
        return grpc.aio.secure_channel(self.address, self._credentials, options=options)

    def _dial_control(self) -> None:
        self._control = self._channel([*_OPTIONS, *_CONTROL_OPTIONS])
        self._enrolment = rpc.EnrolmentServiceStub(self._control)
        self._fleet = rpc.FleetServiceStub(self._control)

    def _dial_bulk(self) -> None:
        self._bulk = self._channel([*_OPTIONS, *_BULK_OPTIONS])
        # Not through the generated stub: chunks are (de)serialised by `protos.chunk`.
        service = f"/{pb.DESCRIPTOR.services_by_name['TransferService'].full_name}/"
        self._fetch: Any = self._bulk.unary_stream(
            f"{service}Fetch", pb.FetchRequest.SerializeToString, None
        )
        self._push: Any = self._bulk.stream_stream(
            f"{service}Push", None, pb.PushResponse.FromString
        )
        self._probe = rpc.FleetServiceStub(self._bulk)

    async def _redial_bulk(self) -> None:
        await self._bulk.close(None)
        self._dial_bulk()

    async def secure(self, credentials: grpc.ChannelCredentials) -> None:
        """Shows and trusts other certificates from the next call on; calls under way end first."""
        self._credentials = credentials
        for old in (self._control, self._bulk):
            leaving = asyncio.create_task(old.close(LEAVE_S))
            self._leaving.add(leaving)
            leaving.add_done_callback(self._leaving.discard)
        self._dial_control()
        self._dial_bulk()

    async def close(self) -> None:
        """Hangs up."""
        for leaving in tuple(self._leaving):
            leaving.cancel()
        await self._control.close(None)
        await self._bulk.close(None)

    @property
    def _metadata(self) -> tuple[tuple[str, str], ...]:
        if self._credentials is not None:
            return ()
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

    async def renew_certificate(self, signing_request: bytes) -> Any:
        """The RenewResponse for a fresh key. Raises `RefusedError`, `LinkError`."""
        request = pb.RenewRequest(signing_request=signing_request)
        return await self._persist(
            lambda: self._fleet.Renew(request, timeout=CONTROL_S, metadata=self._metadata),
            CONTROL_S,
        )

    async def next_task(
        self, profile: DeviceProfile | None, working_on: str, wait_s: float, patience_s: float,
        progress: Progress | None = None, mirror: str | None = None,
    ) -> Any:  # fmt: skip
        """One long poll, or a heartbeat with `progress`; `mirror`: the digest of the one held, ""
        for none, None if none is ever kept. Raises `RefusedError`, `LinkError`.
        """
        request = pb.NextTaskRequest(
            wait_s=wait_s, working_on=working_on, mirror=mirror, trust_digest=self.trust_digest
        )
        if profile is not None:
            request.profile.CopyFrom(to_message(profile, pb.DeviceProfile))
        if progress is not None:
            request.progress.CopyFrom(to_message(progress, pb.Progress))
        answer = await self._persist(
            lambda: self._fleet.NextTask(
                request, timeout=wait_s + CONTROL_S, metadata=self._metadata
            ),
            patience_s,
        )
        if answer.trust_bundle:
            self.on_trust(answer.trust_bundle)
        return answer

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
        reached = part.length  # of what came, an earlier life's included
        silent_s = SILENT_S

        async def attempt() -> None:
            nonlocal reached, silent_s
            self.resent_bytes += reached - part.length  # its digest was wrong
            reached = part.length
            self._count(0)
            known = "down" in self._rates_bps or self.pace.bps is not None
            stream = self._fetch(
                pb.FetchRequest(
                    digest=blob.digest, offset=reached,
                    chunk_bytes=self._chunk_size("down").bytes if known else 0,
                ),
                metadata=self._metadata,
            )  # fmt: skip
            stretch, latest = Stretch("down"), 0
            try:
                while part.length < blob.size_bytes:
                    async with timeout(silent_s):
                        message = await stream.read()
                    if message is grpc.aio.EOF:  # type: ignore[attr-defined]
                        break
                    if (chunk := read_chunk(message)) is None:
                        raise TransferError("the coordinator sent what is no chunk")
                    latest, silent_s = len(chunk.data), SILENT_S
                    # Hashed and written here: a hop to a thread takes longer.
                    part.write(chunk.offset, chunk.data, chunk.crc32)
                    reached = part.length
                    self.fetched_bytes += latest
                    self._count(latest, calls=0)
                    stretch.reached(reached)
                    await self.pace.take("down", latest)
                latest = 0
            except TimeoutError:
                silent_s = min(STALL_S, 2 * silent_s)
                await self._redial_bulk()
                raise
            finally:
                # Of the chunk that was on its way when the stream broke, any part may have come.
                self.resent_bytes += min(latest, blob.size_bytes - part.length)
                stream.cancel()
                self._tell(stretch)
            # Not synced: after a power cut a file that is not whole is fetched again (`_holds`).
            await asyncio.to_thread(part.finish, blob.digest, target, durable=False)

        try:
            await self._resume(attempt, lambda: part.length)
        finally:
            part.close()
        return target

    async def push(self, assignment_id: str, digest: str, path: Path) -> tuple[str, str]:
        """Pushes an update; returns (receipt, outcome).

        Raises `RefusedError`, or `LinkError` when nothing is acknowledged for `patience_s`.
        """
        update = pb.PushedUpdate(
            assignment_id=assignment_id, digest=digest, size_bytes=path.stat().st_size
        )
        held = sent = 0

        async def attempt() -> tuple[str, str]:
            nonlocal held, sent
            self._count(0)
            stream = PushStream(
                self._push, self._metadata, self._chunk_size("up"), self.pace,
                lambda size_bytes: self._count(size_bytes, calls=0),
            )  # fmt: skip
            stretch = Stretch("up")

            def advance(durable: int) -> None:
                nonlocal held
                held = max(held, durable)
                stretch.reached(durable)

            try:
                held = await stream.begin(update)
                # Handed on and not held there: what was on its way may have come, at most what the
                # link carries in a round trip; the rest waited in buffers on this side.
                on_way = self._rates_bps.get("up", math.inf) / 8 * LONGEST_ROUND_TRIP_S
                self.resent_bytes += int(min(max(0, sent - held), on_way))
                sent = held
                if 0 < held < update.size_bytes:
                    log.info("push resumed", extra={"at_byte": held, "of_bytes": update.size_bytes})
                return await stream.send(path, held, advance)
            except TimeoutError:
                await self._redial_bulk()
                raise
            finally:
                stream.cancel()
                sent = max(sent, stream.sent)
                self._tell(stretch)

        return await self._resume(attempt, lambda: held)

    def _chunk_size(self, direction: Direction) -> ChunkSize:
        """Chunks to begin with: as the link carried last, and as it may carry."""
        first = self._rates_bps.get(direction, 8 * FIRST_CHUNK_BYTES / CHUNK_S)
        allowed = self.pace.bps
        first = first if allowed is None else min(first, allowed)
        most = CHUNK_BYTES if allowed is None else int(allowed * CHUNK_S / 8)
        return ChunkSize(min(CHUNK_BYTES, max(LEAST_CHUNK_BYTES, most)), int(first * CHUNK_S / 8))

    def _count(self, payload_bytes: int, calls: int = 1) -> None:
        self.moved_bytes += calls * CALL_BYTES + payload_bytes + int(HEADER_SHARE * payload_bytes)

    def _tell(self, stretch: Stretch) -> None:
        if (transfer := stretch.transfer) is not None:
            bps = 8 * transfer.size_bytes / max(transfer.duration_s, 1e-6)
            self._rates_bps[transfer.direction] = bps
            self.on_transfer(transfer)

    async def probe(self, metered: bool) -> LinkProfile:
        """Measures the channel both ways with little data (`link_probe`)."""
        found = await measure(self.echo, metered)
        self._rates_bps = {"up": found.up_bps, "down": found.down_bps}
        return found

    async def ping(self) -> float:
        """Round trip of the smallest call, s. Raises `RefusedError` when it is not let in."""
        begun = time.perf_counter()
        await self.echo(1, 0)
        return time.perf_counter() - begun

    async def echo(self, up_bytes: int, down_bytes: int) -> Echo:
        """So many bytes up, then down, each way timed by its receiver. Raises `RefusedError`,
        `LinkError`.
        """
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
                if isinstance(failure, BusyError):
                    pause_s = 2 * failure.retry_s
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
                if isinstance(failure, BusyError):
                    log.info("%s", failure, extra={"at_byte": progress()})
                    await asyncio.sleep(failure.retry_s * random.uniform(1.0, 1.5))  # noqa: S311
                    moved_at = time.monotonic()
                    continue
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
        if reason in (Reason.SLOW_DOWN, Reason.NO_ROOM):
            return BusyError(f"{self.address} asks to wait: {sentence}", retry_after_s(error))
        if reason is not None and reason is not Reason.INTERNAL:
            return RefusedError(reason, sentence)
        if time.time() > self.valid_until:  # gRPC tells no more than that it was hung up on
            return RefusedError(Reason.BAD_CREDENTIAL, "this device's certificate has expired")
        if error.code() in RESUMABLE:
            return LinkError(
                f"the coordinator at {self.address} does not answer ({error.code().name.lower()}); "
                "check that it runs and that [coordinator] address is right"
            )
        return LinkError(f"the coordinator at {self.address} answered {sentence!r}")
