"""``edge-fleet approve``: who may join."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from agent.base.errors import ConflictError, DeadlineError, PeerError
from agent.base.files import write_atomically
from agent.cli.commands import Commands
from agent.cli.fleet_common import (
    Opened,
    UsageError,
    authority_of,
    cell,
    confirm,
    duration,
    manual,
    opened,
    passwords_of,
    read_file,
    say,
    table,
)
from agent.cli.terminal import print_json
from agent.fleet.broker import Outgoing
from agent.fleet.desk import Desk
from agent.fleet.enrolment import (
    Enrolled,
    by_hand,
    enrol,
    find_announced,
    fingerprint,
    seal_enrolment,
    trust_for_device,
)
from agent.fleet.keys import open_signer, parse_public
from agent.fleet.words import Announced
from agent.trust.envelope import PublicKey
from agent.wire.topics import claim_topic, device_topic

_ABOUT = """\
Without DEVICE, lists the devices that ask to be enrolled. With it, DEVICE becomes the name of the one whose key id
begins with --keyid: compare the fingerprint with the one that the device itself shows (edge-agent status) before you
say yes. Its certificate is signed, and it is told its name and the keys that it is to obey. A device that is enrolled
already and asks again gets its next enrolment; what was under way for it is void.

--manual is for those who have certificates of their own: nothing is sent, and a folder is written with trust.toml (and,
for a request given by --csr, a certificate) for the device's /etc/edge-agent.
"""
_EXAMPLES = """\
  edge-fleet approve
  edge-fleet approve door-cam-7 --keyid 3f9a --wait 2m
  edge-fleet approve door-cam-8 --manual --identity 5Lw1…= --out door-cam-8/
