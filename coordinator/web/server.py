"""The web server in a thread of its own, with its own event loop: a page never delays a round."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import AsyncIterator

import uvicorn
from starlette.types import ASGIApp

from coordinator.config import RunConfig
from coordinator.web.access import token_hash
from coordinator.web.app import make_app
from coordinator.web.facts import FactReader
from profiles.errors import SketchfleetError
from profiles.listening import listen_on
from profiles.settings import host_of, is_loopback

log = logging.getLogger("sketchfleet.coordinator")

STOP_S = 2  # how long open requests may take to end


class WebError(SketchfleetError):
    """The dashboard cannot be served."""


class WebServer:
    """Serves an application from `start` to `stop`."""

    def __init__(self, app: ASGIApp, listen: str) -> None:
        self._listen = listen
        self._server = uvicorn.Server(
            uvicorn.Config(
                app, log_config=None, log_level="warning", access_log=False, lifespan="off",
                ws="none", http="h11", loop="asyncio", server_header=False, proxy_headers=False,
                limit_concurrency=64, timeout_graceful_shutdown=STOP_S,
            )
        )  # fmt: skip
        self._thread: threading.Thread | None = None

    def start(self) -> str:
        """Listens, and returns the address as `http://host:port`. Raises `WebError`."""
        try:
            listener = listen_on(self._listen)
        except OSError as error:
            raise WebError(
                f"[web] {self._listen} cannot be listened on ({error.strerror}); change [web] "
                'listen, or set it to "" to serve no dashboard'
            ) from error
        self._thread = threading.Thread(
            target=self._server.run, args=([listener],), name="web", daemon=True
        )
        self._thread.start()
        host = self._listen.rpartition(":")[0]
        return f"http://{host}:{listener.getsockname()[1]}"

    def stop(self) -> None:
        """Ends open requests and the thread; blocks for a few seconds at most."""
        if self._thread is not None:
            self._server.should_exit = True
            self._thread.join(STOP_S + 3)


@contextlib.asynccontextmanager
async def dashboard(config: RunConfig, read: FactReader) -> AsyncIterator[str]:
    """Serves what [web] asks for while the block runs; gives its address, "" where it is off.

    Another coordinator may hold the address that nobody chose: then the run goes on without a
    dashboard. Raises `WebError`, `AccessError`.
    """
    web = config.web
    if not web.listen:
        yield ""
        return
    token = None if web.token_file is None else token_hash(web.token_file)
    server = WebServer(make_app(read, token, config.server.state), web.listen)
    try:
        address = server.start()
    except WebError as error:
        if "listen" in web.model_fields_set:
            raise
        log.warning("no dashboard: %s", error)
        yield ""
        return
    if not is_loopback(host_of(web.listen)):
        log.warning("the dashboard's token and pages travel as plain text: put TLS in front")
    try:
        yield address
    finally:
        await asyncio.to_thread(server.stop)
