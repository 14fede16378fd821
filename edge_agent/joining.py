"""Enrolling at the coordinator's enrolment listener with a join token. Blocks; for a command."""

from __future__ import annotations

import ssl
import time
from collections.abc import Callable

from edge_agent.identity import Identity, Pair
from edge_agent.keys import make
from edge_agent.link import LinkError
from edge_agent.returning import CALL_S, joining_call
from profiles.settings import host_of
from protos.invitation import Invitation, pinned
from protos.sketchfleet.v1 import fleet_pb2 as pb

ASK_AGAIN_S = 15.0  # while an operator has yet to approve; each time is a handshake


def enroll(
    identity: Identity, invitation: Invitation, name: str, version: str,
    waiting: Callable[[], None], patience_s: float,
) -> None:  # fmt: skip
    """Makes this device `name` of the fleet that invited it.

    waiting: called when an operator has to approve first, which is waited for up to `patience_s`.
    Raises `RefusedError`, `LinkError`, `InvitationError`, `IdentityError`.
    """
    address = invitation.address
    trust = invitation.trust or pinned(_trust(address), invitation.pin)
    made = identity.asking()
    if made is None:
        made = make()
        identity.ask(made)
    request = pb.EnrollRequest(
        token=invitation.token.get_secret_value(), device_name=name, agent_version=version,
        signing_request=made["request"].encode(),
    )  # fmt: skip
    until, told = time.monotonic() + patience_s, False
    while True:
        answer = joining_call(address, trust, lambda stub: stub.Enroll(request, timeout=CALL_S))
        if not answer.pending:
            break
        if not told:
            waiting()
            told = True
        if time.monotonic() + ASK_AGAIN_S > until:
            raise LinkError("the operator has not approved this device yet; enrol again later")
        time.sleep(ASK_AGAIN_S)
    host = address.rpartition(":")[0]
    fleet = {"device": answer.device_id, "address": f"{host}:{answer.fleet_port}",
             "enrolment": address}  # fmt: skip
    pair = Pair.new(made["key"].encode(), answer.certificate, answer.expires_in_s)
    identity.joined(pair, answer.trust_bundle, fleet)


def _trust(address: str) -> bytes:
    """The roots that whoever answers there names; not to be believed without a pin.

    gRPC speaks to nobody it does not trust, so for this one call the server's own certificate is
    its root.
    """
    host, port = host_of(address), int(address.rpartition(":")[2])
    try:
        shown = ssl.get_server_certificate((host, port), timeout=CALL_S).encode()
    except OSError as error:
        raise LinkError(
            f"nobody answers with a certificate at {address} ({error}); check the address, and "
            "that the coordinator runs"
        ) from error
    asked = pb.TrustRequest()
    found = joining_call(address, shown, lambda stub: stub.Trust(asked, timeout=CALL_S))
    return bytes(found.trust_bundle)
