"""Makes a fleet: authorities and keys, what operators, the broker and images need, and a first signing key.

Invariants: nothing that is there is overwritten; ``fleet.toml`` is written last, so that a folder that has it has it
all.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

from agent.base.clock import iso
from agent.base.errors import PeerError
from agent.fleet.authority import (
    BRIDGE_NAME,
    CLAIM_NAME,
    KINDS,
    OPERATOR_NAME,
    Authority,
    Kind,
    authority_pem,
    make_authority,
    make_client,
    make_server,
)
from agent.fleet.books import Books
from agent.fleet.enrolment import trust_for_claim
from agent.fleet.folder import Folder, make_folder, write_new
from agent.fleet.keys import KeyRow, make_signing_key, private_pem
from agent.trust.envelope import PublicKey
from agent.wire.ops import OpClass

#: Where a device has its files.
ETC = "/etc/edge-agent"


@dataclass(frozen=True, slots=True)
class Door:
    """Where a broker listens for one kind of client."""

    host: str
    port: int


@dataclass(frozen=True, slots=True)
class Plan:
    """What the fleet is to be.

    ``broker_ca``: who vouches for the broker, None for an authority of the fleet's own. ``password_file`` holds the
    broker's password for ``username``. ``server_names`` ask for a certificate for a broker of one's own.
    """

    tenant: str
    devices: Door
    operators: Door
    claims: Door
    key: str
    classes: tuple[OpClass, ...]
    tls: bool = True
    broker_ca: bytes | None = None
    username: str = ""
    password_file: str = ""
    server_names: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Founded:
    """The public halves of what was made."""

    first: PublicKey
    enroller: PublicKey


def found(folder: Folder, plan: Plan, password: bytes | None, now: datetime) -> Founded:
    """Make everything. ConflictError for what is there already, PeerError for a server name that is none, OSError."""
    make_folder(folder)
    authorities = {kind: make_authority(plan.tenant, kind, now) for kind in KINDS}
    if plan.server_names:
        write_server(folder, authorities["servers"], plan.server_names, now)
    for kind, authority in authorities.items():
        write_new(folder.authority_key(kind), private_pem(authority.key, password))
        write_new(folder.authority(kind), authority_pem(authority).encode(), mode=0o644)
    enroller = make_signing_key(folder.enrolment_key, password)
    first = make_signing_key(folder.signing_key(plan.key), password)
    with Books(folder.database) as books, books.database.transaction():
        books.registry.add_key(KeyRow(plan.key, text_of(first), plan.classes, iso(now)))
    broker_ca = plan.broker_ca or authority_pem(authorities["servers"]).encode()
    _write_authorities(folder, authorities, broker_ca)
    write_bridge(folder, authorities["operators"], now)
    write_operator(folder, authorities["operators"], now)
    _write_image(folder, plan, enroller, broker_ca)
    write_claim(folder, authorities["claims"], now)
    write_new(folder.settings_file, _settings(plan).encode())
    return Founded(first, enroller)


def _write_authorities(folder: Folder, authorities: Mapping[Kind, Authority], broker_ca: bytes) -> None:
    """Whom the broker lets in by which door, and who vouches for it."""
    for kind in ("devices", "operators", "claims"):
        write_new(folder.broker / f"{kind}-ca.pem", authority_pem(authorities[kind]).encode(), mode=0o644)
    write_new(folder.broker / "server-ca.pem", broker_ca, mode=0o644)
    write_new(folder.operator / "server-ca.pem", broker_ca, mode=0o644)


def write_operator(folder: Folder, operators: Authority, now: datetime) -> Path:
    """The operator's certificate for the broker."""
    return _write_pair(folder.operator / "ops", *make_client(operators, OPERATOR_NAME, now))


def write_bridge(folder: Folder, operators: Authority, now: datetime) -> Path:
    """For the broker of devices that are not enrolled yet: it hands on what they announce."""
    return _write_pair(folder.broker / "claims-bridge", *make_client(operators, BRIDGE_NAME, now))


