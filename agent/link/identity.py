"""The link's own TLS key and certificate, and what it opens for TLS. The key is made here and never leaves.

Invariants: files are whole or not there; a certificate that does not fit the key is never stored.
"""

from __future__ import annotations

import contextlib
import ssl
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from agent.base.errors import ConfigError, DamagedError
from agent.base.files import read_bounded, temporary_name, write_atomically
from agent.link.settings import Broker

KEY_FILE = "client.key"
CERTIFICATE_FILE = "client.crt"
REQUEST_FILE = "client.csr"
_MAX_BYTES = 65536
_VERSION, _UTC_TIME = 0xA0, 0x17


class Identity:
    """The folder with the link's key and certificate."""

    def __init__(self, folder: Path) -> None:
        self._key = folder / KEY_FILE
        self._certificate = folder / CERTIFICATE_FILE
        self._request = folder / REQUEST_FILE

    def files(self) -> tuple[str, str] | None:
        """Certificate and key, where an enrolment has given one."""
        both = self._certificate.is_file() and self._key.is_file()
        return (str(self._certificate), str(self._key)) if both else None

    def request(self, keyid: str) -> str:
        """A certificate request (PEM) for the key; both are made when there are none. The approver chooses the name."""
        if not (self._key.is_file() and self._request.is_file()):
            self._make(keyid)
        try:
            return read_bounded(self._request, _MAX_BYTES).decode("ascii")
        except ValueError as error:
            raise DamagedError(f"cannot read {self._request}", hint="delete it: a new one is made") from error

    def _make(self, keyid: str) -> None:
        from cryptography import x509  # noqa: PLC0415 - it would stay in memory for good: only where it is needed
        from cryptography.hazmat.primitives import hashes, serialization  # noqa: PLC0415
        from cryptography.hazmat.primitives.asymmetric import ec  # noqa: PLC0415

        key = ec.generate_private_key(ec.SECP256R1())
        pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
        name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, keyid)])
        request = x509.CertificateSigningRequestBuilder().subject_name(name).sign(key, hashes.SHA256())
        self._request.unlink(missing_ok=True)  # never one that is of another key
        write_atomically(self._key, key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain))
        write_atomically(self._request, request.public_bytes(pem))

    def store(self, certificate: str) -> None:
        """Keep an enrolment's certificate (PEM, leaf first). DamagedError when it does not fit the key; OSError."""
        if self._certificate.is_file() and read_bounded(self._certificate, _MAX_BYTES) == certificate.encode():
            return
        candidate = temporary_name(self._certificate)
        write_atomically(candidate, certificate.encode())
        try:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.load_cert_chain(candidate, self._key, password="")
        except (OSError, ValueError) as error:
            raise DamagedError(
                "cannot use the certificate of the enrolment: it does not fit this link's key"
            ) from error
        finally:
            with contextlib.suppress(FileNotFoundError):
                candidate.unlink()
        write_atomically(self._certificate, certificate.encode())


def chain_of(broker: Broker, identity: Identity | None) -> tuple[str, str] | None:
    """Certificate and key for ``broker``: those that the settings name, else the link's own where there are any."""
    if not broker.tls:
        return None
    if broker.cert_file and broker.key_file:
        return broker.cert_file, broker.key_file
    return identity.files() if identity is not None else None


def tls_context(broker: Broker, chain: tuple[str, str] | None) -> ssl.SSLContext | None:
    """TLS towards ``broker`` with this certificate and key; None without TLS. ConfigError names the file."""
    if not broker.tls:
        return None
    context = checking_context(broker.ca_file or "")
    if chain:
        with _opening(chain[0]):
            # A password that opens nothing: without one OpenSSL would ask for it on the terminal.
            context.load_cert_chain(*chain, password="")
    return context


def checking_context(ca_file: str) -> ssl.SSLContext:
    """TLS towards whoever has a certificate of these authorities ("" = the system's). ConfigError names the file."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # checks the certificate and the name in it
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    with _opening(ca_file or "the system's certificates"):
        if ca_file:
            context.load_verify_locations(ca_file)
        else:
            context.load_default_certs()
    return context


@contextlib.contextmanager
def _opening(name: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"cannot use {name} for TLS: {getattr(error, 'strerror', None) or error}",
            hint="link's own user must be able to read the CA, the certificate and its key",
        ) from error


def certificate_end(path: str) -> str | None:
    """When the first certificate in a file ends (RFC 3339); None where that cannot be read.

    By hand, RFC 5280 4.1: the ssl module does not tell of one's own certificate, and cryptography is too large for it.
    """
    try:
        pem = read_bounded(Path(path), _MAX_BYTES).decode("ascii")
        begin, end = pem.index(ssl.PEM_HEADER), pem.index(ssl.PEM_FOOTER)
        der = ssl.PEM_cert_to_DER_cert(pem[begin : end + len(ssl.PEM_FOOTER)])
        to_be_signed = _elements(_elements(der)[0][1])[0][1]
        fields = [value for tag, value in _elements(to_be_signed) if tag != _VERSION]
        tag, moment = _elements(fields[3])[1]  # serial, algorithm, issuer, then when it begins and when it ends
        text = moment.decode("ascii")
        if tag == _UTC_TIME:  # RFC 5280 4.1.2.5.1
            text = ("19" if text[:2] >= "50" else "20") + text
        return datetime.strptime(text, "%Y%m%d%H%M%SZ").strftime("%Y-%m-%dT%H:%M:%SZ")  # noqa: DTZ007 - Z is UTC
    except (OSError, ValueError, IndexError):
        return None


def _elements(data: bytes) -> list[tuple[int, bytes]]:
    """Tag and content of each DER element in ``data``. IndexError where it ends too early."""
    found, at = [], 0
    while at < len(data):
        tag, length, at = data[at], data[at + 1], at + 2
        if length & 0x80:
            octets = length & 0x7F
            length, at = int.from_bytes(data[at : at + octets], "big"), at + octets
        if at + length > len(data):
            raise IndexError
        found.append((tag, data[at : at + length]))
        at += length
    return found


def read_password(broker: Broker) -> str | None:
    """The first line of the password file; None where the settings name none. ConfigError."""
    if not broker.password_file:
        return None
    try:
        data = read_bounded(Path(broker.password_file), _MAX_BYTES)
        return data.split(b"\n", 1)[0].rstrip(b"\r").decode()
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read the password in {broker.password_file}: {error}") from error
