"""``edge-fleet init``: what it makes fits the broker, the images, OpenSSL and the agent that reads it."""

from __future__ import annotations

import shutil
import stat
import subprocess
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import NameOID

from agent.base import config
from agent.base.errors import ConfigError, DamagedError, PeerError
from agent.fleet.authority import make_authority, read_authority, read_request, sign_device
from agent.fleet.folder import Folder, load_settings
from agent.fleet.founding import Door, parse_door
from agent.fleet.keys import Passwords, open_signer
from agent.trust.allegiance import load
from tests.fleet.conftest import Done, edge_fleet
from tests.fleet.device import Identity

NOW = datetime(2026, 1, 31, 12, 0, 0, tzinfo=timezone.utc)


def init(folder: Path, *more: str) -> Done:
    return edge_fleet(
        folder, "init", "--tenant", "acme", "--broker", "mqtt.example", "--server-cert", "mqtt.example",
        "--server-cert", "192.0.2.7", *more,
    )  # fmt: skip


@pytest.fixture
def made(tmp_path: Path) -> Path:
    folder = tmp_path / "fleet"
    done = init(folder, "--no-password")
    assert done.status == 0 and "warning" in done.err, done.err
    return folder


def test_private_files_are_private_and_public_ones_are_not(made: Path) -> None:
    for path in made.rglob("*"):
        if path.is_file():
            private = path.suffix in (".key", ".db", ".db-wal", ".db-shm") or path.name == "fleet.toml"
            assert stat.S_IMODE(path.stat().st_mode) == (0o600 if private else 0o644), path


def test_keys_are_encrypted_but_for_those_that_daemons_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGE_FLEET_PASSWORD", "long enough, surely")
    folder = tmp_path / "fleet"
    assert init(folder).status == 0
    plain = {str(path.relative_to(folder)) for path in folder.rglob("*.key") if b"ENCRYPTED" not in path.read_bytes()}
    assert plain == {"broker/server.key", "broker/claims-bridge.key", "operator/ops.key", "image/link/claim.key"}
    monkeypatch.setenv("EDGE_FLEET_PASSWORD", "another password")
    assert "the password is wrong" in edge_fleet(folder, "keys", "export", "enrolment").err


def test_the_agent_takes_what_images_get(made: Path) -> None:
    waiting = load(made / "image" / "trust.toml")
    assert waiting is not None and waiting.tenant == "acme" and waiting.device is None
    enroller = open_signer(made / "authority" / "enrolment.key", Passwords()).public
    assert waiting.enroller == enroller
    assert (made / "trust.toml").read_bytes() == (made / "image" / "trust.toml").read_bytes()
    settings = config.load(made / "image" / "config.toml", explicit=True).link
    assert (settings.host, settings.port, settings.tls) == ("mqtt.example", 8883, True)
    assert (settings.claim_host, settings.claim_port) == ("mqtt.example", 8885)
    named = (settings.ca_file, settings.claim_cert_file, settings.claim_key_file)
    assert all((made / "image" / Path(name).relative_to("/etc/edge-agent")).is_file() for name in named)
    assert (settings.cert_file, settings.key_file) == ("", "")  # those come with the enrolment


def test_certificates_hold_before_openssl_each_for_its_own_door(made: Path) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("no openssl here")

    def verifies(authority: str, purpose: str, leaf: str) -> bool:
        command = [
            "openssl",
            "verify",
            "-x509_strict",
            "-CAfile",
            str(made / "broker" / authority),
            "-purpose",
            purpose,
        ]
        return subprocess.run([*command, str(made / leaf)], capture_output=True, check=False).returncode == 0

    assert verifies("operators-ca.pem", "sslclient", "operator/ops.pem")
    assert verifies("operators-ca.pem", "sslclient", "broker/claims-bridge.pem")
    assert verifies("claims-ca.pem", "sslclient", "image/link/claim.pem")
    assert verifies("server-ca.pem", "sslserver", "broker/server.pem")
    assert not verifies("operators-ca.pem", "sslclient", "image/link/claim.pem")
    assert not verifies("devices-ca.pem", "sslclient", "operator/ops.pem")
    assert not verifies("server-ca.pem", "sslclient", "broker/server.pem")


def test_what_is_there_is_never_overwritten(made: Path) -> None:
    before = {path: path.read_bytes() for path in made.rglob("*") if path.is_file()}
    again = init(made, "--no-password")
    assert again.status == 1 and "there is one" in again.err
    assert {path: path.read_bytes() for path in made.rglob("*") if path.is_file()} == before


def test_a_certificate_is_made_anew_and_the_old_one_kept(made: Path) -> None:
    for what, stem in (("claim", "image/link/claim"), ("operator", "operator/ops"), ("bridge", "broker/claims-bridge")):
        before = (made / f"{stem}.pem").read_bytes()
        assert edge_fleet(made, "keys", "certify", what).status == 0
        assert (made / f"{stem}.pem.old").read_bytes() == before != (made / f"{stem}.pem").read_bytes()
    assert edge_fleet(made, "keys", "certify", "server", "other.example").status == 0
    certificate = x509.load_pem_x509_certificate((made / "broker" / "server.pem").read_bytes())
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["other.example"]


