"""Where devices reach the coordinator: the fleet's listener, and beside it the one to join at.

Two servers, since a listener either demands certificates of all callers or of none. Certificates
are read anew for every handshake, so that a rotation needs no restart.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import grpc

from coordinator.authority import ISSUER_DAYS, Authority
from coordinator.bearer import BearerEnrolment, join_token
from coordinator.callers import (
    BearerCallers,
    Callers,
    FleetCallers,
    ForeignCallers,
    device_of_call,
)
from coordinator.engine import Engine
from coordinator.enrolment import Enrolment
from coordinator.joining_service import add_bearer_joining, add_joining, make_joining_server
from coordinator.server_config import PkiSection, ServerSection
from coordinator.service import add_services, make_server, refuse
from coordinator.store.members import Members
from coordinator.store.records import Records
from coordinator.throttle import Throttle
from profiles.errors import SketchfleetError

log = logging.getLogger("sketchfleet.coordinator")

AUTHORITY = "authority"  # its folder within the state folder
_Shown = tuple[tuple[bytes, bytes], bytes | None]  # (key, chain) and the roots that clients need


class ListenError(SketchfleetError):
    """An address cannot be listened on, or a certificate cannot be shown."""


@dataclass
class Listeners:
    """Servers that are bound but not started; `facts` for the log."""

    fleet: grpc.aio.Server
    port: int
    throttle: Throttle
    joining: grpc.aio.Server | None = None
    joining_port: int = 0
    members: Members | None = None
    enrolment: Enrolment | None = None
    callers: Callers | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    _watching: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begins to answer."""
        ports = {self.port, self.joining_port} - {0}
        self._watching = asyncio.create_task(self.throttle.watch(ports))
        await self.fleet.start()
        if self.joining is not None:
            await self.joining.start()

    async def stop(self, grace: float | None) -> None:
        """Answers no new call, and ends those under way after `grace` s."""
        if self.joining is not None:
            await self.joining.stop(0)
        await self.fleet.stop(grace)
        if self.members is not None:
            self.members.close()
        if self._watching is not None:
            self._watching.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watching


def open_listeners(
    server: ServerSection, pki: PkiSection | None, engine: Engine, records: Records
) -> Listeners:
    """Binds what [server] asks for. Raises `ListenError`, `AuthorityError`."""
    throttle = Throttle(device_of_call, refuse)
    if server.plain_text:
        return _plain_text(server, engine, records, throttle)
    if pki is not None:
        return _foreign(server, pki, engine, records, throttle)
    authority = Authority(server.state / AUTHORITY)
    _warn_of_end(authority)
    members = Members(records)
    enrolment = Enrolment(
        authority, members, lifetime_s=server.credential_days * 86400, approval=server.approval
    )
    callers = FleetCallers(enrolment)
    fleet, port = _bound(callers, engine, server.listen,
                         _authority_credentials(authority, throttle, mutual=True),
                         throttle)  # fmt: skip
    joining = make_joining_server(throttle)
    add_joining(joining, enrolment, port)
    place = server.enrolment_place
    joining_port = _bind(joining, place, _authority_credentials(authority, throttle, mutual=False))
    facts = {"address": _at(server.listen, port), "enrolment": _at(place, joining_port)}
    return Listeners(fleet, port, throttle, joining, joining_port, members, enrolment, callers,
                     facts)  # fmt: skip


def _warn_of_end(authority: Authority) -> None:
    left_days = (authority.issuer_ends_at - time.time()) / 86400
    if left_days < ISSUER_DAYS / 3:
        log.warning("the authority's issuer ends in %.0f days; replace it with "
                    "`sketchfleet-coordinator rotate-ca --issuer`", left_days)  # fmt: skip


def _plain_text(
    server: ServerSection, engine: Engine, records: Records, throttle: Throttle
) -> Listeners:
    token, token_file = join_token(server.state)
    enrolment = BearerEnrolment(records, token, server.credential_days * 86400)
    fleet = make_server(BearerCallers(enrolment), throttle)
    add_services(fleet, BearerCallers(enrolment), engine)
    add_bearer_joining(fleet, enrolment)
    port = _bind(fleet, server.listen, None)
    log.warning("plain text on loopback: for one machine only")
    facts = {"address": _at(server.listen, port), "join_token_file": str(token_file)}
    return Listeners(fleet, port, throttle, facts=facts)


def _foreign(
    server: ServerSection, pki: PkiSection, engine: Engine, records: Records, throttle: Throttle
) -> Listeners:
    members = Members(records)
    callers = ForeignCallers(members, pki.device_name, server.approval)
    fleet, port = _bound(callers, engine, server.listen, _pki_credentials(pki, throttle), throttle)
    facts = {"address": _at(server.listen, port)}
    return Listeners(fleet, port, throttle, members=members, facts=facts)


def _bound(
    callers: Callers, engine: Engine, place: str, credentials: grpc.ServerCredentials,
    throttle: Throttle,
) -> tuple[grpc.aio.Server, int]:  # fmt: skip
    fleet = make_server(callers, throttle)
    add_services(fleet, callers, engine)
    return fleet, _bind(fleet, place, credentials)


def _bind(server: grpc.aio.Server, place: str, credentials: grpc.ServerCredentials | None) -> int:
    try:
        if credentials is None:
            port = server.add_insecure_port(place)
        else:
            port = server.add_secure_port(place, credentials)
    except RuntimeError:
        port = 0
    if port == 0:
        raise ListenError(
            f"{place} cannot be listened on: the port is in use or the address is not this "
            "machine's; stop what listens there or change [server] listen"
        )
    return port


def _at(place: str, port: int) -> str:
    return f"{place.rpartition(':')[0]}:{port}"


def _authority_credentials(
    authority: Authority, throttle: Throttle, *, mutual: bool
) -> grpc.ServerCredentials:
    def shown() -> _Shown:
        return authority.server_pair(), authority.trust if mutual else None

    return _credentials(shown, throttle, mutual)


def _pki_credentials(pki: PkiSection, throttle: Throttle) -> grpc.ServerCredentials:
    def shown() -> _Shown:
        try:
            pair = pki.key.read_bytes(), pki.certificate.read_bytes()
            return pair, pki.ca.read_bytes()
        except OSError as error:
            raise ListenError(f"[pki] {error.filename} cannot be read: {error.strerror}") from error

    return _credentials(shown, throttle, mutual=True)


def _credentials(
    shown: Callable[[], _Shown], throttle: Throttle, mutual: bool
) -> grpc.ServerCredentials:
    latest = shown()  # what is wrong is told at the start; later on what was shown last stays

    def configuration() -> Any:
        pair, roots = latest
        return grpc.ssl_server_certificate_configuration([pair], root_certificates=roots)

    def fetch() -> Any:
        """Asked before every handshake; None where nothing has changed.

        Not for speed: gRPC swaps what it holds under handshakes that go on elsewhere, unlocked,
        and dies of it when connections come and go by the dozen (grpcio 1.85.1).
        """
        nonlocal latest
        throttle.connections.dialling.begun()
        before = latest
        try:
            latest = shown()
        except SketchfleetError as error:
            log.error("certificates cannot be read anew: %s", error)
        return None if latest == before else configuration()

    return grpc.dynamic_ssl_server_credentials(
        configuration(), fetch, require_client_authentication=mutual
    )
