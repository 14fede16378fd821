"""What a device knows itself by: the files, what is told where they are not right, the process."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from coordinator.authority import Authority
from coordinator.certificates import requested_key
from edge_agent import access
from edge_agent.checks.identity import certificate
from edge_agent.config import AgentConfig
from edge_agent.identity import EARLIER, IdentityError, Pair
from edge_agent.membership import MembershipError
from edge_agent.signing import fresh_key

ROOT = Path(__file__).resolve().parents[2]
DAY_S = 86400.0
FLEET = {"device": "ash", "address": "fleet.lab:8470", "enrolment": "fleet.lab:8471"}


@pytest.fixture
def config(tmp_path):
    return AgentConfig.model_validate({
        "data": {"include": ["code"]}, "device": {"name": "ash"},
        "state": {"folder": tmp_path / "state"},
    })  # fmt: skip


@pytest.fixture
def joined(config, tmp_path):
    """The identity of a device that has enrolled."""
    authority = Authority.create(tmp_path / "ca", ["fleet.lab"])
    made = fresh_key()
    chain = authority.device_certificate("ash", requested_key(made.request), 7 * DAY_S)[1]
    identity = access.identity_of(config)
    identity.folder.mkdir(parents=True)
    identity.joined(Pair.new(made.key, chain, 7 * DAY_S), authority.trust, FLEET)
    return identity


def test_a_device_that_has_not_joined_is_told_how(config):
    assert not access.has_joined(config)
    for use in (access.address_of, access.open_link):
        with pytest.raises(MembershipError, match="sketchfleet-agent enroll FILE"):
            use(config)
    found = certificate(config, 0.0)
    assert found.state == "fail" and "enroll FILE" in found.mend


def test_enrolling_tells_where_the_coordinator_is_unless_the_owner_does(config, joined):
    assert access.address_of(config) == "fleet.lab:8470"
    given = config.coordinator.model_copy(update={"address": "10.0.0.7:1"})
    assert access.address_of(config.model_copy(update={"coordinator": given})) == "10.0.0.7:1"


def test_a_device_keeps_the_name_it_joined_by(config, joined):
    device = config.device.model_copy(update={"name": "oak"})
    with pytest.raises(MembershipError, match=r"joined as 'ash', but .* 'oak'"):
        access.address_of(config.model_copy(update={"device": device}))


@pytest.mark.parametrize(
    ("at_days", "state", "words"),
    [(0, "ok", "7.0 days left"), (8, "warn", "expired 1.0 days ago"), (-1, "warn", "this clock's")],
)
def test_the_doctor_reads_the_certificate(config, joined, at_days, state, words):
    found = certificate(config, joined.pair.made_at + at_days * DAY_S)
    assert found.state == state and words in found.found, found


def test_the_doctor_minds_who_may_read_the_key(config, joined):
    (joined.folder / "pair.json").chmod(0o644)
    found = certificate(config, time.time())
    assert found.state == "warn" and "may be read by others" in found.found


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"key": 1}'])
@pytest.mark.parametrize("name", ["pair.json", "fleet.json"])
def test_damaged_files_are_told_in_one_sentence(joined, name, text):
    (joined.folder / name).write_text(text)
    with pytest.raises(IdentityError, match="enrol this device again"):
        _ = joined.pair if name == "pair.json" else joined.fleet


def test_roots_that_are_none_are_not_adopted(joined):
    before = joined.trust
    for wrong in (b"", b"nonsense", before[: len(before) // 2]):
        with pytest.raises(IdentityError, match="roots that cannot be read"):
            joined.adopt(wrong)
    assert joined.trust == before


def test_a_few_earlier_pairs_are_kept_and_none_for_ever(joined):
    first = joined.pair
    for number in range(EARLIER + 2):
        joined.renewed(Pair.new(f"key {number}".encode(), b"chain", DAY_S))
        assert joined.is_fresh
        joined.confirm()
    assert len(joined.earlier) == EARLIER and first not in joined.earlier
    joined.renewed(Pair.new(b"old", b"chain", -31 * DAY_S))
    joined.confirm()
    joined.renewed(Pair.new(b"new", b"chain", DAY_S))
    joined.confirm()
    assert b"old" not in [pair.key for pair in joined.earlier]
    assert (joined.folder / "earlier.json").stat().st_mode & 0o777 == 0o600


def test_an_agent_does_not_hold_what_it_needs_once_in_days():
    script = "import sys, edge_agent.agent; print('cryptography' in sys.modules)"
    said = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert said.stdout == "False\n"
