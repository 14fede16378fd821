"""A device and its coordinator over a real channel that breaks: every byte arrives, and once."""

from __future__ import annotations

import asyncio
import hashlib
import math
import time
from dataclasses import replace

import grpc
import pytest

from edge_agent import link as link_module
from edge_agent import push_stream
from edge_agent.bearer import BearerMembership
from edge_agent.config import AgentConfig
from edge_agent.link import Link, LinkError, RefusedError
from edge_agent.membership import MembershipError
from edge_agent.pace import Pace
from profiles.compat import timeout
from protos.chunk import Chunk, chunk_message, read_chunk
from protos.contract import BlobRef, LocalReport, Payload, Reason
from protos.layout import packed_bytes
from protos.sketchfleet.v1 import fleet_pb2 as pb
from protos.transfer import MAX_MESSAGE_BYTES, crc32

ONE = {"names": ("ash",), "round": {"min_devices": 1}}


CHUNK_BYTES, MIB = 128 * 1024, 2**20


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """So that a slice of some megabytes takes many."""
    from coordinator import service

    monkeypatch.setattr(service, "CHUNK_BYTES", CHUNK_BYTES)


def large(harness):
    """One device whose whole float32 slice takes many chunks."""
    return {**ONE, "dimensions": harness.LARGE, "wire": {"update": "float32", "slice": "float32"},
            "training": {"local_steps": 1}}  # fmt: skip


async def trained(fleet):
    """(device, spec, assignment, packed update) of the first round."""
    device = fleet["ash"]
    spec, a = await device.take()
    return device, spec, a, await device.train(spec, a)


def part_of(fleet):
    """The one upload that is arriving."""
    (path,) = (fleet.coordinator.blobs.root / "uploads").iterdir()
    return path


def note_chunks(fleet, then=lambda: None):
    """(offset, length) of every chunk the coordinator takes from now on."""
    engine, taken = fleet.coordinator.engine, []
    put = engine.put_chunk

    def noting(device_id, upload_id, offset, data, checksum):
        held = put(device_id, upload_id, offset, data, checksum)
        taken.append((offset, len(data)))
        then()
        return held

    engine.put_chunk = noting
    return taken


def damage_third_chunk(monkeypatch, damaged):
    """The third message that a push reads from its file is another chunk."""
    real, calls = push_stream.message_of_file, iter(range(10**6))

    def damaging(*args, **keywords):
        message = real(*args, **keywords)
        return chunk_message(damaged(read_chunk(message))) if next(calls) == 2 else message

    monkeypatch.setattr(push_stream, "message_of_file", damaging)


# --- pushing ------------------------------------------------------------------------------------


async def test_a_push_resumes_at_the_byte_after_the_coordinator_died(harness, tmp_path, impatient):
    async with harness.fleet(tmp_path, **large(harness)) as fleet:
        device, _, a, update = await trained(fleet)
        size = update.stat().st_size
        assert size > 8 * CHUNK_BYTES
        enough = asyncio.Event()
        before = note_chunks(fleet, lambda: len(before) >= 5 and enough.set())
        pushing = asyncio.create_task(device.push(a, update))
        await asyncio.wait_for(enough.wait(), 10)
        await fleet.coordinator.kill()
        assert not pushing.done()
        # A kill loses nothing of the file, but may come in the middle of a write.
        held = part_of(fleet).stat().st_size - 1000
        assert 0 < held < size
        with part_of(fleet).open("r+b") as part:
            part.truncate(held)
        await fleet.coordinator.start()
        after = note_chunks(fleet)
        receipt, outcome = await pushing
        assert outcome == "accepted" and receipt.endswith(fleet.coordinator.assignment(
            0, "ash").update_digest)  # fmt: skip
        assert min(offset for offset, _ in after) == held
        assert sum(length for _, length in after) == size - held, "bytes were sent again"
        assert device.link.resumes >= 1


