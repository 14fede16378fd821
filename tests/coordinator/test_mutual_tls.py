"""A fleet over mutual TLS in one process: joining, renewing, rotating, coming back."""

from __future__ import annotations

import asyncio
import dataclasses
import socket
import ssl
import time
from urllib.parse import unquote

import grpc
import h2.connection
import pytest

from coordinator.authority import SERVER_DAYS, Authority
from coordinator.callers import device_of_call
from coordinator.certificates import CLIENT, SERVER, Signer, authority, host_names, key_pem, leaf

from coordinator.certificates import new_key, pem  # isort: skip
from coordinator.config import PkiSection
from coordinator.listeners import _authority_credentials, _pki_credentials
from coordinator.service import refuse
from coordinator.store.schema import certificates
from coordinator.throttle import Throttle
from edge_agent import certified
from edge_agent.certified import CertifiedMembership, OwnPkiMembership, own_credentials
from edge_agent.identity import Pair
from edge_agent.joining import enroll
from edge_agent.link import Link, LinkError, RefusedError
from edge_agent.membership import MembershipError
from edge_agent.returning import enroll_again
from protos.contract import Reason
from protos.invitation import InvitationError, read_invitation
from protos.sketchfleet.v1 import fleet_pb2 as pb

SECURED = {"server": {"plain_text": False}}
WAIT = pb.NextTaskResponse.KIND_PROFILE


def poll(device):
    return lambda: device.link.next_task(None, "", 0.0, 5.0)


def member(device):
    """The device with the membership that an agent has."""
    return CertifiedMembership(device.identity, device.link)


async def test_a_whole_run_over_mutual_tls(harness, tmp_path):
    async with harness.fleet(tmp_path, mirrored=True, **SECURED) as fleet:
        done = await fleet.finish()
        assert all(len(assignments) >= 3 for assignments in done.values())
        coordinator = fleet.coordinator
        for device in fleet.devices.values():
            assert (device.identity.folder / "pair.json").stat().st_mode & 0o777 == 0o600
        assert len(coordinator.server.members.all_members()) == 3


async def test_a_short_form_is_as_good_as_a_join_file(harness, tmp_path):
    async with harness.fleet(tmp_path, names=(), **SECURED) as fleet:
        device = harness.Device("ash", fleet.coordinator.address, tmp_path / "ash", None)
        word = fleet.coordinator.invitation().short_form
        assert len(word) < 140
        await device.join(read_invitation(word))
        assert (await device.poll()).kind == WAIT
        await device.link.close()
        (tmp_path / "join.json").write_text(fleet.coordinator.invitation().to_json())
        other = harness.Device("oak", fleet.coordinator.address, tmp_path / "oak", None)
        await other.join(read_invitation(str(tmp_path / "join.json")))
        assert (await other.poll()).kind == WAIT
        await other.link.close()


async def test_a_short_form_gives_its_token_to_its_own_fleet_alone(harness, tmp_path):
    """Whoever answers in its place, with whatever certificate, learns nothing."""
    async with (
        harness.fleet(tmp_path / "a", names=(), **SECURED) as fleet,
        harness.fleet(tmp_path / "b", names=(), **SECURED) as other,
    ):
        there = f"127.0.0.1:{other.coordinator.joining_port}"
        device = harness.Device("ash", "127.0.0.1:1", tmp_path / "ash", None)
        whole = dataclasses.replace(fleet.coordinator.invitation(), address=there)
        with pytest.raises(InvitationError, match="not the fleet"):
            await device.join(read_invitation(whole.short_form))
        with pytest.raises(LinkError, match="not the fleet"):
            await device.join(whole)
        assert not device.identity.exists
        await device.link.close()


async def test_a_certificate_is_renewed_with_a_fresh_key(harness, tmp_path):
    async with harness.fleet(tmp_path, names=("ash",), **SECURED) as fleet:
        ash = fleet["ash"]
        mine, before = member(ash), ash.identity.pair
        await mine.sign_on()
        assert mine._renew_at > time.time() + 4 * 86400, "two thirds of seven days"
        await mine.call(poll(ash))
        assert ash.identity.pair == before
        mine._renew_at = 0.0
        await asyncio.gather(*(mine.call(poll(ash)) for _ in range(3)))
        after = ash.identity.pair
        assert after.key != before.key and not ash.identity.is_fresh
        assert mine._renew_at > time.time() and repr(after) == "Pair(***)"
        await mine.call(poll(ash))


