"""``edge-fleet keys``: the keys that devices obey, and what is signed with them."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from agent.base.clock import SystemClock, iso
from agent.base.errors import ConflictError, NotFoundError, PeerError, RefusedError
from agent.base.files import write_atomically
from agent.cli.commands import Commands
from agent.cli.fleet_common import (
    UsageError,
    authority_of,
    cell,
    classes_of,
    confirm,
    folder_of,
    held_keys,
    manual,
    new_password,
    opened,
    passwords_of,
    read_file,
    require_name,
    say,
    table,
)
from agent.cli.fleet_repository import add_places
from agent.cli.fleet_role_keys import is_role_key, register_publish, register_rotate, revoke_role_key
from agent.cli.terminal import print_json
from agent.fleet import keys as keyring
from agent.fleet.authority import Kind
from agent.fleet.books import Books
from agent.fleet.enrolment import fingerprint
from agent.fleet.folder import Folder, make_folder
from agent.fleet.founding import text_of, write_bridge, write_claim, write_operator, write_server
from agent.fleet.jobs import MOST_EXPORTED_BYTES, export_envelopes, parse_export, read_exported
from agent.trust.envelope import add_signatures
from agent.wire.ops import CLASSES

_ALL = ",".join(CLASSES)
#: What can be made anew: by which authority, and where it is below the folder.
_CERTIFIED: Mapping[str, tuple[Kind, str]] = {
    "server": ("servers", "broker/server"),
    "bridge": ("operators", "broker/claims-bridge"),
    "operator": ("operators", "operator/ops"),
    "claim": ("claims", "image/link/claim"),
}
_WRITERS = {"bridge": write_bridge, "operator": write_operator, "claim": write_claim}


def register(commands: Commands, common: argparse.ArgumentParser) -> None:
    """Add the commands to the parser."""
    keys = manual(
        commands,
        common,
        "keys",
        "the keys that devices obey: list, add, revoke, publish, rotate, export, sign",
        about="A device obeys the keys that there are when it is enrolled, each in the classes of operations (observe, "
        "change, destroy) that it was given. destroy needs two keys, best of two people in two folders.",
    )
    actions = keys.add_subparsers(dest="action", metavar="ACTION", required=True)
    listing = manual(actions, common, "list", "all keys with what they may sign", examples="  edge-fleet keys list\n")
    listing.set_defaults(run=_list, doing="list keys")
    add = manual(
        actions,
        common,
        "add",
        "make a signing key, or take in another person's public key",
        about="Without --public a key is made here; that also works in a folder without a fleet, where a second person "
        "keeps nothing but his key. With --public only its public half is entered: its owner signs elsewhere.",
        examples="  edge-fleet keys add ann --classes observe,change\n"
        "  edge-fleet --fleet ~/mine keys add bob && edge-fleet --fleet ~/mine keys export bob\n"
        "  edge-fleet keys add bob --classes destroy --public MCowBQYDK2VwAyEA…=\n",
    )
    add.set_defaults(run=_add, doing="add a key")
    add.add_argument("name", metavar="NAME", help="whose it is: letters, digits, '.', '_' and '-'")
    add.add_argument(
        "--classes", default="observe,change", metavar="LIST", help=f"some of {_ALL} (default: observe,change)"
    )
    add.add_argument("--public", metavar="BASE64|@FILE", help="a public key that was made elsewhere")
    add.add_argument("--no-password", action="store_true", help="leave the private key readable (for tests)")
    revoke = manual(
        actions,
        common,
        "revoke",
        "use a key no more",
        about="It signs nothing here any more and is left out of enrolments to come. Devices that were enrolled with "
        "it go on obeying it until 'keys publish' tells them, or a new enrolment. A key of the repository (ROLE-N) is "
        "taken out of its role, which devices learn by themselves.",
        examples="  edge-fleet keys revoke ann\n  edge-fleet keys revoke models-1 --keys /media/stick\n",
    )
    revoke.set_defaults(run=_revoke, doing="revoke a key")
    revoke.add_argument("name", metavar="NAME", help="the key")
    revoke.add_argument("--yes", action="store_true", help="do not ask")
    add_places(revoke)
    register_rotate(actions, common)
    register_publish(actions, common)
    export = manual(
        actions, common, "export", "print a public key", examples="  edge-fleet keys export bob | tee bob.pub\n"
    )
    export.set_defaults(run=_export, doing="export a key")
    export.add_argument("name", metavar="NAME", help="the key, or 'enrolment' for the one that enrols devices")
    sign = manual(
        actions,
        common,
        "sign",
        "add a signature to an exported job",
        about="Shows what is about to be signed, asks, and writes the signature into the file. This is how a second "
        "person agrees to an operation of class destroy.",
        examples="  edge-fleet --fleet ~/mine keys sign wipe.job\n  edge-fleet keys sign wipe.job --key ann --yes\n",
    )
    sign.set_defaults(run=_sign, doing="sign")
    sign.add_argument("file", type=Path, metavar="FILE", help="what 'edge-fleet job … --export FILE' wrote")
    sign.add_argument("--key", metavar="NAME", help="the key to sign with (default: the only one in the folder)")
    sign.add_argument("--yes", action="store_true", help="do not ask")
    certify = manual(
        actions,
        common,
        "certify",
        "make a certificate anew: for the broker, for images, for the operator",
        about="What was there is moved aside as FILE.old. 'server' needs the names by which devices and operators "
        "reach the broker.",
        examples="  edge-fleet keys certify server mqtt.lab.example 192.0.2.10\n  edge-fleet keys certify claim\n",
    )
    certify.set_defaults(run=_certify, doing="make a certificate")
    certify.add_argument("what", choices=tuple(_CERTIFIED), metavar="WHAT", help=f"one of {', '.join(_CERTIFIED)}")
    certify.add_argument("names", nargs="*", metavar="HOST", help="names or addresses of the broker")


def _list(options: argparse.Namespace) -> int:
    folder, books = _keyring(options)
    with books:
        rows = held_keys(folder, books)
    if options.json:
        print_json({"keys": [_key_document(row) for row in rows]})
        return 0
    table(
        ("KEY", "ID", "CLASSES", "PRIVATE", "ADDED", "REVOKED"),
        [
            (row.name, row.keyid, ",".join(row.classes), "here" if row.held else "elsewhere", row.added, row.revoked)
            for row in rows
        ],
    )
    able = [row for row in rows if "destroy" in row.classes and row.revoked is None]
    if len(able) < 2:
        say(f"note: destroy needs two keys that have it, there {'is 1' if able else 'is none'}: edge-fleet keys add")
    return 0


def _key_document(row: keyring.KeyRow) -> dict[str, Any]:
    return {
        "name": row.name,
        "keyid": row.keyid,
        "public": row.public,
        "classes": list(row.classes),
        "held": row.held,
        "added": row.added,
        "revoked": row.revoked,
    }


def _keyring(options: argparse.Namespace) -> tuple[Folder, Books]:
    """A folder that has at least keys. NotFoundError."""
    folder = folder_of(options)
    if not folder.database.exists():
        raise NotFoundError(
            f"cannot use {folder.path}: there are no keys in it", hint="edge-fleet init, or edge-fleet keys add"
        )
    return folder, Books(folder.database)


def _add(options: argparse.Namespace) -> int:
    require_name("key", options.name)
    classes = classes_of(options.classes)
    folder = folder_of(options)
    now = iso(SystemClock().now())
    make_folder(folder)
    with Books(folder.database) as books:
        if options.name in {row.name for row in books.registry.signing_keys()}:
            raise ConflictError(f"cannot add key '{options.name}': there is one of that name")
        if options.public is not None:
            given: str = options.public
            text = read_file(Path(given[1:])).decode("utf-8", "replace") if given.startswith("@") else given
            public = keyring.parse_public(text)
        else:
            public = keyring.make_signing_key(
                folder.signing_key(options.name), new_password(options, f"the key '{options.name}'")
            )
        row = keyring.KeyRow(options.name, text_of(public), classes, now, held=options.public is None)
        with books.database.transaction():
            books.registry.add_key(row)
        waiting = len(books.registry.devices())
    if options.json:
        print_json(_key_document(row))
    else:
        print(f"added {row.name} ({fingerprint(row.keyid)}) for {', '.join(row.classes)}")
        print(f"public key: {row.public}")
    if waiting:
        say("note: devices that are enrolled already do not obey it before 'keys publish', or a new enrolment")
    return 0


def _revoke(options: argparse.Namespace) -> int:
    folder, books = _keyring(options)
    with books:
        if is_role_key(options.name, folder) and options.name not in {
            row.name for row in books.registry.signing_keys()
        }:
            return revoke_role_key(options)
        if options.name not in {row.name for row in books.registry.signing_keys()}:
            raise NotFoundError(f"cannot revoke '{options.name}': there is no such key", hint="edge-fleet keys list")
        confirm(f"Revoke the key '{options.name}'?", yes=options.yes)
        with books.database.transaction():
            books.registry.revoke_key(options.name, iso(SystemClock().now()))
        row = next(row for row in held_keys(folder, books) if row.name == options.name)
        obeying = [device.name for device in books.registry.devices() if row.keyid in device.obeys]
    if options.json:
        print_json(_key_document(row) | {"still_obeyed_by": obeying})
    else:
        print(f"revoked {options.name}")
    if obeying:
        say(f"warning: {len(obeying)} enrolled devices obey it until 'keys publish' tells them, or a new enrolment")
    return 0


def _export(options: argparse.Namespace) -> int:
    folder = folder_of(options)
    if options.name == "enrolment":
        public = keyring.open_signer(folder.enrolment_key, passwords_of(options)).public
        document: dict[str, Any] = {"name": "enrolment", "keyid": public.keyid, "public": text_of(public)}
    else:
        folder, books = _keyring(options)
        with books:
            rows = {row.name: row for row in held_keys(folder, books)}
        if options.name not in rows:
            raise NotFoundError(f"cannot export '{options.name}': there is no such key", hint="edge-fleet keys list")
        document = _key_document(rows[options.name])
    if options.json:
        print_json(document)
    else:
        print(document["public"])
    return 0


def _sign(options: argparse.Namespace) -> int:
    folder, books = _keyring(options)
    with books:
        held = [row for row in held_keys(folder, books) if row.held and row.revoked is None]
    if options.key is not None:
        held = [row for row in held if row.name == options.key]
    if len(held) != 1:
        reason = "no such key here" if not held else f"there are {', '.join(row.name for row in held)}"
        raise RefusedError(f"cannot sign: {reason}", hint="--key names the key")
    entries = read_export(options.file)
    _tell_signing(entries)
    confirm(f"Sign this as '{held[0].name}'?", yes=options.yes)
    (signer,) = keyring.open_signers(folder, held, passwords_of(options))
    if all(_has_signed(envelope, signer.keyid) for _, envelope in entries):
        raise ConflictError(f"cannot sign {options.file}: '{held[0].name}' has signed it already")
    signed = [
        (device, envelope if _has_signed(envelope, signer.keyid) else add_signatures(envelope, [signer]))
        for device, envelope in entries
    ]
    write_atomically(options.file, json.dumps(export_envelopes(signed), indent=1).encode())
    if options.json:
        print_json({"file": str(options.file), "keyid": signer.keyid, "documents": len(entries)})
    else:
        print(f"signed {options.file} as {held[0].name}: {len(entries)} document{'s' * (len(entries) > 1)}")
    return 0


def _has_signed(envelope: bytes, keyid: str) -> bool:
    """Whether the key is among the signers of an envelope, which was read before."""
    return any(each["keyid"] == keyid for each in json.loads(envelope)["signatures"])


def read_export(path: Path) -> list[tuple[str, bytes]]:
    """Device and envelope of each document of an exported job. PeerError, OSError."""
    try:
        return parse_export(json.loads(read_file(path, MOST_EXPORTED_BYTES).decode("utf-8")))
    except (ValueError, RecursionError) as error:
        raise PeerError(f"cannot read {path}: it is no JSON") from error


def _tell_signing(entries: list[tuple[str, bytes]]) -> None:
    """Everything that is about to be signed: what is not shown is not agreed to."""
    for device, envelope in entries:
        message = read_exported(envelope)
        if message.device != device:
            raise PeerError(f"cannot sign: the document for '{device}' is for '{message.device}'")
        job = message.job
        what = "nothing" if job is None else f"{job.op} ({job.kind}) {json.dumps(job.args, ensure_ascii=False)}"
        cancels = f", cancels {', '.join(message.cancel)}" if message.cancel else ""
        say(f"{message.tenant}/{message.device}: {cell(what, 2000)}{cancels}, job {'-' if job is None else job.job_id}")


def _certify(options: argparse.Namespace) -> int:
    if (options.what == "server") != bool(options.names):
        raise UsageError(
            "cannot make a certificate: 'server' needs the broker's names, the others take none",
            hint="edge-fleet keys certify server mqtt.example",
        )
    with opened(options) as fleet:
        kind, stem = _CERTIFIED[options.what]
        authority, now = authority_of(fleet, options, kind), fleet.clock.now()
        made = fleet.folder.path / stem
        for path in (made.with_name(f"{made.name}.pem"), made.with_name(f"{made.name}.key")):
            if path.exists():
                path.replace(path.with_name(f"{path.name}.old"))
        if options.what == "server":
            write_server(fleet.folder, authority, options.names, now)
        else:
            _WRITERS[options.what](fleet.folder, authority, now)
    if options.json:
        print_json({"certificate": f"{made}.pem", "key": f"{made}.key"})
    else:
        print(f"made {made}.pem and {made}.key")
    return 0