async def test_an_outage_longer_than_its_patience_ends_a_push_and_an_agent_has_no_end_of_it(
    harness, tmp_path, impatient
):
    async with harness.fleet(tmp_path, **large(harness)) as fleet:
        device, _, a, update = await trained(fleet)
        await fleet.coordinator.kill()
        device.link.patience_s = 0.3
        with pytest.raises(LinkError, match=r"no byte moved to or from .* for 0 s"):
            await device.push(a, update)
        device.link.patience_s = math.inf  # as the agent sets it after the first contact
        pushing = asyncio.create_task(device.push(a, update))
        await asyncio.sleep(1.0)
        assert not pushing.done()
        await fleet.coordinator.start()
        assert (await pushing)[1] == "accepted"


async def test_a_push_after_a_restart_of_the_device_resumes_too(harness, tmp_path, impatient):
    async with harness.fleet(tmp_path, **large(harness)) as fleet:
        device, _, a, update = await trained(fleet)
        size = update.stat().st_size
        enough = asyncio.Event()
        before = note_chunks(fleet, lambda: len(before) >= 5 and enough.set())
        pushing = asyncio.create_task(device.push(a, update))
        await asyncio.wait_for(enough.wait(), 10)
        pushing.cancel()
        await asyncio.gather(pushing, return_exceptions=True)
        credential = device.link.credential
        await device.link.close()
        device.link = Link(fleet.coordinator.address)
        device.link.credential = credential
        await asyncio.sleep(0.05)  # chunks that were on their way
        held = part_of(fleet).stat().st_size
        before.clear()
        assert (await device.push(a, update))[1] == "accepted"
        assert held > 0 and sum(length for _, length in before) == size - held


async def test_an_update_that_was_stored_before_a_power_cut_is_not_sent_again(
    harness, tmp_path, impatient
):
    async with harness.fleet(tmp_path, **ONE) as fleet:
        device, spec, a, update = await trained(fleet)
        fleet.coordinator.cut_power("put_update", before=True)
        pushing = asyncio.create_task(device.push(a, update))
        digest = hashlib.sha256(update.read_bytes()).hexdigest()
        await fleet.coordinator.until(lambda: fleet.coordinator.blobs.holds(digest), "the blob")
        await fleet.restart()
        taken = note_chunks(fleet)
        receipt, _ = await pushing
        assert taken == [] and receipt == f"{a.assignment_id}:{digest}"
        await device.report(spec, a)
        assert fleet.coordinator.assignment(0, "ash").complete


async def test_a_chunk_with_a_wrong_checksum_is_refused_and_the_push_goes_on(harness, tmp_path):
    async with harness.fleet(tmp_path, **large(harness)) as fleet:
        device, _, a, update = await trained(fleet)
        data = update.read_bytes()
        begun = await device.begin(a.assignment_id, hashlib.sha256(data).hexdigest(), len(data))
        chunk = data[:CHUNK_BYTES]
        bad = device.put(begun.update, 0, chunk, crc32(chunk) ^ 1)
        assert await harness.reason_for(bad) is Reason.CORRUPT_CHUNK
        assert part_of(fleet).stat().st_size == 0
        good = await device.put(begun.update, 0, chunk, crc32(chunk))
        assert good == CHUNK_BYTES
        taken = note_chunks(fleet)
        assert (await device.push(a, update))[1] == "accepted"
        assert sum(length for _, length in taken) == len(data) - CHUNK_BYTES


async def test_a_chunk_damaged_on_the_way_is_sent_again(harness, tmp_path, impatient, monkeypatch):
    async with harness.fleet(tmp_path, **large(harness)) as fleet:
        device, _, a, update = await trained(fleet)
        damage_third_chunk(monkeypatch, lambda c: replace(c, crc32=crc32(c.data) ^ 1))
        assert (await device.push(a, update))[1] == "accepted"
        assert device.link.resumes == 1
        assert fleet.coordinator.assignment(0, "ash").update_digest is not None


