"""Enrolment: a device gets its name, its certificate, and the list of keys that it obeys.

Invariants: a name belongs to one identity, unless a person says that the device was replaced; the number of an
enrolment only rises, also for a name that was forgotten; which operations each key may sign is fixed here, by the
registry of this moment.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from agent.base.clock import iso
from agent.base.errors import ConflictError, NotFoundError, PeerError, RefusedError
from agent.fleet.authority import Authority, read_request, sign_device, valid_until
from agent.fleet.books import Books
from agent.fleet.keys import KeyRow
from agent.fleet.registry import Device
from agent.fleet.words import Announced
from agent.trust.envelope import PublicKey, Signer, seal
from agent.wire.messages import Enrolment, SigningKey
from agent.wire.topics import CLAIM, is_name

_LEAST_KEYID = 4


@dataclass(frozen=True, slots=True)
class Enrolled:
    """What came of an enrolment. ``certificate`` is PEM, "" where none was asked for.

    ``keys_version`` is that of the latest table of keys: a device that has an earlier one takes these keys.
    """

    device: Device
    certificate: str
    keys: tuple[KeyRow, ...]
    keys_version: int = 0


def find_announced(announced: Sequence[Announced], keyid: str) -> Announced:
    """The one whose keyid begins so (blanks and colons do not count). NotFoundError, PeerError when it is too short."""
    wanted = keyid.replace(":", "").replace(" ", "").lower()
    if len(wanted) < _LEAST_KEYID:
        raise PeerError(f"cannot find device {keyid!r}: give at least {_LEAST_KEYID} characters of its key id")
    found = [each for each in announced if each.keyid.startswith(wanted)]
    if not found:
        raise NotFoundError(
            f"cannot find device '{wanted}': nobody with that key id asks to be enrolled", hint="edge-fleet approve"
        )
    if len(found) > 1:
        raise PeerError(f"cannot find device '{wanted}': {len(found)} begin so, give more of it")
    return found[0]


def enrol(
    books: Books,
    name: str,
    announced: Announced,
    authority: Authority | None,
    now: datetime,
    *,
    origin: str = "approved",
    replaced: bool = False,
) -> Enrolled:
    """Enter a device, or a device's next enrolment. ``authority`` None: its certificate comes from elsewhere.

    ConflictError when the name or the identity is another's, PeerError for a name or a request that is none,
    RefusedError while there is no key that it could obey.
    """
    if not is_name(name) or name == CLAIM:
        raise PeerError(f"cannot call a device {name!r}: letters, digits, '.', '_' and '-', not 'claim', at most 64")
    with books.database.transaction():
        _require_free(books, name, announced.identity, replaced=replaced)
        keys = tuple(key for key in books.registry.signing_keys() if key.revoked is None)
        if not keys:
            raise RefusedError("cannot enrol a device: there is no key that it could obey", hint="edge-fleet keys add")
        certificate = "" if authority is None else sign_device(authority, read_request(announced.csr), name, now)
        device = Device(
            name=name,
            identity=PublicKey(base64.b64decode(announced.identity)),
            epoch=books.registry.last_epoch(name) + 1,
            origin=origin,
            enrolled=iso(now),
            obeys={key.keyid: key.classes for key in keys},
            certificate_until=iso(valid_until(certificate)) if certificate else None,
            board=announced.board,
            serial=announced.serial,
        )
        books.registry.enrol(device, announced.identity)
        books.words.withdraw_announcement(announced.keyid)
        table = books.registry.last_table()
    return Enrolled(device, certificate, keys, table.version if table is not None else 0)


def _require_free(books: Books, name: str, identity: str, *, replaced: bool) -> None:
    same = books.registry.device_of(identity)
    if same is not None and same.name != name:
        raise ConflictError(
            f"cannot enrol '{name}': this device is enrolled as '{same.name}'",
            hint=f"use that name, or first: edge-fleet devices forget {same.name}",
        )
    known = books.registry.find_device(name)
    if known is not None and same is None and not replaced:
        raise ConflictError(
            f"cannot enrol '{name}': another device has that name (key id {known.identity.keyid})",
            hint="--replace gives its name to this one",
        )


def seal_enrolment(enrolled: Enrolled, tenant: str, signer: Signer) -> bytes:
    """What the device is told, signed by the fleet's enrolment key."""
    device = enrolled.device
    message = Enrolment(
        tenant=tenant,
        device=device.name,
        epoch=device.epoch,
        identity=base64.b64encode(device.identity.raw).decode(),
        certificate=enrolled.certificate,
        keys=[SigningKey(name=key.name, public=key.public, classes=list(key.classes)) for key in enrolled.keys],
        keys_version=enrolled.keys_version or None,
    )
    return seal(Enrolment.KIND, message.encode(), [signer])


def trust_for_claim(tenant: str, enroller: PublicKey) -> str:
    """``trust.toml`` for images: whoever has this key may enrol the device."""
    return (
        "# Whom this device obeys. Belongs to root: /etc/edge-agent/trust.toml, mode 0644.\n"
        f"tenant = {_quoted(tenant)}\n\n[enrolment]\npublic = {_quoted(base64.b64encode(enroller.raw).decode())}\n"
    )


def trust_for_device(enrolled: Enrolled, tenant: str) -> str:
    """``trust.toml`` for one device that is enrolled by hand."""
    device = enrolled.device
    lines = [
        "# Whom this device obeys. Belongs to root: /etc/edge-agent/trust.toml, mode 0644.",
        f"tenant = {_quoted(tenant)}",
        f"device = {_quoted(device.name)}",
        f"epoch = {device.epoch}",
    ]
    if enrolled.keys_version:
        lines.append(f"keys_version = {enrolled.keys_version}")
    for key in enrolled.keys:
        classes = ", ".join(_quoted(kind) for kind in key.classes)
        lines += ["", "[[keys]]", f"name = {_quoted(key.name)}", f"public = {_quoted(key.public)}"]
        lines.append(f"classes = [{classes}]")
    return "\n".join(lines) + "\n"


def by_hand(identity: PublicKey, csr: str, now: datetime) -> Announced:
    """What a person brings instead of an announcement."""
    return Announced(
        keyid=identity.keyid,
        identity=base64.b64encode(identity.raw).decode(),
        csr=csr,
        board=None,
        serial=None,
        agent_version="",
        received=iso(now),
    )


def fingerprint(keyid: str) -> str:
    """A key id in groups of four, to be compared by eye."""
    return " ".join(keyid[index : index + 4] for index in range(0, len(keyid), 4))


def _quoted(text: str) -> str:
    """A TOML basic string; those of JSON are."""
    return json.dumps(text, ensure_ascii=False)