async def test_a_fresh_certificate_that_gets_no_answer_is_given_up(harness, tmp_path, monkeypatch):
    monkeypatch.setattr(certified, "PROOF_S", 0.5)
    async with harness.fleet(tmp_path, names=("ash",), **SECURED) as fleet:
        ash = fleet["ash"]
        mine, before = member(ash), ash.identity.pair
        await mine.sign_on()
        stranger = Authority.create(tmp_path / "other", ["127.0.0.1"])
        real = ash.link.renew_certificate

        async def spoiled(request):
            answer = await real(request)
            key = new_key().public_key()
            answer.certificate = stranger.device_certificate("ash", key, 86400.0)[1]
            return answer

        ash.link.renew_certificate = spoiled
        mine._renew_at = 0.0
        await mine.call(poll(ash))
        assert ash.identity.pair == before and not ash.identity.is_fresh
        assert mine._renew_at > time.time()


async def test_a_device_that_slept_comes_back_by_its_key(harness, tmp_path, monkeypatch):
    async with harness.fleet(tmp_path, names=("ash",), **SECURED) as fleet:
        ash, enrolment = fleet["ash"], fleet.coordinator.enrolment
        ends = ash.identity.pair.ends_at
        mine = member(ash)
        await mine.sign_on()
        old = ash.identity.pair
        # As if its certificate had expired: of this one, on record, nothing else is known.
        ash.link.valid_until = 0.0
        fleet.coordinator.server.callers._clock = lambda: ends + 1
        with pytest.raises(RefusedError, match="expired"):
            await ash.link.next_task(None, "", 0.0, 5.0)
        fleet.coordinator.server.callers._clock = time.time
        await mine._regain("it slept")
        assert ash.identity.pair.key != old.key
        assert (await mine.call(poll(ash))).kind == WAIT
        assert enrolment.revoke("ash")
        with pytest.raises(RefusedError) as told:
            await asyncio.to_thread(enroll_again, ash.identity)
        assert told.value.reason is Reason.REVOKED
        with pytest.raises(MembershipError, match="ask the operator"):
            await mine.call(poll(ash))


async def test_a_coordinator_restored_from_a_backup_still_knows_its_devices(harness, tmp_path):
    """It has no record of the certificates that were issued since."""
    async with harness.fleet(tmp_path, names=("ash",), **SECURED) as fleet:
        ash, members = fleet["ash"], fleet.coordinator.server.members
        mine = member(ash)
        await mine.sign_on()
        with members.records.transaction() as db:
            recorded = db.execute(certificates.select()).all()
        for _ in range(2):
            mine._renew_at = 0.0
            await mine.call(poll(ash))
        with members.writing() as db:
            db.execute(certificates.delete().where(
                certificates.c.fingerprint.not_in([row.fingerprint for row in recorded])
            ))  # fmt: skip
        before = ash.identity.pair
        assert (await mine.call(poll(ash))).kind == WAIT
        assert ash.identity.pair.key != before.key
        assert fleet.coordinator.enrolment.revoke("ash")
        with pytest.raises(MembershipError, match="not one of the fleet's any more"):
            await mine.call(poll(ash))