async def test_an_update_file_that_is_not_what_was_promised_is_refused(harness, tmp_path):
    async with harness.fleet(tmp_path, **ONE) as fleet:
        device, _, a, update = await trained(fleet)
        data = update.read_bytes()
        begun = await device.begin(a.assignment_id, "0" * 64, len(data))
        await device.put(begun.update, 0, data, crc32(data))
        assert await harness.reason_for(device.commit(begun.update)) is Reason.DIGEST_MISMATCH
        again = await device.begin(a.assignment_id, "0" * 64, len(data))
        assert again.durable_bytes == 0


async def test_a_chunk_that_does_not_belong_is_refused(harness, tmp_path):
    async with harness.fleet(tmp_path, **ONE) as fleet:
        device, spec, a, _ = await trained(fleet)
        size = packed_bytes(spec, a.update)
        begun = await device.begin(a.assignment_id, "0" * 64, size)
        for offset, data in ((size, b"x"), (-1, b"x"), (0, bytes(CHUNK_BYTES + 1))):
            call = device.put(begun.update, offset, data, crc32(data))
            assert await harness.reason_for(call) is Reason.WRONG_OFFSET
        incomplete = device.commit(begun.update)
        assert await harness.reason_for(incomplete) is Reason.DIGEST_MISMATCH


async def test_a_message_above_the_limit_is_refused_before_it_is_looked_at(harness, tmp_path):
    async with harness.fleet(tmp_path, **ONE) as fleet:
        device, _, _, _ = await trained(fleet)
        taken = note_chunks(fleet)
        channel, push = harness.raw_transfer(fleet.coordinator.address)
        try:
            stream = push(timeout=10, metadata=device.link._metadata)
            await stream.write(chunk_message(Chunk(0, bytes(MAX_MESSAGE_BYTES))))
            with pytest.raises(grpc.aio.AioRpcError) as told:
                await stream.read()
        finally:
            await channel.close()
        assert told.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert taken == []


async def test_what_may_have_crossed_twice_is_counted(harness, tmp_path, impatient):
    async with harness.fleet(tmp_path, **large(harness)) as fleet:
        device, _, a, update = await trained(fleet)
        enough = asyncio.Event()
        before = note_chunks(fleet, lambda: len(before) >= 5 and enough.set())
        pushing = asyncio.create_task(device.push(a, update))
        await asyncio.wait_for(enough.wait(), 10)
        assert device.link.resent_bytes == 0
        await fleet.coordinator.kill()
        held = part_of(fleet).stat().st_size - 1000
        with part_of(fleet).open("r+b") as part:
            part.truncate(held)
        await fleet.coordinator.start()
        await pushing
        window = push_stream.MOST_WINDOW_BYTES
        assert 1000 <= device.link.resent_bytes <= window, "more than was on its way"


async def test_a_push_whose_bytes_were_damaged_unseen_is_sent_again_and_counted(
    harness, tmp_path, impatient, monkeypatch
):
    """Large chunks carry no checksum: the digest of the whole tells."""
    async with harness.fleet(tmp_path, **large(harness)) as fleet:
        device, _, a, update = await trained(fleet)
        damage_third_chunk(monkeypatch, lambda c: replace(c, data=bytes(len(c.data)), crc32=None))
        assert (await device.push(a, update))[1] == "accepted"
        assert device.link.resent_bytes == update.stat().st_size


async def test_a_window_that_became_smaller_does_not_wait_for_ever(harness, tmp_path, monkeypatch):
    """What was sent under the larger one may be unasked for."""
    async with harness.fleet(tmp_path, **large(harness)) as fleet:
        device, _, a, update = await trained(fleet)
        windows = iter([MIB, MIB, MIB])
        monkeypatch.setattr(
            push_stream.PushStream, "_window", property(lambda self: next(windows, 32 * 1024))
        )
        async with timeout(20):
            assert (await device.push(a, update))[1] == "accepted"


