"""Joining the fleet: tokens, approval, certificates, renewal, revocation.

What a device asks for counts as little as possible: of its signing request only the key, of its
word only the name, and that only while nobody else has it.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from pydantic import SecretStr

from coordinator.audit import Audit
from coordinator.authority import Authority
from coordinator.certificates import (
    DAY_S,
    MOST_REQUEST_BYTES,
    UNREADABLE,
    CertificateError,
    holder_of,
    key_digest,
    requested_key,
)
from coordinator.store.members import Members, Standing, TokenRecord
from protos.contract import Reason, RefusalError
from protos.identity import REENROL_LABEL

log = logging.getLogger("sketchfleet.coordinator")

DEVICE_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
REENROL_DAYS = 30.0  # after its certificate expired, a device may still prove who it is
WRONG_AT_ONCE, WRONG_EVERY_S = 5, 60.0  # wrong tokens of one address: then one a minute
MOST_ADDRESSES = 4096


@dataclass(frozen=True)
class Issued:
    """A device's certificate with what stands between it and the root (PEM), and for how long."""

    device_id: str
    certificate: bytes
    expires_in_s: float


class Enrolment:
    """Lets devices in. Call from one event loop.

    approval: an operator has to approve each device first.
    """

    def __init__(
        self, authority: Authority, members: Members, *, lifetime_s: float, approval: bool = False,
        clock: Callable[[], float] = time.time,
    ) -> None:  # fmt: skip
        self.authority, self.members = authority, members
        self._lifetime_s, self._approval, self._clock = lifetime_s, approval, clock
        self._audit = Audit(members.records, clock)
        self._wrong: OrderedDict[str, tuple[float, float]] = OrderedDict()

    # --- what operators do ----------------------------------------------------------------------

    def create_token(
        self, *, name: str | None = None, ttl_s: float = DAY_S, uses: int = 1
    ) -> SecretStr:
        """A new token, "id.secret"; nobody can be told the secret again."""
        if name is not None:
            check_name(name)
        now, token_id, secret = self._clock(), secrets.token_hex(4), secrets.token_urlsafe(24)
        with self.members.writing():
            self.members.add_token(
                TokenRecord(token_id, self._hash(secret), name, now, now + ttl_s, uses, uses)
            )
            self._audit.record("token created", token_id=token_id, device_name=name, uses=uses,
                               ttl_s=ttl_s)  # fmt: skip
        return SecretStr(f"{token_id}.{secret}")

    def revoke_token(self, token_id: str) -> bool:
        """Ends a token; False when there is none that was good."""
        return self._told("token revoked", self.members.revoke_token, token_id=token_id)

    def approve(self, device_id: str) -> bool:
        """Lets a device in that asked to, or one of the owner's own PKI that was revoked."""
        return self._told("device approved", self._set, device_id=device_id, state="active")

    def revoke(self, device_id: str) -> bool:
        """Shuts a device out, from its next message on; its name stays taken."""
        return self._told("device revoked", self._set, device_id=device_id, state="revoked")

    def behind(self) -> list[str]:
        """Devices whose newest certificate was signed before the root was replaced."""
        since = self.authority.root_since
        return [m.device_id for m in self.members.all_members()
                if m.state == "active" and (m.generation or "") < since]  # fmt: skip

    def note_rotation(self, what: str) -> None:
        """For the audit log."""
        self._audit.record("authority rotated", what=what, generation=self.authority.generation)

    def _set(self, device_id: str, state: Standing, at: float) -> bool:
        return self.members.set_state(device_id, state, at)

    def _told(self, event: str, change: Callable[..., bool], **facts: Any) -> bool:
        with self.members.writing():
            done = change(**facts, at=self._clock())
            if done:
                self._audit.record(event, **facts)
        return done

    # --- what devices ask for -------------------------------------------------------------------

    def enroll(self, token: SecretStr, name: str, request: bytes, peer: str) -> Issued | None:
        """A certificate for a new device; None while it awaits approval. Raises `RefusalError`.

        Repeating it with the same token and key costs no second use. peer: the caller's address.
        """
        self._hold_back(peer)
        kept = self._checked(token, peer)
        check_name(name)
        key = _key(request)
        digest, now = key_digest(key), self._clock()
        with self.members.writing():
            member = self.members.member(name)
            repeated = member is not None and (member.token_id, member.key_digest) == (
                kept.token_id, digest,
            )  # fmt: skip
            if member is not None and repeated and member.state != "revoked":
                state = member.state
            else:
                # A name that was revoked is free for a token that an operator made for it.
                if member is not None and (member.state != "revoked" or kept.device_name != name):
                    raise RefusalError(
                        Reason.BAD_REQUEST,
                        f"the fleet has a device {name!r} already; choose another [device] name, "
                        "or have the operator revoke it and make a token with --name",
                    )
                self._spend(kept, name, now)
                state = "pending" if self._approval else "active"
                self.members.put_member(name, state, digest, kept.token_id, now)
                self._audit.record("device enrolled", device_id=name, state=state,
                                   token_id=kept.token_id)  # fmt: skip
        return self._issue(name, key, "enrolled") if state == "active" else None

    def renew(self, device_id: str, request: bytes) -> Issued:
        """A certificate for a fresh key of a device that is known. Raises `RefusalError`."""
        return self._issue(device_id, _key(request), "renewed")

    def reenroll(self, certificate: bytes, request: bytes, signature: bytes) -> Issued:
        """The same for a device whose certificate has expired, but whose key it still holds."""
        if len(certificate) > 4 * MOST_REQUEST_BYTES:
            raise RefusalError(Reason.BAD_REQUEST, "the certificate is too long")
        try:
            holder = holder_of(certificate, "spiffe", self.authority.trust_domain)
            old = x509.load_pem_x509_certificate(certificate).public_key()
            if not isinstance(old, ec.EllipticCurvePublicKey):
                raise CertificateError("the certificate has a key of another kind")
            old.verify(signature, REENROL_LABEL + request, ec.ECDSA(hashes.SHA256()))
        except UNREADABLE as error:
            raise RefusalError(
                Reason.BAD_CREDENTIAL, "the proof of the old key is wrong; enrol with a join token"
            ) from error
        state = self.members.standing(holder.device_id, holder.fingerprint)
        if state != "active" or holder.expires_at < self._clock() - REENROL_DAYS * DAY_S:
            raise RefusalError(
                Reason.REVOKED,
                "this certificate is not one of the fleet's any more; ask the operator for a new "
                "join token",
            )
        return self._issue(holder.device_id, _key(request), "re-enrolled")

    def _issue(self, device_id: str, key: ec.EllipticCurvePublicKey, how: str) -> Issued:
        found, chain = self.authority.device_certificate(device_id, key, self._lifetime_s)
        now, ends_at = self._clock(), found.not_valid_after_utc.timestamp()
        fingerprint = found.fingerprint(hashes.SHA256()).hex()
        with self.members.writing():
            self.members.add_certificate(
                fingerprint, device_id, self.authority.generation, now, ends_at,
                now - REENROL_DAYS * DAY_S,
            )  # fmt: skip
            self._audit.record("certificate issued", device_id=device_id, how=how,
                               fingerprint=fingerprint, expires_at=ends_at)  # fmt: skip
        return Issued(device_id, chain, ends_at - now)

    # --- tokens ---------------------------------------------------------------------------------

    def _hash(self, secret: str) -> str:
        return hmac.new(self.authority.token_key, secret.encode(), hashlib.sha256).hexdigest()

    def _checked(self, token: SecretStr, peer: str) -> TokenRecord:
        token_id, _, secret = token.get_secret_value().partition(".")
        kept = self.members.token(token_id)
        right = hmac.compare_digest("" if kept is None else kept.secret_hash, self._hash(secret))
        if kept is None or not right:
            self._note_wrong(peer)
            log.warning("wrong join token", extra={"peer": peer})
            raise RefusalError(
                Reason.BAD_TOKEN, "the join token is wrong; ask the operator for a join file"
            )
        return kept

    def _spend(self, kept: TokenRecord, name: str, now: float) -> None:
        if self.members.spend(kept.token_id, name, now):
            return
        why = "is used up"
        if kept.revoked_at is not None:
            why = "was revoked"
        elif kept.expires_at <= now:
            why = "has expired"
        elif kept.device_name not in (None, name):
            why = f"is for a device named {kept.device_name!r}, this one is {name!r}"
        raise RefusalError(
            Reason.BAD_TOKEN, f"the join token {why}; ask the operator for another join file"
        )

    def _hold_back(self, peer: str) -> None:
        """Refuses an address that sent wrong tokens, until it may try again."""
        debt, at = self._wrong.get(peer, (0.0, 0.0))
        if debt - (self._clock() - at) / WRONG_EVERY_S > WRONG_AT_ONCE - 1:
            raise RefusalError(
                Reason.BAD_TOKEN,
                "too many wrong join tokens came from this address; wait a minute and try again",
            )

    def _note_wrong(self, peer: str) -> None:
        now = self._clock()
        debt, at = self._wrong.pop(peer, (0.0, now))
        self._wrong[peer] = (max(0.0, debt - (now - at) / WRONG_EVERY_S) + 1, now)
        while len(self._wrong) > MOST_ADDRESSES:
            self._wrong.popitem(last=False)


def check_name(name: str) -> None:
    """Raises `RefusalError` for what cannot be a device's name."""
    if not DEVICE_NAME.fullmatch(name):
        raise RefusalError(
            Reason.BAD_REQUEST,
            f"device name {name[:64]!r} is not usable; use lower-case letters, digits, "
            "dots, dashes and underscores, 63 at most",
        )


def _key(request: bytes) -> ec.EllipticCurvePublicKey:
    try:
        return requested_key(request)
    except CertificateError as error:
        raise RefusalError(Reason.BAD_REQUEST, f"{error}; update the agent") from error
