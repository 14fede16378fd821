"""The limits over a real channel: refused before parsing, hung up on, and nobody else notices."""

from __future__ import annotations

import asyncio
import time

import grpc
import hpack
import pytest

from coordinator import limits as limits_module
from coordinator import throttle as throttle_module
from coordinator.limits import CALLS
from edge_agent import link as link_module
from edge_agent.link import Link, LinkError, RefusedError
from profiles.compat import timeout, wait_for
from protos.contract import Reason
from protos.sketchfleet.v1 import fleet_pb2 as pb
from protos.status import reason_of, retry_after_s, status_of

TWO = {"names": ("ash", "birch"), "round": {"min_devices": 2}}
ONE = {"names": ("ash",), "round": {"min_devices": 1}}
FLEET = "/sketchfleet.v1.FleetService/"


@pytest.fixture
def strict(monkeypatch):
    """Few calls, short waits."""
    for name, value in {"CALLS_BURST": 40.0, "CALLS_PER_S": 2.0, "OVER_BURST": 20.0}.items():
        monkeypatch.setattr(limits_module, name, value)
    for module in (limits_module, throttle_module):
        monkeypatch.setattr(module, "HOLD_S", 0.05)


def raw(device, call, message=b"", timeout_s=10):
    """A call as bytes, over the device's own connection and credential."""
    method = device.link._control.unary_unary(FLEET + call)
    return method(message, metadata=device.link._metadata, timeout=timeout_s)


async def refusal(call):
    """(status code, reason, seconds to wait) of a call that is refused."""
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await call
    return error.value.code(), reason_of(error.value)[0], retry_after_s(error.value)


async def flood(device, calls, timeout_s=10):
    """So many polls at once; the refusals among their ends."""
    poll = pb.NextTaskRequest(wait_s=0).SerializeToString()
    ended = await asyncio.gather(
        *(raw(device, "NextTask", poll, timeout_s) for _ in range(calls)), return_exceptions=True
    )
    return [error for error in ended if isinstance(error, grpc.aio.AioRpcError)]


async def test_a_device_that_polls_too_fast_is_told_how_long_to_wait(harness, tmp_path, strict):
    async with harness.fleet(tmp_path, **TWO) as fleet:
        for _ in range(5):
            refused = await flood(fleet["ash"], 12)
        told = [e for e in refused if e.code() is grpc.StatusCode.RESOURCE_EXHAUSTED]
        assert told and all(reason_of(e)[0] is Reason.SLOW_DOWN for e in told)
        assert all(retry_after_s(e) > 0 for e in told)
        begun = time.monotonic()
        await fleet["birch"].poll()
        assert time.monotonic() - begun < 1, "another device waited too"


async def test_a_flood_is_not_heard_for_a_while_and_others_are(harness, tmp_path, strict, caplog):
    async with harness.fleet(tmp_path, **TWO) as fleet:
        connections = fleet.coordinator.server.throttle.connections
        other, later = Link(fleet.coordinator.address), Link(fleet.coordinator.address)
        other.credential = later.credential = fleet["ash"].link.credential
        await other.next_task(None, "", 0, 10)
        for device in ("ash", "birch"):
            await fleet[device].poll()
        mine = set(connections.of("ash"))
        assert len(mine) == 2
        async with timeout(20):
            while not connections._deaf:
                await flood(fleet["ash"], 30, timeout_s=0.5)
        assert connections._deaf.keys() >= mine, "one of its connections is heard"
        poll = pb.NextTaskRequest(wait_s=0).SerializeToString()
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await raw(fleet["ash"], "NextTask", poll, timeout_s=0.5)
        assert error.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED, "heard, or hung up on"
        assert not connections._deaf.keys() & set(connections.of("birch"))
        await fleet["birch"].poll()
        with pytest.raises(LinkError):
            await later.next_task(None, "", 0, 0.5)  # nor over a new connection
        await other.close()
        await later.close()
        told = [r.getMessage() for r in caplog.records if "floods" in r.getMessage()]
        assert len(told) == 1 and "revoke ash" in told[0]


def frame(kind, payload=b"", flags=0, stream=0):
    """Of HTTP/2 (RFC 9113, 4.1)."""
    head = len(payload).to_bytes(3, "big") + bytes([kind, flags])
    return head + stream.to_bytes(4, "big") + payload


