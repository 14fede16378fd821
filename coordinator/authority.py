"""The fleet's certificate authority: a root, and the issuer below it that signs from day to day.

Everything lies in one folder. What belongs together lies in a generation's folder of its own, and
the file `current` names the one that counts: a rotation is in force whole or not at all, and a
coordinator that serves meanwhile sees it at the next handshake. The root's key is used for nothing
but rotations and may have a passphrase.

A new root is also signed by the one before it ("cross"). The coordinator shows that certificate
along with its own, so that a device that knows only the old root, however long it slept, still
knows the coordinator, and is told of the new root.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from coordinator.certificates import (
    DAY_S,
    SERVER,
    Signer,
    authority,
    device_leaf,
    host_names,
    key_pem,
    leaf,
    new_key,
    pem,
)
from profiles.errors import SketchfleetError
from protos.transfer import make_folder, write_durably

ROOT_DAYS, ISSUER_DAYS, SERVER_DAYS = 3650.0, 730.0, 30.0
RENEW_AT = 2 / 3  # of a life
_write = partial(write_durably, mode=0o600)


class AuthorityError(SketchfleetError):
    """The authority cannot be used as asked."""


class Authority:
    """An authority that exists. Raises `AuthorityError` where there is none."""

    def __init__(self, folder: Path, clock: Callable[[], float] = time.time) -> None:
        self._folder, self._clock = folder, clock
        self.generation = ""
        self._server: tuple[bytes, bytes] | None = None
        self._server_until = 0.0
        self._lock = threading.RLock()  # handshakes happen in threads of gRPC's
        self.refresh()

    @classmethod
    def create(
        cls, folder: Path, names: Sequence[str], trust_domain: str = "sketchfleet",
        passphrase: bytes | None = None, clock: Callable[[], float] = time.time,
    ) -> Authority:  # fmt: skip
        """A new authority in `folder`, for a coordinator of these names and addresses."""
        if (folder / "current").exists():
            raise AuthorityError(f"{folder} holds an authority already; it is left as it is")
        try:
            make_folder(folder)
            folder.chmod(0o700)
        except OSError as error:
            raise AuthorityError(f"{folder} cannot be made: {error.strerror}") from error
        _write(folder / "token.key", secrets.token_bytes(32))
        write_settings(folder, names, trust_domain)
        root = _root(trust_domain, 1, clock())
        _write_generation(folder, 1, root, passphrase, b"", b"", clock())
        return cls(folder, clock)

    def refresh(self) -> None:
        """Reads the generation that counts now, if it is another one."""
        with self._lock:
            try:
                current = (self._folder / "current").read_text().strip()
                if current != self.generation:
                    self._read(current)
            except FileNotFoundError as error:
                raise AuthorityError(
                    f"there is no certificate authority in {self._folder}; make one with "
                    "`sketchfleet-coordinator init`"
                ) from error
            except (OSError, ValueError, KeyError) as error:
                raise AuthorityError(
                    f"the authority in {self._folder} is damaged: {error}"
                ) from error

    def _read(self, generation: str) -> None:
        here = self._folder / generation
        plain = json.loads((self._folder / "authority.json").read_text())
        self.names, self.trust_domain = tuple(plain["names"]), str(plain["trust_domain"])
        self.token_key = (self._folder / "token.key").read_bytes()
        self.trust = (here / "trust.pem").read_bytes()
        self.trust_digest = hashlib.sha256(self.trust).digest()
        self._chain = (here / "chain.pem").read_bytes()
        self._issuer = _signer(here, "issuer", None)
        self.generation, self._server = generation, None

    @property
    def issuer_ends_at(self) -> float:
        """Unix s."""
        return self._issuer.certificate.not_valid_after_utc.timestamp()

    def device_certificate(
        self, device_id: str, key: ec.EllipticCurvePublicKey, lifetime_s: float
    ) -> tuple[x509.Certificate, bytes]:
        """(the certificate, with what stands between it and the root as PEM)."""
        with self._lock:
            self.refresh()
            found = device_leaf(
                device_id, self.trust_domain, key, self._issuer, self._clock(), lifetime_s
            )
            return found, pem(found) + self._chain

    def server_pair(self) -> tuple[bytes, bytes]:
        """(key, certificate and chain) for the coordinator's listeners, PEM; kept in memory."""
        with self._lock:
            self.refresh()
            now = self._clock()
            if self._server is None or now > self._server_until:
                key = new_key()
                certificate = leaf(
                    self.names[0][:64], key.public_key(), self._issuer, now, SERVER_DAYS * DAY_S,
                    SERVER, host_names(self.names),
                )  # fmt: skip
                self._server = key_pem(key), pem(certificate) + self._chain
                life_s = certificate.not_valid_after_utc.timestamp() - now
                self._server_until = now + RENEW_AT * life_s
            return self._server

    # --- rotation -------------------------------------------------------------------------------

    def rotate(self, passphrase: bytes | None = None) -> None:
        """A new root and issuer; the old root stays trusted until `finish`."""
        self.refresh()
        here, now, number = self._folder / self.generation, self._clock(), self._number + 1
        old = _signer(here, "root", passphrase)
        new = _root(self.trust_domain, number, now)
        name = _common_name(new.certificate)
        left_days = (old.certificate.not_valid_after_utc.timestamp() - now) / DAY_S
        cross = authority(name, new.key.public_key(), old, old.key, now, left_days, None)
        crosses = pem(cross) + b"".join(pem(c) for c in self._crosses())
        _write_generation(self._folder, number, new, passphrase, crosses, self.trust, now)
        self.refresh()

    def replace_issuer(self, passphrase: bytes | None = None) -> None:
        """A new issuer below the same root; devices notice nothing."""
        self.refresh()
        root = _signer(self._folder / self.generation, "root", passphrase)
        crosses = b"".join(pem(c) for c in self._crosses())
        number = self._number + 1
        rest = pem(*x509.load_pem_x509_certificates(self.trust)[1:])
        _write_generation(self._folder, number, root, passphrase, crosses, rest, self._clock())
        self.refresh()

    def finish(self) -> None:
        """Trusts the newest root alone, and destroys the keys of earlier generations."""
        self.refresh()
        before, number = self._folder / self.generation, self._number + 1
        after = self._folder / f"{number:04}"
        shutil.copytree(before, after, dirs_exist_ok=True)
        newest = x509.load_pem_x509_certificates(self.trust)[0]
        _write(after / "trust.pem", pem(newest))
        _write(self._folder / "current", f"{number:04}\n".encode())
        for folder in self._folder.glob("[0-9]*"):
            if folder.name != after.name:
                shutil.rmtree(folder)
        self.refresh()

    @property
    def rotating(self) -> bool:
        """Whether more than one root is trusted."""
        return len(x509.load_pem_x509_certificates(self.trust)) > 1

    @property
    def root_since(self) -> str:
        """The first generation of the newest root."""
        self.refresh()
        newest = (self._folder / self.generation / "root.pem").read_bytes()
        same = [f.parent.name for f in self._folder.glob("[0-9]*/root.pem")
                if f.read_bytes() == newest]  # fmt: skip
        return min(same)

    @property
    def _number(self) -> int:
        return int(self.generation)

    def _crosses(self) -> list[x509.Certificate]:
        """Earlier roots' certificates for later ones, that are still valid."""
        now = self._clock()
        after_issuer = x509.load_pem_x509_certificates(self._chain)[1:]
        return [c for c in after_issuer if c.not_valid_after_utc.timestamp() > now]


