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
from coordinator.callers import Callers, Guard, device_of_call
from coordinator.connections import room_for_connections
from coordinator.engine import Engine, Task
from coordinator.plausible import require_plausible, require_plausible_report
from coordinator.store.blobs import UnknownBlobError
from coordinator.throttle import Throttle
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
    ("grpc.compression_enabled_algorithms_bitset", 1),  # none: bytes are counted as they cross
    ("grpc.max_concurrent_streams", 32),
    ("grpc.server_handshake_timeout_ms", 20_000),
    ("grpc.max_connection_idle_ms", 600_000),
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


async def refuse(context: Any, error: Exception) -> None:
    """Ends a call with the status of an error."""
    if isinstance(error, RefusalError):
        await context.abort_with_status(status_of(error.reason, str(error), error.retry_s))
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
            await refuse(context, error)
            raise

    return wrapped


class FleetService(rpc.FleetServiceServicer):
    """The life of an enrolled device."""

    def __init__(self, callers: Callers, engine: Engine) -> None:
        self._callers, self._engine = callers, engine

    @answered
    async def Renew(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Replaces the caller's certificate or credential."""
        return self._callers.renew(device_of_call(), request)

    @answered
    async def NextTask(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Long poll and heartbeat."""
        device_id = device_of_call()
        if request.working_on:
            _refuse_foreign(request.working_on, device_id)
        profile = None
        if request.HasField("profile"):
            profile = from_message(request.profile, DeviceProfile)
            require_plausible(profile)
        wait_s = min(max(0.0, request.wait_s), MAX_WAIT_S)  # in this order NaN becomes 0
        progress = None
        if request.HasField("progress"):
            progress = from_message(request.progress, Progress)
        mirror = request.mirror if request.HasField("mirror") else None
        task = await self._engine.next_task(
            device_id, profile, request.working_on, wait_s, progress, mirror
        )
        answer = _task_message(task)
        if request.trust_digest:
            answer.trust_bundle = self._callers.news(request.trust_digest)
        return answer

    @answered
    async def Report(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Takes what a local round measured."""
        report = from_message(request.report, LocalReport)
        require_plausible_report(report)
        self._engine.report(device_of_call(), report)
        return pb.ReportResponse()

    async def Probe(  # noqa: N802
        self, request_iterator: AsyncIterator[Any], context: Any
    ) -> AsyncIterator[Any]:
        """Times the upload here, from the second message on, then sends as much as asked."""
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


class TransferService:
    """Bytes, both ways. Registers itself: chunks are (de)serialised by `protos.chunk`."""

    def __init__(self, engine: Engine) -> None:
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
            path = self._engine.blob_path(device_of_call(), request.digest)
            if request.offset <= 0:
                await self._engine.suspect(device_of_call(), request.digest)
        except Exception as error:  # noqa: BLE001 - the rim: everything becomes a status
            await refuse(context, error)
            return
        # The device knows its link: on the way a proxy may swallow chunks as fast as they come.
        wanted = request.chunk_bytes
        most, first = (2 * wanted, wanted) if wanted > 0 else (CHUNK_BYTES, FIRST_CHUNK_BYTES)
        size = ChunkSize(max(LEAST_CHUNK_BYTES, min(CHUNK_BYTES, most)), first)
        device_id, size_bytes = device_of_call(), path.stat().st_size
        for message in messages_of_file(path, max(0, request.offset), size):
            self._engine.traffic.take(device_id, request.digest, size_bytes, len(message))
            yield message

    async def Push(  # noqa: N802
        self, request_iterator: AsyncIterator[Any], context: Any
    ) -> AsyncIterator[Any]:
        """Takes an update: declared, chunk by chunk, accepted."""
        arriving: Arriving | None = None
        try:
            device_id = device_of_call()
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
            await refuse(context, error)
        finally:
            if arriving is not None:
                arriving.leave()


def _refuse_foreign(assignment_id: str, device_id: str) -> None:
    """Ids are run.round.device (`coordinator.issuing`). Raises `RefusalError`."""
    if assignment_id.split(".", 2)[2:] != [device_id]:
        raise RefusalError(
            Reason.UNKNOWN_ASSIGNMENT,
            f"assignment {assignment_id[:80]!r} is not this device's; restart the agent",
        )


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


def add_services(server: Any, callers: Callers, engine: Engine) -> None:
    """Registers what enrolled devices call on a server that was made with `callers`."""
    rpc.add_FleetServiceServicer_to_server(FleetService(callers, engine), server)
    server.add_generic_rpc_handlers((TransferService(engine).handlers,))


def make_server(callers: Callers, throttle: Throttle) -> grpc.aio.Server:
    """A server whose limits are those of the contract, and that these callers alone may use."""
    options = [*SERVER_OPTIONS, ("grpc.max_allowed_incoming_connections", room_for_connections())]
    interceptors = [Guard(callers, throttle.turn_away), throttle]
    return grpc.aio.server(interceptors=interceptors, options=options)
