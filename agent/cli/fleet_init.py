"""``edge-fleet init``: the folder of a fleet."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from agent.base.clock import SystemClock
from agent.base.errors import ConflictError
from agent.cli.commands import Commands
from agent.cli.fleet_common import classes_of, folder_of, manual, new_password, read_file, require_name
from agent.cli.terminal import print_json
from agent.fleet.enrolment import fingerprint
from agent.fleet.folder import CLAIM_PORT, DEVICE_PORT, OPERATOR_PORT, Folder
from agent.fleet.founding import ETC, Door, Founded, Plan, found, parse_door, text_of
from agent.wire.ops import CLASSES

_ALL = ",".join(CLASSES)
_INIT = """\
  edge-fleet init --tenant acme --broker mqtt.acme.example
  edge-fleet init --tenant acme --broker mqtt.acme.example --ca /etc/ssl/acme-ca.pem
  edge-fleet --fleet ./lab init --tenant lab --broker 192.0.2.10 --server-cert 192.0.2.10 --no-password
"""
_ABOUT = """\
Makes a folder with everything that an operator needs: certificate authorities, the key that enrols devices, a first key
that signs jobs, the registry (fleet.db); broker/, which a broker needs, and image/, which goes to every device.

Devices, operators and devices that ask to be enrolled each have a door of their own at the broker, by default the ports
8883, 8884 and 8885 of one host. docs/how-to/fleet.md shows the whole way.

Private keys are encrypted with a password. It is asked for, or comes from EDGE_FLEET_PASSWORD or --password-file. The
operator's key for the broker has none: with it one can listen and ring doorbells, but not command.
"""


def register(commands: Commands, common: argparse.ArgumentParser) -> None:
    """Add the command to the parser."""
    init = manual(commands, common, "init", "make a fleet: keys, certificates, registry", about=_ABOUT, examples=_INIT)
    init.set_defaults(run=_init, doing="make a fleet")
    init.add_argument("--tenant", required=True, metavar="NAME", help="the fleet's name: a level of every topic")
    init.add_argument(
        "--broker", required=True, metavar="HOST[:PORT]", help=f"the broker, as devices reach it (port {DEVICE_PORT})"
    )
    init.add_argument(
        "--operators", metavar="HOST[:PORT]", help=f"as operators reach it (default: that host, port {OPERATOR_PORT})"
    )
    init.add_argument(
        "--claims",
        metavar="HOST[:PORT]",
        help=f"as devices reach it that ask to be enrolled (default: that host, port {CLAIM_PORT})",
    )
    init.add_argument("--ca", type=Path, metavar="FILE", help="who vouches for the broker (default: our own authority)")
    init.add_argument(
        "--server-cert", action="append", metavar="NAME", help="make the broker's certificate, too; may be repeated"
    )
    init.add_argument("--username", metavar="NAME", default="", help="for brokers that want a name and a password, too")
    init.add_argument("--broker-password-file", type=Path, metavar="FILE", help="holds that password in its first line")
    init.add_argument("--key", default="operator", metavar="NAME", help="name of the first signing key (operator)")
    init.add_argument("--classes", default=_ALL, metavar="LIST", help=f"what it may sign ({_ALL})")
    init.add_argument("--no-password", action="store_true", help="leave the private keys readable (for tests)")
    init.add_argument("--no-tls", action="store_true", help="talk to the broker in the clear (for tests)")


def _init(options: argparse.Namespace) -> int:
    folder = folder_of(options)
    plan = _plan(options)
    if os.path.lexists(folder.settings_file) or os.path.lexists(folder.enrolment_key):
        raise ConflictError(f"cannot make a fleet in {folder.path}: there is one", hint="--fleet names another folder")
    password = new_password(options, "the keys of this fleet")
    made = found(folder, plan, password, SystemClock().now())
    if options.json:
        print_json(_document(folder, plan, made))
    else:
        _tell(folder, plan, made)
    return 0


def _plan(options: argparse.Namespace) -> Plan:
    require_name("tenant", options.tenant)
    require_name("key", options.key)
    devices = parse_door(options.broker, DEVICE_PORT)
    operators, claims = Door(devices.host, OPERATOR_PORT), Door(devices.host, CLAIM_PORT)
    return Plan(
        tenant=options.tenant,
        devices=devices,
        operators=parse_door(options.operators, OPERATOR_PORT) if options.operators else operators,
        claims=parse_door(options.claims, CLAIM_PORT) if options.claims else claims,
        key=options.key,
        classes=classes_of(options.classes),
        tls=not options.no_tls,
        broker_ca=None if options.ca is None else read_file(options.ca),
        username=options.username,
        password_file=os.path.abspath(options.broker_password_file) if options.broker_password_file else "",
        server_names=options.server_cert or (),
    )


def _document(folder: Folder, plan: Plan, made: Founded) -> dict[str, object]:
    return {
        "folder": str(folder.path),
        "tenant": plan.tenant,
        "image": str(folder.image),
        "trust": str(folder.trust_file),
        "enrolment_key": text_of(made.enroller),
        "key": {"name": plan.key, "keyid": made.first.keyid, "public": text_of(made.first)},
        "broker": str(folder.broker),
    }


def _tell(folder: Folder, plan: Plan, made: Founded) -> None:
    print(f"made the fleet {plan.tenant} in {folder.path}")
    print(f"  {folder.image}/  goes to {ETC} of each device: whom it obeys, the broker, the claim credential")
    print(f"  {folder.broker}/  goes to the broker: whom it lets in{', and its certificate' * bool(plan.server_names)}")
    print(f"signing key {plan.key}: {fingerprint(made.first.keyid)}")
    print("next: set up the broker, start devices with that image, then: edge-fleet approve")
