"""Who may join, who is who, and that no secret lies in the database."""

from __future__ import annotations

import stat

import pytest

from coordinator.bearer import BearerEnrolment, join_token
from coordinator.serve import open_state
from protos.contract import Reason, RefusalError

LIFE_S = 100.0


@pytest.fixture
def state(tmp_path):
    return tmp_path / "state"


@pytest.fixture
def enrolment(state):
    records, _ = open_state(state)
    yield BearerEnrolment(records, join_token(state)[0], LIFE_S)
    records.close()


def join(enrolment, state, name="ash", at=0.0):
    """The credential of a device that enrols now."""
    return enrolment.enroll(join_token(state)[0], name, at)[1]


def refused(reason, sentence, call, *arguments):
    with pytest.raises(RefusalError, match=sentence) as told:
        call(*arguments)
    assert told.value.reason is reason


def test_the_join_token_is_made_once_and_for_its_owner_only(state):
    token, path = join_token(state)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert len(token) >= 32 and join_token(state) == (token, path)


def test_an_empty_token_file_lets_nobody_in(state):
    """As a crash between making and writing it would leave it."""
    state.mkdir()
    (state / "join-token").touch(mode=0o644)
    token, path = join_token(state)
    assert len(token) >= 32 and stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_device_is_known_by_the_credential_it_was_given(enrolment, state):
    device_id, credential, expires_in_s = enrolment.enroll(join_token(state)[0], "ash", 0.0)
    assert (device_id, expires_in_s) == ("ash", LIFE_S)
    assert enrolment.authenticate(credential, 1.0) == "ash"


@pytest.mark.parametrize("token", ["", "wrong", "tökén"])
def test_a_wrong_token_is_refused(enrolment, token):
    refused(Reason.BAD_TOKEN, "copy it from the join-token file", enrolment.enroll, token, "ash", 0)


def test_the_token_must_be_whole(enrolment, state):
    token = join_token(state)[0]
    for wrong in (token[:-1], token + "x", token.swapcase()):
        refused(Reason.BAD_TOKEN, "the join token is wrong", enrolment.enroll, wrong, "ash", 0)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "Ash",
        "-ash",
        ".",
        "../ash",
        "a/b",
        "a:b",
        "a b",
        "ash\n",
        "ä",
        "a\0",
        "a" * 64,
        "a" * 9999,
    ],
)
def test_a_name_that_is_no_name_is_refused(enrolment, state, name):
    token = join_token(state)[0]
    refused(Reason.BAD_REQUEST, "is not usable; use lower-case", enrolment.enroll, token, name, 0)


@pytest.mark.parametrize("name", ["a", "0", "pi-5.lab_2", "a" * 63])
def test_a_usable_name_is_taken(enrolment, state, name):
    assert enrolment.authenticate(join(enrolment, state, name), 0.0) == name


@pytest.mark.parametrize(
    "credential", ["", ":", "ash", "ash:", "nobody:secret", "ash:wrong", "ash:wröng", ":secret"]
)
def test_a_credential_that_was_never_given_is_refused(enrolment, state, credential):
    join(enrolment, state)
    refused(Reason.BAD_CREDENTIAL, "not known here; enrol again", enrolment.authenticate,
            credential, 0.0)  # fmt: skip


def test_a_credential_of_one_device_is_none_of_another(enrolment, state):
    secret = join(enrolment, state, "ash").partition(":")[2]
    join(enrolment, state, "birch")
    refused(Reason.BAD_CREDENTIAL, "not known", enrolment.authenticate, f"birch:{secret}", 0.0)


def test_a_credential_expires(enrolment, state):
    credential = join(enrolment, state, at=50.0)
    assert enrolment.authenticate(credential, 50.0 + LIFE_S) == "ash"
    refused(Reason.BAD_CREDENTIAL, "has expired; enrol again", enrolment.authenticate, credential,
            50.1 + LIFE_S)  # fmt: skip


def test_renewing_ends_the_old_credential_and_starts_a_new_life(enrolment, state):
    old = join(enrolment, state)
    new, expires_in_s = enrolment.renew("ash", 90.0)
    assert expires_in_s == LIFE_S and enrolment.authenticate(new, 180.0) == "ash"
    refused(Reason.BAD_CREDENTIAL, "not known", enrolment.authenticate, old, 91.0)


def test_enrolling_again_gives_the_same_device_a_fresh_credential(enrolment, state):
    old = join(enrolment, state)
    new = join(enrolment, state)
    assert new != old and enrolment.authenticate(new, 0.0) == "ash"
    refused(Reason.BAD_CREDENTIAL, "not known", enrolment.authenticate, old, 0.0)


def test_no_secret_is_in_the_database_files(enrolment, state):
    secrets = [join_token(state)[0]]
    secrets += [join(enrolment, state, name).partition(":")[2] for name in ("ash", "birch")]
    secrets.append(enrolment.renew("ash", 1.0)[0].partition(":")[2])
    files = list(state.glob("coordinator.sqlite*"))
    assert files
    kept = b"".join(path.read_bytes() for path in files)
    assert b"birch" in kept, "the devices were to be in these files"
    for secret in secrets:
        assert secret.encode() not in kept, "a secret lies in clear in the database"
