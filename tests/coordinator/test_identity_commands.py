"""init, token, devices, approve, revoke, rotate-ca: what they do, and one sentence where they do
not.
"""

from __future__ import annotations

import json

import pytest

from coordinator.authority import Authority
from coordinator.cli import main
from coordinator.enrolment import Enrolment
from coordinator.store.members import Members
from coordinator.store.records import Records
from edge_agent.keys import make
from protos.invitation import InvitationError, read_invitation


@pytest.fixture
def command(tmp_path, capsys):
    """Runs a command on the state folder: (exit code, what it printed, its complaint)."""

    def run(*words, state=tmp_path / "state"):
        code = main([*map(str, words), "--state", str(state)])
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


@pytest.fixture
def fleet(command, tmp_path):
    """A state folder with an authority, and a way to let devices in."""
    assert command("init", "--name", "127.0.0.1")[0] == 0
    records = Records(tmp_path / "state" / "coordinator.sqlite")
    members = Members(records)
    enrolment = Enrolment(Authority(tmp_path / "state" / "authority"), members, lifetime_s=86400.0)

    def join(word, name):
        token = read_invitation(word).token
        return enrolment.enroll(token, name, make()["request"].encode(), "here")

    yield join
    members.close()
    records.close()


def token(command, *words):
    code, out, err = command("token", "create", *words)
    assert code == 0, err
    return out.splitlines()[-1]


def test_init_makes_an_authority_once(command, tmp_path):
    code, out, _ = command("init", "--name", "fleet.lab", "--name", "10.0.0.7")
    assert code == 0 and "sha256:" in out and "fleet.lab, 10.0.0.7" in out
    trust = Authority(tmp_path / "state" / "authority").trust
    code, out, _ = command("init", "--name", "other.lab")
    assert code == 0 and "the authority stays" in out
    again = Authority(tmp_path / "state" / "authority")
    assert again.trust == trust and again.names == ("other.lab",)


@pytest.mark.parametrize("words", [("--trust-domain", "A b"), ("--passphrase-file", "none")])
def test_init_says_what_is_wrong(command, words, tmp_path):
    code, _, err = command("init", *words)
    assert code == 1 and err.count("\n") == 1
    assert not (tmp_path / "state" / "authority" / "current").exists()


def test_a_token_needs_an_authority_first(command):
    code, _, err = command("token", "create")
    assert code == 1 and "sketchfleet-coordinator init" in err and err.count("\n") == 1


def test_a_join_file_is_private_and_whole(command, fleet, tmp_path):
    word = token(command, "--out", tmp_path / "join.json", "--address", "[::1]:9000")
    assert (tmp_path / "join.json").stat().st_mode & 0o777 == 0o600
    full, short = read_invitation(str(tmp_path / "join.json")), read_invitation(word)
    assert (full.token, full.address, full.pin) == (short.token, "[::1]:9000", short.pin)
    assert full.trust and not short.trust
    assert full.token.get_secret_value() not in repr(full)


@pytest.mark.parametrize("text", ["", "{", "{}", '{"token": "a.b", "address": "x", "trust": ""}'])
def test_what_is_no_join_file_is_told(tmp_path, text):
    (tmp_path / "join.json").write_text(text)
    with pytest.raises(InvitationError, match="is no join file"):
        read_invitation(str(tmp_path / "join.json"))
    with pytest.raises(InvitationError, match="token create"):
        read_invitation("no-such-file")


def test_tokens_are_listed_without_their_secrets_and_end(command, fleet):
    word = token(command, "--uses", "2", "--ttl", "30m", "--name", "ash")
    token_id, secret = read_invitation(word).token.get_secret_value().split(".")
    code, out, _ = command("token", "list", "--json")
    (listed,) = json.loads(out)
    assert (listed["id"], listed["device"], listed["uses_left"]) == (token_id, "ash", 2)
    assert listed["state"] == "good" and 1700 < listed["expires_in_s"] <= 1800
    assert secret not in out + command("token", "list")[1]
    assert command("token", "revoke", token_id)[0] == 0
    assert json.loads(command("token", "list", "--json")[1])[0]["state"] == "revoked"
    code, _, err = command("token", "revoke", token_id)
    assert code == 1 and "token list" in err


def test_devices_show_who_is_in_and_revoke_who_is_not_any_more(command, fleet):
    fleet(token(command), "ash")
    (device,) = json.loads(command("devices", "--json")[1])
    assert (device["device_id"], device["state"], device["generation"]) == ("ash", "active", "0001")
    assert command("revoke", "ash")[1] == "ash is revoked\n"
    assert json.loads(command("devices", "--json")[1])[0]["state"] == "revoked"
    assert command("approve", "ash")[0] == 0
    code, _, err = command("revoke", "nobody")
    assert code == 1 and "no device 'nobody'" in err


def test_a_rotation_is_finished_once_everybody_has_renewed(command, fleet):
    fleet(token(command), "ash")
    code, _, err = command("rotate-ca", "--finish")
    assert code == 1 and "no rotation is going on" in err
    assert command("rotate-ca")[0] == 0
    code, _, err = command("rotate-ca", "--finish")
    assert code == 1 and "1 devices have not renewed since: ash" in err
    fleet(token(command), "oak")  # of the new authority
    assert command("revoke", "ash")[0] == 0
    assert command("rotate-ca", "--finish")[0] == 0
    assert command("rotate-ca", "--issuer")[0] == 0


def test_a_passphrase_is_asked_for_at_rotations(command, tmp_path):
    (tmp_path / "words").write_text("open sesame\n")
    assert command("init", "--name", "here", "--passphrase-file", tmp_path / "words")[0] == 0
    code, _, err = command("rotate-ca")
    assert code == 1 and "--passphrase-file" in err and err.count("\n") == 1
    assert command("rotate-ca", "--passphrase-file", tmp_path / "words")[0] == 0
