"""What an operator hands to the owner of a device: where to join, the token, whom to trust.

As a file (JSON, about 1 kB) it carries the roots themselves; the short form, for a terminal, only
the SHA-256 of a root's public key, by which the device knows the root when it is sent it.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from pydantic import SecretStr

from profiles.errors import SketchfleetError
from profiles.settings import host_of

SHORT_FORM = re.compile(
    r"(?P<token>[a-z0-9]{8}\.[A-Za-z0-9_-]{20,})@(?P<address>[^#\s]+)#sha256:(?P<pin>[\w-]{43})"
)


# What reading somebody else's certificate may raise.
UNREADABLE = (ValueError, UnsupportedAlgorithm, x509.InvalidVersion)


class InvitationError(SketchfleetError):
    """A join file or its short form cannot be used."""


@dataclass(frozen=True)
class Invitation:
    """`token` is "id.secret"; `address` the enrolment listener's; `trust` PEM, empty if pinned."""

    token: SecretStr
    address: str
    pin: str
    trust: bytes = field(default=b"", repr=False)

    @property
    def short_form(self) -> str:
        """One word, secret included: for the operator's terminal, never for a log."""
        return f"{self.token.get_secret_value()}@{self.address}#sha256:{self.pin}"

    def to_json(self) -> str:
        """The join file, secret included."""
        plain = {"sketchfleet": "join", "address": self.address,
                 "token": self.token.get_secret_value(), "trust": self.trust.decode()}  # fmt: skip
        return json.dumps(plain, indent=1) + "\n"


def read_invitation(given: str) -> Invitation:
    """A join file by its path, or a short form; "-" for either on standard input.

    Raises `InvitationError`.
    """
    piped = sys.stdin.read() if given == "-" else None
    if found := SHORT_FORM.fullmatch((piped or given).strip()):
        return _checked(Invitation(SecretStr(found["token"]), found["address"], found["pin"]))
    try:
        plain = json.loads(Path(given).read_text() if piped is None else piped)
        trust = str(plain["trust"]).encode()
        token, address = SecretStr(str(plain["token"])), str(plain["address"])
        return _checked(Invitation(token, address, pin_of(trust), trust))
    except OSError as error:
        raise InvitationError(
            f"{Path(given).name[:40]!r} is no join file that can be read ({error.strerror}) and no "
            "short form; make one with `sketchfleet-coordinator token create`"
        ) from error
    except (*UNREADABLE, KeyError, TypeError, RecursionError) as error:
        source = "standard input" if given == "-" else given
        raise InvitationError(
            f"{source} is no join file; copy the one of `sketchfleet-coordinator token create` "
            "whole"
        ) from error


def _checked(invitation: Invitation) -> Invitation:
    try:
        host_of(invitation.address)
    except ValueError as error:
        raise InvitationError(
            f"{invitation.address} is no address: it {error}; ask for another join token"
        ) from error
    return invitation


def pin_of(trust: bytes) -> str:
    """SHA-256 of the first root's SubjectPublicKeyInfo, base64url. Raises `ValueError`."""
    return _pin(x509.load_pem_x509_certificates(trust)[0])


def pinned(trust: bytes, pin: str) -> bytes:
    """The one root among these whose key has this digest, PEM. Raises `InvitationError`."""
    with contextlib.suppress(*UNREADABLE):
        for root in x509.load_pem_x509_certificates(trust):
            if _pin(root) == pin:
                return root.public_bytes(Encoding.PEM)
    raise InvitationError(
        "what answers there is not the fleet that the join token belongs to (its authority has "
        "another key); check the address, and who answers in its place"
    )


def _pin(root: x509.Certificate) -> str:
    public = root.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return base64.urlsafe_b64encode(hashlib.sha256(public).digest()).decode().rstrip("=")
