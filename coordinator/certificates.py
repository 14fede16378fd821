"""X.509 as this fleet uses it: how its certificates look, and what one says about its holder.

P-256 throughout; gRPC's TLS takes no Ed25519. Knows no files and no database.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    KeySerializationEncryption,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from coordinator.server_config import NameRule
from profiles.compat import UTC
from protos.identity import BACKDATED_S

DAY_S = 86400.0
MOST_REQUEST_BYTES = 4096
CLIENT, SERVER = ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH


# What reading somebody else's certificate may raise.
UNREADABLE = (
    ValueError, UnsupportedAlgorithm, InvalidSignature, x509.InvalidVersion,
    x509.DuplicateExtension, x509.UnsupportedGeneralNameType,
)  # fmt: skip


class CertificateError(ValueError):
    """A certificate or a signing request is not what it has to be."""


@dataclass(frozen=True)
class Holder:
    """Whom a certificate names. `fingerprint`: SHA-256 of the whole, hex; `expires_at`: Unix s."""

    device_id: str
    fingerprint: str
    expires_at: float


@dataclass(frozen=True)
class Signer:
    """An authority that signs: its certificate and key."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey


def new_key() -> ec.EllipticCurvePrivateKey:
    """A P-256 key."""
    return ec.generate_private_key(ec.SECP256R1())


def key_pem(key: ec.EllipticCurvePrivateKey, passphrase: bytes | None = None) -> bytes:
    """PKCS #8, encrypted where a passphrase is given."""
    how: KeySerializationEncryption = NoEncryption()
    if passphrase is not None:
        how = BestAvailableEncryption(passphrase)
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, how)


def pem(*certificates: x509.Certificate) -> bytes:
    """One after the other."""
    return b"".join(c.public_bytes(Encoding.PEM) for c in certificates)


def authority(
    name: str, key: ec.EllipticCurvePublicKey, by: Signer | None, own: ec.EllipticCurvePrivateKey,
    at: float, days: float, below: int | None,
) -> x509.Certificate:  # fmt: skip
    """A CA's certificate for `key`, by another authority or (None) self-signed with `own`.

    below: how many authorities may stand below it.
    """
    signer, issuer = (own, _name(name)) if by is None else (by.key, by.certificate.subject)
    usage = x509.KeyUsage(
        digital_signature=False, content_commitment=False, key_encipherment=False,
        data_encipherment=False, key_agreement=False, key_cert_sign=True, crl_sign=True,
        encipher_only=False, decipher_only=False,
    )  # fmt: skip
    return (
        _builder(_name(name), issuer, key, at, days * DAY_S)
        .add_extension(x509.BasicConstraints(ca=True, path_length=below), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()),
                       critical=False)
        .sign(signer, hashes.SHA256())
    )  # fmt: skip


def leaf(
    name: str, key: ec.EllipticCurvePublicKey, by: Signer, at: float, lifetime_s: float,
    purpose: x509.ObjectIdentifier, names: Sequence[x509.GeneralName],
) -> x509.Certificate:  # fmt: skip
    """A certificate for one purpose; it ends with its authority's at the latest."""
    until = by.certificate.not_valid_after_utc.timestamp()
    usage = x509.KeyUsage(
        digital_signature=True, content_commitment=False, key_encipherment=False,
        data_encipherment=False, key_agreement=False, key_cert_sign=False, crl_sign=False,
        encipher_only=False, decipher_only=False,
    )  # fmt: skip
    issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(by.key.public_key())
    return (
        _builder(_name(name), by.certificate.subject, key, at, min(lifetime_s, until - at))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(issuer, critical=False)
        .sign(by.key, hashes.SHA256())
    )


def device_leaf(
    device_id: str, trust_domain: str, key: ec.EllipticCurvePublicKey, by: Signer, at: float,
    lifetime_s: float,
) -> x509.Certificate:  # fmt: skip
    """A device's certificate (SPIFFE's X.509-SVID)."""
    uri = x509.UniformResourceIdentifier(f"spiffe://{trust_domain}/device/{device_id}")
    return leaf(f"device:{device_id}"[:64], key, by, at, lifetime_s, CLIENT, [uri])


def host_names(names: Sequence[str]) -> list[x509.GeneralName]:
    """Names and addresses of a host as a server's certificate carries them."""
    found: list[x509.GeneralName] = []
    for name in names:
        try:
            found.append(x509.IPAddress(ipaddress.ip_address(name)))
        except ValueError:
            found.append(x509.DNSName(name))
    return found


def requested_key(request: bytes) -> ec.EllipticCurvePublicKey:
    """The key of a signing request (PKCS #10, PEM); what else it says does not count.

    Raises `CertificateError`.
    """
    if len(request) > MOST_REQUEST_BYTES:
        raise CertificateError("the signing request is too long")
    try:
        found = x509.load_pem_x509_csr(request)
        key, sound = found.public_key(), found.is_signature_valid
    except UNREADABLE as error:
        raise CertificateError("the signing request cannot be read") from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise CertificateError("the signing request has a key of another kind than P-256")
    if not sound:
        raise CertificateError("the signing request is not signed with its own key")
    return key


def key_digest(key: ec.EllipticCurvePublicKey) -> str:
    """SHA-256 of the SubjectPublicKeyInfo, hex."""
    public = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(public).hexdigest()


def holder_of(certificate: bytes, rule: NameRule, trust_domain: str = "") -> Holder:
    """Whom a device's certificate (PEM) names by this rule. Raises `CertificateError`.

    trust_domain: the only one that counts under "spiffe"; any when empty. The chain is TLS's.
    """
    try:
        found = x509.load_pem_x509_certificate(certificate)
        extensions = found.extensions
    except UNREADABLE as error:
        raise CertificateError("the certificate cannot be read") from error
    try:
        purposes = list(extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)
    except x509.ExtensionNotFound:
        purposes = []
    if CLIENT not in purposes:
        raise CertificateError("the certificate is not one of a client")
    named = _named(found, extensions, rule, trust_domain)
    if len(named) != 1:
        raise CertificateError(f"the certificate names {len(named)} devices, by its {rule}")
    fingerprint = hashlib.sha256(found.public_bytes(Encoding.DER)).hexdigest()
    return Holder(named[0], fingerprint, found.not_valid_after_utc.timestamp())


def _named(
    found: x509.Certificate, extensions: x509.Extensions, rule: NameRule, trust_domain: str
) -> list[str]:
    if rule == "common-name":
        common = found.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
        return [str(c.value).removeprefix("device:") for c in common]
    try:
        names = extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    if rule == "dns":
        return list(names.get_values_for_type(x509.DNSName))
    uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    places = [uri.removeprefix("spiffe://").split("/") for uri in uris if uri[:9] == "spiffe://"]
    return [
        "/".join(path)
        for domain, *path in places
        if trust_domain in ("", domain)
        for path in [path[1:] if path[:1] == ["device"] else path]
    ]


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, at: float,
    lifetime_s: float,
) -> x509.CertificateBuilder:  # fmt: skip
    life = (at - BACKDATED_S, at + lifetime_s)
    begins, ends = (dt.datetime.fromtimestamp(t, UTC) for t in life)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())  # 159 random bits
        .not_valid_before(begins)
        .not_valid_after(ends)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )
