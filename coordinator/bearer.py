"""Who is who over plain text, which is for trials on one machine: one join token, credentials.

The token and the credentials are random secrets; the database keeps only their hashes. What a fleet
uses instead is in `coordinator.enrolment`.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from pathlib import Path

from coordinator.enrolment import check_name
from coordinator.store.records import Records
from protos.contract import Reason, RefusalError
from protos.transfer import make_folder, write_durably


def join_token(state: Path) -> tuple[str, Path]:
    """The join token of this state folder and its file (mode 0600), made on first use."""
    path = state / "join-token"
    if not path.exists() or not path.read_text().strip():  # a crash may have left it empty
        make_folder(state)
        write_durably(path, f"{secrets.token_urlsafe(24)}\n".encode(), mode=0o600)
    return path.read_text().strip(), path


class BearerEnrolment:
    """Issues and checks credentials."""

    def __init__(self, records: Records, token: str, credential_s: float) -> None:
        self._records = records
        self._token = token.encode()
        self._credential_s = credential_s
        # Each chunk of an update is authenticated; a query for each would be most of its time.
        self._known: dict[str, tuple[str, float]] = {}

    def enroll(self, token: str, device_name: str, at: float) -> tuple[str, str, float]:
        """(device id, credential, seconds it is valid). Raises `RefusalError`."""
        if not hmac.compare_digest(token.encode(), self._token):
            raise RefusalError(
                Reason.BAD_TOKEN,
                "the join token is wrong; copy it from the join-token file in the coordinator's "
                "state folder",
            )
        check_name(device_name)
        credential, expires_in_s = self.renew(device_name, at)
        return device_name, credential, expires_in_s

    def renew(self, device_id: str, at: float) -> tuple[str, float]:
        """(fresh credential, seconds it is valid); the one before stops working."""
        credential = secrets.token_urlsafe(32)
        kept = (_hash(credential), at + self._credential_s)
        self._records.put_device(device_id, *kept, at)
        self._known[device_id] = kept
        return f"{device_id}:{credential}", self._credential_s

    def authenticate(self, credential: str, at: float) -> str:
        """The device a credential belongs to. Raises `RefusalError`."""
        device_id, _, secret = credential.partition(":")
        kept = self._known.get(device_id) or self._records.credential(device_id)
        if kept is None or not hmac.compare_digest(kept[0], _hash(secret)):
            raise RefusalError(
                Reason.BAD_CREDENTIAL,
                "this device's credential is not known here; enrol again with the join token",
            )
        if kept[1] < at:
            raise RefusalError(
                Reason.BAD_CREDENTIAL, "this device's credential has expired; enrol again"
            )
        self._known[device_id] = kept
        return device_id


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
