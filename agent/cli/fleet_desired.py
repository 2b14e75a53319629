"""``edge-fleet desired``: how devices should be, and whether they are."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from agent.base.clock import iso
from agent.base.errors import RefusedError
from agent.cli.commands import Commands
from agent.cli.fleet_common import (
    Opened,
    UsageError,
    cell,
    choose_devices,
    confirm,
    manual,
    opened,
    read_json,
    signers_for,
    table,
)
from agent.cli.fleet_devices import chosen_devices, which_devices
from agent.cli.terminal import print_json
from agent.fleet.broker import Outgoing
from agent.fleet.desiring import changed, desire, desired_of, parse_settings, twin
from agent.fleet.desk import Desk
from agent.fleet.filters import parse_filters
from agent.fleet.overview import select, views
from agent.wire.topics import device_topic

_ABOUT = """\
What is desired is kept by the broker for each device and holds until something else is desired, whenever the device
comes to see it. A device applies it, takes it back when its link does not return with it, and reports what became of
it. It lies over the device's own configuration file; which sections a fleet may set, the device decides.
"""
_SET = """\
SECTION.KEY=VALUE words, or a whole document by --config. They are laid over what is desired already; null takes a key
out of it, --replace begins with nothing.
"""


def register(commands: Commands, common: argparse.ArgumentParser) -> None:
    """Add the commands to the parser."""
    desired = manual(commands, common, "desired", "how devices should be: set, show", about=_ABOUT)
    actions = desired.add_subparsers(dest="action", metavar="ACTION", required=True)
    setting = manual(
        actions,
        common,
        "set",
        "change what is desired of devices",
        about=_SET,
        examples="  edge-fleet desired set log.level=debug telemetry.heat_s=10 --device door-cam-7\n"
        "  edge-fleet desired set --config @night.toml --where group=kitchens\n",
    )
    setting.set_defaults(run=_set, doing="say what is desired")
    setting.add_argument("settings", metavar="SECTION.KEY=VALUE", nargs="*", help="a value is JSON where it can be")
    setting.add_argument("--config", metavar="JSON|@FILE", help="sections as one object, or a .json or .toml file")
    setting.add_argument("--replace", action="store_true", help="instead of all that was desired before")
    choose_devices(setting)
    setting.add_argument("--sign", action="append", metavar="KEY", help="sign with this key; may be repeated")
    setting.add_argument("--yes", action="store_true", help="do not ask")
    show = manual(
        actions,
        common,
        "show",
        "what is desired, what is reported, and the drift between them",
        examples="  edge-fleet desired show --device door-cam-7\n",
    )
    show.set_defaults(run=_show, doing="show what is desired")
    which_devices(show)


def _set(options: argparse.Namespace) -> int:
    if not (options.device or options.all or options.where):
        raise UsageError("cannot say what is desired: say of which devices", hint="--device, --where or --all")
    change = parse_settings(options.settings)
    if options.config is not None:
        document = read_json(options.config)
        if not isinstance(document, dict) or options.settings:
            raise UsageError("cannot read --config: it is one JSON object, and takes no settings beside it")
        change = document
    if not change and not options.replace:
        raise UsageError("cannot say what is desired: nothing was given", hint="log.level=debug, --config or --replace")
    with opened(options) as fleet:
        _, signers = signers_for(fleet, options, ["change"])
        with Desk(fleet.folder, fleet.settings, fleet.books, fleet.clock) as desk:
            devices = _meant(fleet, options, desk)
            if len(devices) > 1 and sys.stdin.isatty():
                confirm(f"Change what is desired of {len(devices)} devices?", yes=options.yes)
            versions, messages = {}, []
            with fleet.books.database.transaction():
                for name in devices:
                    before = {} if options.replace else desired_of(fleet.books, name)["config"]
                    device = fleet.books.registry.device(name)
                    config = changed(before, change)
                    now = iso(fleet.clock.now())
                    envelope = desire(fleet.books, fleet.settings.tenant, device, config, signers, now)
                    topic = device_topic(fleet.settings.tenant, name, "dn/desired")
                    messages.append(Outgoing(topic, envelope, retain=True))
                    versions[name] = desired_of(fleet.books, name)["version"]
            desk.say(messages)
    if options.json:
        print_json({"devices": versions})
    else:
        table(("DEVICE", "VERSION"), list(versions.items()), right=(1,))
    return 0


def _meant(fleet: Opened, options: argparse.Namespace, desk: Desk) -> list[str]:
    filters = parse_filters(options.where or (), fleet.settings.groups)
    if filters:
        desk.listen(options.device)
        desk.sync()
    devices = select(views(fleet.books), options.device or (), filters)
    if not devices:
        raise RefusedError("cannot say what is desired: no device is meant", hint="edge-fleet devices list")
    return devices


def _show(options: argparse.Namespace) -> int:
    with opened(options) as fleet:
        twins = [twin(fleet.books, name) for name in chosen_devices(fleet, options)]
    if options.json:
        print_json({"devices": twins})
        return 0
    table(
        ("DEVICE", "VERSION", "REPORTED", "STATE", "DESIRED", "DRIFT"),
        [
            (each["device"], each["version"], each["reported_version"], each["state"], *map(_brief, _both(each)))
            for each in twins
        ],
        right=(1, 2),
    )
    return 0


def _both(each: dict[str, Any]) -> tuple[Any, Any]:
    return each["desired"], each["drift"]


def _brief(value: Any) -> str:
    return cell(json.dumps(value), 120) if value else ""
