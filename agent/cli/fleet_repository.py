"""``edge-fleet repository``, ``publish``, ``unpublish``, ``refresh``, ``verify``: what devices install from.

What needs tuf is imported when a command runs: the others must not pay for it, and work where it is missing.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agent.base.clock import SystemClock, iso
from agent.base.errors import PeerError, UnsupportedError
from agent.cli.commands import Commands
from agent.cli.fleet_common import confirm, folder_of, manual, new_password, opened, passwords_of, read_file, say, table
from agent.cli.terminal import EXIT_FAILED, Progress, bar, megabytes, print_json
from agent.fleet.folder import Folder, load_settings

if TYPE_CHECKING:
    from agent.fleet.repository import Repository
    from agent.fleet.roles import Role, Rule

_SOON_DAYS = 30
_ABOUT = """\
The repository is a folder of static files with TUF metadata (theupdateframework.io): any web server, object store or
CDN can serve it, and none of them is trusted.

Who may say what is told by five roles with keys of their own. root says who has the other roles; targets delegates to
models, which lists what may be installed; snapshot and timestamp say which state is the newest. By default two keys of
root, targets and models each must sign, so that one that is stolen does nothing.
"""


def register(commands: Commands, common: argparse.ArgumentParser) -> None:
    """Add the commands to the parser."""
    _register_repository(commands, common)
    publish = manual(
        commands,
        common,
        "publish",
        "put a packed model where devices can fetch it",
        about="Each file of BUNDLE is encrypted once, for the operator's identity; devices open it by a grant that a "
        "job brings. A version is published once: doing so again changes nothing, and another content needs another "
        "version. Cut off, it is finished by doing it again.",
        examples="  edge-fleet publish digits-1.0.0.edgemodel --to /srv/www/models\n",
    )
    publish.set_defaults(run=_publish, doing="publish")
    publish.add_argument("bundle", type=Path, metavar="BUNDLE", help="what 'edge-fleet pack' made")
    add_places(publish)
    unpublish = manual(
        commands,
        common,
        "unpublish",
        "take a version back",
        about="No device gets it any more, and no grant is made for it. A device that has it keeps it: "
        "'edge-fleet job model.rollback' or 'model.remove' is for those.",
        examples="  edge-fleet unpublish digits 1.0.0\n",
    )
    unpublish.set_defaults(run=_unpublish, doing="unpublish")
    unpublish.add_argument("model", metavar="MODEL", help="the model's name")
    unpublish.add_argument("version", metavar="VERSION", help="its version")
    unpublish.add_argument("--yes", action="store_true", help="do not ask")
    add_places(unpublish)
    refresh = manual(
        commands,
        common,
        "refresh",
        "sign the repository anew, so that it does not expire",
        about="The timestamp holds for 30 days: let a timer do this each day or week. What has half of its time behind "
        "it and whose keys are here is signed anew, too.",
        examples="  edge-fleet refresh --password-file /run/secrets/fleet --to /srv/www/models\n",
    )
    refresh.set_defaults(run=_refresh, doing="refresh the repository")
    add_places(refresh)
    verify = manual(
        commands,
        common,
        "verify",
        "check the repository as a device does, and further",
        about="From the root that devices were shipped with: every signature, every file. With --open each payload is "
        "decrypted, too, and compared with its manifest; that needs the password.",
        examples="  edge-fleet verify\n  edge-fleet verify /srv/www/models --open\n",
    )
    verify.set_defaults(run=_verify, doing="verify the repository")
    verify.add_argument("folder", type=Path, nargs="?", metavar="DIR", help="a copy of it (default: the fleet's own)")
    verify.add_argument("--root", type=Path, metavar="FILE", help="begin with this root (default: the first)")
    verify.add_argument("--open", action="store_true", help="decrypt each payload")


def _register_repository(commands: Commands, common: argparse.ArgumentParser) -> None:
    group = manual(commands, common, "repository", "where models are published: init, show, identity", about=_ABOUT)
    actions = group.add_subparsers(dest="action", metavar="ACTION", required=True)
    init = manual(
        actions,
        common,
        "init",
        "make the repository and its keys",
        about="Makes the keys of all roles and the identity to which payloads are encrypted, and image/root.json, "
        "which goes to every device. Move the private keys of root and targets to a safe place afterwards: --keys "
        "brings them back for the commands that need them.",
        examples="  edge-fleet repository init\n  edge-fleet repository init --root 2/3 --models 1/1\n",
    )
    init.set_defaults(run=_init, doing="make a repository")
    for role, least, count in (
        ("root", 2, 3), ("targets", 2, 2), ("models", 2, 2), ("snapshot", 1, 1), ("timestamp", 1, 1),
    ):  # fmt: skip
        init.add_argument(
            f"--{role}", type=_share, metavar="M/N", help=f"M of N keys must sign for {role} (default {least}/{count})"
        )
    init.add_argument("--no-password", action="store_true", help="leave the private keys readable (for tests)")
    show = manual(actions, common, "show", "roles, keys and versions", examples="  edge-fleet repository show\n")
    show.set_defaults(run=_show, doing="show the repository")
    identity = manual(
        actions,
        common,
        "identity",
        "print the recipient to whom payloads are encrypted",
        about="With --secret the identity itself, as age reads it: with it, 'cat HEADER PAYLOAD | age -d -i FILE' "
        "opens every payload that was ever published.",
        examples="  edge-fleet repository identity\n  edge-fleet repository identity --secret > identity.txt\n",
    )
    identity.set_defaults(run=_identity, doing="print the identity")
    identity.add_argument("--secret", action="store_true", help="print the secret half")


def add_places(parser: argparse.ArgumentParser) -> None:
    """Where keys come from and the files go."""
    parser.add_argument("--to", type=Path, metavar="DIR", help="copy the repository's files there, too")
    parser.add_argument("--keys", type=Path, action="append", metavar="DIR", help="further private keys are there")


def _share(text: str) -> tuple[int, int]:
    least, slash, count = text.partition("/")
    if not (slash and least.isdigit() and count.isdigit() and 1 <= int(least) <= int(count) <= 16):
        raise argparse.ArgumentTypeError(f"{text!r} is not like 2/3")
    return int(least), int(count)


def require_tuf() -> None:
    """UnsupportedError where the repository's library is not installed."""
    try:
        import tuf.api.metadata  # noqa: F401, PLC0415 - the check itself
    except ImportError as error:
        raise UnsupportedError(
            "cannot use a repository: python-tuf is not installed", hint="pip install 'edge-agent[fleet]'"
        ) from error


