"""A device's place in a plain-text fleet, which is for trials: a join token and a credential.

Knows the join token's file and the credential's; the calls themselves are `link`'s.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import time
from collections import deque
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

from edge_agent.config import AgentConfig
from edge_agent.link import Link, LinkError, RefusedError
from edge_agent.membership import MembershipError
from protos.contract import Reason
from protos.transfer import write_durably

log = logging.getLogger("sketchfleet.agent")

FIRST_CONTACT_S = 30.0
RENEW_AT = 2 / 3  # of a credential's life
TUG_OF_WAR = (3, 600.0)  # enrolling so often within so many seconds means two share a name
T = TypeVar("T")


class BearerMembership:
    """Makes calls as this device, whatever becomes of its credential."""

    def __init__(self, config: AgentConfig, link: Link, version: str) -> None:
        self._config, self._link, self._version = config, link, version
        self._kept = config.state.folder / "credential.json"
        self._renew_at = math.inf
        self._enrolled_at: deque[float] = deque(maxlen=TUG_OF_WAR[0])

    async def sign_on(self) -> None:
        """Uses the kept credential, or enrols. Raises `MembershipError`, `LinkError`."""
        if self._kept.is_file():
            try:
                plain = json.loads(self._kept.read_text())
                self._link.credential = str(plain["credential"])
                self._renew_at = float(plain["renew_at"])
            except (ValueError, KeyError, TypeError):
                log.warning("credential file unreadable; enrolling again")
            else:
                return
        await self._enroll(FIRST_CONTACT_S)

    async def call(self, make: Callable[[], Awaitable[T]]) -> T:
        """The answer to a call; enrols again, once, when the credential is not known any more."""
        if time.time() > self._renew_at:
            with contextlib.suppress(LinkError):  # the call below waits for the coordinator
                await self._renew()
        try:
            return await make()
        except RefusedError as error:
            if error.reason is not Reason.BAD_CREDENTIAL:
                raise
        log.warning("credential refused; enrolling again")
        await self._enroll(math.inf)
        return await make()

    async def _renew(self) -> None:
        try:
            self._keep(await self._link.renew())
        except RefusedError as error:
            if error.reason is not Reason.BAD_CREDENTIAL:
                raise
            await self._enroll(math.inf)

    async def _enroll(self, patience_s: float) -> None:
        name = self._config.device.name
        often, within_s = TUG_OF_WAR
        if len(self._enrolled_at) == often and time.time() - self._enrolled_at[0] < within_s:
            raise MembershipError(
                f"this device had to enrol {often} times in {within_s / 60:.0f} minutes; another "
                f"one uses the name {name!r}, choose a [device] name of its own for each"
            )
        token = read_token(self._config.coordinator.token_file)
        self._keep(await self._link.enroll(token, name, self._version, patience_s))
        self._enrolled_at.append(time.time())

    def _keep(self, valid_s: float) -> None:
        self._renew_at = time.time() + RENEW_AT * valid_s
        plain = {"credential": self._link.credential, "renew_at": self._renew_at}
        write_durably(self._kept, json.dumps(plain).encode(), mode=0o600)


def read_token(path: Path) -> str:
    """The join token in a file. Raises `MembershipError`."""
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "not text"
        raise MembershipError(
            f"join token {path} cannot be read ({why}); copy it from the coordinator's state "
            "folder and set [coordinator] token_file"
        ) from error
