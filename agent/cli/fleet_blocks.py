"""``edge-fleet serve-blocks``: models for devices that have nothing but the broker."""

from __future__ import annotations

import argparse
import secrets
import signal
import threading
from pathlib import Path

from agent.cli.commands import Commands
from agent.cli.fleet_common import folder_of, manual, say
from agent.cli.terminal import megabytes
from agent.fleet.folder import load_settings

_ABOUT = """\
Devices for which no mirror is set, or none answers, ask for the files of the repository through the broker, 48 KiB at a
time. This command answers them, until it is ended by a signal; run it as a service, on one machine or several.

Nothing else than the folder is read, and nothing is believed of what is asked. Devices take turns. A web server is
cheaper where there is one: each byte passes the broker.
"""


def register(commands: Commands, common: argparse.ArgumentParser) -> None:
    """Add the command to the parser."""
    made = manual(
        commands,
        common,
        "serve-blocks",
        "give devices the files of the repository through the broker",
        about=_ABOUT,
        examples="  edge-fleet serve-blocks /srv/www/models\n"
        "  edge-fleet serve-blocks /srv/www/models --rate-kib-s 512\n",
    )
    made.set_defaults(run=_run, doing="serve blocks")
    made.add_argument("folder", type=Path, metavar="DIR", help="the repository: what publish wrote to")
    made.add_argument(
        "--rate-kib-s", type=_rate, default=0, metavar="N", help="at most N KiB a second, to all devices together"
    )


def _rate(text: str) -> int:
    if not text.isdecimal() or len(text) > 9:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of KiB")
    return int(text)


def _run(options: argparse.Namespace) -> int:
    from agent.fleet.broker import Broker  # noqa: PLC0415 - the other commands need no broker
    from agent.fleet.giving import Given, Giver  # noqa: PLC0415

    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    folder = folder_of(options)
    settings = load_settings(folder)

    def told(given: Given) -> None:
        if given.offset == 0 or given.offset + given.count == given.total:
            words = "begins with" if given.offset + given.count < given.total else "has had"
            say(f"{given.device} {words} {given.path}, {megabytes(given.total)}")

    client_id = f"{settings.tenant}/@ops/{secrets.token_hex(8)}"
    with Broker(folder, settings.broker, client_id) as broker:
        giver = Giver(options.folder, settings.tenant, broker, bytes_per_s=options.rate_kib_s * 1024.0, told=told)
        broker.subscribe({giver.filter: 0})
        say(f"serving {options.folder} to the devices of {settings.tenant} through {broker.where}")
        giver.run(ended.is_set)
    return 0
