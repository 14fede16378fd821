"""The pages as an HTTP application: addresses, templates, headers. Only GET; nothing changes.

Handlers are plain functions, which the web server runs on threads: a slow database delays a page
and never a round.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from coordinator import charts
from coordinator.web.access import Guard
from coordinator.web.facts import FactReader, Facts
from coordinator.web.health import health
from coordinator.web.metrics import CONTENT_TYPE, Exporter
from coordinator.web.pages.compression import compression_view
from coordinator.web.pages.device import device_view
from coordinator.web.pages.fairness import fairness_view
from coordinator.web.pages.fleet import fleet_view
from coordinator.web.pages.parts import RunHead, run_head
from coordinator.web.pages.rounds import round_view, rounds_view
from coordinator.web.pages.screening import screening_view

HERE = Path(__file__).parent
PAGES = (
    ("/", "Fleet"), ("/rounds", "Rounds"), ("/fairness", "Fairness"),
    ("/compression", "Compression"), ("/screening", "Screening"),
)  # fmt: skip
HEADERS = (
    # No script or style but our own files; nothing from anywhere else.
    (b"content-security-policy", b"default-src 'none'; script-src 'self'; style-src 'self'; "
     b"img-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; "
     b"frame-ancestors 'none'"),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
)  # fmt: skip


class _SecurityHeaders:
    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *HEADERS]
            await send(message)

        await self._app(scope, receive, with_headers)


class _Site:
    """Renders views through the templates."""

    def __init__(self, read: FactReader) -> None:
        self._read = read
        self._templates = jinja2.Environment(
            loader=jinja2.FileSystemLoader(HERE / "templates"), autoescape=True,
            trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined,
        )  # fmt: skip
        self._templates.filters["svg"] = Markup  # of `coordinator.charts`, which escapes its texts

    def page(self, template: str, view: Callable[[Facts, Request], Any]) -> Any:
        """A handler that shows what `view` makes of the facts; None of it is a 404."""

        def answer(request: Request) -> Response:
            facts = self._read()
            shown = view(facts, request)
            if shown is None:
                raise HTTPException(404)
            # Not `asdict`, which would turn the values within into dictionaries too.
            values = {f.name: getattr(shown, f.name) for f in dataclasses.fields(shown)}
            return self._render(request, template, run_head(facts), **values)

        return answer

    def problem(self, request: Request, error: Exception) -> Response:
        """A page that says what is wrong."""
        status = error.status_code if isinstance(error, HTTPException) else 500
        said = {404: "There is no such page, device or round here.",
                405: "This dashboard only shows; it takes no commands."}  # fmt: skip
        sentence = said.get(status, "The page could not be made; the coordinator's log says why.")
        return self._render(request, "problem.html", None, status, sentence=sentence)

    def _render(
        self, request: Request, template: str, head: RunHead | None, status: int = 200,
        **values: Any,
    ) -> Response:  # fmt: skip
        html = self._templates.get_template(template).render(
            run=head, pages=PAGES, path=request.url.path, **values
        )
        # The script asks again with this tag and gets an empty 304 while nothing has changed.
        tag = f'"{hashlib.sha256(html.encode()).hexdigest()[:16]}"'
        headers = {"ETag": tag, "Cache-Control": "no-store" if status != 200 else "no-cache"}
        if status == 200 and request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        return HTMLResponse(html, status, headers)


def make_app(
    read: FactReader, token: bytes | None = None, state: Path | None = None
) -> ASGIApp:  # fmt: skip
    """The application over one run.

    token: SHA-256 of what visitors must show, None asks nobody; state: the folder whose disk is
    watched.
    """
    site, exporter = _Site(read), Exporter(read, state)

    def metrics(_: Request) -> Response:
        return Response(exporter.text(), headers={"Content-Type": CONTENT_TYPE})

    def healthz(_: Request) -> Response:
        state = health(read)
        return JSONResponse(state.plain(), 200 if state.ready else 503)

    def chart_style(_: Request) -> Response:
        return Response(charts.CSS, media_type="text/css",
                        headers={"Cache-Control": "no-cache"})  # fmt: skip

    get = ["GET"]
    routes = [
        Route("/", site.page("fleet.html", lambda f, _: fleet_view(f)), methods=get),
        Route("/devices/{device:path}", site.page(
            "device.html", lambda f, r: device_view(f, r.path_params["device"])), methods=get),
        Route("/rounds", site.page("rounds.html", lambda f, _: rounds_view(f)), methods=get),
        Route("/rounds/{number:int}", site.page(
            "round.html", lambda f, r: round_view(f, r.path_params["number"])), methods=get),
        Route("/fairness", site.page("fairness.html", lambda f, _: fairness_view(f)), methods=get),
        Route("/compression", site.page(
            "compression.html", lambda f, _: compression_view(f)), methods=get),
        Route("/screening", site.page(
            "screening.html", lambda f, _: screening_view(f)), methods=get),
        Route("/metrics", metrics, methods=get),
        Route("/healthz", healthz, methods=get),
        Route("/static/charts.css", chart_style, methods=get),
        Mount("/static", StaticFiles(directory=HERE / "static")),
    ]  # fmt: skip
    app = Starlette(
        routes=routes, exception_handlers={HTTPException: site.problem, Exception: site.problem}
    )
    return _SecurityHeaders(Guard(GZipMiddleware(app, minimum_size=1000), token))
