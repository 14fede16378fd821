"""Every call of every service with every kind of certificate that is not the right one.

The calls come from the contract's descriptors: one that is added without a line here fails. What
was found is the table of docs/security.md; after a change, `SKETCHFLEET_WRITE_TABLES=1` writes it.
"""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from coordinator.authority import Authority
from coordinator.certificates import SERVER, device_leaf, key_pem, leaf, new_key, pem
from edge_agent.identity import Pair
from edge_agent.keys import make
from edge_agent.link import RefusedError
from protos.contract import LocalReport, to_message
from protos.identity import REENROL_LABEL
from protos.sketchfleet.v1 import fleet_pb2 as pb
from protos.status import reason_of

PAGE = Path(__file__).resolve().parents[2] / "docs" / "security.md"
BEGIN, END = "<!-- rpc-table begin -->", "<!-- rpc-table end -->"
SECURED = {"server": {"plain_text": False}, "round": {"min_devices": 2}}
ANSWERED = "answered"
NO_CONNECTION = "no connection"
URI = x509.UniformResourceIdentifier


def services():
    """(service, method) of the contract, all of them."""
    return [(s, m) for s in pb.DESCRIPTOR.services_by_name.values() for m in s.methods]


def requests(theirs, blob):
    """What each call asks for: whatever it can name is the first device's."""
    report = LocalReport(assignment_id=theirs, outcome="crashed", message="not mine")
    update = pb.PushedUpdate(assignment_id=theirs, digest="0" * 64, size_bytes=10_000)
    return {
        "FleetService.Renew": pb.RenewRequest(signing_request=named_request("cedar")),
        "FleetService.NextTask": pb.NextTaskRequest(working_on=theirs),
        "FleetService.Report": pb.ReportRequest(report=to_message(report, pb.LocalReport)),
        "FleetService.Probe": pb.ProbeRequest(payload=b"x", last=True, reply_bytes=1),
        "TransferService.Fetch": pb.FetchRequest(digest=blob),
        "TransferService.Push": pb.PushRequest(update=update),
        "EnrolmentService.Enroll": pb.EnrollRequest(token="00000000.x", device_name="cedar"),
        "EnrolmentService.Reenroll": pb.ReenrollRequest(),
        "EnrolmentService.Trust": pb.TrustRequest(),
    }


def named_request(name):
    """A signing request that claims to be another device."""
    uri = x509.SubjectAlternativeName([URI(f"spiffe://sketchfleet/device/{name}")])
    common = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"device:{name}")])
    builder = x509.CertificateSigningRequestBuilder().subject_name(common)
    signed = builder.add_extension(uri, critical=False).sign(new_key(), hashes.SHA256())
    return signed.public_bytes(Encoding.PEM)


async def call(channel, service, method, request):
    """(reason, status, or "answered"; the first answer)."""
    path = f"/{service.full_name}/{method.name}"
    codecs = (lambda m: m.SerializeToString(),
              getattr(pb, method.output_type.name).FromString)  # fmt: skip

    async def one():
        yield request

    try:
        if method.client_streaming and method.server_streaming:
            stream = channel.stream_stream(path, *codecs)(one(), timeout=5)
        elif method.server_streaming:
            stream = channel.unary_stream(path, *codecs)(request, timeout=5)
        elif method.client_streaming:
            return ANSWERED, await channel.stream_unary(path, *codecs)(one(), timeout=5)
        else:
            return ANSWERED, await channel.unary_unary(path, *codecs)(request, timeout=5)
        first = None
        async for message in stream:
            first = first or message
        return ANSWERED, first
    except grpc.aio.AioRpcError as error:
        reason, _ = reason_of(error)
        if reason is None and error.code() is grpc.StatusCode.UNAVAILABLE:
            return NO_CONNECTION, None
        return str(reason or error.code().name), None