async def test_frames_that_are_no_calls_are_a_flood_too(harness, tmp_path, monkeypatch):
    monkeypatch.setattr(limits_module, "NOISE_IN_BURST", 1e6)
    async with harness.fleet(tmp_path, **TWO) as fleet:
        connections = fleet.coordinator.server.throttle.connections
        for device in ("ash", "birch"):
            await fleet[device].poll()
        host, _, port = fleet.coordinator.address.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        told = {":method": "POST", ":scheme": "http", ":authority": "-", "te": "trailers",
                ":path": FLEET + "NextTask", "content-type": "application/grpc",
                "authorization": f"Bearer {fleet['ash'].link.credential}"}  # fmt: skip
        writer.write(
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4)
            + frame(1, hpack.Encoder().encode(told.items()), flags=4, stream=1)
            + frame(0, bytes(5), flags=1, stream=1)
        )  # fmt: skip
        answers = asyncio.ensure_future(reader.read())
        async with timeout(20):
            while not connections._deaf:
                writer.write(1000 * frame(99))  # of a kind that is to be ignored
                await asyncio.sleep(0.01)
        answers.cancel()
        mine = set(connections.of("ash"))
        assert len(mine) == 2 and connections._deaf.keys() >= mine
        assert not connections._deaf.keys() & set(connections.of("birch"))
        await fleet["birch"].poll()
        writer.close()


async def test_messages_of_calls_are_no_noise(harness, tmp_path, monkeypatch):
    for name, value in {"NOISE_IN_BURST": 2e6, "NOISE_OUT_BURST": 1e5, "CALLS_BURST": 1e6}.items():
        monkeypatch.setattr(limits_module, name, value)
    async with harness.fleet(tmp_path, **ONE) as fleet:
        limits, received, sent, floods = fleet.coordinator.server.throttle.limits, 0, 0, False
        count = limits.crossed

        def crossed(device_id, more_received, more_sent):
            nonlocal received, sent, floods
            received, sent = received + more_received, sent + more_sent
            floods = count(device_id, more_received, more_sent) or floods
            return floods

        monkeypatch.setattr(limits, "crossed", crossed)
        async with timeout(60):
            while (received < 8e6 or sent < 1e6) and not floods:
                await fleet["ash"].link.probe(metered=False)
                await asyncio.sleep(0.3)
        assert not floods


async def test_compressed_messages_are_refused_for_they_hide_their_size(harness, tmp_path):
    async with harness.fleet(tmp_path, **ONE) as fleet:
        link = fleet["ash"].link
        call = link._control.unary_unary(FLEET + "NextTask")(
            bytes(10_000), metadata=link._metadata, timeout=10, compression=grpc.Compression.Gzip
        )
        assert (await refusal(call))[0] is grpc.StatusCode.UNIMPLEMENTED


