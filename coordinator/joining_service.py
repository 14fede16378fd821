"""The gRPC servicers for joining: the only calls that need no certificate or credential."""

from __future__ import annotations

import logging
import time
from typing import Any

import grpc
from pydantic import SecretStr

from coordinator.bearer import BearerEnrolment
from coordinator.connections import MOST_JOINING, network_of
from coordinator.enrolment import Enrolment, Issued
from coordinator.service import SERVER_OPTIONS, answered
from coordinator.throttle import Throttle
from protos.contract import Reason, RefusalError
from protos.sketchfleet.v1 import fleet_pb2 as pb
from protos.sketchfleet.v1 import fleet_pb2_grpc as rpc

log = logging.getLogger("sketchfleet.coordinator")

MOST_REQUEST_BYTES = 64 * 1024
MOST_CALLS = 1024  # of anybody, at once, waiting ones included; of an address: `limits`


class JoiningService(rpc.EnrolmentServiceServicer):
    """Trades join tokens and proofs of old keys for certificates."""

    def __init__(self, enrolment: Enrolment, fleet_port: int) -> None:
        self._enrolment, self._fleet_port = enrolment, fleet_port

    @answered
    async def Enroll(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Trades a join token for a certificate."""
        _require_newest_tls(context)
        issued = self._enrolment.enroll(
            SecretStr(request.token), request.device_name, request.signing_request,
            network_of(context.peer()),
        )  # fmt: skip
        answer = pb.EnrollResponse(
            device_id=request.device_name, fleet_port=self._fleet_port,
            trust_bundle=self._enrolment.authority.trust, pending=issued is None,
        )  # fmt: skip
        if issued is not None:
            answer.certificate, answer.expires_in_s = issued.certificate, issued.expires_in_s
            log.info("device enrolled", extra={"device_id": issued.device_id})
        return answer

    @answered
    async def Reenroll(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Takes the proof of an old key."""
        _require_newest_tls(context)
        issued: Issued = self._enrolment.reenroll(
            request.certificate, request.signing_request, request.signature
        )
        log.info("device enrolled again", extra={"device_id": issued.device_id})
        return pb.ReenrollResponse(
            certificate=issued.certificate, expires_in_s=issued.expires_in_s,
            trust_bundle=self._enrolment.authority.trust,
        )  # fmt: skip

    @answered
    async def Trust(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Tells the roots, which are no secret."""
        _require_newest_tls(context)
        self._enrolment.authority.refresh()
        return pb.TrustResponse(trust_bundle=self._enrolment.authority.trust)


class BearerJoiningService(rpc.EnrolmentServiceServicer):
    """Trades the join token of a plain-text fleet for a credential."""

    def __init__(self, enrolment: BearerEnrolment) -> None:
        self._enrolment = enrolment

    @answered
    async def Enroll(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Trades the join token for a credential."""
        device_id, credential, expires_in_s = self._enrolment.enroll(
            request.token, request.device_name, time.time()
        )
        log.info("device enrolled", extra={"device_id": device_id})
        return pb.EnrollResponse(
            device_id=device_id, credential=credential, expires_in_s=expires_in_s
        )


def make_joining_server(throttle: Throttle) -> grpc.aio.Server:
    """A server for small calls of strangers."""
    limited = {"grpc.max_receive_message_length": MOST_REQUEST_BYTES,
               "grpc.max_concurrent_streams": 4,
               "grpc.max_allowed_incoming_connections": MOST_JOINING}  # fmt: skip
    options = [*(o for o in SERVER_OPTIONS if o[0] not in limited), *limited.items()]
    return grpc.aio.server(
        interceptors=[throttle], options=options, maximum_concurrent_rpcs=MOST_CALLS
    )


def add_joining(server: grpc.aio.Server, enrolment: Enrolment, fleet_port: int) -> None:
    """Registers what joining devices call."""
    rpc.add_EnrolmentServiceServicer_to_server(JoiningService(enrolment, fleet_port), server)


def add_bearer_joining(server: grpc.aio.Server, enrolment: BearerEnrolment) -> None:
    """The same over plain text."""
    rpc.add_EnrolmentServiceServicer_to_server(BearerJoiningService(enrolment), server)


def _require_newest_tls(context: Any) -> None:
    if context.auth_context().get("ssl_tls_version") != [b"TLSv1.3"]:
        raise RefusalError(Reason.BAD_CREDENTIAL, "only TLS 1.3 is spoken here")