def channel_of(port, trust, pair=None):
    """A new connection, with a certificate or without."""
    credentials = grpc.ssl_channel_credentials(trust, *((pair.key, pair.chain) if pair else ()))
    options = [("grpc.use_local_subchannel_pool", 1)]
    return grpc.aio.secure_channel(f"127.0.0.1:{port}", credentials, options=options)


def crafted(authority, name, *, at=None, lifetime_s=86400.0, purpose=None):
    """A pair that the authority's own issuer signed, but that is not on record."""
    key, now = new_key(), time.time() if at is None else at
    if purpose is None:
        found = device_leaf(name, "sketchfleet", key.public_key(), authority._issuer, now,
                            lifetime_s)  # fmt: skip
    else:
        uri = URI(f"spiffe://sketchfleet/device/{name}")
        found = leaf(name, key.public_key(), authority._issuer, now, lifetime_s, purpose, [uri])
    return Pair.new(key_pem(key), pem(found) + authority._chain, lifetime_s)


def forged(folder, name):
    """A pair of an authority of the same name and trust domain, with a key of its own."""
    return crafted(Authority.create(folder, ["127.0.0.1"]), name)


async def every_call(port, trust, pair, asked, plain=False):
    """What each call of the fleet's listener was answered with."""
    found = {}
    for service, method in services():
        name = f"{service.name}.{method.name}"
        if service.name == "EnrolmentService":
            continue
        channel = (grpc.aio.insecure_channel(f"127.0.0.1:{port}") if plain
                   else channel_of(port, trust, pair))  # fmt: skip
        async with channel:
            found[name], _ = await call(channel, service, method, asked[name])
    return found


async def test_every_call_with_every_certificate_that_is_not_the_right_one(harness, tmp_path):
    async with harness.fleet(tmp_path, names=("cedar", "ash"), **SECURED) as fleet:
        authority = fleet.coordinator.enrolment.authority
        taken = {name: task for name, (_, task) in (await fleet.take()).items()}
        # Rows that both were assigned are both's to fetch.
        only = {b.digest for b in taken["cedar"].blobs} - {b.digest for b in taken["ash"].blobs}
        asked = requests(taken["cedar"].assignment_id, min(only))
        port, trust = fleet.coordinator.port, authority.trust
        first, other = (fleet[name].identity.pair for name in ("cedar", "ash"))
        now = time.time()
        table = {
            "plain text": await every_call(port, trust, None, asked, plain=True),
            "none": await every_call(port, trust, None, asked),
            "expired": await every_call(
                port, trust, crafted(authority, "cedar", at=now - 9e4), asked),
            "server's": await every_call(
                port, trust, crafted(authority, "cedar", purpose=SERVER), asked),
            "another CA's": await every_call(port, trust, forged(tmp_path / "ca", "cedar"), asked),
            "not on record": await every_call(port, trust, crafted(authority, "cedar"), asked),
            "another device's": await every_call(port, trust, other, asked),
        }  # fmt: skip
        # What names nothing of another device is answered, to the one that asks.
        mine = table["another device's"]
        answered = {name for name, answer in mine.items() if answer == ANSWERED}
        assert answered == {"FleetService.Renew", "FleetService.Probe"}
        mine["FleetService.Renew"] = "a certificate of its own"
        mine["FleetService.Probe"] = "names nothing"
        async with channel_of(port, trust, other) as channel:
            service = pb.DESCRIPTOR.services_by_name["FleetService"]
            renew = service.methods_by_name["Renew"]
            _, answer = await call(channel, service, renew, asked["FleetService.Renew"])
        assert uris(answer.certificate) == ["spiffe://sketchfleet/device/ash"]
        assert fleet.coordinator.enrolment.revoke("cedar")
        table["revoked"] = await every_call(port, trust, first, asked)
        joining = await joining_calls(fleet, first, tmp_path)

    for certificate, calls in table.items():
        if certificate != "another device's":
            assert ANSWERED not in calls.values(), f"{certificate}: {calls}"
    held(written(table, joining))