@pytest.mark.parametrize("way", ["push", "fetch"])
async def test_transfers_keep_to_the_owners_limit(harness, tmp_path, way):
    async with harness.fleet(tmp_path, **large(harness)) as fleet:
        device, _, a, update = await trained(fleet)
        (slice_,) = a.slice
        size = update.stat().st_size if way == "push" else slice_.size_bytes
        device.link.pace = Pace(8 * size / 1.5)  # for a second and a half
        begun = time.monotonic()
        if way == "push":
            await device.push(a, update)
        else:
            (tmp_path / "again").mkdir()
            await device.link.fetch(slice_, tmp_path / "again")
        assert 1.0 < time.monotonic() - begun < 5.0


# --- fetching -----------------------------------------------------------------------------------


async def one_slice(device):
    """The one file that a device's slice of the first round is."""
    _, a = await device.take()
    (blob,) = a.slice
    return blob


def note_fetches(monkeypatch):
    """Offsets from which the coordinator sends blobs."""
    from coordinator import service

    real, offsets = service.messages_of_file, []

    def noting(path, offset, size):
        offsets.append(offset)
        return real(path, offset, size)

    monkeypatch.setattr(service, "messages_of_file", noting)
    return offsets


@pytest.mark.parametrize("held", [1, CHUNK_BYTES, 3 * CHUNK_BYTES + 7])
async def test_a_fetch_resumes_from_what_is_there(harness, tmp_path, monkeypatch, held):
    async with harness.fleet(tmp_path, **large(harness)) as fleet:
        device = fleet["ash"]
        slice_ = await one_slice(device)
        whole = fleet.coordinator.blobs.path(slice_.digest).read_bytes()
        folder = tmp_path / "fetched"
        folder.mkdir()
        (folder / f"{slice_.digest}.part").write_bytes(whole[:held])
        offsets = note_fetches(monkeypatch)
        path = await device.link.fetch(slice_, folder)
        assert offsets == [held] and path.read_bytes() == whole
        assert [p.name for p in folder.iterdir()] == [slice_.digest]
        assert device.link.fetched_bytes == len(whole) - held
        await device.link.fetch(slice_, folder)
        assert offsets == [held], "what is there is not fetched again"


async def test_a_fetch_goes_on_after_the_coordinator_died(
    harness, tmp_path, monkeypatch, impatient
):
    async with harness.fleet(tmp_path, **large(harness)) as fleet:
        from coordinator import service

        device = fleet["ash"]
        slice_ = await one_slice(device)
        real, offsets, halfway = service.messages_of_file, [], asyncio.Event()

        def breaking(path, offset, size):
            offsets.append(offset)
            for number, piece in enumerate(real(path, offset, size)):
                if len(offsets) == 1 and number == 3:
                    halfway.set()
                    raise ConnectionResetError
                yield piece

        monkeypatch.setattr(service, "messages_of_file", breaking)
        fetching = asyncio.create_task(device.link.fetch(slice_, tmp_path))
        await asyncio.wait_for(halfway.wait(), 10)
        await fleet.restart()
        path = await fetching
        assert path.read_bytes() == fleet.coordinator.blobs.path(slice_.digest).read_bytes()
        assert len(offsets) >= 2 and offsets[-1] > 0


async def test_a_damaged_part_is_fetched_anew(harness, tmp_path, monkeypatch, impatient):
    async with harness.fleet(tmp_path, **large(harness)) as fleet:
        device = fleet["ash"]
        slice_ = await one_slice(device)
        folder = tmp_path / "fetched"
        folder.mkdir()
        (folder / f"{slice_.digest}.part").write_bytes(b"?" * 1000)
        offsets = note_fetches(monkeypatch)
        path = await device.link.fetch(slice_, folder)
        assert offsets == [1000, 0]
        assert hashlib.sha256(path.read_bytes()).hexdigest() == slice_.digest


@pytest.mark.parametrize("digest", ["0" * 64, "", "../join-token"])
async def test_a_blob_that_is_not_kept_is_refused(harness, tmp_path, digest):
    async with harness.fleet(tmp_path, **ONE) as fleet:
        call = fleet["ash"].link._fetch(
            pb.FetchRequest(digest=digest), timeout=5, metadata=fleet["ash"].link._metadata
        )
        assert await harness.reason_for(call.read()) is Reason.UNKNOWN_BLOB
        with pytest.raises(RefusedError, match="blob") as told:
            await fleet["ash"].link.fetch(BlobRef("0" * 64, 10, Payload(1, "int8")), tmp_path)
        assert told.value.reason is Reason.UNKNOWN_BLOB


