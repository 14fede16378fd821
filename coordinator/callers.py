"""Who calls, and whether that device is still let in: asked for every message of every call.

`Guard` stands before all services, so that none can forget it. A device is told by the certificate
of its TLS connection; over plain text, which is for trials on one machine, by a bearer credential.
"""

from __future__ import annotations

import functools
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

import grpc

from coordinator.bearer import BearerEnrolment
from coordinator.certificates import CertificateError, Holder, holder_of
from coordinator.enrolment import Enrolment, check_name
from coordinator.server_config import NameRule
from coordinator.store.members import Members
from protos.contract import Reason, RefusalError
from protos.sketchfleet.v1 import fleet_pb2 as pb

Refuse = Callable[[Any, Exception], Awaitable[None]]
_OPEN = f"/{pb.DESCRIPTOR.services_by_name['EnrolmentService'].full_name}/"
_device: ContextVar[str] = ContextVar("device")


@dataclass(frozen=True)
class Caller:
    """A device as it showed itself; of a certificate the fingerprint, and when it ends (Unix s)."""

    device_id: str
    fingerprint: str
    expires_at: float


class Callers(Protocol):
    """A way to know devices."""

    def identify(self, context: Any) -> Caller:
        """Who calls, by its own showing. Raises `RefusalError`."""

    def admit(self, caller: Caller) -> None:
        """Raises `RefusalError` where that device is not let in now."""

    def renew(self, device_id: str, request: Any) -> Any:
        """The RenewResponse to a RenewRequest. Raises `RefusalError`."""

    def news(self, trust_digest: bytes) -> bytes:
        """Roots to trust (PEM) for a device that trusts others; empty for none."""


def device_of_call() -> str:
    """The device whose call is being answered; the guard let it in."""
    return _device.get()


class BearerCallers:
    """Devices by the credential that they send along."""

    def __init__(self, enrolment: BearerEnrolment) -> None:
        self._enrolment = enrolment

    def identify(self, context: Any) -> Caller:
        """Reads the metadata and compares with the hash that was kept."""
        metadata = dict(context.invocation_metadata() or ())
        scheme, _, credential = str(metadata.get("authorization", "")).partition(" ")
        if scheme != "Bearer":
            raise RefusalError(Reason.BAD_CREDENTIAL, "the call carries no credential; enrol first")
        return Caller(self._enrolment.authenticate(credential, time.time()), "", 0.0)

    def admit(self, caller: Caller) -> None:
        """Nobody is shut out of a plain-text fleet."""

    def renew(self, device_id: str, request: Any) -> Any:
        """A fresh credential."""
        credential, expires_in_s = self._enrolment.renew(device_id, time.time())
        return pb.RenewResponse(credential=credential, expires_in_s=expires_in_s)

    def news(self, trust_digest: bytes) -> bytes:
        """Nothing is trusted."""
        return b""


class _CertificateCallers:
    """Devices by the certificate that TLS has verified up to a root."""

    def __init__(
        self, members: Members, rule: NameRule, trust_domain: str, clock: Callable[[], float]
    ) -> None:
        self._members, self._clock = members, clock

        @functools.lru_cache(maxsize=4096)  # one for each device, not for each call
        def read(certificate: bytes) -> Holder:
            return holder_of(certificate, rule, trust_domain)

        self._read = read

    def identify(self, context: Any) -> Caller:
        """Reads the certificate of the connection."""
        facts = context.auth_context()
        if facts.get("ssl_tls_version") != [b"TLSv1.3"]:
            raise RefusalError(Reason.BAD_CREDENTIAL, "only TLS 1.3 is spoken here")
        try:
            holder = self._read(next(iter(facts.get("x509_pem_cert", ())), b""))
        except CertificateError as error:
            sentence = f"{error}; enrol with a join token"
            raise RefusalError(Reason.BAD_CREDENTIAL, sentence) from error
        return Caller(holder.device_id, holder.fingerprint, holder.expires_at)

    def _refuse(self, caller: Caller, state: str | None) -> None:
        """Raises `RefusalError` unless the state is active and the certificate has not expired."""
        if caller.expires_at < self._clock():
            raise RefusalError(Reason.BAD_CREDENTIAL, "this device's certificate has expired")
        if state == "pending":
            raise RefusalError(
                Reason.PENDING,
                f"the operator has not approved {caller.device_id} yet "
                f"(`sketchfleet-coordinator approve {caller.device_id}`)",
            )
        if state != "active":
            raise RefusalError(
                Reason.REVOKED,
                f"this certificate of {caller.device_id} was revoked or is none of this fleet's; "
                "ask the operator for a new join token",
            )