async def test_a_root_is_rotated_under_a_fleet_that_works(harness, tmp_path, monkeypatch):
    """Nobody enrols again, nothing restarts; a device that slept through it comes back."""
    async with harness.fleet(tmp_path, names=("ash", "cedar"), **SECURED) as fleet:
        ash, cedar = fleet["ash"], fleet["cedar"]
        awake, enrolment = member(ash), fleet.coordinator.enrolment
        await awake.sign_on()
        before = ash.identity.trust
        # As the command does it, in a process of its own.
        Authority(fleet.coordinator.config.server.state / "authority").rotate()
        assert enrolment.behind() == ["ash", "cedar"]
        await awake.call(poll(ash))
        assert before in ash.identity.trust and ash.identity.trust != before
        awake._renew_at = 0.0
        await awake.call(poll(ash))
        assert enrolment.behind() == ["cedar"]
        Authority(fleet.coordinator.config.server.state / "authority").finish()
        await awake.call(poll(ash))  # over the connection that was there
        assert before not in ash.identity.trust
        await ash.link.secure(ash.identity.credentials)
        assert (await awake.call(poll(ash))).kind == WAIT
        # Its certificate is of the root that nobody trusts any more, and it trusts no other.
        sleeper = harness.Device("cedar", fleet.coordinator.address, cedar.folder, None)
        sleeper.link = Link(fleet.coordinator.address, None, sleeper.identity.credentials)
        with pytest.raises(LinkError):
            await sleeper.link.next_task(None, "", 0.0, 0.3)
        await asyncio.to_thread(enroll_again, sleeper.identity)
        await sleeper.link.secure(sleeper.identity.credentials)
        assert (await sleeper.poll()).kind == WAIT
        await sleeper.link.close()


async def test_approval_lets_a_device_in(harness, tmp_path, monkeypatch):
    monkeypatch.setattr("edge_agent.joining.ASK_AGAIN_S", 0.1)
    sections = {"server": {"plain_text": False, "approval": True}}
    async with harness.fleet(tmp_path, names=(), **sections) as fleet:
        device = harness.Device("ash", fleet.coordinator.address, tmp_path / "ash", None)
        told = []
        joining = asyncio.create_task(asyncio.to_thread(
            enroll, device.identity, fleet.coordinator.invitation(), "ash", "test",
            lambda: told.append(True), 10.0,
        ))  # fmt: skip
        while not told:
            await asyncio.sleep(0.02)
        assert not device.identity.exists
        assert fleet.coordinator.enrolment.approve("ash")
        await joining
        assert told == [True] and device.identity.exists
        await device.link.close()


# --- certificates of the owner's own PKI --------------------------------------------------------


class OwnPki:
    """A root of the owner's, and what it signed for a coordinator and its devices."""

    def __init__(self, folder):
        self.folder, self.key = folder, new_key()
        folder.mkdir()
        root = authority("own", self.key.public_key(), None, self.key, time.time(), 30, None)
        self.signer = Signer(root, self.key)
        (folder / "ca.pem").write_bytes(pem(root))
        self.sign("server", SERVER, host_names(["127.0.0.1"]))

    def sign(self, name, purpose, names):
        key = new_key()
        found = leaf(name, key.public_key(), self.signer, time.time(), 86400.0, purpose, names)
        (self.folder / f"{name}.pem").write_bytes(pem(found))
        (self.folder / f"{name}.key").write_bytes(key_pem(key))
        return self.of(name)

    def of(self, name):
        return (self.folder / "ca.pem", self.folder / f"{name}.pem", self.folder / f"{name}.key")

    @property
    def section(self):
        ca, certificate, key = self.of("server")
        return PkiSection(ca=ca, certificate=certificate, key=key, device_name="dns")


async def test_a_fleet_of_the_owners_own_pki(harness, tmp_path):
    own = OwnPki(tmp_path / "pki")
    async with harness.fleet(tmp_path, names=(), pki=own.section.model_dump(), **SECURED) as fleet:
        files = own.sign("ash", CLIENT, host_names(["ash"]))
        device = harness.Device("ash", fleet.coordinator.address, tmp_path / "ash", None)
        device.link = Link(fleet.coordinator.address, None, own_credentials(*files))
        mine = OwnPkiMembership(device.link, files)
        assert (await mine.call(poll(device))).kind == WAIT
        own.sign("ash", CLIENT, host_names(["ash"]))  # something renewed it
        assert (await mine.call(poll(device))).kind == WAIT
        members = fleet.coordinator.server.members
        assert [m.device_id for m in members.all_members()] == ["ash"]
        assert members.set_state("ash", "revoked", time.time())
        with pytest.raises(MembershipError, match="revoked"):
            await mine.call(poll(device))
        await device.link.close()
        for name, names in (("Bad Name", ["oak"]), ("two", ["oak", "elm"])):
            files = own.sign(name, CLIENT, host_names(names if name == "two" else ["x" * 63 + "."]))
            link = Link(fleet.coordinator.address, None, own_credentials(*files))
            with pytest.raises(RefusedError):
                await link.next_task(None, "", 0.0, 2.0)
            await link.close()


