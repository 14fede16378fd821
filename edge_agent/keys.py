"""Makes a device's keys and signs with them. Stands alone, and may be run as a program:

    echo '{}' | python keys.py

reads and prints JSON, so that an agent that renews once in days need not hold the library (11 MB)
all the time (`signing`).
"""

from __future__ import annotations

import json
import sys

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)


def make(old_key: str = "", label: str = "") -> dict[str, str]:
    """A fresh P-256 `key` (PKCS #8, PEM), the `request` for a certificate (PKCS #10, PEM), and, by
    an old key, the `signature` (hex) over `label` and the request.

    The request names nobody: that is not asked.
    """
    key = ec.generate_private_key(ec.SECP256R1())
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    request = builder.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM)
    text = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    made = {"key": text.decode(), "request": request.decode()}
    if old_key:
        old = load_pem_private_key(old_key.encode(), None)
        assert isinstance(old, ec.EllipticCurvePrivateKey)
        signed = old.sign(label.encode() + request, ec.ECDSA(hashes.SHA256()))
        made["signature"] = signed.hex()
    return made


if __name__ == "__main__":
    json.dump(make(**json.load(sys.stdin)), sys.stdout)
