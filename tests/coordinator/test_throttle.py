"""The limits over a real channel: refused before parsing, hung up on, and nobody else notices."""

from __future__ import annotations

import asyncio
import socket
import time

import grpc
import pytest

from coordinator import limits as limits_module
from coordinator import throttle as throttle_module
from coordinator.connections import ANONYMOUS_S, MOST_OF_DEVICE, Connections, network_of, peer_of
from coordinator.limits import CALLS
from edge_agent import link as link_module
from edge_agent.link import Link, LinkError, RefusedError
from profiles.compat import wait_for
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


def raw(device, call, message=b""):
    """A call as bytes, over the device's own connection and credential."""
    method = device.link._control.unary_unary(FLEET + call)
    return method(message, metadata=device.link._metadata, timeout=10)


async def refusal(call):
    """(status code, reason, seconds to wait) of a call that is refused."""
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await call
    return error.value.code(), reason_of(error.value)[0], retry_after_s(error.value)


async def flood(device, calls):
    """So many polls at once; the refusals among their ends."""
    poll = pb.NextTaskRequest(wait_s=0).SerializeToString()
    ended = await asyncio.gather(
        *(raw(device, "NextTask", poll) for _ in range(calls)), return_exceptions=True
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


async def test_a_flood_is_hung_up_on_and_others_are_not(harness, tmp_path, strict, impatient):
    async with harness.fleet(tmp_path, **TWO) as fleet:
        throttle = fleet.coordinator.server.throttle
        await fleet["birch"].poll()
        ended = []
        hang_up = throttle.connections._hang_up
        throttle.connections._hang_up = lambda peers: ended.append(set(peers)) or hang_up(peers)
        refused = []
        for _ in range(8):
            refused += await flood(fleet["ash"], 30)
        assert ended, "the flood's connection was left open"
        assert any(error.code() is grpc.StatusCode.UNAVAILABLE for error in refused)
        mine = {p for peers in ended for p in peers}
        theirs = set(throttle.connections._of_device["birch"])
        assert not mine & theirs
        await fleet["birch"].poll()


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


# --- connections --------------------------------------------------------------------------------


def test_peers_and_networks_are_told_by_grpc_s_names():
    assert peer_of("ipv4:10.0.0.1:80") == ("10.0.0.1", 80)
    assert peer_of("ipv6:%5B::1%5D:80") == ("::1", 80)
    assert peer_of("unix:") is None
    assert network_of("ipv4:10.0.0.1:80") == "10.0.0.1"
    assert network_of("ipv6:%5B2001:db8::1%5D:8") == network_of("ipv6:%5B2001:db8::2%5D:9")
    assert network_of("ipv6:%5B2001:db8::1%5D:8") != network_of("ipv6:%5B2001:db9::1%5D:8")


class Place:
    """A listener with some connections to it."""

    def __enter__(self):
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.pairs = []
        return self

    def __exit__(self, *_):
        for pair in self.pairs:
            for end in pair:
                end.close()
        self.listener.close()

    def dial(self):
        """(the far end, gRPC's name for it)."""
        far = socket.create_connection(("127.0.0.1", self.port))
        self.pairs.append((far, self.listener.accept()[0]))
        return far, f"ipv4:127.0.0.1:{far.getsockname()[1]}"


def open_yet(far):
    """Whether the other end has not hung up."""
    far.setblocking(False)
    try:
        return far.recv(1) != b""
    except BlockingIOError:
        return True


def test_strangers_that_say_nothing_are_hung_up_on_and_devices_are_not():
    now = [0.0]
    connections = Connections(lambda: now[0])
    with Place() as place:
        connections.ports = {place.port}
        stranger, device = place.dial(), place.dial()
        connections.used("ash", device[1])
        assert connections.sweep() == 0
        now[0] = ANONYMOUS_S + 1
        assert connections.sweep() == 1
        assert not open_yet(stranger[0]) and open_yet(device[0])


def test_a_device_keeps_its_newest_connections():
    now = [0.0]
    connections = Connections(lambda: now[0])
    with Place() as place:
        connections.ports = {place.port}
        dialled = [place.dial() for _ in range(MOST_OF_DEVICE + 3)]
        for number, (_, told) in enumerate(dialled):
            now[0] = float(number)
            connections.used("ash", told)
        assert connections.sweep() == 3
        assert [open_yet(far) for far, _ in dialled] == [False] * 3 + [True] * MOST_OF_DEVICE


def test_what_is_closed_is_forgotten():
    now = [0.0]
    connections = Connections(lambda: now[0])
    with Place() as place:
        connections.ports = {place.port}
        connections.used("ash", place.dial()[1])
        for end in place.pairs.pop():
            end.close()
        now[0] = 1000.0
        connections.sweep()
        assert not connections._known and not connections._of_device and not connections._first_seen