def uris(chain):
    found = x509.load_pem_x509_certificate(chain)
    names = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return names.get_values_for_type(URI)


async def joining_calls(fleet, revoked, tmp_path):
    """What the enrolment listener answers to whom: (call, shown, answer)."""
    coordinator = fleet.coordinator
    enrolment, authority = coordinator.enrolment, coordinator.enrolment.authority
    port, trust, ash = coordinator.joining_port, authority.trust, fleet["ash"].identity.pair
    service = pb.DESCRIPTOR.services_by_name["EnrolmentService"]
    asked = requests("", "")
    rows = []

    async def told(name, shown, request):
        async with channel_of(port, trust) as channel:
            answer, _ = await call(channel, service, service.methods_by_name[name], request)
        rows.append((f"EnrolmentService.{name}", shown, answer))
        return answer

    def with_token(token, name="fir"):
        return pb.EnrollRequest(
            token=token.get_secret_value(), device_name=name,
            signing_request=make()["request"].encode(),
        )  # fmt: skip

    spent, ended = enrolment.create_token(), enrolment.create_token()
    enrolment.revoke_token(ended.get_secret_value()[:8])
    old, other = enrolment.create_token(ttl_s=-1.0), enrolment.create_token(name="dogwood")
    assert await told("Enroll", "a token that is good", with_token(spent)) == ANSWERED
    await told("Enroll", "no token", asked["EnrolmentService.Enroll"])
    await told("Enroll", "a token that is used up", with_token(spent, "elder"))
    await told("Enroll", "an expired token", with_token(old, "elder"))
    await told("Enroll", "a revoked token", with_token(ended, "elder"))
    await told("Enroll", "a token for another device", with_token(other, "elder"))
    await told("Enroll", "the name of a device that is there",
               with_token(enrolment.create_token(), "ash"))  # fmt: skip
    await told("Enroll", "the name of a revoked device",
               with_token(enrolment.create_token(), "cedar"))  # fmt: skip

    def proof(pair, signer=None):
        made = make((signer or pair).key.decode(), REENROL_LABEL.decode())
        return pb.ReenrollRequest(
            certificate=pair.chain, signing_request=made["request"].encode(),
            signature=bytes.fromhex(made["signature"]),
        )  # fmt: skip

    assert await told("Reenroll", "a certificate on record and its key", proof(ash)) == ANSWERED
    stranger = Pair.new(key_pem(new_key()), b"", 1.0)
    await told("Reenroll", "nothing", asked["EnrolmentService.Reenroll"])
    await told("Reenroll", "another device's certificate", proof(ash, stranger))
    await told("Reenroll", "a revoked certificate", proof(revoked))
    await told("Reenroll", "another CA's certificate", proof(forged(tmp_path / "ca2", "ash")))
    await told("Reenroll", "a server's certificate",
               proof(crafted(authority, "ash", purpose=SERVER)))  # fmt: skip
    await told("Reenroll", "a certificate that is not on record", proof(crafted(authority, "ash")))
    await told("Trust", "nothing; the answer is no secret", asked["EnrolmentService.Trust"])
    good = ("a token that is good", "a certificate on record and its key",
            "nothing; the answer is no secret")  # fmt: skip
    for name, shown, answer in rows:
        assert (answer == ANSWERED) == (shown in good), f"{name} with {shown}: {answer}"
    tried = {name for name, _, _ in rows}
    assert tried == {f"EnrolmentService.{method.name}" for method in service.methods}
    return rows


def written(table, joining):
    """Both tables in Markdown."""
    calls = sorted(next(iter(table.values())))
    order = [*(c for c in table if c != "another device's"), "another device's"]
    lines = ["| call | " + " | ".join(order) + " |", "|---" * (len(order) + 1) + "|"]
    lines += [f"| `{name}` | " + " | ".join(word(table[c][name]) for c in order) + " |"
              for name in calls]  # fmt: skip
    lines += ["", "At the enrolment listener, which asks for no certificate:", "",
              "| call | shown | answer |", "|---|---|---|"]  # fmt: skip
    lines += [f"| `{name}` | {shown} | {word(answer)} |" for name, shown, answer in joining]
    return "\n".join(lines)


