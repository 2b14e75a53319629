"""Certificates for tests, made with ``cryptography``: authorities, a server, devices, operators."""

from __future__ import annotations

import ipaddress
from datetime import datetime, timedelta, timezone
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

_PEM = serialization.Encoding.PEM


def pem_of(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(_PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())


def _name(common: str, organization: str = "") -> x509.Name:
    parts = [x509.NameAttribute(NameOID.COMMON_NAME, common)]
    if organization:
        parts.append(x509.NameAttribute(NameOID.ORGANIZATION_NAME, organization))
    return x509.Name(parts)


class Authority:
    """A CA. ``days`` may be negative: a certificate that is over already."""

    def __init__(self, name: str) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = _name(name)
        builder = self._builder(self._name, self._key.public_key(), 3650)
        self._certificate = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True).sign(
            self._key, hashes.SHA256()
        )

    @property
    def pem(self) -> bytes:
        return self._certificate.public_bytes(_PEM)

    def _builder(self, subject: x509.Name, public: ec.EllipticCurvePublicKey, days: float) -> x509.CertificateBuilder:
        now = datetime.now(timezone.utc)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(days=2))
            .not_valid_after(now + timedelta(days=days))
        )

    def sign(
        self,
        common: str,
        public: ec.EllipticCurvePublicKey,
        *,
        organization: str = "",
        host: str = "",
        days: float = 30,
    ) -> bytes:
        """A certificate for a public key; ``host``: of a server, with its names."""
        builder = self._builder(_name(common, organization), public, days)
        builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        if host:
            names = [x509.DNSName(host), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        return builder.sign(self._key, hashes.SHA256()).public_bytes(_PEM)

    def sign_request(self, csr: str, common: str, organization: str = "") -> bytes:
        """What an approver does: the key of the request under the approver's own name for it."""
        request = x509.load_pem_x509_csr(csr.encode())
        assert request.is_signature_valid
        public = request.public_key()
        assert isinstance(public, ec.EllipticCurvePublicKey)
        return self.sign(common, public, organization=organization)

    def issue(self, folder: Path, file: str, common: str, **options: object) -> tuple[Path, Path]:
        """A fresh key and its certificate as ``FILE.pem`` and ``FILE.key``."""
        key = ec.generate_private_key(ec.SECP256R1())
        certificate, private = folder / f"{file}.pem", folder / f"{file}.key"
        certificate.write_bytes(self.sign(common, key.public_key(), **options))  # type: ignore[arg-type]
        private.write_bytes(pem_of(key))
        private.chmod(0o600)
        return certificate, private
