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

from coordinator.arriving import Arriving
from coordinator.engine import Engine, Task
from coordinator.enrolment import Enrolment
from coordinator.store.blobs import UnknownBlobError
from profiles.device import DeviceProfile
from protos.chunk import Chunk, messages_of_file, read_chunk
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
from protos.transfer import (
    CHUNK_BYTES,
    FIRST_CHUNK_BYTES,
    LEAST_CHUNK_BYTES,
    MAX_MESSAGE_BYTES,
    ChunkSize,
)

log = logging.getLogger("sketchfleet.coordinator")

MAX_WAIT_S = 50.0  # NATs and proxies cut idle calls at a minute and up
PROBE_BLOCK_BYTES = 16 * 1024
MAX_PROBE_BYTES = 4 << 20
R = TypeVar("R")
Handler = Callable[[Any, Any, Any], Awaitable[R]]

SERVER_OPTIONS = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.http2.max_frame_size", MAX_MESSAGE_BYTES),  # a chunk in one frame, not in 32
    ("grpc.max_concurrent_streams", 64),
    ("grpc.keepalive_time_ms", 300_000),
    ("grpc.keepalive_timeout_ms", 60_000),  # TCP's too: outlives a link's outage
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
        mirror = request.mirror if request.HasField("mirror") else None
        task = await self._engine.next_task(
            device_id, profile, request.working_on, wait_s, progress, mirror
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


class TransferService(_Authenticated):
    """Bytes, both ways. Registers itself: chunks are (de)serialised by `protos.chunk`."""

    def __init__(self, enrolment: Enrolment, engine: Engine) -> None:
        super().__init__(enrolment)
        self._engine = engine

    @property
    def handlers(self) -> Any:
        """What to register on a server."""
        methods = {
            "Fetch": grpc.unary_stream_rpc_method_handler(self.Fetch, pb.FetchRequest.FromString),
            "Push": grpc.stream_stream_rpc_method_handler(
                self.Push, _push_request, pb.PushResponse.SerializeToString
            ),
        }
        service = pb.DESCRIPTOR.services_by_name["TransferService"].full_name
        return grpc.method_handlers_generic_handler(service, methods)

    async def Fetch(self, request: Any, context: Any) -> AsyncIterator[bytes]:  # noqa: N802
        """Streams a blob from an offset, as serialised messages."""
        try:
            self._device(context)
            path = self._engine.blob_path(request.digest)
        except (RefusalError, UnknownBlobError) as error:
            await _refuse(context, error)
            return
        # The device knows its link: on the way a proxy may swallow chunks as fast as they come.
        wanted = request.chunk_bytes
        most, first = (2 * wanted, wanted) if wanted > 0 else (CHUNK_BYTES, FIRST_CHUNK_BYTES)
        size = ChunkSize(max(LEAST_CHUNK_BYTES, min(CHUNK_BYTES, most)), first)
        for message in messages_of_file(path, max(0, request.offset), size):
            yield message

    async def Push(  # noqa: N802
        self, request_iterator: AsyncIterator[Any], context: Any
    ) -> AsyncIterator[Any]:
        """Takes an update: declared, chunk by chunk, accepted."""
        arriving: Arriving | None = None
        try:
            device_id = self._device(context)
            first = await anext(aiter(request_iterator), None)
            if not isinstance(first, pb.PushRequest) or not first.HasField("update"):
                raise ContractError("a push begins with the update it brings; restart the agent")
            update = first.update
            upload_id, durable = await self._engine.begin_push(
                device_id, update.assignment_id, update.digest, update.size_bytes
            )
            yield pb.PushResponse(durable_bytes=durable, chunk_bytes=CHUNK_BYTES)

            def put(chunk: Chunk) -> int:
                return self._engine.put_chunk(
                    device_id, upload_id, chunk.offset, chunk.data, chunk.crc32
                )

            arriving = Arriving(put, durable)
            async for chunk in request_iterator:
                if not isinstance(chunk, Chunk):
                    raise ContractError("a push brings one update; begin another for the next")
                await arriving.take(chunk)
                if chunk.acknowledge:
                    yield pb.PushResponse(durable_bytes=await arriving.written())
            await arriving.written()
            receipt, outcome = await self._engine.commit_push(device_id, upload_id)
            yield pb.PushResponse(receipt=receipt, outcome=outcome)
        except Exception as error:  # noqa: BLE001 - the rim: everything becomes a status
            await _refuse(context, error)
        finally:
            if arriving is not None:
                arriving.leave()


def _push_request(message: bytes) -> Any:
    """A `Chunk`, or the request that declares the update."""
    return read_chunk(message) or pb.PushRequest.FromString(message)


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
    server.add_generic_rpc_handlers((TransferService(enrolment, engine).handlers,))


def make_server() -> grpc.aio.Server:
    """A server whose limits are those of the contract."""
    return grpc.aio.server(options=SERVER_OPTIONS)