class FleetCallers(_CertificateCallers):
    """Devices of the fleet's own authority: only by certificates that are on record."""

    def __init__(self, enrolment: Enrolment, clock: Callable[[], float] = time.time) -> None:
        self._enrolment, self._authority = enrolment, enrolment.authority
        super().__init__(enrolment.members, "spiffe", self._authority.trust_domain, clock)

    def admit(self, caller: Caller) -> None:
        """Looks the certificate up."""
        self._refuse(caller, self._members.standing(caller.device_id, caller.fingerprint))

    def renew(self, device_id: str, request: Any) -> Any:
        """A certificate for the key of the signing request."""
        issued = self._enrolment.renew(device_id, request.signing_request)
        return pb.RenewResponse(
            certificate=issued.certificate, expires_in_s=issued.expires_in_s,
            trust_bundle=self._authority.trust,
        )  # fmt: skip

    def news(self, trust_digest: bytes) -> bytes:
        """The roots, where they have changed."""
        self._authority.refresh()
        return b"" if trust_digest == self._authority.trust_digest else self._authority.trust


class ForeignCallers(_CertificateCallers):
    """Devices of the owner's own PKI: members from their first call on."""

    def __init__(
        self, members: Members, rule: NameRule, approval: bool,
        clock: Callable[[], float] = time.time,
    ) -> None:  # fmt: skip
        super().__init__(members, rule, "", clock)
        self._approval = approval

    def admit(self, caller: Caller) -> None:
        """Looks the name up."""
        state = self._members.standing(caller.device_id, None)
        if state is None:
            check_name(caller.device_id)
            state = "pending" if self._approval else "active"
            self._members.put_member(caller.device_id, state, "", "", self._clock())
        self._refuse(caller, state)

    def renew(self, device_id: str, request: Any) -> Any:
        """Not here."""
        raise RefusalError(Reason.BAD_REQUEST, "certificates of this fleet come from its own PKI")

    def news(self, trust_digest: bytes) -> bytes:
        """The owner's business."""
        return b""


class Guard(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """Lets no message of a call pass unless its device is let in at that moment.

    Only the services for joining are open. refuse: answers a call with an error.
    """

    def __init__(self, callers: Callers, refuse: Refuse) -> None:
        self._callers, self._refuse = callers, refuse

    async def intercept_service(self, continuation: Any, details: Any) -> Any:
        """The handler of a call, guarded."""
        handler = await continuation(details)
        if handler is None or details.method.startswith(_OPEN):
            return handler
        inner: Any = (handler.unary_unary or handler.unary_stream or handler.stream_unary
                      or handler.stream_stream)  # fmt: skip
        if handler.response_streaming:
            guarded: Any = self._streamed(inner, handler.request_streaming)
        else:
            guarded = self._single(inner, handler.request_streaming)
        make = {
            (False, False): grpc.unary_unary_rpc_method_handler,
            (False, True): grpc.unary_stream_rpc_method_handler,
            (True, False): grpc.stream_unary_rpc_method_handler,
            (True, True): grpc.stream_stream_rpc_method_handler,
        }[handler.request_streaming, handler.response_streaming]
        return make(guarded, handler.request_deserializer, handler.response_serializer)

    def _single(self, inner: Any, streams: bool) -> Any:
        async def answer(request: Any, context: Any) -> Any:
            caller = await self._begin(context)
            incoming = self._checked(request, caller) if streams else request
            answered = await inner(incoming, context)
            try:
                self._callers.admit(caller)  # a poll is held open for long
            except RefusalError as error:
                await self._refuse(context, error)
            return answered

        return answer

    def _streamed(self, inner: Any, streams: bool) -> Any:
        async def answer(request: Any, context: Any) -> AsyncIterator[Any]:
            caller = await self._begin(context)
            incoming = self._checked(request, caller) if streams else request
            try:
                async for message in inner(incoming, context):
                    self._callers.admit(caller)
                    yield message
            except RefusalError as error:
                await self._refuse(context, error)

        return answer

    async def _begin(self, context: Any) -> Caller:
        try:
            caller = self._callers.identify(context)
            self._callers.admit(caller)
        except Exception as error:
            await self._refuse(context, error)  # also of a disk that cannot be read
            raise
        _device.set(caller.device_id)
        return caller

    async def _checked(self, requests: AsyncIterator[Any], caller: Caller) -> AsyncIterator[Any]:
        async for message in requests:
            self._callers.admit(caller)
            yield message
