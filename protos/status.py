"""Errors on the wire: `google.rpc.Status` with a machine-readable reason and a sentence.

Agents branch on the reason, never on the text (gRPC error model, AIP-193).
"""

from __future__ import annotations

from typing import Any

import grpc
from google.protobuf import any_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from protos.contract import Reason

DOMAIN = "sketchfleet"


_CODES = {
    Reason.BAD_TOKEN: code_pb2.PERMISSION_DENIED,
    Reason.BAD_CREDENTIAL: code_pb2.UNAUTHENTICATED,
    Reason.REVOKED: code_pb2.PERMISSION_DENIED,
    Reason.PENDING: code_pb2.PERMISSION_DENIED,
    Reason.BAD_REQUEST: code_pb2.INVALID_ARGUMENT,
    Reason.DOES_NOT_FIT: code_pb2.FAILED_PRECONDITION,
    Reason.UNKNOWN_BLOB: code_pb2.NOT_FOUND,
    Reason.UNKNOWN_UPLOAD: code_pb2.NOT_FOUND,
    Reason.UNKNOWN_ASSIGNMENT: code_pb2.NOT_FOUND,
    Reason.WRONG_OFFSET: code_pb2.OUT_OF_RANGE,
    Reason.CORRUPT_CHUNK: code_pb2.DATA_LOSS,
    Reason.DIGEST_MISMATCH: code_pb2.DATA_LOSS,
    Reason.WRONG_SIZE: code_pb2.INVALID_ARGUMENT,
    Reason.BAD_UPDATE: code_pb2.INVALID_ARGUMENT,
    Reason.EQUIVOCATION: code_pb2.ALREADY_EXISTS,
    Reason.TOO_LATE: code_pb2.FAILED_PRECONDITION,
    Reason.SLOW_DOWN: code_pb2.RESOURCE_EXHAUSTED,
    Reason.NO_ROOM: code_pb2.RESOURCE_EXHAUSTED,
    Reason.INTERNAL: code_pb2.INTERNAL,
}
# Worth repeating: the transport broke, not the request.
RESUMABLE = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.INTERNAL,  # "Internal error from Core", grpc/grpc#36066
    grpc.StatusCode.UNKNOWN,
)


def status_of(reason: Reason, sentence: str, retry_s: float = 0.0) -> Any:
    """The rich status of a refusal, for `context.abort_with_status`."""
    detail = any_pb2.Any()
    detail.Pack(error_details_pb2.ErrorInfo(reason=str(reason), domain=DOMAIN))
    details = [detail]
    if retry_s > 0:
        again = error_details_pb2.RetryInfo()
        again.retry_delay.FromMilliseconds(int(1000 * retry_s))
        details.append(any_pb2.Any())
        details[-1].Pack(again)
    return rpc_status.to_status(
        status_pb2.Status(code=_CODES[reason], message=sentence, details=details)
    )


def retry_after_s(error: grpc.RpcError) -> float:
    """How long the other end asks to wait before the call is made again; 0 where it does not."""
    try:
        status = rpc_status.from_call(error)  # type: ignore[arg-type]
    except ValueError:
        return 0.0
    for detail in status.details if status is not None else ():
        again = error_details_pb2.RetryInfo()
        if detail.Is(again.DESCRIPTOR) and detail.Unpack(again):
            return max(0.0, float(again.retry_delay.ToMilliseconds()) / 1000)
    return 0.0


def reason_of(error: grpc.RpcError) -> tuple[Reason | None, str]:
    """(reason, sentence) of a failed call; reason None when the transport failed."""
    sentence = error.details() or str(error.code())
    try:
        status = rpc_status.from_call(error)  # type: ignore[arg-type]
    except ValueError:
        return None, sentence
    for detail in status.details if status is not None else ():
        info = error_details_pb2.ErrorInfo()
        if detail.Is(info.DESCRIPTOR) and detail.Unpack(info) and info.domain == DOMAIN:
            try:
                return Reason(info.reason), sentence
            except ValueError:
                return None, sentence
    return None, sentence