async def test_connections_are_looked_at_again_after_a_look_that_failed(
    harness, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(throttle_module, "AGAIN_S", 0.01)
    async with harness.fleet(tmp_path, **ONE) as fleet:
        throttle, asked = fleet.coordinator.server.throttle, []
        sweep = throttle.connections.sweep

        def fail_once(doomed):
            asked.append(set(doomed))
            if len(asked) == 1:
                raise OSError("too many open files")
            return sweep(doomed)

        monkeypatch.setattr(throttle.connections, "sweep", fail_once)
        throttle._doomed.add(("10.0.0.1", 1))
        async with timeout(10):
            while len(asked) < 2:
                await asyncio.sleep(0.01)
        assert asked[:2] == [{("10.0.0.1", 1)}] * 2, "who was to be deaf is forgotten"
        assert "too many open files" in caplog.text


async def test_bytes_that_are_no_message_are_refused_without_a_word_in_the_log(
    harness, tmp_path, caplog
):
    async with harness.fleet(tmp_path, **ONE) as fleet:
        for call in ("NextTask", "Report", "Renew"):
            code, reason, _ = await refusal(raw(fleet["ash"], call, b"\xff" * 100))
            assert (code, reason) == (grpc.StatusCode.INVALID_ARGUMENT, Reason.BAD_REQUEST)
        assert (await refusal(raw(fleet["ash"], "Nothing")))[0] is grpc.StatusCode.UNIMPLEMENTED
        push = fleet["ash"].link._push(metadata=fleet["ash"].link._metadata, timeout=10)
        await push.write(b"\xff" * 100)
        assert (await refusal(push.read()))[1] is Reason.BAD_REQUEST
        assert not [r for r in caplog.records if r.exc_info], "a stranger fills the log"


async def test_a_push_without_a_word_is_ended(harness, tmp_path, monkeypatch):
    monkeypatch.setattr(throttle_module, "SILENT_S", 0.05)
    async with harness.fleet(tmp_path, **ONE) as fleet:
        push = fleet["ash"].link._push(metadata=fleet["ash"].link._metadata, timeout=10)
        code, reason, _ = await refusal(push.read())
        assert (code, reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, Reason.SLOW_DOWN)


async def test_a_call_whose_place_is_taken_is_told_so(harness, tmp_path):
    async with harness.fleet(tmp_path, **ONE) as fleet:
        device = fleet["ash"]
        pushes = []
        for _ in range(CALLS["Push"].at_once + 1):
            pushes.append(device.link._push(metadata=device.link._metadata, timeout=10))
            await asyncio.sleep(0.02)
        assert (await refusal(pushes[0].read()))[1] is Reason.SLOW_DOWN
        assert not pushes[1].done()
        for push in pushes:
            push.cancel()


async def test_an_update_waits_for_room_on_the_disk_and_is_not_lost(
    harness, tmp_path, monkeypatch, impatient
):
    async with harness.fleet(tmp_path, **ONE) as fleet:
        device = fleet["ash"]
        spec, a = await device.take()
        update = await device.train(spec, a)
        room = fleet.coordinator.engine._intake._room
        room._room_bytes, room._looked_at = 0, float("inf")
        monkeypatch.setattr(link_module, "LONGEST_AWAY_S", 0.05)
        monkeypatch.setattr(link_module.BusyError, "__init__", quick_busy)
        pushing = asyncio.create_task(device.push(a, update))
        await asyncio.sleep(0.3)
        assert not pushing.done() and device.link.resumes == 0
        assert not any((fleet.coordinator.blobs.root / "uploads").iterdir())
        room._looked_at = float("-inf")
        assert (await pushing)[1] == "accepted"


def quick_busy(self, sentence, retry_s):
    """As the agent's, without the wait."""
    link_module.LinkError.__init__(self, sentence)
    assert retry_s == 60
    self.retry_s = 0.05


async def test_an_agent_waits_as_long_as_it_is_told(monkeypatch):
    told = status_of(Reason.SLOW_DOWN, "wait", 7.0)
    metadata = grpc.aio.Metadata(*told.trailing_metadata)
    busy = grpc.aio.AioRpcError(told.code, grpc.aio.Metadata(), metadata, told.details)
    answers, waits = [busy, busy, "answer"], []

    async def call():
        answer = answers.pop(0)
        if answer is busy:
            raise busy
        return answer

    async def sleep(seconds):
        waits.append(seconds)

    link = Link("127.0.0.1:1")
    monkeypatch.setattr(link_module.asyncio, "sleep", sleep)
    assert await link._persist(call, 60.0) == "answer"
    answers[:] = [busy, "answer"]
    assert await link._resume(call, lambda: 0) == "answer"
    monkeypatch.undo()
    assert len(waits) == 3 and all(7 <= wait <= 14 for wait in waits), waits
    answers[:] = [busy]
    with pytest.raises(LinkError, match="asks to wait"):
        await link._persist(call, 5.0)
    await link.close()


async def test_bytes_of_an_update_are_counted_however_often_it_is_begun(
    harness, tmp_path, monkeypatch
):
    monkeypatch.setattr(limits_module, "most_bytes", lambda size: 2 * size)
    async with harness.fleet(tmp_path, **ONE) as fleet:
        device = fleet["ash"]
        spec, a = await device.take()
        size = (await device.train(spec, a)).stat().st_size
        reasons = []
        for number in range(8):
            garbage = bytes([number]) * size
            path = device.folder / "garbage"
            path.write_bytes(garbage)
            try:
                await wait_for(device.push(a, path), 1)
            except TimeoutError:
                reasons.append("waits")
                break
            except RefusedError as error:
                reasons.append(type(error).__name__)
        assert "waits" in reasons, f"garbage without an end: {reasons}"