def word(answer):
    return f"`{answer}`" if answer.isupper() else answer


def held(text):
    """Holds the page against what was found, or writes it."""
    page = PAGE.read_text()
    head, rest = page.split(BEGIN)
    before, tail = rest.split(END)
    if os.environ.get("SKETCHFLEET_WRITE_TABLES"):
        PAGE.write_text(f"{head}{BEGIN}\n{text}\n{END}{tail}")
    else:
        assert before.strip() == text, "docs/security.md has another table; write it anew"


def test_no_call_is_left_out():
    """Of a call that is added, the test must be told what to ask for."""
    assert set(requests("a.0.b", "0" * 64)) == {f"{s.name}.{m.name}" for s, m in services()}


@pytest.mark.parametrize("kind", ["revoked", "expired"])
async def test_an_open_stream_ends_with_its_certificate(harness, tmp_path, kind, monkeypatch):
    """Long after the handshake, in the middle of an update."""
    async with harness.fleet(tmp_path, names=("cedar", "ash"), **SECURED) as fleet:
        spec, a = (await fleet.take())["cedar"]
        path = await fleet["cedar"].train(spec, a)
        data = path.read_bytes()
        update = pb.PushedUpdate(assignment_id=a.assignment_id, size_bytes=len(data),
                                 digest=harness.hashlib.sha256(data).hexdigest())  # fmt: skip
        async with fleet["cedar"].pushing(update) as (stream, first):
            assert first.durable_bytes == 0
            half = harness.Chunk(0, data[: len(data) // 2], None, True)
            await stream.write(harness.chunk_message(half))
            assert (await stream.read()).durable_bytes == len(data) // 2
            if kind == "revoked":
                assert fleet.coordinator.enrolment.revoke("cedar")
            else:
                ends = fleet["cedar"].identity.pair.ends_at
                callers = fleet.coordinator.server.callers
                monkeypatch.setattr(callers, "_clock", lambda: ends + 1)
            await stream.write(harness.chunk_message(
                harness.Chunk(len(data) // 2, data[len(data) // 2 :], None, True)))  # fmt: skip
            with pytest.raises(grpc.aio.AioRpcError) as told:
                while await stream.read() is not grpc.aio.EOF:
                    pass
        assert reason_of(told.value)[0].name == {"revoked": "REVOKED",
                                                 "expired": "BAD_CREDENTIAL"}[kind]  # fmt: skip
        assert fleet.coordinator.assignment(0, "cedar").update_digest is None


async def test_a_poll_that_is_held_open_is_not_answered_after_a_revocation(harness, tmp_path):
    sections = {**SECURED, "round": {"min_devices": 3}}
    async with harness.fleet(tmp_path, names=("cedar", "ash"), **sections) as fleet:
        device = fleet["cedar"]
        await device.poll(profile=device.profile)
        polling = asyncio.create_task(device.poll(wait_s=1.0))
        await asyncio.sleep(0.3)
        assert fleet.coordinator.enrolment.revoke("cedar")
        with pytest.raises(RefusedError) as told:
            await polling
        assert told.value.reason.name == "REVOKED"


def test_a_device_cannot_pass_for_the_coordinator(tmp_path):
    """Its certificate is for clients, so that other devices would not speak to it."""
    authority = Authority.create(tmp_path / "ca", ["127.0.0.1"])
    pair = crafted(authority, "cedar")
    found = x509.load_pem_x509_certificate(pair.chain)
    purposes = found.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    basic = found.extensions.get_extension_for_class(x509.BasicConstraints).value
    assert list(purposes) == [ExtendedKeyUsageOID.CLIENT_AUTH] and not basic.ca
    assert found.serial_number.bit_length() > 64 and isinstance(
        found.public_key(), ec.EllipticCurvePublicKey
    )
