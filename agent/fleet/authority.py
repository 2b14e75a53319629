"""The fleet's own certificate authorities: one each for devices, operators, the claim credential and brokers.

Four, because a broker gives each kind another door: whoever has a device's certificate, or the claim credential that is
in every image, cannot come in by the operators'. One level each, EC P-256 (RFC 5280 profiles, as OpenSSL and mosquitto
check them). The common name is what a broker's access list goes by: a device's name, ``claim``, or a name with ``@``,
which is no device's. Pure but for randomness; the clock is passed in.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from typing import Literal

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from agent.base.errors import DamagedError, PeerError

Kind = Literal["devices", "operators", "claims", "servers"]
KINDS: tuple[Kind, ...] = ("devices", "operators", "claims", "servers")
#: Common names that deploy/mosquitto's access lists know.
OPERATOR_NAME, BRIDGE_NAME, CLAIM_NAME = "@ops", "@claims", "claim"

_AUTHORITY_DAYS = 20 * 365
_DEVICE_DAYS = 10 * 365
_SERVER_DAYS = 2 * 365
#: A device without a clock battery wakes up in the past: a certificate that is to be checked there begins early.
_EARLY = datetime(2020, 1, 1, tzinfo=timezone.utc)
#: What a device is checked by, a broker with a right clock, may begin when it was made; clocks differ by a little.
_SKEW = timedelta(days=1)
_LEAST_RSA_BITS = 2048
_HOST = re.compile(r"(\*\.)?[A-Za-z0-9_-]{1,63}(\.[A-Za-z0-9_-]{1,63})*")
_CURVES = (ec.SECP256R1, ec.SECP384R1, ec.SECP521R1)


@dataclass(frozen=True, slots=True)
class Authority:
    """The authority's certificate and key."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @property
    def tenant(self) -> str:
        """The organisation that is in every certificate."""
        return str(self.certificate.subject.get_attributes_for_oid(NameOID.ORGANIZATION_NAME)[0].value)


def make_authority(tenant: str, kind: Kind, now: datetime) -> Authority:
    """A new authority of a tenant."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = _name(tenant, f"edge-fleet {kind}")
    certificate = (
        _builder(name, name, key.public_key(), _EARLY, now + timedelta(days=_AUTHORITY_DAYS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(sign_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    return Authority(certificate, key)


def read_authority(certificate: bytes, key: object) -> Authority:
    """The authority from its PEM and its opened key. DamagedError when they do not belong together."""
    try:
        found = x509.load_pem_x509_certificate(certificate)
    except ValueError as error:
        raise DamagedError("cannot read the authority's certificate: it is no PEM") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or found.public_key() != key.public_key():
        raise DamagedError("cannot use the authority: its key does not belong to its certificate")
    return Authority(found, key)


def read_request(pem: str) -> x509.CertificateSigningRequest:
    """A device's request, once it is proven that whoever made it has the key. PeerError."""
    try:
        request = x509.load_pem_x509_csr(pem.encode())
        valid = request.is_signature_valid
        key = request.public_key()
    except (ValueError, UnsupportedAlgorithm) as error:
        raise PeerError("cannot read the certificate request: it is no PKCS#10 in PEM") from error
    if not valid:
        raise PeerError("cannot accept the certificate request: its signature is wrong")
    if isinstance(key, ed25519.Ed25519PublicKey):
        return request
    if isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, _CURVES):
        return request
    if isinstance(key, rsa.RSAPublicKey) and key.key_size >= _LEAST_RSA_BITS:
        return request
    raise PeerError("cannot accept the certificate request: its key is neither EC, Ed25519 nor RSA of 2048 bits")


def sign_device(authority: Authority, request: x509.CertificateSigningRequest, device: str, now: datetime) -> str:
    """PEM of a client certificate for ``device``. What the request says of its subject is passed over."""
    return _pem(_client(authority, request.public_key(), device, now))


def make_client(authority: Authority, name: str, now: datetime) -> tuple[str, ec.EllipticCurvePrivateKey]:
    """Certificate in PEM and a new key for a client that is no device."""
    key = ec.generate_private_key(ec.SECP256R1())
    return _pem(_client(authority, key.public_key(), name, now)), key


def make_server(authority: Authority, names: list[str], now: datetime) -> tuple[str, ec.EllipticCurvePrivateKey]:
    """Certificate in PEM and a new key for a broker of those host names or addresses. PeerError for what is neither."""
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = (
        _builder(
            _name(authority.tenant, names[0][:64]),
            authority.certificate.subject,
            key.public_key(),
            _EARLY,
            now + timedelta(days=_SERVER_DAYS),
        )
        .add_extension(x509.SubjectAlternativeName([_general_name(name) for name in names]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(_issuer(authority), critical=False)
        .sign(authority.key, hashes.SHA256())
    )
    return _pem(certificate), key


def valid_until(pem: str) -> datetime:
    """When the first certificate in ``pem`` ends."""
    return x509.load_pem_x509_certificate(pem.encode()).not_valid_after_utc


def authority_pem(authority: Authority) -> str:
    """The authority's certificate, which brokers and devices check others by."""
    return _pem(authority.certificate)


def _client(authority: Authority, key: object, name: str, now: datetime) -> x509.Certificate:
    until = min(now + timedelta(days=_DEVICE_DAYS), authority.certificate.not_valid_after_utc)
    subject = _name(authority.tenant, name)
    return (
        _builder(subject, authority.certificate.subject, key, now - _SKEW, until)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False)
        .add_extension(_issuer(authority), critical=False)
        .sign(authority.key, hashes.SHA256())
    )


def _builder(
    subject: x509.Name, issuer: x509.Name, key: object, start: datetime, until: datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)  # type: ignore[arg-type]  # one of the kinds that read_request lets through
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(until)
    )


def _name(tenant: str, common: str) -> x509.Name:
    return x509.Name(
        [x509.NameAttribute(NameOID.ORGANIZATION_NAME, tenant), x509.NameAttribute(NameOID.COMMON_NAME, common)]
    )


def _usage(*, sign_certificates: bool = False) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not sign_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=sign_certificates,
        crl_sign=sign_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _issuer(authority: Authority) -> x509.AuthorityKeyIdentifier:
    return x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.key.public_key())


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        pass
    if len(name) > 253 or _HOST.fullmatch(name) is None:
        raise PeerError(f"cannot make a certificate for {name!r}: it is neither a host name nor an address")
    return x509.DNSName(name)


def _pem(certificate: x509.Certificate) -> str:
    return certificate.public_bytes(serialization.Encoding.PEM).decode()
