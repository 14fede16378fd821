"""[server] and [pki] of run.toml: where the coordinator listens, and whose certificates count."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from profiles.settings import Section, host_of, is_loopback

NameRule = Literal["spiffe", "common-name", "dns"]


class ServerSection(Section):
    """Where the coordinator listens and what it keeps."""

    listen: str = "127.0.0.1:8470"
    """For enrolled devices: mutual TLS 1.3."""
    enrolment: str = ""
    """For devices that join: TLS, with a join token. The next port of `listen` when empty."""
    plain_text: bool = False
    """No TLS at all and one join token for everybody, for trials within this machine."""
    state: Path = Path("state")
    """Folder for the database, blobs and the certificate authority."""
    credential_days: Annotated[float, Field(gt=0)] = 7.0
    """How long a device's certificate lasts; it is renewed at two thirds of that."""
    approval: bool = False
    """Whether an operator has to `approve` each device that joins."""

    @model_validator(mode="after")
    def _guarded(self) -> Self:
        host = host_of(self.listen)
        if self.plain_text and not is_loopback(host):
            raise ValueError(
                f"listen: {host} is not a loopback address; plain_text is for trials within one "
                "machine, take it out and make an authority with `sketchfleet-coordinator init`"
            )
        if self.enrolment:
            host_of(self.enrolment)
        return self

    @property
    def enrolment_place(self) -> str:
        """host:port of the enrolment listener."""
        host, _, port = self.listen.rpartition(":")
        return self.enrolment or f"{host}:{int(port) and (int(port) + 1) % 65536}"


class PkiSection(Section):
    """Certificates of your own PKI in place of the fleet's authority; nothing is enrolled then."""

    ca: Path
    """Roots that devices' certificates are verified up to, PEM. Read at every handshake."""
    certificate: Path
    """The coordinator's, with what stands between it and the root, PEM."""
    key: Path
    device_name: NameRule = "spiffe"
    """Where a certificate names its device: the path of its SPIFFE id (after /device/, if that is
    how it begins), its common name, or its only DNS name."""

    def placed(self, here: Path) -> PkiSection:
        """The same with absolute paths."""
        keys = ("ca", "certificate", "key")
        return self.model_copy(update={k: here / getattr(self, k).expanduser() for k in keys})
