"""``edge-fleet devices``: which devices there are, and all that is known of them."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from typing import Any

from agent.base.clock import iso
from agent.base.errors import AgentError
from agent.cli.commands import Commands
from agent.cli.fleet_common import Opened, cell, choose_devices, confirm, manual, opened, say, table
from agent.cli.terminal import print_json
from agent.fleet.broker import Outgoing
from agent.fleet.desk import Desk
from agent.fleet.enrolment import fingerprint
from agent.fleet.filters import SHORT, parse_filters
from agent.fleet.overview import groups, job_document, row, select, views
from agent.wire.topics import claim_topic, device_topic

FILTERS = f"""\
A FILTER is FIELD=PATTERN, FIELD!=PATTERN, or for numbers FIELD>=N, <=, >, <. Patterns know * and ?, and | between
alternatives; case does not matter. Fields are {", ".join(SHORT)}, group, and paths below facts, inventory, config and
jobs, like facts.mem_total_mb. What a device has not said matches nothing."""
_FORGET = """\
What the broker retains of it is emptied, too. The device itself is not told, and its certificate stays good: the broker
has to refuse it from now on (docs/how-to/broker.md).
"""
_REVOKE = """\
No grant is made for it: it cannot open any version that it does not have. It keeps what it has, and it can still be
given other jobs. Enrolled again, it is a device like any other.
"""
_SHOW = """\
What it is, how it is, its alerts, its last jobs, what it refused, and what was not believed of what came in its name.
"""


def register(commands: Commands, common: argparse.ArgumentParser) -> None:
    """Add the commands to the parser."""
    devices = manual(
        commands,
        common,
        "devices",
        "the devices of the fleet: list, show, groups, revoke, forget",
        about="Each asks the broker first for what devices say of themselves. --offline shows what was heard last.",
    )
    actions = devices.add_subparsers(dest="action", metavar="ACTION", required=True)
    listing = manual(
        actions,
        common,
        "list",
        "one line a device",
        about=FILTERS,
        examples="  edge-fleet devices list\n"
        "  edge-fleet devices list --where 'board=Raspberry Pi 4*' --where 'memory>=4000'\n",
    )
    listing.set_defaults(run=_list, doing="list devices")
    which_devices(listing)
    show = manual(
        actions,
        common,
        "show",
        "all that is known of a device",
        about=_SHOW,
        examples="  edge-fleet devices show door-cam-7\n",
    )
    show.set_defaults(run=_show, doing="show a device")
    show.add_argument("device", metavar="DEVICE", help="its name")
    _offline(show)
    grouped = manual(
        actions,
        common,
        "groups",
        "how many devices there are of each kind",
        about="Prints filters for --where with the number of devices that they match, and the groups of fleet.toml.",
        examples="  edge-fleet devices groups\n",
    )
    grouped.set_defaults(run=_groups, doing="group devices")
    _offline(grouped)
    forget = manual(
        actions,
        common,
        "forget",
        "take a device out of the registry",
        about=_FORGET,
        examples="  edge-fleet devices forget door-cam-7\n",
    )
    forget.set_defaults(run=_forget, doing="forget a device")
    forget.add_argument("device", metavar="DEVICE", help="its name")
    forget.add_argument("--yes", action="store_true", help="do not ask")
    revoke = manual(
        actions,
        common,
        "revoke",
        "give a device no published version any more",
        about=_REVOKE,
        examples="  edge-fleet devices revoke door-cam-7\n",
    )
    revoke.set_defaults(run=_revoke, doing="revoke a device")
    revoke.add_argument("device", metavar="DEVICE", help="its name")
    revoke.add_argument("--undo", action="store_true", help="take that back")
    revoke.add_argument("--yes", action="store_true", help="do not ask")


def which_devices(parser: argparse.ArgumentParser) -> None:
    """The options that say which devices are meant, and whether the broker is to be asked."""
    choose_devices(parser, everyone=False)
    _offline(parser)


def _offline(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--offline", action="store_true", help="do not ask the broker: what was heard last")


def refresh(fleet: Opened, options: argparse.Namespace, devices: Sequence[str] | None) -> None:
    """Hear what these devices say now. Where the broker cannot be reached, what was heard last has to do."""
    if options.offline:
        return
    try:
        with Desk(fleet.folder, fleet.settings, fleet.books, fleet.clock) as desk:
            desk.listen(devices)
            desk.sync()
    except AgentError as error:
        say(f"warning: {error}")
        say("what follows is what was heard last")


# -- devices ----------------------------------------------------------------------------------------------------------


def chosen_devices(fleet: Opened, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The views of the devices that the options name, by name."""
    filters = parse_filters(options.where or (), fleet.settings.groups)
    refresh(fleet, options, options.device)
    seen = views(fleet.books)
    return {name: seen[name] for name in select(seen, options.device or (), filters)}


def _list(options: argparse.Namespace) -> int:
    with opened(options) as fleet:
        chosen = chosen_devices(fleet, options)
        waiting = len(fleet.books.words.announced())
    rows = [row(view) for view in chosen.values()]
    if options.json:
        print_json({"devices": rows})
        return 0
    table(
        ("DEVICE", "ONLINE", "HEALTH", "ALERTS", "BOARD", "PROFILE", "AGENT", "HEARD"),
        [
            (
                each["device"],
                each["online"],
                each["health"],
                each["alerts"] or "",
                each["board"],
                each["profile"],
                each["agent"],
                each["heard"] or "never",
            )
            for each in rows
        ],
        right=(3,),
    )
    if waiting:
        say(f"{waiting} more ask to be enrolled: edge-fleet approve")
    return 0