# --- who calls ----------------------------------------------------------------------------------


async def test_every_call_but_enrolment_needs_a_credential(harness, tmp_path):
    async with harness.fleet(tmp_path, names=()) as fleet:
        link = Link(fleet.coordinator.address)
        try:
            blob = BlobRef("0" * 64, 10, Payload(1, "int8"))
            calls = [
                link.renew(), link.next_task(None, "", 0.0, 0.0), link.probe(metered=True),
                link.report(LocalReport("run.0.ash", "done"), 0.0), link.fetch(blob, tmp_path),
                link.push("run.0.ash", "0" * 64, tmp_path / "base"),
            ]  # fmt: skip
            (tmp_path / "base").write_bytes(b"x")
            for credential, call in zip(["", "ash:wrong"] * 3, calls, strict=True):
                link.credential = credential
                with pytest.raises(RefusedError, match="enrol") as told:
                    await call
                assert told.value.reason is Reason.BAD_CREDENTIAL
        finally:
            await link.close()


async def test_a_wrong_token_is_refused_without_patience(harness, tmp_path):
    async with harness.fleet(tmp_path, names=()) as fleet:
        link = Link(fleet.coordinator.address)
        begun = time.monotonic()
        with pytest.raises(RefusedError, match="the join token is wrong") as told:
            await link.enroll("wrong", "ash", "test", 30.0)
        await link.close()
        assert told.value.reason is Reason.BAD_TOKEN and time.monotonic() - begun < 5


async def test_renewing_over_the_wire_ends_the_old_credential(harness, tmp_path):
    async with harness.fleet(tmp_path, names=("ash",)) as fleet:
        link = fleet["ash"].link
        old = link.credential
        assert await link.renew() == 7 * 86400.0 and link.credential != old
        await fleet["ash"].poll()
        link.credential = old
        with pytest.raises(RefusedError, match="enrol again"):
            await fleet["ash"].poll()


async def test_a_coordinator_that_is_not_there_is_named_after_the_patience(impatient):
    link = Link("127.0.0.1:1")
    with pytest.raises(LinkError, match=r"127\.0\.0\.1:1 does not answer .*check that it runs"):
        await link.enroll("token", "ash", "test", 0.2)
    await link.close()


async def test_an_idempotent_call_waits_for_a_coordinator_that_comes_back(
    harness, tmp_path, impatient
):
    async with harness.fleet(tmp_path, **ONE) as fleet:
        await fleet.coordinator.kill()
        polling = asyncio.create_task(fleet["ash"].take())
        await asyncio.sleep(0.2)
        await fleet.coordinator.start()
        assert (await polling)[1].round == 0


async def test_the_link_is_measured_both_ways(harness, tmp_path):
    async with harness.fleet(tmp_path, names=("ash",)) as fleet:
        found = await fleet["ash"].link.probe(metered=True)
        assert found.metered and found.up_bps > 1e6 and found.down_bps > 1e6
        assert 0 < found.rtt_s < 5


# --- membership ---------------------------------------------------------------------------------


@pytest.fixture
def member(tmp_path):
    """A device's membership, its credential and token under `tmp_path`, and its link."""

    def of(coordinator):
        (tmp_path / "token").write_text(coordinator.token)
        (tmp_path / "agent").mkdir()
        plain = {
            "device": {"name": "ash"},
            "coordinator": {
                "address": coordinator.address,
                "token_file": tmp_path / "token",
                "plain_text": True,
            },
            "data": {"include": ["code"]},
            "state": {"folder": tmp_path / "agent"},
        }
        link = Link(coordinator.address)
        return BearerMembership(AgentConfig.model_validate(plain), link, "test"), link

    return of


