"""Who may look: everyone on this machine, or whoever shows the token.

The token is read from a file and kept as a hash only. Browsers send it as a password (the user name
is ignored), Prometheus as a bearer token.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
from pathlib import Path

from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from profiles.errors import SketchfleetError
from profiles.settings import is_loopback

LEAST_TOKEN = 16  # characters
OPEN_PATHS = ("/healthz",)  # tells nobody more than that somebody is at home


class AccessError(SketchfleetError):
    """The token cannot be used."""


def token_hash(path: Path) -> bytes:
    """SHA-256 of the token in a file, less white space around it. Raises `AccessError`."""
    try:
        token = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise AccessError(f"[web] token_file {path} cannot be read: {error}") from error
    if len(token) < LEAST_TOKEN:
        raise AccessError(
            f"[web] token_file {path} holds {len(token)} characters; use {LEAST_TOKEN} or more, "
            "for example from: openssl rand -hex 24"
        )
    return hashlib.sha256(token.encode()).digest()


class Guard:
    """Lets requests through that carry the token; without one, those addressed to this machine.

    The latter so that a page on the internet whose name resolves to 127.0.0.1 (DNS rebinding)
    cannot read the dashboard through a visitor's browser.
    """

    def __init__(self, app: ASGIApp, token: bytes | None) -> None:
        self._app, self._token = app, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers in place of the application where the request may not pass."""
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS:
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        if self._token is None:
            host = headers.get("host", "").rpartition("@")[2]
            name = host[: host.rfind("]") + 1] if host.startswith("[") else host.partition(":")[0]
            if is_loopback(name.strip("[]")):
                await self._app(scope, receive, send)
                return
            answer = PlainTextResponse(
                "This dashboard answers to names of this machine only; "
                "set [web] token_file to reach it by others.\n", 421,
            )  # fmt: skip
        elif self._shown(headers.get("authorization", "")):
            await self._app(scope, receive, send)
            return
        else:
            answer = PlainTextResponse(
                "This dashboard wants its token: as a password, or as a bearer token.\n", 401,
                {"WWW-Authenticate": 'Basic realm="sketchfleet", charset="UTF-8"'},
            )  # fmt: skip
        await answer(scope, receive, send)

    def _shown(self, authorization: str) -> bool:
        scheme, _, value = authorization.partition(" ")
        if scheme.lower() == "basic":
            try:
                value = base64.b64decode(value, validate=True).decode().partition(":")[2]
            except (binascii.Error, UnicodeDecodeError):
                return False
        elif scheme.lower() != "bearer":
            return False
        digest = hashlib.sha256(value.encode()).digest()
        return self._token is not None and hmac.compare_digest(digest, self._token)
