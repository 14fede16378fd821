"""Calls of the enrolment listener, and coming back to a fleet by the proof of an old key.

They block: they are made once in a while, by a command or in a thread of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import grpc

from edge_agent.identity import Identity, Pair
from edge_agent.link import LinkError, RefusedError
from edge_agent.signing import fresh_key
from protos.contract import Reason
from protos.identity import REENROL_LABEL
from protos.sketchfleet.v1 import fleet_pb2 as pb
from protos.sketchfleet.v1 import fleet_pb2_grpc as rpc
from protos.status import reason_of

CALL_S = 15.0
T = TypeVar("T")


def enroll_again(identity: Identity) -> None:
    """A certificate for a fresh key, in place of one that expired, or that is not on record where a
    coordinator was restored from a backup: then an earlier one is.

    Raises `RefusedError`, `LinkError`, `IdentityError`.
    """
    pairs = [identity.pair, *identity.earlier]
    for pair in pairs:
        try:
            _by_proof(identity, pair)
            return
        except RefusedError as error:
            if error.reason is not Reason.REVOKED or pair is pairs[-1]:
                raise


def _by_proof(identity: Identity, pair: Pair) -> None:
    made = fresh_key(pair, REENROL_LABEL)
    asked = pb.ReenrollRequest(
        certificate=pair.chain, signing_request=made.request, signature=made.signature
    )
    address = identity.fleet["enrolment"]
    answer = joining_call(
        address, identity.trust, lambda stub: stub.Reenroll(asked, timeout=CALL_S)
    )
    identity.adopt(answer.trust_bundle)
    identity.renewed(Pair.new(made.key, answer.certificate, answer.expires_in_s))


def joining_call(address: str, trust: bytes, make: Callable[[Any], T]) -> T:
    """One call of the EnrolmentService, over a connection of its own.

    Raises `RefusedError`, `LinkError`.
    """
    with grpc.secure_channel(address, grpc.ssl_channel_credentials(trust)) as channel:
        try:
            return make(rpc.EnrolmentServiceStub(channel))
        except grpc.RpcError as error:
            reason, sentence = reason_of(error)
            if reason is not None:
                raise RefusedError(reason, sentence) from error
            raise LinkError(
                f"the coordinator does not answer at {address}, or what answers there is not the "
                "fleet that the join file belongs to; check the address, and that its name is one "
                "of those given to `sketchfleet-coordinator init`"
            ) from error
