"""Serves completions over HTTP until told to stop: engine, newest adapter, application, signals."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from edge_agent.config import AgentConfig
from edge_agent.inference import Engine
from edge_agent.serving_adapter import NewestAdapter
from edge_agent.serving_settings import ServeSection
from profiles.errors import MissingExtraError, SketchfleetError
from profiles.listening import listen_on
from profiles.service_manager import ServiceManager

try:
    import uvicorn
    from uvicorn.protocols.http.h11_impl import H11Protocol

    from edge_agent.serving_access import Access
    from edge_agent.serving_app import make_app
    from edge_agent.serving_work import Desk
except ImportError as missing:
    raise MissingExtraError(str(missing.name), "serve") from missing

log = logging.getLogger("sketchfleet.agent")

HEAD_S = 15.0  # for the head of a request to arrive
IDLE_S = 60  # that a connection is kept for the next request
STOP_S = 10  # for requests under way to end
MOST_CONNECTIONS = 256
MOST_HEAD_BYTES = 32 << 10


class ServeError(SketchfleetError):
    """The endpoint cannot be served."""


def serve(config: AgentConfig) -> int:
    """Serves until SIGTERM or Ctrl-C; returns the exit code. Raises `SketchfleetError`."""
    settings = config.serve
    if not settings.model:
        raise ServeError(
            "no model to serve; write one with sketchfleet-agent export-base and name its folder "
            "in [serve] model or --model"
        )
    access = Access.of(settings)
    listener = _listener(settings.listen)
    engine = Engine.open(Path(settings.model), threads=settings.threads)
    whose = None if settings.adapter == "newest" else settings.adapter
    with tempfile.TemporaryDirectory(prefix="sketchfleet-serve-") as folder:
        newest = NewestAdapter(engine, config.state.folder, Path(folder), whose)
        newest.refresh()
        watching = threading.Thread(target=newest.watch, name="adapter", daemon=True)
        watching.start()
        try:
            return asyncio.run(_serve(settings, access, listener, engine, newest))
        finally:
            newest.end()
            watching.join()
            engine.close()


async def _serve(
    settings: ServeSection, access: Access, listener: socket.socket, engine: Engine,
    newest: NewestAdapter,
) -> int:  # fmt: skip
    desk = Desk(engine, settings.at_once, settings.waiting)

    def health() -> dict[str, Any]:
        now = newest.serving(engine.adapter)
        told = {"status": "ok", "adapter": now.whose, "rounds": now.round,
                "answering": desk.answering, "waiting": desk.queued}  # fmt: skip
        return told | ({"problem": newest.problem} if newest.problem else {})

    app = make_app(desk, newest.serving, access, most_tokens=settings.most_tokens, health=health,
                   origins=settings.origins)  # fmt: skip
    server = _Server(
        uvicorn.Config(
            app, log_config=None, log_level="warning", access_log=False, lifespan="off", ws="none",
            http=_Protocol, loop="asyncio", server_header=False, proxy_headers=False,
            limit_concurrency=MOST_CONNECTIONS, timeout_keep_alive=IDLE_S,
            timeout_graceful_shutdown=STOP_S, h11_max_incomplete_event_size=MOST_HEAD_BYTES,
        )
    )  # fmt: skip
    manager = ServiceManager()
    loop = asyncio.get_running_loop()
    came: list[signal.Signals] = []

    def stop(which: signal.Signals) -> None:
        server.force_exit = bool(came)  # the second one means it
        server.should_exit = True
        came.append(which)

    for which in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(which, stop, which)
    address = f"http://{settings.listen.rpartition(':')[0]}:{listener.getsockname()[1]}/v1"
    now = newest.serving(engine.adapter)
    log.info("serving completions", extra={"address": address, "adapter": now.fingerprint})
    manager.ready(f"serving at {address}")
    pulse = asyncio.create_task(
        manager.keep_alive(lambda: True, lambda: f"{desk.answering} requests being answered")
    )
    try:
        await server.serve([listener])
    finally:
        manager.stopping("stopping")
        pulse.cancel()
        desk.close()
    if came and came[0] is signal.SIGINT:
        raise KeyboardInterrupt
    return 0


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """None: `_serve` has its own handlers, which do not raise the signal once more."""
        yield


class _Protocol(H11Protocol):
    """Gives up connections on which no request arrives; uvicorn waits for ever."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._due = self.loop.call_later(HEAD_S, self._give_up)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._due.cancel()
        self._due = self.loop.call_later(IDLE_S + HEAD_S, self._give_up)

    def connection_lost(self, exc: Exception | None) -> None:
        self._due.cancel()
        super().connection_lost(exc)

    def _give_up(self) -> None:
        if self.cycle is None or self.cycle.response_complete:
            self.transport.abort()


def _listener(listen: str) -> socket.socket:
    try:
        return listen_on(listen)
    except OSError as error:
        raise ServeError(
            f"{listen} cannot be listened on ({error.strerror}); stop what listens there or choose "
            "another [serve] listen"
        ) from error