"""


def register(commands: Commands, common: argparse.ArgumentParser) -> None:
    """Add the command to the parser."""
    approve = manual(
        commands, common, "approve", "let a device join, or show who asks", about=_ABOUT, examples=_EXAMPLES
    )
    approve.set_defaults(run=_approve, doing="approve")
    approve.add_argument("device", metavar="DEVICE", nargs="?", help="the name that it gets")
    approve.add_argument("--keyid", metavar="ID", help="the beginning of its key id")
    approve.add_argument("--replace", action="store_true", help="the name was another device's, which is no more")
    approve.add_argument("--yes", action="store_true", help="do not ask")
    approve.add_argument("--wait", type=duration, metavar="TIME", help="until it is there under its name")
    hand = approve.add_argument_group("by hand")
    hand.add_argument("--manual", action="store_true", help="write files instead of telling the device")
    hand.add_argument("--identity", metavar="BASE64|@FILE", help="its identity key; may be left out if it is known")
    hand.add_argument("--csr", type=Path, metavar="FILE", help="sign this certificate request")
    hand.add_argument("-o", "--out", type=Path, metavar="DIR", help="where the files go (default: DEVICE)")


def _approve(options: argparse.Namespace) -> int:
    if options.manual:
        return _approve_by_hand(options)
    if options.identity or options.csr or options.out:
        raise UsageError("cannot approve: --identity, --csr and --out are for --manual")
    if options.device is None and options.keyid:
        raise UsageError(
            "cannot approve: say what the device is to be called", hint="edge-fleet approve NAME --keyid ID"
        )
    with opened(options) as fleet, Desk(fleet.folder, fleet.settings, fleet.books, fleet.clock) as desk:
        desk.listen((), claims=True)
        desk.sync()
        announced = fleet.books.words.announced()
        if options.device is None:
            return _list_announced(fleet, options, announced)
        chosen = _choose_announced(options, announced)
        _ask(fleet, options, chosen)
        passwords = passwords_of(options)
        authority = authority_of(fleet, options, "devices", passwords)
        signer = open_signer(fleet.folder.enrolment_key, passwords)
        enrolled = enrol(fleet.books, options.device, chosen, authority, fleet.clock.now(), replaced=options.replace)
        _publish(fleet, desk, chosen, seal_enrolment(enrolled, fleet.settings.tenant, signer), enrolled)
        if options.wait is not None:
            _await(fleet, desk, enrolled, options.wait)
    _tell_enrolled(options, enrolled)
    return 0


def _list_announced(fleet: Opened, options: argparse.Namespace, announced: Sequence[Announced]) -> int:
    names = {device.identity.keyid: device.name for device in fleet.books.registry.devices()}
    if options.json:
        print_json(
            {
                "announced": [
                    {
                        "keyid": each.keyid,
                        "identity": each.identity,
                        "board": each.board,
                        "serial": each.serial,
                        "agent": each.agent_version,
                        "heard": each.received,
                        "device": names.get(each.keyid),
                    }
                    for each in announced
                ]
            }
        )
        return 0
    if not announced:
        print("nobody asks to be enrolled")
        return 0
    table(
        ("KEY ID", "BOARD", "SERIAL", "AGENT", "HEARD", "WAS"),
        [
            (fingerprint(each.keyid), each.board, each.serial, each.agent_version, each.received, names.get(each.keyid))
            for each in announced
        ],
    )
    say("next: edge-fleet approve NAME --keyid ID")
    return 0


def _choose_announced(options: argparse.Namespace, announced: Sequence[Announced]) -> Announced:
    if options.keyid:
        return find_announced(announced, options.keyid)
    if len(announced) != 1:
        raise PeerError(
            f"cannot approve '{options.device}': {len(announced) or 'no'} devices ask to be enrolled",
            hint="edge-fleet approve lists them; --keyid says which one is meant",
        )
    if options.yes:
        raise UsageError("cannot approve: with --yes, --keyid must say which device is meant")
    return announced[0]


def _ask(fleet: Opened, options: argparse.Namespace, chosen: Announced) -> None:
    known = fleet.books.registry.find_device(options.device)
    say(f"key id  {fingerprint(chosen.keyid)}")
    say(f"board   {cell(chosen.board)}, serial {cell(chosen.serial)}, agent {cell(chosen.agent_version)}")
    if known is not None:
        say(f"enrolled already, on {known.enrolled}: it starts anew, and what is under way for it is void")
    keys = [key for key in fleet.books.registry.signing_keys() if key.revoked is None]
    if sum("destroy" in key.classes for key in keys) < 2:
        say("note: fewer than two keys may sign destroy, so nobody will be able to: edge-fleet keys add")
    confirm(f"Enrol this device as '{options.device}'?", yes=options.yes)


def _publish(fleet: Opened, desk: Desk, chosen: Announced, envelope: bytes, enrolled: Enrolled) -> None:
    """The enrolment, and what is retained of an earlier one emptied: none of it is for the device as it now is."""
    tenant = fleet.settings.tenant
    desk.say(
        [
            *(
                Outgoing(device_topic(tenant, enrolled.device.name, rest), b"", retain=True)
                for rest in ("dn/job", "dn/desired", "up/info", "up/reported")
                if enrolled.device.epoch > 1
            ),
            Outgoing(claim_topic(tenant, chosen.keyid, "dn/enrolment"), envelope, retain=True),
            Outgoing(claim_topic(tenant, chosen.keyid, "up/announce"), b"", retain=True),
        ]
    )


def _await(fleet: Opened, desk: Desk, enrolled: Enrolled, patience_s: float) -> None:
    """DeadlineError when the device has not shown itself under its name by then."""
    name = enrolled.device.name
    desk.listen([name])
    deadline = fleet.clock.monotonic() + patience_s
    while fleet.books.words.word(name, "info") is None:
        left = deadline - fleet.clock.monotonic()
        if left <= 0:
            raise DeadlineError(
                f"cannot see '{name}' yet: it is enrolled, but has said nothing within {patience_s:g} s",
                hint="edge-fleet devices show tells when it has",
            )
        desk.pump(min(left, 1.0))


def _tell_enrolled(options: argparse.Namespace, enrolled: Enrolled, out: Path | None = None) -> None:
    device = enrolled.device
    if options.json:
        print_json(
            {
                "device": device.name,
                "epoch": device.epoch,
                "keyid": device.identity.keyid,
                "certificate_until": device.certificate_until,
                "keys": [key.name for key in enrolled.keys],
                "folder": None if out is None else str(out),
            }
        )
        return
    print(
        f"{device.name} is enrolled as number {device.epoch}; it obeys {', '.join(key.name for key in enrolled.keys)}"
    )
    if out is not None:
        print(f"{out}/ holds what belongs into its /etc/edge-agent")


def _approve_by_hand(options: argparse.Namespace) -> int:
    if options.device is None or options.keyid or options.wait is not None:
        raise UsageError("cannot approve: --manual needs DEVICE, and takes neither --keyid nor --wait")
    csr = read_file(options.csr).decode("utf-8", "replace") if options.csr else ""
    with opened(options) as fleet:
        out = options.out or Path(options.device)
        if os.path.lexists(out):
            raise ConflictError(f"cannot write {out}: it is there already", hint="--out names another folder")
        chosen = by_hand(_identity(fleet, options), csr, fleet.clock.now())
        _ask(fleet, options, chosen)
        authority = authority_of(fleet, options, "devices") if csr else None
        enrolled = enrol(
            fleet.books,
            options.device,
            chosen,
            authority,
            fleet.clock.now(),
            origin="manual",
            replaced=options.replace,
        )
        _write_by_hand(fleet, enrolled, out)
    _tell_enrolled(options, enrolled, out)
    return 0


def _identity(fleet: Opened, options: argparse.Namespace) -> PublicKey:
    """The identity that was given, else that of the device which has the name already."""
    given: str | None = options.identity
    if given is not None:
        return parse_public(read_file(Path(given[1:])).decode("utf-8", "replace") if given.startswith("@") else given)
    known = fleet.books.registry.find_device(options.device)
    if known is None:
        raise UsageError(
            f"cannot approve '{options.device}': --manual needs --identity",
            hint="edge-agent status on the device shows it",
        )
    return known.identity


def _write_by_hand(fleet: Opened, enrolled: Enrolled, out: Path) -> None:
    out.mkdir(mode=0o755)
    write_atomically(out / "trust.toml", trust_for_device(enrolled, fleet.settings.tenant).encode(), mode=0o644)
    if enrolled.certificate:
        write_atomically(out / "device.pem", enrolled.certificate.encode(), mode=0o644)