def write_settings(folder: Path, names: Sequence[str], trust_domain: str) -> None:
    """Says under which names the coordinator is reached. Raises `AuthorityError`."""
    try:
        host_names(names)
    except ValueError as error:
        raise AuthorityError(f"{', '.join(names)}: {error}; names are ASCII") from error
    plain = {"trust_domain": trust_domain, "names": list(names)}
    _write(folder / "authority.json", json.dumps(plain, indent=1).encode())


def _root(trust_domain: str, number: int, at: float) -> Signer:
    key = new_key()
    name = f"{trust_domain} root {number} {secrets.token_hex(4)}"
    return Signer(authority(name, key.public_key(), None, key, at, ROOT_DAYS, None), key)


def _write_generation(
    folder: Path, number: int, root: Signer, passphrase: bytes | None, crosses: bytes,
    earlier: bytes, at: float,
) -> None:  # fmt: skip
    """Puts a generation in force. `earlier`: further roots to trust, PEM."""
    here = folder / f"{number:04}"
    if here.exists():  # of a rotation that was interrupted
        shutil.rmtree(here)
    here.mkdir(mode=0o700)
    key = new_key()
    name = f"{_common_name(root.certificate)[:50]} issuer {number}"
    left_days = (root.certificate.not_valid_after_utc.timestamp() - at) / DAY_S
    days = min(ISSUER_DAYS, left_days)
    issuer = authority(name, key.public_key(), root, root.key, at, days, 0)
    _write(here / "root.key", key_pem(root.key, passphrase))
    _write(here / "root.pem", pem(root.certificate))
    _write(here / "issuer.key", key_pem(key))
    _write(here / "issuer.pem", pem(issuer))
    _write(here / "chain.pem", pem(issuer) + crosses)
    _write(here / "trust.pem", pem(root.certificate) + earlier)
    _write(folder / "current", f"{number:04}\n".encode())


def _signer(here: Path, name: str, passphrase: bytes | None) -> Signer:
    text = (here / f"{name}.key").read_bytes()
    try:
        key = load_pem_private_key(text, passphrase)
    except (TypeError, ValueError) as error:
        needed = "has a passphrase, give it" if passphrase is None else "does not open with this"
        if passphrase is not None and b"ENCRYPTED" not in text:
            needed = "has no passphrase, give none"
        raise AuthorityError(f"the {name}'s key {needed} (--passphrase-file)") from error
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    return Signer(x509.load_pem_x509_certificate((here / f"{name}.pem").read_bytes()), key)


def _common_name(certificate: x509.Certificate) -> str:
    return str(certificate.subject.rfc4514_string()).removeprefix("CN=")
