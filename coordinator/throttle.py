"""Keeps calls within the limits before they are parsed: what gRPC hands over is bytes until then.

Stands behind the guard that knows devices (`callers`), before the services. What a call is allowed
is in `limits`, which connections we do without in `connections`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from coordinator.connections import Connections, Peer, network_of, peer_of
from coordinator.dialling import TELL_S
from coordinator.limits import HOLD_S, SILENT_S, Device, FloodError, Limits
from profiles.compat import timeout
from protos.contract import ContractError, Reason, RefusalError

log = logging.getLogger("sketchfleet.coordinator")

Refuse = Callable[[Any, Exception], Awaitable[None]]
SWEEP_S, LONGEST_SWEEP_S = 0.25, 2.0  # between two looks at the connections, by their number
AGAIN_S = 5.0  # after a look that failed
TURNED_AWAY = (Reason.BAD_CREDENTIAL, Reason.BAD_TOKEN, Reason.REVOKED, Reason.PENDING)


class Throttle(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """who: the device whose call is being answered; raises `LookupError` where the caller is a
    stranger, who counts by address. refuse: answers a call with an error.
    """

    def __init__(self, who: Callable[[], str], refuse: Refuse) -> None:
        self._who, self._refuse = who, refuse
        self.limits, self.connections = Limits(), Connections()
        self._doomed: set[Peer] = set()
        self._alarm = asyncio.Event()

    async def intercept_service(self, continuation: Any, details: Any) -> Any:
        """The handler of a call, throttled; of an unknown one too, for that is asked as fast."""
        handler = await continuation(details) or grpc.unary_unary_rpc_method_handler(_unknown)
        call = details.method.rpartition("/")[2]
        make: Any = grpc.unary_unary_rpc_method_handler
        if handler.request_streaming:
            make = grpc.stream_stream_rpc_method_handler
        elif handler.response_streaming:
            make = grpc.unary_stream_rpc_method_handler
        throttled = self._streamed if handler.response_streaming else self._single
        return make(throttled(handler, call), None, handler.response_serializer)

    async def turn_away(self, context: Any, error: Exception) -> None:
        """Refuses a call; who is refused again and again waits for it, then is not heard."""
        told = context.peer()
        try:
            if isinstance(error, RefusalError) and error.reason in TURNED_AWAY:
                await self.limits.refused(network_of(told))
        except FloodError as flood:
            error = flood
        if isinstance(error, FloodError) and (peer := peer_of(told)) is not None:
            self._doomed.add(peer)
            self._alarm.set()
            await asyncio.sleep(HOLD_S)  # no answer to spend time on: soon nobody asks
        await self._refuse(context, error)

    async def watch(self, ports: set[int]) -> None:
        """Sweeps connections until it is cancelled; at once where a call was a flood."""
        self.connections.ports = ports
        told, ended, took_s = float("-inf"), 0, 0.0
        loop = asyncio.get_running_loop()
        # Not one of the threads that may all wait for a slow disk.
        with ThreadPoolExecutor(1, "connections") as own_thread:
            while True:
                await asyncio.sleep(4 * took_s)  # a fifth of a processor at most
                with contextlib.suppress(TimeoutError):
                    async with timeout(min(max(SWEEP_S, 50 * took_s), LONGEST_SWEEP_S)):
                        await self._alarm.wait()
                self._alarm.clear()
                doomed, self._doomed = self._doomed, set()
                try:
                    swept = await loop.run_in_executor(own_thread, self.connections.sweep, doomed)
                except Exception:  # no descriptor left to list them with, for one; and go on
                    log.exception("connections were not looked at")
                    self._doomed |= doomed
                    await asyncio.sleep(AGAIN_S)
                    continue
                now, took_s = time.monotonic(), swept.took_s
                for device_id, crossed in swept.crossed.items():
                    if self.limits.crossed(device_id, crossed.received, crossed.sent):
                        self._doomed.update(self.connections.of(device_id))
                        self._alarm.set()
                ended += swept.hung_up
                if ended and now > told + TELL_S:
                    log.warning("connections hung up on", extra={"connections": ended})
                    told, ended = now, 0

    def _single(self, handler: Any, call: str) -> Any:
        async def answer(message: bytes, context: Any) -> Any:
            try:
                async with self._turn(context, call) as own:
                    own.noise.taken(len(message))
                    answered = await handler.unary_unary(_parsed(handler, message), context)
                    own.noise.given(_size(answered))
                    return answered
            except (RefusalError, ContractError) as error:
                await self.turn_away(context, error)
                raise

        return answer

    def _streamed(self, handler: Any, call: str) -> Any:
        inner: Any = handler.stream_stream or handler.unary_stream

        async def answer(given: Any, context: Any) -> AsyncIterator[Any]:
            try:
                async with self._turn(context, call) as own:
                    if handler.request_streaming:
                        request = self._read(handler, given, own)
                    else:
                        own.noise.taken(len(given))
                        request = _parsed(handler, given)
                    async for message in inner(request, context):
                        await self.limits.message(own)
                        own.noise.given(_size(message))
                        yield message
            except (RefusalError, ContractError) as error:
                await self.turn_away(context, error)

        return answer

    async def _read(self, handler: Any, messages: Any, own: Device) -> AsyncIterator[Any]:
        """The messages of a stream, no faster than they may come."""
        incoming = aiter(messages)
        while True:
            try:
                async with timeout(SILENT_S):
                    message = await anext(incoming, None)
            except TimeoutError:
                raise RefusalError(
                    Reason.SLOW_DOWN, f"nothing came for {SILENT_S:.0f} s; begin again", 1.0
                ) from None
            if message is None:
                return
            own.noise.taken(len(message))
            await self.limits.message(own)
            yield _parsed(handler, message)

    @contextlib.asynccontextmanager
    async def _turn(self, context: Any, call: str) -> AsyncIterator[Device]:
        told = context.peer()
        try:
            device_id = self._who()
        except LookupError:
            async with self.limits.turn("@" + network_of(told), call) as own:
                yield own
            return
        self.connections.used(device_id, told)
        try:
            async with self.limits.turn(device_id, call) as own:
                yield own
        except FloodError:
            self._doomed.update(self.connections.of(device_id))
            raise


def _size(message: Any) -> int:
    return len(message) if isinstance(message, bytes) else int(message.ByteSize())


async def _unknown(request: Any, context: Any) -> None:
    await context.abort(grpc.StatusCode.UNIMPLEMENTED, "there is no such call; update the agent")


def _parsed(handler: Any, message: bytes) -> Any:
    """Raises `ContractError`."""
    if handler.request_deserializer is None:
        return message
    try:
        return handler.request_deserializer(message)
    except DecodeError:
        raise ContractError("the call's message cannot be read; update the agent") from None
