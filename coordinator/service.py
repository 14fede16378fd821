"""The gRPC servicers: authenticate, validate, translate. No policy of their own.

Every refusal becomes a `google.rpc.Status` (`protos.status`); anything unexpected becomes INTERNAL
with a sentence and a traceback in the log, never on the wire.
"""

from __future__ import annotations

import functools
import logging
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

import grpc

from coordinator.engine import Engine, Task
from coordinator.enrolment import Enrolment
from coordinator.store.blobs import UnknownBlobError
from profiles.device import DeviceProfile
from protos.contract import (
    ContractError,
    LocalReport,
    Progress,
    Reason,
    RefusalError,
    from_message,
    to_message,
)
from protos.sketchfleet.v1 import fleet_pb2 as pb
from protos.sketchfleet.v1 import fleet_pb2_grpc as rpc
from protos.status import status_of
from protos.transfer import CHUNK_BYTES, MAX_MESSAGE_BYTES, ChunkSize, chunks, crc32

log = logging.getLogger("sketchfleet.coordinator")

MAX_WAIT_S = 50.0  # NATs and proxies cut idle calls at a minute and up
PROBE_BLOCK_BYTES = 16 * 1024
MAX_PROBE_BYTES = 4 << 20
R = TypeVar("R")
Handler = Callable[[Any, Any, Any], Awaitable[R]]

SERVER_OPTIONS = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_concurrent_streams", 64),
    ("grpc.keepalive_time_ms", 300_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 60_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.so_reuseport", 0),  # two coordinators on one port would share it silently
]

_KIND = {
    "wait": pb.NextTaskResponse.KIND_WAIT,
    "profile": pb.NextTaskResponse.KIND_PROFILE,
    "assignment": pb.NextTaskResponse.KIND_ASSIGNMENT,
    "finished": pb.NextTaskResponse.KIND_RUN_FINISHED,
}


async def _refuse(context: Any, error: Exception) -> None:
    if isinstance(error, RefusalError):
        await context.abort_with_status(status_of(error.reason, str(error)))
    if isinstance(error, ContractError):
        await context.abort_with_status(status_of(Reason.BAD_REQUEST, str(error)))
    if isinstance(error, UnknownBlobError):
        await context.abort_with_status(status_of(Reason.UNKNOWN_BLOB, str(error)))
    log.exception("call failed")
    await context.abort_with_status(
        status_of(Reason.INTERNAL, "the coordinator failed on this call; see its log")
    )


def answered(handler: Handler[R]) -> Handler[R]:
    """Turns the errors of a unary handler into statuses."""

    @functools.wraps(handler)
    async def wrapped(self: Any, request: Any, context: Any) -> R:
        try:
            return await handler(self, request, context)
        except Exception as error:  # the rim: everything becomes a status
            await _refuse(context, error)
            raise

    return wrapped


class _Authenticated:
    def __init__(self, enrolment: Enrolment) -> None:
        self._enrolment = enrolment

    def _device(self, context: Any) -> str:
        """The device that calls. Raises `RefusalError`."""
        metadata = dict(context.invocation_metadata() or ())
        scheme, _, credential = str(metadata.get("authorization", "")).partition(" ")
        if scheme != "Bearer":
            raise RefusalError(Reason.BAD_CREDENTIAL, "the call carries no credential; enrol first")
        return self._enrolment.authenticate(credential, time.time())