def test_what_a_device_holds_shows_no_key():
    assert "secret" not in repr(Pair(b"secret", b"chain", 0.0, 1.0))


# --- what is spoken -----------------------------------------------------------------------------


def grpc_status(port, pair, trust, folder, newest):
    """What a poll over TLS up to `newest` is answered: (version spoken, grpc-status, message).

    gRPC's clients cannot be kept from TLS 1.3, so this one speaks HTTP/2 by itself.
    """
    files = folder / "chain.pem", folder / "key.pem"
    for file, content in zip(files, (pair.chain, pair.key), strict=True):
        file.write_bytes(content)
    context = ssl.create_default_context(cadata=trust.decode())
    context.maximum_version = newest
    context.load_cert_chain(*files)
    context.set_alpn_protocols(["h2"])
    path = "/sketchfleet.v1.FleetService/NextTask"
    with (
        socket.create_connection(("127.0.0.1", port), 5) as plain,
        context.wrap_socket(plain, server_hostname="127.0.0.1") as line,
    ):
        http = h2.connection.H2Connection()
        http.initiate_connection()
        http.send_headers(1, [
            (":method", "POST"), (":scheme", "https"), (":path", path), (":authority", "127.0.0.1"),
            ("content-type", "application/grpc"), ("te", "trailers"),
        ])  # fmt: skip
        http.send_data(1, bytes(5), end_stream=True)  # an empty message
        line.sendall(http.data_to_send())
        said = {}
        while "grpc-status" not in said and (data := line.recv(65536)):
            for event in http.receive_data(data):
                said.update((k.decode(), v.decode()) for k, v in getattr(event, "headers", ()))
            line.sendall(http.data_to_send())
        return line.version(), int(said["grpc-status"]), unquote(said.get("grpc-message", ""))


async def test_nothing_older_than_tls_1_3_is_answered(harness, tmp_path):
    async with harness.fleet(tmp_path, names=("ash",), **SECURED) as fleet:
        authority = fleet.coordinator.enrolment.authority
        asked = fleet.coordinator.port, fleet["ash"].identity.pair, authority.trust, tmp_path
        old = await asyncio.to_thread(grpc_status, *asked, ssl.TLSVersion.TLSv1_2)
        new = await asyncio.to_thread(grpc_status, *asked, ssl.TLSVersion.TLSv1_3)
    assert old == ("TLSv1.2", grpc.StatusCode.UNAUTHENTICATED.value[0],
                   "only TLS 1.3 is spoken here")  # fmt: skip
    assert new[0] == "TLSv1.3" and "TLS" not in new[2]


def test_certificates_are_handed_to_grpc_only_when_they_changed(tmp_path, monkeypatch):
    """Handed over anew for every handshake, they killed the process under a flood."""
    taken = []
    monkeypatch.setattr(
        grpc, "dynamic_ssl_server_credentials",
        lambda first, fetch, require_client_authentication: taken.append(fetch),
    )  # fmt: skip
    at = [time.time()]
    authority = Authority.create(tmp_path / "ca", ["127.0.0.1"], clock=lambda: at[0])
    throttle = Throttle(device_of_call, refuse)
    _authority_credentials(authority, throttle, mutual=True)
    own = OwnPki(tmp_path / "pki")
    _pki_credentials(own.section, throttle)
    of_authority, of_pki = taken
    assert of_authority() is None and of_pki() is None
    at[0] += SERVER_DAYS * 86400 * 0.9  # the listeners' certificate is renewed
    own.sign("server", SERVER, host_names(["127.0.0.1"]))
    assert of_authority() is not None and of_pki() is not None
    assert throttle.connections.dialling._begun == 4, "handshakes are not counted"
    assert of_authority() is None and of_pki() is None
