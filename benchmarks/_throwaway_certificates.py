"""Certificates for a benchmark on loopback: an authority, a server and a client, for a day.

For mutual TLS of the bare peer; what the project's own authority issues is another matter.
"""

from __future__ import annotations

import datetime
import ipaddress
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID


def make(folder: Path) -> None:
    """Writes ca.pem, server.pem, server.key, client.pem and client.key to a folder."""
    authority_key = ec.generate_private_key(ec.SECP256R1())
    authority = _issue("benchmark", authority_key, "benchmark", authority_key, authority=True)
    (folder / "ca.pem").write_bytes(authority)
    for name in ("server", "client"):
        key = ec.generate_private_key(ec.SECP256R1())
        (folder / f"{name}.pem").write_bytes(_issue(name, key, "benchmark", authority_key))
        (folder / f"{name}.key").write_bytes(key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        ))  # fmt: skip


def _issue(
    subject: str, key: ec.EllipticCurvePrivateKey, issuer: str,
    signed_with: ec.EllipticCurvePrivateKey, *, authority: bool = False,
) -> bytes:  # fmt: skip
    now = datetime.datetime.now(datetime.UTC)
    here = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    certificate = (
        x509.CertificateBuilder()
        .subject_name(_name(subject))
        .issuer_name(_name(issuer))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName(here), critical=False)
        .sign(signed_with, hashes.SHA256())
    )
    return certificate.public_bytes(serialization.Encoding.PEM)


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])
