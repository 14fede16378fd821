"""A device's key, its certificate and the roots it trusts: the files they are kept in.

`pair.json` holds key and certificate together (mode 0600), since one is nothing without the other.
A fresh pair lies in `fresh.json` until a call with it has succeeded; until then the old one is
kept. Those before it stay in `earlier.json`: a coordinator that was restored from a backup knows
one of them. Knows no cryptography; that is `keys`'.
"""

from __future__ import annotations

import hashlib
import json
import ssl
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import grpc

from profiles.errors import SketchfleetError
from protos.transfer import make_folder, write_durably

EARLIER, EARLIER_S = 6, 30 * 86400.0  # pairs kept, for so long after they ended


class IdentityError(SketchfleetError):
    """What a device knows itself by cannot be used; its owner must act."""


@dataclass(frozen=True)
class Pair:
    """A key and the certificate chain for it, PEM; made and ending at these Unix seconds.

    By this device's clock: it is told how long a certificate lasts.
    """

    key: bytes
    chain: bytes
    made_at: float
    ends_at: float

    def __repr__(self) -> str:
        return "Pair(***)"

    @classmethod
    def new(cls, key: bytes, chain: bytes, lasts_s: float) -> Pair:
        """One that was issued just now."""
        now = time.time()
        return cls(key, chain, now, now + lasts_s)


class Identity:
    """What lies in one folder. Raises `IdentityError` where that cannot be used."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._pair, self._fresh = folder / "pair.json", folder / "fresh.json"
        self._trust, self._fleet = folder / "trust.pem", folder / "fleet.json"
        self._asking, self._earlier = folder / "asking.json", folder / "earlier.json"

    @property
    def exists(self) -> bool:
        """Whether this device has enrolled."""
        return self._pair.is_file() and self._fleet.is_file()

    @property
    def is_fresh(self) -> bool:
        """Whether the newest pair has yet to prove itself."""
        return self._fresh.is_file()

    @property
    def pair(self) -> Pair:
        """The newest."""
        path = self._fresh if self.is_fresh else self._pair
        try:
            return _read(json.loads(path.read_text()))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise _broken(path, error) from error

    @property
    def earlier(self) -> list[Pair]:
        """Those before it, newest first; none where they cannot be read."""
        try:
            return [_read(plain) for plain in json.loads(self._earlier.read_text())]
        except (OSError, ValueError, KeyError, TypeError):
            return []

    @property
    def trust(self) -> bytes:
        """Roots, PEM."""
        try:
            return self._trust.read_bytes()
        except OSError as error:
            raise _broken(self._trust, error) from error

    @property
    def trust_digest(self) -> bytes:
        """SHA-256 of `trust`."""
        return hashlib.sha256(self.trust).digest()

    @property
    def fleet(self) -> dict[str, str]:
        """What enrolling told: `device`, `address` of the fleet's listener, `enrolment`."""
        try:
            plain = json.loads(self._fleet.read_text())
            return {key: str(plain[key]) for key in ("device", "address", "enrolment")}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise _broken(self._fleet, error) from error

    @property
    def credentials(self) -> grpc.ChannelCredentials:
        """For a channel to the fleet's listener."""
        pair = self.pair
        return grpc.ssl_channel_credentials(self.trust, pair.key, pair.chain)

    def asking(self) -> dict[str, str] | None:
        """The key and request that an answer is still awaited for.

        A lost answer or a wait for approval must not make another device of this one.
        """
        try:
            plain = json.loads(self._asking.read_text())
            return {key: str(plain[key]) for key in ("key", "request")}
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise _broken(self._asking, error) from error

    def ask(self, made: dict[str, str]) -> None:
        """Keeps what is asked with."""
        make_folder(self.folder)
        self.folder.chmod(0o700)
        write_durably(self._asking, json.dumps(made).encode(), mode=0o600)

    def joined(self, pair: Pair, trust: bytes, fleet: dict[str, str]) -> None:
        """Keeps what enrolling gave."""
        self._fresh.unlink(missing_ok=True)
        self.adopt(trust)
        _keep(self._pair, pair)
        write_durably(self._fleet, json.dumps(fleet).encode(), mode=0o600)
        self._asking.unlink(missing_ok=True)

    def adopt(self, trust: bytes) -> None:
        """Trusts these roots from now on. Raises `IdentityError` if they are none."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        try:
            context.load_verify_locations(cadata=trust.decode())
            if not context.get_ca_certs():
                raise ValueError("none")
        except (ssl.SSLError, ValueError) as error:
            raise IdentityError("the coordinator sent roots that cannot be read") from error
        write_durably(self._trust, trust, mode=0o600)

    def renewed(self, pair: Pair) -> None:
        """Keeps a fresh pair beside the old one."""
        _keep(self._fresh, pair)

    def confirm(self) -> None:
        """The fresh pair has proved itself."""
        if not self.is_fresh:
            return
        fresh, since = self.pair, time.time() - EARLIER_S
        old = [_read(json.loads(self._pair.read_text())), *self.earlier]
        kept = [_plain(p) for p in old if p.ends_at > since and p.key != fresh.key][:EARLIER]
        write_durably(self._earlier, json.dumps(kept).encode(), mode=0o600)
        self._fresh.replace(self._pair)

    def reject(self) -> None:
        """Back to the old pair."""
        self._fresh.unlink(missing_ok=True)


def _keep(path: Path, pair: Pair) -> None:
    write_durably(path, json.dumps(_plain(pair)).encode(), mode=0o600)


def _plain(pair: Pair) -> dict[str, Any]:
    return asdict(pair) | {"key": pair.key.decode(), "chain": pair.chain.decode()}


def _read(plain: Any) -> Pair:
    """Raises `KeyError`, `TypeError`, `ValueError`."""
    return Pair(
        str(plain["key"]).encode(), str(plain["chain"]).encode(), float(plain["made_at"]),
        float(plain["ends_at"]),
    )  # fmt: skip


def _broken(path: Path, error: Exception) -> IdentityError:
    why = error.strerror if isinstance(error, OSError) else "damaged"
    return IdentityError(f"{path} cannot be used ({why}); enrol this device again")
