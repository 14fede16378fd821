"""Tokens, approval, certificates: who becomes a device, and that no secret is kept."""

from __future__ import annotations

import itertools
import stat
import threading

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from pydantic import SecretStr

from coordinator.authority import Authority, AuthorityError
from coordinator.certificates import DAY_S, CertificateError, new_key, requested_key
from coordinator.enrolment import DEVICE_NAME, Enrolment
from coordinator.serve import open_state
from coordinator.store.members import Members
from edge_agent.keys import make
from protos.contract import Reason, RefusalError

HERE = "192.0.2.7"


class Place:
    """A state folder with an authority, and a clock that only the test moves."""

    def __init__(self, folder):
        self.folder, self.now = folder, 1_000_000_000.0
        self.records, _ = open_state(folder)
        self.authority = Authority.create(folder / "authority", ["127.0.0.1"], clock=self.clock)
        self.members = Members(self.records)
        self.enrolment = self.with_rules()

    def clock(self):
        return self.now

    def with_rules(self, **rules):
        return Enrolment(self.authority, self.members, lifetime_s=7 * DAY_S, clock=self.clock,
                         **rules)  # fmt: skip

    def join(self, token, name, request=None, peer=HERE, enrolment=None):
        request = request or make()["request"].encode()
        return (enrolment or self.enrolment).enroll(token, name, request, peer)


@pytest.fixture
def place(tmp_path):
    found = Place(tmp_path / "state")
    yield found
    found.members.close()
    found.records.close()


def refused(reason, sentence, call, *arguments):
    with pytest.raises(RefusalError, match=sentence) as told:
        call(*arguments)
    assert told.value.reason is reason


def test_a_device_gets_what_the_fleet_calls_it_and_nothing_it_asks_for(place):
    issued = place.join(place.enrolment.create_token(), "ash")
    leaf, issuer = x509.load_pem_x509_certificates(issued.certificate)
    leaf.verify_directly_issued_by(issuer)
    (root,) = x509.load_pem_x509_certificates(place.authority.trust)
    issuer.verify_directly_issued_by(root)
    assert leaf.subject.rfc4514_string() == "CN=device:ash"
    assert leaf.not_valid_before_utc.timestamp() == place.now - 300
    assert (
        leaf.not_valid_after_utc.timestamp()
        == place.now + 7 * DAY_S
        == (place.now + issued.expires_in_s)
    )


def test_a_token_is_good_for_so_many_devices(place):
    token = place.enrolment.create_token(uses=2)
    for name in ("ash", "oak"):
        assert place.join(token, name) is not None
    refused(Reason.BAD_TOKEN, "is used up", place.join, token, "elm")