@contextlib.contextmanager
def changing(options: argparse.Namespace) -> Iterator[Repository]:
    """The repository, open for changes; afterwards it is copied where the options say."""
    require_tuf()
    from agent.fleet.publishing import copy_site  # noqa: PLC0415 - brings in tuf
    from agent.fleet.repository import Repository  # noqa: PLC0415 - brings in tuf

    folder = folder_of(options)
    load_settings(folder)
    with Repository(folder, passwords_of(options), SystemClock().now(), options.keys or ()) as repository:
        yield repository
        if options.to is not None:
            copied = copy_site(folder.site, options.to)
            say(f"copied {copied} files to {options.to}")


# -- repository -------------------------------------------------------------------------------------------------------


def _init(options: argparse.Namespace) -> int:
    require_tuf()
    from agent.fleet.repository import found_repository  # noqa: PLC0415 - brings in tuf
    from agent.fleet.roles import RULES, Rule, read_recipient  # noqa: PLC0415 - brings in tuf

    folder = folder_of(options)
    load_settings(folder)
    rules: dict[Role, Rule] = {}
    for role, rule in RULES.items():
        chosen = getattr(options, role)
        rules[role] = rule if chosen is None else Rule(chosen[1], chosen[0], rule.days)
    password = new_password(options, "the keys of the repository")
    found_repository(folder, rules, password, passwords_of(options), SystemClock().now())
    recipient = read_recipient(folder).text()
    if options.json:
        print_json({"repository": str(folder.site), "root": str(folder.shipped_root), "recipient": recipient})
        return 0
    print(f"made a repository in {folder.site}")
    print(f"  {folder.shipped_root}  goes to /etc/edge-agent of each device")
    print(f"  {folder.role_keys}/  sign it: keep root-* and targets-* elsewhere, they are seldom needed")
    print(f"payloads are encrypted to {recipient}")
    return 0


def _show(options: argparse.Namespace) -> int:
    require_tuf()
    from agent.fleet.repository import load, locked  # noqa: PLC0415 - brings in tuf
    from agent.fleet.roles import ROLES, RoleKeys  # noqa: PLC0415 - brings in tuf

    with opened(options) as fleet:
        with locked(fleet.folder):
            edition, keys = load(fleet.folder.site), RoleKeys(fleet.folder)
        names = keys.names()
        releases = fleet.books.releases.all()
        payloads = {each: fleet.books.releases.payloads(each.model, each.version) for each in releases}
    roles = []
    for role in ROLES:
        rule, signed = edition.rule(role), edition.of(role).signed
        held = set(keys.held(rule.keyids))
        roles.append({
            "role": role, "version": signed.version, "expires": iso(signed.expires), "threshold": rule.threshold,
            "keys": [{"name": names.get(keyid, keyid), "keyid": keyid, "held": keyid in held} for keyid in rule.keyids],
        })  # fmt: skip
    versions = [
        {
            "model": each.model, "version": each.version, "state": each.state, "changed": each.changed,
            "files": len(payloads[each]), "size": sum(payload.payload_size for payload in payloads[each]),
        }
        for each in releases
    ]  # fmt: skip
    if options.json:
        print_json({"roles": roles, "releases": versions})
        return 0
    table(
        ("ROLE", "VERSION", "UNTIL", "SIGNS", "KEYS"),
        [
            (each["role"], each["version"], each["expires"], f"{each['threshold']} of", _key_names(each))
            for each in roles
        ],
    )
    if versions:
        print()
        table(
            ("MODEL", "VERSION", "STATE", "SINCE", "FILES", "SIZE"),
            [
                (*(each[name] for name in ("model", "version", "state", "changed", "files")), _size(each))
                for each in versions
            ],
        )
    return 0


