"""What the commands of ``edge-fleet`` share: the folder, passwords, the books, questions to the person, help texts."""

from __future__ import annotations

import argparse
import contextlib
import getpass
import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

from agent.base.clock import SystemClock
from agent.base.errors import ConflictError, PeerError, RefusedError, one_line
from agent.base.files import read_bounded
from agent.cli.commands import Commands, sentence
from agent.cli.terminal import print_table
from agent.fleet.authority import Authority, Kind, read_authority
from agent.fleet.books import Books
from agent.fleet.folder import Folder, Settings, load_settings, resolve_folder
from agent.fleet.keys import KeyRow, Passwords, choose_keys, open_signers, parse_classes, read_password
from agent.trust.envelope import Signer
from agent.wire.ops import OpClass
from agent.wire.topics import is_name

_MOST_FILE_BYTES = 1 << 20
_DURATION = re.compile(r"([0-9]{1,9})(s|m|h|d|)")
_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86_400}


class UsageError(PeerError):
    """The command line contradicts itself: exit status 2."""


@dataclass(frozen=True, slots=True)
class Opened:
    """A fleet that is in use: its folder, settings and books."""

    folder: Folder
    settings: Settings
    books: Books
    clock: SystemClock


@contextlib.contextmanager
def opened(options: argparse.Namespace) -> Iterator[Opened]:
    """The fleet that the options name. NotFoundError where there is none."""
    folder = folder_of(options)
    settings = load_settings(folder)
    with Books(folder.database) as books:
        yield Opened(folder, settings, books, SystemClock())


def folder_of(options: argparse.Namespace) -> Folder:
    """The fleet's folder by flag, environment, default."""
    return resolve_folder(os.environ, getattr(options, "fleet", None))


# -- people -----------------------------------------------------------------------------------------------------------


def passwords_of(options: argparse.Namespace) -> Passwords:
    """The password that was given, else what a person at the terminal types."""
    return Passwords(
        read_password(os.environ, getattr(options, "password_file", None)), _ask_password if _is_talking() else None
    )


def new_password(options: argparse.Namespace, what: str) -> bytes | None:
    """The password for keys that are made; None where there is to be none, with a warning."""
    if options.no_password:
        say(f"warning: {what} have no password: whoever reads the folder commands the fleet")
        return None
    return passwords_of(options).choose(what)


def _ask_password(question: str) -> bytes:
    try:
        return os.fsencode(getpass.getpass(question, stream=sys.stderr))
    except EOFError as error:
        raise RefusedError("cannot go on: no password was typed") from error


def _is_talking() -> bool:
    return sys.stdin.isatty() and sys.stderr.isatty()