class EnrolmentService(rpc.EnrolmentServiceServicer):
    """Joining the fleet; the only calls without a credential."""

    def __init__(self, enrolment: Enrolment) -> None:
        self._enrolment = enrolment

    @answered
    async def Enroll(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Trades the join token for a credential."""
        device_id, credential, expires_in_s = self._enrolment.enroll(
            request.token, request.device_name, time.time()
        )
        log.info("device enrolled", extra={"device_id": device_id})
        return pb.EnrollResponse(
            device_id=device_id, credential=credential, expires_in_s=expires_in_s
        )


class FleetService(_Authenticated, rpc.FleetServiceServicer):
    """The life of an enrolled device."""

    def __init__(self, enrolment: Enrolment, engine: Engine) -> None:
        super().__init__(enrolment)
        self._engine = engine

    @answered
    async def Renew(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Replaces the caller's credential."""
        credential, expires_in_s = self._enrolment.renew(self._device(context), time.time())
        return pb.RenewResponse(credential=credential, expires_in_s=expires_in_s)

    @answered
    async def NextTask(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Long poll and heartbeat."""
        device_id = self._device(context)
        profile = None
        if request.HasField("profile"):
            profile = from_message(request.profile, DeviceProfile)
        wait_s = min(max(0.0, request.wait_s), MAX_WAIT_S)  # in this order NaN becomes 0
        progress = None
        if request.HasField("progress"):
            progress = from_message(request.progress, Progress)
        task = await self._engine.next_task(
            device_id, profile, request.working_on, wait_s, progress
        )
        return _task_message(task)

    @answered
    async def Report(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Takes what a local round measured."""
        self._engine.report(self._device(context), from_message(request.report, LocalReport))
        return pb.ReportResponse()

    async def Probe(  # noqa: N802
        self, request_iterator: AsyncIterator[Any], context: Any
    ) -> AsyncIterator[Any]:
        """Times the upload here, from the second message on, then sends as much as asked."""
        try:
            self._device(context)
        except RefusalError as error:
            await _refuse(context, error)
        started, timed, received, reply = 0.0, 0, 0, 0
        async for message in request_iterator:
            received += len(message.payload)
            if started == 0.0:
                started = time.perf_counter()
            else:
                timed += len(message.payload)
            if message.last or received > MAX_PROBE_BYTES:
                reply = min(message.reply_bytes, MAX_PROBE_BYTES)
                break
        yield pb.ProbeResponse(timed_bytes=timed, timed_s=time.perf_counter() - started)
        block = _noise(PROBE_BLOCK_BYTES)
        for offset in range(0, reply, len(block)):
            yield pb.ProbeResponse(payload=block[: reply - offset])


class TransferService(_Authenticated, rpc.TransferServiceServicer):
    """Bytes, both ways."""

    def __init__(self, enrolment: Enrolment, engine: Engine) -> None:
        super().__init__(enrolment)
        self._engine = engine

    async def Fetch(self, request: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802
        """Streams a blob from an offset."""
        try:
            self._device(context)
            path = self._engine.blob_path(request.digest)
        except (RefusalError, UnknownBlobError) as error:
            await _refuse(context, error)
            return
        for offset, data in chunks(path, max(0, request.offset), ChunkSize()):
            yield pb.FetchResponse(offset=offset, data=data, crc32=crc32(data))

    @answered
    async def BeginPush(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Declares an update."""
        upload_id, durable = self._engine.begin_push(
            self._device(context), request.assignment_id, request.digest, request.size_bytes
        )
        return pb.BeginPushResponse(
            upload_id=upload_id, durable_bytes=durable, chunk_bytes=CHUNK_BYTES
        )

    @answered
    async def PutChunk(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Takes bytes at an offset."""
        durable = self._engine.put_chunk(
            self._device(context), request.upload_id, request.offset, request.data, request.crc32
        )
        return pb.PutChunkResponse(durable_bytes=durable)

    @answered
    async def CommitPush(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Accepts an update."""
        receipt, outcome = await self._engine.commit_push(self._device(context), request.upload_id)
        return pb.CommitPushResponse(receipt=receipt, outcome=outcome)


def _task_message(task: Task) -> Any:
    message = pb.NextTaskResponse(
        kind=_KIND[task.kind], remaining_s=task.remaining_s, message=task.message
    )
    message.spec.CopyFrom(to_message(task.spec, pb.AdapterSpec))
    if task.assignment is not None:
        message.assignment.CopyFrom(to_message(task.assignment, pb.Assignment))
    if task.profile_request is not None:
        message.profile_request.CopyFrom(to_message(task.profile_request, pb.ProfileRequest))
    return message


@functools.cache
def _noise(size: int) -> bytes:
    """Bytes that no link compresses."""
    return os.urandom(size)


def add_services(server: Any, enrolment: Enrolment, engine: Engine) -> None:
    """Registers every service on a `grpc.aio` server."""
    rpc.add_EnrolmentServiceServicer_to_server(EnrolmentService(enrolment), server)
    rpc.add_FleetServiceServicer_to_server(FleetService(enrolment, engine), server)
    rpc.add_TransferServiceServicer_to_server(TransferService(enrolment, engine), server)


def make_server() -> grpc.aio.Server:
    """A server whose limits are those of the contract."""
    return grpc.aio.server(options=SERVER_OPTIONS)