def test_of_many_at_once_no_more_get_in_than_the_token_is_good_for(place):
    """Each over a connection of its own, as two coordinators on one database would."""
    token = place.enrolment.create_token(uses=3)
    spent, ready = [], threading.Barrier(8)
    token_id = token.get_secret_value().partition(".")[0]

    def spend(number):
        ready.wait()
        spent.append(place.members.spend(token_id, f"d{number}", place.now))

    threads = [threading.Thread(target=spend, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(spent) == [False] * 5 + [True] * 3


def test_a_token_ends(place):
    token = place.enrolment.create_token(ttl_s=60.0)
    place.now += 61
    refused(Reason.BAD_TOKEN, "has expired", place.join, token, "ash")
    token = place.enrolment.create_token()
    assert place.enrolment.revoke_token(token.get_secret_value()[:8])
    assert not place.enrolment.revoke_token(token.get_secret_value()[:8])
    refused(Reason.BAD_TOKEN, "was revoked", place.join, token, "ash")
    token = place.enrolment.create_token(name="oak")
    refused(Reason.BAD_TOKEN, "named 'oak', this one is 'ash'", place.join, token, "ash")


def test_a_lost_answer_costs_no_second_use(place):
    token, request = place.enrolment.create_token(), make()["request"].encode()
    place.join(token, "ash", request)
    again = place.join(token, "ash", request)
    assert again.device_id == "ash" and len(place.members.all_members()) == 1
    refused(Reason.BAD_REQUEST, "has a device 'ash' already", place.join, token, "ash")


def test_a_name_that_is_taken_stays_taken_until_an_operator_frees_it(place):
    place.join(place.enrolment.create_token(), "ash")
    for token in (place.enrolment.create_token(), place.enrolment.create_token(name="ash")):
        refused(Reason.BAD_REQUEST, "already", place.join, token, "ash")
    assert place.enrolment.revoke("ash")
    refused(Reason.BAD_REQUEST, "already", place.join, place.enrolment.create_token(), "ash")
    old = place.members.member("ash")
    place.join(place.enrolment.create_token(name="ash"), "ash")
    assert place.members.member("ash").key_digest != old.key_digest


def test_a_device_waits_for_approval_where_that_is_asked(place):
    strict, token = place.with_rules(approval=True), place.enrolment.create_token()
    key = make()["request"].encode()
    assert place.join(token, "ash", key, enrolment=strict) is None
    assert place.join(token, "ash", key, enrolment=strict) is None
    assert place.members.member("ash").state == "pending"
    assert strict.approve("ash") and not strict.approve("nobody")
    assert place.join(token, "ash", key, enrolment=strict).device_id == "ash"


def test_guessing_is_slowed_down_by_address(place):
    token = place.enrolment.create_token()
    for _ in range(5):
        wrong = SecretStr(token.get_secret_value()[:9] + "x" * 32)
        refused(Reason.BAD_TOKEN, "the join token is wrong", place.join, wrong, "ash")
    refused(Reason.BAD_TOKEN, "too many wrong", place.join, token, "ash")
    assert place.join(token, "ash", peer="192.0.2.8") is not None
    place.now += 61
    assert place.join(place.enrolment.create_token(), "oak") is not None


def test_no_secret_is_kept_or_shown(place):
    token = place.enrolment.create_token()
    secret = token.get_secret_value().partition(".")[2]
    place.join(token, "ash")
    files = [f for f in place.folder.rglob("*") if f.is_file()]
    assert files and not any(secret.encode() in f.read_bytes() for f in files)
    assert secret not in f"{token!r} {token} {place.members.all_tokens()}"


def test_the_authoritys_files_are_its_owners_alone(place):
    for path in (place.folder / "authority").rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path


@pytest.mark.parametrize("name", ["", "Ash", "-ash", "../ash", "a/b", "a b", "ä", "a\0", "a" * 64])
def test_a_name_that_is_no_name_is_refused(place, name):
    token = place.enrolment.create_token()
    refused(Reason.BAD_REQUEST, "is not usable", place.join, token, name)
    assert not DEVICE_NAME.fullmatch(name) and place.members.all_tokens()[0].uses_left == 1


def test_only_sound_requests_for_p_256_are_signed(place):
    def request(key):
        builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
        return builder.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM)

    sound = request(new_key())
    requested_key(sound)
    lines = sound.split(b"\n")
    lines[-3] = lines[-3][:10] + (b"A" if lines[-3][10:11] != b"A" else b"B") + lines[-3][11:]
    others = [b"", b"x" * 5000, b"\n".join(lines), request(ec.generate_private_key(ec.SECP384R1())),
              request(rsa.generate_private_key(65537, 2048))]  # fmt: skip
    for wrong in others:
        with pytest.raises(CertificateError):
            requested_key(wrong)


# --- the authority ------------------------------------------------------------------------------


def test_a_root_with_a_passphrase_needs_it_for_rotations_only(tmp_path):
    authority = Authority.create(tmp_path / "ca", ["127.0.0.1"], passphrase=b"right")
    assert b"ENCRYPTED" in (tmp_path / "ca" / "0001" / "root.key").read_bytes()
    authority.device_certificate("ash", new_key().public_key(), 60.0)
    for wrong in (None, b"wrong"):
        with pytest.raises(AuthorityError, match="passphrase"):
            authority.rotate(wrong)
    assert authority.generation == "0001"
    authority.rotate(b"right")
    assert authority.generation == "0002"
    assert b"ENCRYPTED" in (tmp_path / "ca" / "0002" / "root.key").read_bytes()


def test_an_interrupted_rotation_changes_nothing(tmp_path, monkeypatch):
    authority = Authority.create(tmp_path / "ca", ["127.0.0.1"])
    before = authority.trust
    real = Authority.rotate.__globals__["_write"]

    def failing(path, data):
        if path.name == "chain.pem":
            raise OSError("the disk is full")
        real(path, data)

    monkeypatch.setitem(Authority.rotate.__globals__, "_write", failing)
    with pytest.raises(OSError, match="full"):
        authority.rotate()
    monkeypatch.undo()
    assert Authority(tmp_path / "ca").trust == before
    authority.rotate()
    assert Authority(tmp_path / "ca").trust.endswith(before)


def test_a_device_that_knows_only_the_old_root_still_knows_the_coordinator(tmp_path):
    authority = Authority.create(tmp_path / "ca", ["127.0.0.1"])
    old = authority.trust
    for _ in range(2):
        authority.rotate()
    _, chain = authority.server_pair()
    certificates = x509.load_pem_x509_certificates(chain)
    for below, above in itertools.pairwise(certificates):
        below.verify_directly_issued_by(above)
    certificates[-1].verify_directly_issued_by(x509.load_pem_x509_certificate(old))
    assert len(x509.load_pem_x509_certificates(authority.trust)) == 3


def test_a_new_issuer_changes_no_root(tmp_path):
    authority = Authority.create(tmp_path / "ca", ["127.0.0.1"])
    before, shown = authority.trust, authority.server_pair()
    authority.replace_issuer()
    assert authority.trust == before and not authority.rotating
    assert authority.server_pair() != shown and authority.root_since == "0001"


def test_finishing_destroys_the_old_keys(tmp_path):
    authority = Authority.create(tmp_path / "ca", ["127.0.0.1"])
    old = authority.trust
    authority.rotate()
    authority.finish()
    assert old not in authority.trust and not authority.rotating
    assert [f.name for f in (tmp_path / "ca").glob("[0-9]*")] == [authority.generation]


def test_there_is_one_authority_in_a_folder(tmp_path):
    with pytest.raises(AuthorityError, match="sketchfleet-coordinator init"):
        Authority(tmp_path / "ca")
    made = Authority.create(tmp_path / "ca", ["127.0.0.1"])
    with pytest.raises(AuthorityError, match="already"):
        Authority.create(tmp_path / "ca", ["127.0.0.1"])
    assert Authority(tmp_path / "ca").trust == made.trust