def confirm(question: str, *, yes: bool) -> None:
    """Go on if the person says so. RefusedError when not, or when nobody can be asked and ``--yes`` is not given."""
    if yes:
        return
    if not _is_talking():
        raise RefusedError("cannot go on: nobody can be asked whether that is meant", hint="--yes says so")
    print(f"{question} [y/N] ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise RefusedError("cannot go on: it was not confirmed")


def held_keys(folder: Folder, books: Books) -> list[KeyRow]:
    """All signing keys; those with their private half in the folder are marked so."""
    held = [path.stem for path in folder.path.glob("keys/*.key")]
    return books.registry.signing_keys(held)


def signers_for(
    fleet: Opened, options: argparse.Namespace, kinds: Sequence[OpClass]
) -> tuple[list[KeyRow], list[Signer]]:
    """The keys that sign for these classes, opened."""
    rows = choose_keys(held_keys(fleet.folder, fleet.books), kinds, getattr(options, "sign", None) or ())
    return rows, open_signers(fleet.folder, rows, passwords_of(options))


def authority_of(
    fleet: Opened, options: argparse.Namespace, kind: Kind, passwords: Passwords | None = None
) -> Authority:
    """One of the fleet's authorities with its key opened. RefusedError, DamagedError, ConflictError, OSError."""
    key = (passwords or passwords_of(options)).open(fleet.folder.authority_key(kind))
    authority = read_authority(read_file(fleet.folder.authority(kind)), key)
    if authority.tenant != fleet.settings.tenant:
        raise ConflictError(f"cannot use {fleet.folder.authority(kind)}: it is of tenant '{authority.tenant}'")
    return authority


# -- values -----------------------------------------------------------------------------------------------------------


def classes_of(text: str) -> tuple[OpClass, ...]:
    """Classes from a list with commas. PeerError."""
    try:
        return parse_classes(text)
    except ValueError as error:
        raise PeerError(f"cannot read classes '{text}': {error}") from error


def require_name(what: str, name: str) -> None:
    """PeerError for what cannot be a name."""
    if not is_name(name) or name == "enrolment":
        raise PeerError(
            f"cannot use the {what} '{name}': letters, digits, '.', '_' and '-', at most 64, not 'enrolment'"
        )


def duration(text: str) -> float:
    """``90``, ``90s``, ``15m``, ``2h``, ``7d`` in seconds. For argparse."""
    match = _DURATION.fullmatch(text)
    if match is None or int(match[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no duration, like 90s, 15m, 2h or 7d")
    return float(int(match[1]) * _SECONDS[match[2]])


def moment_after(text: str, now: datetime) -> datetime:
    """``2026-01-31T12:00:00Z``, or a duration from ``now``. PeerError."""
    try:
        return now + timedelta(seconds=duration(text))
    except (argparse.ArgumentTypeError, OverflowError):
        pass
    try:
        return datetime.strptime(text, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=timezone.utc)
    except ValueError as error:
        raise PeerError(f"cannot read '{text}': it is neither a duration (2h) nor like 2026-01-31T12:00:00Z") from error


def read_json(text: str) -> Any:
    """JSON, or with ``@`` before it a file of JSON or TOML. PeerError, ConfigError, OSError."""
    if text.startswith("@") and text.endswith(".toml"):
        from agent.base.config import read_toml  # noqa: PLC0415 - only for such files

        return read_toml(Path(text[1:]))
    data = read_file(Path(text[1:])) if text.startswith("@") else text.encode()
    try:
        return json.loads(data.decode("utf-8"), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise PeerError(f"cannot read {text[:60]!r}: it is no JSON: {error}") from error


def _no_constant(name: str) -> None:
    raise ValueError(f"JSON has no {name}")


def read_file(path: Path, most: int = _MOST_FILE_BYTES) -> bytes:
    """A file of at most ``most`` bytes. PeerError, OSError."""
    data = read_bounded(path, most + 1)
    if len(data) > most:
        raise PeerError(f"cannot read {path}: larger than {most} bytes")
    return data


# -- text -------------------------------------------------------------------------------------------------------------


def table(header: Sequence[str], rows: Sequence[Sequence[object]], *, right: Sequence[int] = ()) -> None:
    """A table of texts that may come from devices: nothing in them may write on the terminal."""
    print_table(header, [[cell(value) for value in row] for row in rows], right=right)


def cell(value: object, most: int = 300) -> str:
    """A value in one printable line."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    text = one_line(str(value))
    return text if len(text) <= most else text[: most - 1] + "…"


def say(text: str) -> None:
    """A remark beside the result: to stderr."""
    print(text, file=sys.stderr, flush=True)


def manual(
    commands: Commands, common: argparse.ArgumentParser, name: str, text: str, *, about: str = "", examples: str = ""
) -> argparse.ArgumentParser:
    """A command with a help like a manual page: what it does, its options, examples."""
    description = sentence(text) + (f"\n\n{_filled(about)}" if about else "")
    made: argparse.ArgumentParser = commands.add_parser(
        name,
        parents=[common],
        help=text,
        description=description,
        epilog=f"examples:\n{examples.rstrip()}" if examples else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    return made


def _filled(text: str) -> str:
    """Paragraphs broken at 96 characters; a line that begins with a blank stays as it is."""
    import textwrap  # noqa: PLC0415 - at each start, but it is loaded by argparse anyway

    return "\n\n".join(
        paragraph if paragraph.startswith(" ") else textwrap.fill(" ".join(paragraph.split()), 96)
        for paragraph in text.split("\n\n")
    )


def choose_devices(parser: argparse.ArgumentParser, *, everyone: bool = True) -> None:
    """The options that say which devices are meant."""
    group = parser.add_argument_group("which devices")
    group.add_argument("--device", "-d", action="append", metavar="NAME", help="this one; may be repeated")
    if everyone:
        group.add_argument("--all", action="store_true", help="all that are enrolled")
    group.add_argument(
        "--where",
        action="append",
        metavar="FILTER",
        help="those that match, like board=Raspberry*; may be repeated",
    )