@pytest.mark.parametrize(
    ("text", "door"),
    [
        ("mqtt.example", Door("mqtt.example", 1)),
        ("mqtt.example:8883", Door("mqtt.example", 8883)),
        ("192.0.2.7:1883", Door("192.0.2.7", 1883)),
        ("2001:db8::1", Door("2001:db8::1", 1)),
        ("[2001:db8::1]", Door("2001:db8::1", 1)),
        ("[2001:db8::1]:8883", Door("2001:db8::1", 8883)),
    ],
)
def test_addresses_of_brokers(text: str, door: Door) -> None:
    assert parse_door(text, 1) == door


@pytest.mark.parametrize(
    "text", ["", ":8883", "a b", "host:0", "host:99999", "host:x", "mqtt://host", "h" * 300, "[::1]:x"]
)
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(PeerError, match="cannot use the broker"):
        parse_door(text, 1)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--tenant", "a/b"], "letters, digits"),
        (["--tenant", "a", "--key", "enrolment"], "not 'enrolment'"),
        (["--tenant", "a", "--classes", "everything"], "unknown class"),
        (["--tenant", "a", "--server-cert", "not a host"], "neither a host name nor an address"),
        (["--tenant", "a", "--ca", "/nowhere"], "No such file"),
        (["--tenant", "a", "--password-file", "/nowhere"], "No such file"),
    ],
)
def test_a_fleet_that_cannot_be_is_not_begun(tmp_path: Path, arguments: list[str], reason: str) -> None:
    password = tmp_path / "password"
    password.write_text("long enough, surely\n")
    done = edge_fleet(tmp_path / "f", "init", "--broker", "h", "--password-file", str(password), *arguments)
    assert done.status == 1 and reason in done.err
    assert not (tmp_path / "f" / "fleet.toml").exists() and list((tmp_path / "f").rglob("*.key")) == []


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "tenant"),
        ("tenant = 'a'\n[broker]\nhost = ''\n", "broker.host"),
        ("tenant = 'a'\n[broker]\nhost = 'h'\nport = '1'\n", "broker.port"),
        ("tenant = 'a'\ncolour = 1\n[broker]\nhost = 'h'\n", "colour: unknown key"),
        ("tenant = 'a'\n[broker]\nhost = 'h'\n[groups]\nx = 'board=y'\n", "groups.x"),
        ("\ntenant = = 1", "line 2"),
        ("\xff", "UTF-8"),
    ],
)
def test_settings_that_are_wrong_name_the_field(made: Path, text: str, reason: str) -> None:
    (made / "fleet.toml").write_text(text, encoding="latin-1")
    with pytest.raises(ConfigError, match="cannot read") as wrong:
        load_settings(Folder(made))
    assert reason in str(wrong.value)


# -- certificates of devices ------------------------------------------------------------------------------------------


def test_a_device_gets_the_name_that_the_operator_gives_and_nothing_that_it_asks_for() -> None:
    authority = make_authority("acme", "devices", NOW)
    request = read_request(Identity().csr)
    certificate = x509.load_pem_x509_certificate(sign_device(authority, request, "cam-1", NOW).encode())
    assert certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value == "cam-1"
    assert certificate.subject.get_attributes_for_oid(NameOID.ORGANIZATION_NAME)[0].value == "acme"
    assert not certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert certificate.not_valid_before_utc < NOW < certificate.not_valid_after_utc
    late = NOW + timedelta(days=19 * 365)
    short = x509.load_pem_x509_certificate(sign_device(authority, request, "cam-1", late).encode())
    assert short.not_valid_after_utc == authority.certificate.not_valid_after_utc  # never beyond who vouches for it


def test_requests_that_prove_nothing_are_refused() -> None:
    good = Identity().csr
    other = x509.load_pem_x509_csr(Identity().csr.encode())
    der = bytearray(x509.load_pem_x509_csr(good.encode()).public_bytes(serialization.Encoding.DER))
    der[-1] ^= 1
    forged = x509.load_der_x509_csr(bytes(der)).public_bytes(serialization.Encoding.PEM).decode()
    weak = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([]))
        .sign(rsa.generate_private_key(65537, 1024), hashes.SHA256())
    )
    odd = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([]))
        .sign(ec.generate_private_key(ec.SECP224R1()), hashes.SHA256())
    )
    assert other.is_signature_valid
    for text, reason in (
        ("", "no PKCS#10"),
        ("ü", "no PKCS#10"),
        (good[:200], "no PKCS#10"),
        (forged, "its signature is wrong"),
        (weak.public_bytes(serialization.Encoding.PEM).decode(), "neither EC"),
        (odd.public_bytes(serialization.Encoding.PEM).decode(), "neither EC"),
    ):
        with pytest.raises(PeerError, match=reason):
            read_request(text)


def test_an_authority_whose_key_is_another_s_signs_nothing() -> None:
    first, second = (make_authority("acme", "devices", NOW) for _ in range(2))
    pem = first.certificate.public_bytes(serialization.Encoding.PEM)
    assert read_authority(pem, first.key).tenant == "acme"
    with pytest.raises(DamagedError, match="does not belong"):
        read_authority(pem, second.key)
    with pytest.raises(DamagedError, match="it is no PEM"):
        read_authority(b"nonsense", first.key)
