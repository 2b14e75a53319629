"""``edge-fleet publish-release`` and ``withdraw-release``: releases of the agent itself."""

from __future__ import annotations

import argparse
from pathlib import Path

from agent.cli.commands import Commands
from agent.cli.fleet_common import confirm, manual
from agent.cli.fleet_repository import add_places, changing
from agent.cli.terminal import megabytes, print_json


def register(commands: Commands, common: argparse.ArgumentParser) -> None:
    """Add the commands to the parser."""
    publish = manual(
        commands,
        common,
        "publish-release",
        "put a release of the agent where devices can fetch it",
        about="WHEELHOUSE is a folder of wheels for one processor and one Python, as 'pip wheel' makes it; version, "
        "the kind of machine and the formats are read out of the wheels. The keys of the role targets sign it. Devices "
        "install it when a job says so: 'edge-fleet job agent.update'. Versions only go up, unless the release says "
        "with --instead-of which later ones it may take the place of.",
        examples="  pip wheel -w wheels '/path/to/the/clone[device]'\n"
        "  edge-fleet publish-release wheels --keys /mnt/safe --to /srv/www/models\n"
        "  edge-fleet publish-release old-wheels --instead-of 0.3.0 --keys /mnt/safe\n",
    )
    publish.set_defaults(run=_publish, doing="publish a release")
    publish.add_argument("wheelhouse", type=Path, metavar="WHEELHOUSE", help="the wheels")
    publish.add_argument(
        "--instead-of", action="append", default=[], metavar="VERSION", help="a later version that it may replace"
    )
    add_places(publish)
    withdraw = manual(
        commands,
        common,
        "withdraw-release",
        "take a release of the agent back",
        about="No device gets it any more, on whatever kind of machine; one that has it keeps it.",
        examples="  edge-fleet withdraw-release 0.3.0 --keys /mnt/safe\n",
    )
    withdraw.set_defaults(run=_withdraw, doing="withdraw a release")
    withdraw.add_argument("version", metavar="VERSION", help="the release's version")
    withdraw.add_argument("--yes", action="store_true", help="do not ask")
    add_places(withdraw)


def _publish(options: argparse.Namespace) -> int:
    with changing(options) as repository:
        from agent.fleet.shipping import publish_release  # noqa: PLC0415 - brings in tuf

        done = publish_release(repository, options.wheelhouse, options.instead_of)
    if options.json:
        print_json({
            **done.release.model_dump(mode="json"), "target": done.target, "size": done.size, "wheels": done.wheels,
            "again": done.again,
        })  # fmt: skip
    elif done.again:
        print(f"{done.target} is published already, with this content")
    else:
        print(f"published {done.target}: {done.wheels} wheels, {megabytes(done.size)}")
    return 0


def _withdraw(options: argparse.Namespace) -> int:
    with changing(options) as repository:
        from agent.fleet.shipping import withdraw_release  # noqa: PLC0415 - brings in tuf

        confirm(f"Take release {options.version} out of the repository?", yes=options.yes)
        gone = withdraw_release(repository, options.version)
    if options.json:
        print_json({"version": options.version, "withdrawn": gone})
    else:
        print(f"withdrew {', '.join(gone)}")
    return 0
