"""Who may ask: a token, and where there is none, this machine's own programs alone.

A page in a browser on this machine is not one of them: it can be made to send requests to
127.0.0.1 under a name of its own (DNS rebinding), so the Host header must name this machine.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from edge_agent.serving_requests import RequestError
from edge_agent.serving_settings import ServeSection
from profiles.errors import SketchfleetError
from profiles.settings import is_loopback

OPEN_PATHS = ("/healthz",)  # to whoever watches the service
LEAST_TOKEN_CHARACTERS = 16
PORT = re.compile(r":[0-9]*$")  # at the end of a Host header; "[::1]" has none


class AccessError(SketchfleetError):
    """The token cannot be used."""


@dataclass(frozen=True)
class Access:
    """token_hash: SHA-256 of the token; None asks for none."""

    token_hash: bytes | None = None

    @classmethod
    def of(cls, settings: ServeSection) -> Access:
        """What [serve] says. Raises `AccessError`."""
        token, where = settings.token.get_secret_value(), "[serve] token"
        if settings.token_file is not None:
            where = str(settings.token_file)
            try:
                token = settings.token_file.read_text().strip()
            except (OSError, UnicodeDecodeError) as error:
                raise AccessError(f"{where} cannot be read as a token") from error
        elif not token:
            return cls()
        if len(token) < LEAST_TOKEN_CHARACTERS or not token.isascii() or " " in token:
            raise AccessError(
                f"{where} must hold at least {LEAST_TOKEN_CHARACTERS} letters and digits; make one "
                "with: openssl rand -hex 32"
            )
        return cls(hashlib.sha256(token.encode()).digest())

    def check(self, headers: Headers) -> None:
        """Raises `RequestError` for a caller who may not ask."""
        if self.token_hash is None:
            host = PORT.sub("", headers.get("host", "")).strip("[]").lower()
            if not is_loopback(host):
                raise RequestError(
                    "this server answers for this machine alone; ask it as 127.0.0.1 or localhost, "
                    "or set a token",
                    status=403, kind="permission_error", code="wrong_host",
                )  # fmt: skip
            return
        word, _, given = headers.get("authorization", "").partition(" ")
        found = hashlib.sha256(given.strip().encode("latin-1")).digest()
        if word.lower() != "bearer" or not hmac.compare_digest(found, self.token_hash):
            raise RequestError(
                "the token is missing or wrong; send Authorization: Bearer TOKEN",
                status=401, kind="authentication_error", code="invalid_api_key",
            )  # fmt: skip

    def guard(self, app: ASGIApp, refuse: Callable[[RequestError], Response]) -> ASGIApp:
        """The application behind this check."""

        async def guarded(scope: Scope, receive: Receive, send: Send) -> None:
            answer: Any = app
            if scope["type"] == "http" and scope["path"] not in OPEN_PATHS:
                try:
                    self.check(Headers(scope=scope))
                except RequestError as error:
                    answer = refuse(error)
            await answer(scope, receive, send)

        return guarded
