"""The endpoint as an HTTP application: /v1/completions, /v1/models, /healthz.

OpenAI's completions API as its own client speaks it. Knows HTTP and JSON; what a request may hold
is `serving_requests`'s, in what order they are answered `serving_work`'s.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import threading
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from edge_agent.serving_access import Access
from edge_agent.serving_adapter import Serving
from edge_agent.serving_requests import MODEL, Completion, RequestError, read_completion, read_json
from edge_agent.serving_work import Begun, Desk
from profiles.compat import wait_for

log = logging.getLogger("sketchfleet.agent")

MOST_BODY_BYTES = 1 << 20
BODY_S = 30.0  # for a request's body to arrive
STALL_S = 60.0  # after which a client that reads nothing is given up

ServingOf = Callable[[str], Serving]
"""What the adapter of this name is."""


class GoneError(Exception):
    """The client left; there is nobody to answer."""


def make_app(
    desk: Desk, serving: ServingOf, access: Access, *, most_tokens: int,
    health: Callable[[], dict[str, Any]], origins: Sequence[str] = (),
) -> ASGIApp:  # fmt: skip
    """The application. health: what /healthz tells."""
    started = int(time.time())

    async def models(request: Request) -> Response:
        card = {"id": MODEL, "object": "model", "created": started, "owned_by": "sketchfleet"}
        return JSONResponse({"object": "list", "data": [card]})

    async def model(request: Request) -> Response:
        if request.path_params["name"] != MODEL:
            raise HTTPException(404, f'there is no such model here; use "{MODEL}"')
        card = {"id": MODEL, "object": "model", "created": started, "owned_by": "sketchfleet"}
        return JSONResponse(card)

    async def healthz(request: Request) -> Response:
        return JSONResponse(health())

    routes = [
        Route("/v1/completions", _Completions(desk, serving, most_tokens), methods=["POST"]),
        Route("/v1/models", models, methods=["GET"]),
        Route("/v1/models/{name:path}", model, methods=["GET"]),
        Route("/healthz", healthz, methods=["GET"]),
    ]
    asked = [Middleware(CORSMiddleware, allow_origins=list(origins), allow_methods=["GET", "POST"],
                        allow_headers=["authorization", "content-type"])]  # fmt: skip
    return Starlette(
        routes=routes,
        middleware=[*(asked if origins else ()), Middleware(access.guard, refuse=refuse)],
        exception_handlers={HTTPException: _told, Exception: _broken},
    )


def refuse(error: RequestError) -> Response:
    """An error as OpenAI's clients read it."""
    headers = {"Retry-After": "1"} if error.status == 429 else {}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error.body, error.status, headers)