def _show(options: argparse.Namespace) -> int:
    with opened(options) as fleet:
        fleet.books.registry.device(options.device)
        refresh(fleet, options, [options.device])
        document = _device_document(fleet, options.device)
    if options.json:
        print_json(document)
    else:
        _print_device(document)
    return 0


def _device_document(fleet: Opened, name: str) -> dict[str, Any]:
    books = fleet.books
    device = books.registry.device(name)
    names = {key.keyid: key.name for key in books.registry.signing_keys()}
    return {
        **views(books)[name],
        "obeys": [
            {"keyid": keyid, "name": names.get(keyid), "classes": list(classes)}
            for keyid, classes in device.obeys.items()
        ],
        "alerts": [{"id": alert, **word.payload} for _, alert, word in books.words.alerts(name)],
        "jobs": [job_document(outcome) for outcome in books.documents.of_device(name, 10)],
        "dropped": books.words.dropped(name),
    }


def _print_device(document: Mapping[str, Any]) -> None:
    for label, value in _device_lines(document):
        if value not in (None, ""):
            print(f"{label:<14}{cell(value, 2000)}")
    for alert in document["alerts"]:
        print(f"alert         {cell(alert['id'])}: {cell(alert.get('text'))}")
    for job in document["jobs"]:
        print(f"job           {cell(job['job'])}  {cell(job['op'])}  {cell(job['state'])}")
    for dropped in document["dropped"]:
        times = f"{dropped['count']} times, last {dropped['last']}"
        print(f"not believed  {cell(dropped['what'])}: {cell(dropped['reason'])}, {times}")


def _device_lines(document: Mapping[str, Any]) -> list[tuple[str, object]]:
    info, reported, status = (document[kind] or {} for kind in ("info", "reported", "status"))
    short = row({**document, "alerts": len(document["alerts"])})
    obeys = "; ".join(f"{key['name'] or key['keyid']}: {', '.join(key['classes'])}" for key in document["obeys"])
    refused = reported.get("refused") or {}
    return [
        ("device", document["device"]),
        ("key id", fingerprint(document["keyid"])),
        ("enrolled", f"{document['enrolled']} as number {document['epoch']} ({document['origin']})"),
        ("revoked", document["revoked"]),
        ("certificate", f"until {document['certificate_until']}" if document["certificate_until"] else ""),
        ("serial", document["serial"]),
        ("obeys", obeys),
        ("online", short["online"]),
        ("", status.get("reason") if short["online"] is False else ""),
        ("health", short["health"]),
        ("board", short["board"]),
        ("profile", short["profile"]),
        ("agent", short["agent"]),
        ("this start", info.get("boot_nonce")),
        (
            "models",
            ", ".join(f"{model.get('name')} {model.get('active') or '-'}" for model in reported.get("models") or ()),
        ),
        ("config", reported.get("config_state")),
        ("drift", json.dumps(reported["drift"]) if reported.get("drift") else ""),
        ("refused", ", ".join(f"{reason} {count}" for reason, count in sorted(refused.items()))),
        ("heard", document["heard"] or "never"),
    ]


def _groups(options: argparse.Namespace) -> int:
    with opened(options) as fleet:
        refresh(fleet, options, None)
        seen = views(fleet.books)
        named = {
            name: len(select(seen, (), parse_filters(filters)))
            for name, filters in sorted(fleet.settings.groups.items())
        }
    counted = groups(row(view) for view in seen.values())
    if options.json:
        print_json(
            {
                "groups": named,
                "filters": [{"field": field, "value": value, "devices": count} for field, value, count in counted],
            }
        )
        return 0
    rows = [(f"group={name}", count) for name, count in named.items()]
    table(("FILTER", "DEVICES"), rows + [(f"{field}={value}", count) for field, value, count in counted], right=(1,))
    return 0


def _revoke(options: argparse.Namespace) -> int:
    with opened(options) as fleet:
        device = fleet.books.registry.device(options.device)
        if not options.undo:
            confirm(f"Give the device '{device.name}' no published version any more?", yes=options.yes)
        now = None if options.undo else device.revoked or iso(fleet.clock.now())
        with fleet.books.database.transaction():
            fleet.books.registry.revoke_device(device.name, now)
    if options.json:
        print_json({"device": device.name, "revoked": now})
    else:
        print(f"{device.name} gets published versions again" if now is None else f"revoked {device.name}")
    return 0


def _forget(options: argparse.Namespace) -> int:
    with opened(options) as fleet:
        device = fleet.books.registry.device(options.device)
        confirm(f"Forget the device '{device.name}' and its jobs?", yes=options.yes)
        retained = ["up/status", "up/info", "up/reported", "dn/job", "dn/desired"]
        retained += [f"up/alert/{alert}" for _, alert, _ in fleet.books.words.alerts(device.name)]
        topics = [device_topic(fleet.settings.tenant, device.name, rest) for rest in retained]
        topics.append(claim_topic(fleet.settings.tenant, device.identity.keyid, "dn/enrolment"))
        with Desk(fleet.folder, fleet.settings, fleet.books, fleet.clock) as desk:
            desk.say([Outgoing(topic, b"", retain=True) for topic in topics])
        with fleet.books.database.transaction():
            fleet.books.registry.forget_device(device.name)
    if options.json:
        print_json({"forgotten": device.name})
    else:
        print(f"forgot {device.name}")
    return 0