async def test_a_device_whose_renewal_is_refused_enrols_again(harness, tmp_path, member):
    """As after a renewal whose answer was lost, or longer away than a credential lives."""
    async with harness.fleet(tmp_path, names=()) as fleet:
        mine, link = member(fleet.coordinator)
        await mine.sign_on()
        link.credential, mine._renew_at = "ash:lost", 0.0
        answer = await mine.call(lambda: link.next_task(None, "", 0.0, 5.0))
        assert answer.kind == pb.NextTaskResponse.KIND_PROFILE
        assert link.credential != "ash:lost" and mine._renew_at > time.time()
        await link.close()


async def test_an_update_finds_its_way_although_the_credential_was_lost(harness, tmp_path, member):
    """A journal is sent before the first poll: it must not need one to enrol again."""
    async with harness.fleet(tmp_path, **ONE) as fleet:
        _, _, a, update = await trained(fleet)
        mine, link = member(fleet.coordinator)
        await mine.sign_on()
        link.credential = "ash:lost"
        digest = hashlib.sha256(update.read_bytes()).hexdigest()
        receipt, outcome = await mine.call(lambda: link.push(a.assignment_id, digest, update))
        assert outcome == "accepted" and digest in receipt
        await link.close()


async def test_two_devices_of_one_name_are_told_to_part(harness, tmp_path, member):
    async with harness.fleet(tmp_path, names=()) as fleet:
        mine, link = member(fleet.coordinator)
        await mine.sign_on()
        with pytest.raises(MembershipError, match="another one uses the name 'ash'"):
            for _ in range(5):
                link.credential = "ash:taken"
                await mine.call(lambda: link.next_task(None, "", 0.0, 5.0))
        await link.close()


async def test_an_outage_at_the_time_to_renew_ends_nothing(
    harness, tmp_path, member, impatient, monkeypatch
):
    monkeypatch.setattr(link_module, "CONTROL_S", 0.3)
    async with harness.fleet(tmp_path, names=()) as fleet:
        mine, link = member(fleet.coordinator)
        await mine.sign_on()
        mine._renew_at, old = 0.0, link.credential
        await fleet.coordinator.kill()
        poll = lambda: link.next_task(None, "", 0.0, 30.0)  # noqa: E731
        polling = asyncio.create_task(mine.call(poll))
        await asyncio.sleep(1.0)
        assert not polling.done(), "the outage ended the agent"
        await fleet.coordinator.start()
        await polling
        await mine.call(poll)
        assert link.credential != old
        await link.close()


async def test_a_download_that_falls_silent_goes_on_over_a_new_connection(tmp_path, monkeypatch):
    monkeypatch.setattr(link_module, "SILENT_S", 0.3)
    data = bytes(range(256)) * 800
    asked = []

    async def fetch(request, context):
        asked.append((context.peer(), request.offset))
        piece = data[request.offset : request.offset + 100_000]
        yield chunk_message(Chunk(request.offset, piece, crc32(piece)))
        if len(asked) == 1:
            await asyncio.sleep(60)  # its connection tries again ever more rarely
        rest = data[request.offset + len(piece) :]
        if rest:
            yield chunk_message(Chunk(request.offset + len(piece), rest, crc32(rest)))

    server = grpc.aio.server()
    handler = grpc.unary_stream_rpc_method_handler(fetch, pb.FetchRequest.FromString, bytes)
    name = pb.DESCRIPTOR.services_by_name["TransferService"].full_name
    server.add_generic_rpc_handlers([
        grpc.method_handlers_generic_handler(name, {"Fetch": handler})
    ])  # fmt: skip
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    link = Link(f"127.0.0.1:{port}")
    blob = BlobRef(hashlib.sha256(data).hexdigest(), len(data), Payload(1, "float32"))
    try:
        path = await asyncio.wait_for(link.fetch(blob, tmp_path), 20)
    finally:
        await link.close()
        await server.stop(0)
    assert path.read_bytes() == data
    assert [offset for _, offset in asked] == [0, 100_000]
    assert asked[0][0] != asked[1][0], "the same connection was asked again"
    assert link.resumes == 1 and link.fetched_bytes == len(data)
