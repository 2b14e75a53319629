"""``edge-fleet keys rotate`` and ``keys revoke`` for the keys of the repository's roles."""

from __future__ import annotations

import argparse
import re
from typing import TYPE_CHECKING, cast

from agent.base.errors import NotFoundError
from agent.cli.commands import Commands
from agent.cli.fleet_common import UsageError, confirm, manual, new_password, opened, say
from agent.cli.fleet_repository import add_places, changing
from agent.cli.terminal import print_json
from agent.fleet.folder import Folder

if TYPE_CHECKING:
    from agent.fleet.roles import Role

_ROLES = ("root", "targets", "models", "snapshot", "timestamp")
_NAME = re.compile(rf"({'|'.join(_ROLES)})-[0-9]+")


def register_rotate(actions: Commands, common: argparse.ArgumentParser) -> None:
    """Add ``keys rotate``."""
    rotate = manual(
        actions,
        common,
        "rotate",
        "give a role of the repository new keys",
        about="By default each of its keys is replaced. Devices follow by the chain of roots: nothing has to be done "
        "on them, however many changes they missed. The private halves of the old keys can be destroyed afterwards.",
        examples="  edge-fleet keys rotate timestamp\n"
        "  edge-fleet keys rotate models --key models-1 --keys /media/stick\n",
    )
    rotate.set_defaults(run=_rotate, doing="rotate keys")
    rotate.add_argument("role", choices=_ROLES, metavar="ROLE", help=f"one of {', '.join(_ROLES)}")
    rotate.add_argument("--key", action="append", metavar="NAME", help="replace this one only; may be repeated")
    rotate.add_argument("--threshold", type=int, metavar="M", help="from now on M of its keys must sign")
    rotate.add_argument("--add", type=int, default=0, metavar="N", help="N keys more than before")
    rotate.add_argument("--no-password", action="store_true", help="leave the private keys readable (for tests)")
    add_places(rotate)


def register_publish(actions: Commands, common: argparse.ArgumentParser) -> None:
    """Add ``keys publish``."""
    publish = manual(
        actions,
        common,
        "publish",
        "tell devices which keys to obey, by the repository",
        about="The keys that sign jobs, with their classes and without those that were revoked, become a target of the "
        "repository. Devices adopt it when they look there next, for an installation or by their plan: what they were "
        "enrolled with counts no more then. The role targets signs it.",
        examples="  edge-fleet keys publish --keys /media/stick --to /srv/www/models\n",
    )
    publish.set_defaults(run=_publish, doing="publish keys")
    add_places(publish)


def is_role_key(name: str, folder: Folder) -> bool:
    """Whether a name is that of a repository's key."""
    return _NAME.fullmatch(name) is not None and (folder.role_keys / f"{name}.pub").exists()


def revoke_role_key(options: argparse.Namespace) -> int:
    """Take a key out of its role, with none in its place."""
    name: str = options.name
    role = cast("Role", name.rpartition("-")[0])
    with changing(options) as repository:
        confirm(f"Take the key '{name}' out of {role}?", yes=options.yes)
        repository.rotate(role, [name], 0, None)
        repository.save()
    if options.json:
        print_json({"name": name, "role": role, "revoked": True})
    else:
        print(f"revoked {name}: it signs for {role} no more")
    return 0


def _publish(options: argparse.Namespace) -> int:
    with opened(options) as fleet, changing(options) as repository:
        from agent.fleet.keytable import publish_keys  # noqa: PLC0415 - brings in tuf

        done = publish_keys(repository, fleet.books, fleet.settings.tenant)
    names = [key.name for key in done.table.keys.values()]
    if options.json:
        print_json({"version": done.table.version, "again": done.again, "keys": names})
    elif done.again:
        print(f"these keys are published already, as version {done.table.version}")
    else:
        print(f"published keys, version {done.table.version}: {', '.join(names)}")
    return 0


def _rotate(options: argparse.Namespace) -> int:
    if options.add < 0 or (options.threshold is not None and options.threshold < 1):
        raise UsageError("cannot rotate: --add and --threshold are counts")
    role = cast("Role", options.role)
    with changing(options) as repository:
        names = repository.keys.names()
        gone = options.key or [names[keyid] for keyid in repository.edition.rule(role).keyids if keyid in names]
        if not gone and not options.add:
            raise NotFoundError(f"cannot rotate {role}: none of its keys has a name here")
        password = new_password(options, f"the new keys of {role}")
        made = repository.rotate(role, gone, len(gone) + options.add, password, options.threshold or 0)
        repository.save()
        version = repository.edition.root.signed.version
    if options.json:
        print_json({"role": role, "gone": gone, "made": made, "root": version})
    else:
        print(f"{role} is now signed by {', '.join(made)} in place of {', '.join(gone)} (root version {version})")
    say("note: destroy the private halves of the old keys; devices learn of the new ones by themselves")
    return 0