async def _told(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    said = {404: f"{request.url.path} is not served here; there are POST /v1/completions, GET "
            "/v1/models and GET /healthz",
            405: f"{request.method} is not for {request.url.path}"}  # fmt: skip
    sentence = said.get(error.status_code, error.detail)
    return refuse(RequestError(sentence, status=error.status_code))


async def _broken(request: Request, error: Exception) -> Response:
    return refuse(_defect())


def _defect() -> RequestError:
    return RequestError("the request failed here; the server's log says why", status=500,
                        kind="server_error")  # fmt: skip


class _Completions:
    """POST /v1/completions."""

    def __init__(self, desk: Desk, serving: ServingOf, most_tokens: int) -> None:
        self._desk, self._serving, self._most_tokens = desk, serving, most_tokens

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Reads, waits for its turn, writes; stops as soon as the client leaves."""
        begun_sending = False

        async def tell(message: Message) -> None:
            nonlocal begun_sending
            begun_sending = True
            try:
                await wait_for(send(message), STALL_S)
            except (TimeoutError, OSError) as error:
                raise GoneError from error

        try:
            plain = read_json(await _body(Request(scope), receive))
            wanted = read_completion(plain, self._desk.engine.info, self._most_tokens)
            await self._answer(wanted, scope, receive, tell)
        except GoneError:
            log.debug("a client left before its answer was complete")
        except RequestError as error:
            await refuse(error)(scope, receive, send)
        except Exception:
            log.exception("a completion failed")
            if not begun_sending:
                await refuse(_defect())(scope, receive, send)
            else:
                raise  # the server closes the connection: the answer is not complete

    async def _answer(self, wanted: Completion, scope: Scope, receive: Receive, send: Send) -> None:
        cancel = threading.Event()
        writing = asyncio.ensure_future(self._write(wanted, cancel, scope, receive, send))
        leaving = asyncio.ensure_future(_left(receive))
        try:
            await asyncio.wait((writing, leaving), return_when=asyncio.FIRST_COMPLETED)
            if not writing.done():
                raise GoneError
            await writing
        finally:
            cancel.set()
            for task in (writing, leaving):
                task.cancel()
            await asyncio.gather(writing, leaving, return_exceptions=True)

    async def _write(
        self, wanted: Completion, cancel: threading.Event, scope: Scope, receive: Receive,
        send: Send,
    ) -> None:  # fmt: skip
        async with self._desk.place(cancel):
            begun = await self._desk.begin(wanted, cancel)
            serving = self._serving(begun[0].adapter)
            head = {
                "id": f"cmpl-{uuid.uuid4().hex}",
                "object": "text_completion",
                "created": int(time.time()),
                "model": MODEL,
                "system_fingerprint": serving.fingerprint,
            }
            headers = _headers(serving, head["id"])
            if not wanted.stream:
                answer = await self._whole(begun, cancel)
                await JSONResponse(head | answer, 200, headers)(scope, receive, send)
                return
            headers |= {"content-type": "text/event-stream; charset=utf-8",
                        "cache-control": "no-cache", "x-accel-buffering": "no"}  # fmt: skip
            raw = [(name.encode(), value.encode()) for name, value in headers.items()]
            await send({"type": "http.response.start", "status": 200, "headers": raw})
            async with contextlib.aclosing(self._events(begun, wanted, cancel)) as events:
                async for event in events:
                    await _event(send, json.dumps(head | event, ensure_ascii=False))
            await _event(send, "[DONE]")
            await send({"type": "http.response.body", "body": b""})

    async def _whole(self, begun: Sequence[Begun], cancel: threading.Event) -> dict[str, Any]:
        choices, tokens = [], 0
        for one in begun:
            text, finish = one.echo, None
            async with contextlib.aclosing(self._desk.write(one, cancel)) as pieces:
                async for piece in pieces:
                    text += piece.text
                    tokens += piece.token is not None
                    finish = piece.finish
            choices.append(_choice(one.index, text, finish))
        return {"choices": choices, "usage": _usage(begun, tokens)}

    async def _events(
        self, begun: Sequence[Begun], wanted: Completion, cancel: threading.Event
    ) -> AsyncGenerator[dict[str, Any], None]:
        """The chunks of a stream; with usage at the end where that is asked for."""
        usage: dict[str, Any] = {"usage": None} if wanted.include_usage else {}
        tokens = 0
        for one in begun:
            if one.echo:
                yield {"choices": [_choice(one.index, one.echo, None)], **usage}
            async with contextlib.aclosing(self._desk.write(one, cancel)) as pieces:
                async for piece in pieces:
                    tokens += piece.token is not None
                    if piece.text or piece.finish:
                        yield {"choices": [_choice(one.index, piece.text, piece.finish)], **usage}
        if wanted.include_usage:
            yield {"choices": [], "usage": _usage(begun, tokens)}


async def _event(send: Send, data: str) -> None:
    await send({"type": "http.response.body", "body": f"data: {data}\n\n".encode(),
                "more_body": True})  # fmt: skip


async def _body(request: Request, receive: Receive) -> bytes:
    """The body. Raises `RequestError` on one too large or too slow, `GoneError`."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # which pages elsewhere cannot send unasked
        raise RequestError("send the request as Content-Type: application/json", status=415)
    large = RequestError(
        f"the body is larger than {MOST_BODY_BYTES:,} bytes; send less of the file", status=413
    )
    try:
        if int(request.headers.get("content-length", 0)) > MOST_BODY_BYTES:
            raise large
    except ValueError as error:
        raise RequestError("Content-Length is no number") from error
    data = bytearray()

    async def read() -> None:
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise GoneError
            data.extend(message.get("body", b""))
            if len(data) > MOST_BODY_BYTES:
                raise large
            more = message.get("more_body", False)

    try:
        await wait_for(read(), BODY_S)
    except TimeoutError as error:
        raise RequestError(f"the body took longer than {BODY_S:.0f} s", status=408) from error
    return bytes(data)


async def _left(receive: Receive) -> None:
    """Returns when the client is gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


def _headers(serving: Serving, request_id: Any) -> dict[str, str]:
    headers = {"x-request-id": str(request_id), "x-sketchfleet-adapter": serving.whose}
    if serving.run:
        headers |= {"x-sketchfleet-run": serving.run, "x-sketchfleet-rounds": str(serving.round)}
    return headers


def _choice(index: int, text: str, finish: str | None) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": None, "finish_reason": finish}


def _usage(begun: Sequence[Begun], tokens: int) -> dict[str, int]:
    prompt = sum(one.prompt_tokens for one in begun if one.counts_prompt)
    return {"prompt_tokens": prompt, "completion_tokens": tokens, "total_tokens": prompt + tokens}