def write_claim(folder: Folder, claims: Authority, now: datetime) -> Path:
    """The credential with which devices ask to be enrolled, the same in all images."""
    (folder.image / "link").mkdir(mode=0o755, exist_ok=True)
    return _write_pair(folder.image / "link" / "claim", *make_client(claims, CLAIM_NAME, now))


def write_server(folder: Folder, servers: Authority, names: Sequence[str], now: datetime) -> Path:
    """A certificate for a broker of one's own. PeerError for a name that is none."""
    return _write_pair(folder.broker / "server", *make_server(servers, list(names), now))


def text_of(key: PublicKey) -> str:
    """A public key as it stands in messages and files: base64 of 32 bytes."""
    return base64.b64encode(key.raw).decode()


def parse_door(text: str, port: int) -> Door:
    """``host``, ``host:port``, ``[v6]:port``; ``port`` where none is named. PeerError."""
    host, colon, named = text.rpartition(":")
    if text.startswith("["):
        host, _, rest = text[1:].partition("]")
        colon, named = rest[:1], rest[1:]
    elif not colon or ":" in host:  # no port, or an IPv6 address alone
        host, colon, named = text, "", ""
    if colon and not (named.isascii() and named.isdigit() and len(named) < 6 and 1 <= int(named) <= 65_535):
        raise PeerError(f"cannot use the broker '{text}': its port is no number from 1 to 65535")
    if not host or len(host) > 253 or not all(char.isascii() and (char.isalnum() or char in ".:_-") for char in host):
        raise PeerError(f"cannot use the broker '{text}': that is no host")
    return Door(host, int(named) if colon else port)


def _write_image(folder: Folder, plan: Plan, enroller: PublicKey, broker_ca: bytes) -> None:
    trust = trust_for_claim(plan.tenant, enroller).encode()
    write_new(folder.trust_file, trust, mode=0o644)
    write_new(folder.image / "trust.toml", trust, mode=0o644)
    (folder.image / "link").mkdir(mode=0o755, exist_ok=True)
    write_new(folder.image / "link" / "server-ca.pem", broker_ca, mode=0o644)
    snippet = [
        f"# Belongs into {ETC}/config.toml. The claim credential serves until the device is enrolled.",
        "[link]",
        *_door(plan.devices),
        f"tls = {str(plan.tls).lower()}",
        f'ca_file = "{ETC}/link/server-ca.pem"',
        f"claim_host = {_quoted(plan.claims.host)}",
        f"claim_port = {plan.claims.port}",
        f'claim_cert_file = "{ETC}/link/claim.pem"',
        f'claim_key_file = "{ETC}/link/claim.key"',
    ]
    write_new(folder.image / "config.toml", ("\n".join(snippet) + "\n").encode(), mode=0o644)


def _settings(plan: Plan) -> str:
    lines = [
        "# The fleet's settings: docs/reference/edge-fleet.md. Relative files are of this folder.",
        f"tenant = {_quoted(plan.tenant)}",
        "",
        "[broker]",
        *_door(plan.operators),
        f"tls = {str(plan.tls).lower()}",
        'ca_file = "operator/server-ca.pem"',
        'cert_file = "operator/ops.pem"',
        'key_file = "operator/ops.key"',
    ]
    if plan.username:
        lines.append(f"username = {_quoted(plan.username)}")
    if plan.password_file:
        lines.append(f"password_file = {_quoted(plan.password_file)}")
    lines += ["", "# Names for filters, used as --where group=NAME.", "[groups]", '# pi = ["board=Raspberry Pi*"]']
    return "\n".join(lines) + "\n"


def _door(door: Door) -> list[str]:
    return [f"host = {_quoted(door.host)}", f"port = {door.port}"]


def _write_pair(stem: Path, certificate: str, key: EllipticCurvePrivateKey) -> Path:
    """``STEM.pem`` and ``STEM.key``; brokers and daemons read the key without a password."""
    write_new(stem.with_name(f"{stem.name}.key"), private_pem(key, None))
    write_new(stem.with_name(f"{stem.name}.pem"), certificate.encode(), mode=0o644)
    return stem


def _quoted(text: str) -> str:
    """A TOML basic string; those of JSON in ASCII are."""
    return json.dumps(text)
