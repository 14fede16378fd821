"""A refusal arrives as it was said: reason, sentence and code."""

from __future__ import annotations

import contextlib

import grpc
import pytest
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from protos.contract import Reason
from protos.status import _CODES, RESUMABLE, reason_of, status_of


@contextlib.asynccontextmanager
async def refusing(status):
    """A call to a server that answers everything with this status."""

    async def refuse(request, context):
        await context.abort_with_status(status)

    server = grpc.aio.server()
    handlers = {"Refuse": grpc.unary_unary_rpc_method_handler(refuse)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}")
    try:
        yield channel
    finally:
        await channel.close()
        await server.stop(0)


async def error_of(channel, method="/test/Refuse"):
    with pytest.raises(grpc.aio.AioRpcError) as told:
        await channel.unary_unary(method)(b"", timeout=5)
    return told.value


def test_every_reason_has_a_code():
    assert set(_CODES) == set(Reason)
    assert 0 not in _CODES.values(), "a refusal must not arrive as OK"


@pytest.mark.parametrize("reason", Reason)
async def test_reason_and_sentence_survive_the_wire(reason):
    sentence = f"{reason}: k=8 allows 1,024 bytes, naïve agents send 2 × that; run doctor"
    async with refusing(status_of(reason, sentence)) as channel:
        error = await error_of(channel)
    assert reason_of(error) == (reason, sentence)
    assert error.code().value[0] == _CODES[reason]


def test_only_a_failure_of_the_coordinator_looks_like_a_broken_transport():
    retried = {code.value[0] for code in RESUMABLE}
    assert {reason for reason in Reason if _CODES[reason] in retried} == {Reason.INTERNAL}


async def test_a_transport_that_fails_has_no_reason():
    async with refusing(status_of(Reason.INTERNAL, "x")) as channel:
        unknown = await error_of(channel, "/test/NoSuchMethod")
    assert reason_of(unknown)[0] is None
    closed = grpc.aio.insecure_channel("127.0.0.1:1")
    error = await error_of(closed)
    await closed.close()
    assert reason_of(error)[0] is None and error.code() in RESUMABLE


@pytest.mark.parametrize(
    ("domain", "reason"), [("elsewhere", "BAD_TOKEN"), ("sketchfleet", "OF_A_LATER_VERSION")]
)
async def test_a_reason_that_is_not_ours_is_none(domain, reason):
    detail = any_pb2.Any()
    detail.Pack(error_details_pb2.ErrorInfo(reason=reason, domain=domain))
    status = rpc_status.to_status(status_pb2.Status(code=7, message="no", details=[detail]))
    async with refusing(status) as channel:
        assert reason_of(await error_of(channel)) == (None, "no")