def _key_names(role: dict[str, Any]) -> str:
    return ", ".join(f"{key['name']}{'' if key['held'] else ' (elsewhere)'}" for key in role["keys"])


def _size(release: dict[str, Any]) -> str:
    return megabytes(release["size"])


def _identity(options: argparse.Namespace) -> int:
    require_tuf()
    from agent.fleet.roles import open_identity, read_recipient  # noqa: PLC0415 - brings in tuf

    folder = folder_of(options)
    load_settings(folder)
    text = open_identity(folder, passwords_of(options)).text() if options.secret else read_recipient(folder).text()
    if options.json:
        print_json({"identity" if options.secret else "recipient": text})
    else:
        print(text)
    return 0


# -- versions ---------------------------------------------------------------------------------------------------------


def _publish(options: argparse.Namespace) -> int:
    with opened(options) as fleet, changing(options) as repository, Progress() as line:
        from agent.fleet.publishing import publish  # noqa: PLC0415 - brings in tuf

        done = publish(
            repository, fleet.books, options.bundle, lambda what, now, total: line.show(bar(what, now, total))
        )
    manifest, size = done.manifest, sum(each.payload_size for each in done.payloads)
    if options.json:
        print_json({
            "model": manifest.name, "version": manifest.version, "again": done.again, "size": size,
            "files": [
                {"name": each.part, "payload": each.payload, "size": each.payload_size} for each in done.payloads
            ],
        })  # fmt: skip
    elif done.again:
        print(f"{manifest.name} {manifest.version} is published already, with this content")
    else:
        print(f"published {manifest.name} {manifest.version}: {len(done.payloads)} files, {megabytes(size)}")
    return 0


def _unpublish(options: argparse.Namespace) -> int:
    name, version = options.model, options.version
    with opened(options) as fleet, changing(options) as repository:
        from agent.fleet.publishing import unpublish  # noqa: PLC0415 - brings in tuf

        confirm(f"Take {name} {version} out of the repository?", yes=options.yes)
        unpublish(repository, fleet.books, name, version)
    if options.json:
        print_json({"model": name, "version": version, "state": "withdrawn"})
    else:
        print(f"unpublished {name} {version}")
    return 0


def _refresh(options: argparse.Namespace) -> int:
    with changing(options) as repository:
        missed = repository.refresh()
        edition = repository.edition
        now = repository.now
    expires = {"timestamp": edition.timestamp.signed.expires, "snapshot": edition.snapshot.signed.expires}
    if options.json:
        print_json({
            "expires": {role: iso(moment) for role, moment in expires.items()},
            "missed": {role: iso(moment) for role, moment in missed.items()},
        })  # fmt: skip
    else:
        print(f"refreshed: the timestamp holds until {iso(expires['timestamp'])}")
    for role, moment in missed.items():
        _warn(role, moment, now)
    return 0


def _warn(role: str, moment: datetime, now: datetime) -> None:
    left = (moment - now).days
    urgent = "warning" if left < _SOON_DAYS else "note"
    say(f"{urgent}: {role} expires on {iso(moment)}, in {left} days; its keys are not here: --keys names their folder")


def _verify(options: argparse.Namespace) -> int:
    require_tuf()
    from agent.fleet.checking import check_site  # noqa: PLC0415 - brings in tuf
    from agent.fleet.roles import open_identity  # noqa: PLC0415 - brings in tuf

    folder = folder_of(options)
    load_settings(folder)
    site = options.folder or folder.site
    identity = open_identity(folder, passwords_of(options)) if options.open else None
    with Progress() as line:
        found = check_site(
            site,
            _first_root(folder, site, options.root),
            SystemClock(),
            identity,
            lambda what, now, total: line.show(bar(what, now, total)),
        )
    if options.json:
        print_json({
            "folder": str(site), "releases": found.releases, "targets": found.targets, "size": found.size,
            "versions": {role: mark.version for role, mark in found.state.marks.items()},
            "expires": {role: iso(moment) for role, moment in found.state.expires.items()},
            "problems": list(found.problems),
        })  # fmt: skip
    else:
        for problem in found.problems:
            say(f"wrong: {problem}")
        print(
            f"{site}: {found.releases} versions, {found.targets} files, {megabytes(found.size)}, "
            f"{len(found.problems) or 'no'} problem{'s' * (len(found.problems) != 1)}"
        )
    return EXIT_FAILED if found.problems else 0


def _first_root(folder: Folder, site: Path, given: Path | None) -> bytes:
    """The oldest root that devices may have: the whole chain is checked. PeerError where there is none."""
    path = given or folder.site / "metadata" / "1.root.json"
    if not path.is_file():
        raise PeerError(f"cannot verify {site}: there is no {path}", hint="edge-fleet repository init")
    return read_file(path)
