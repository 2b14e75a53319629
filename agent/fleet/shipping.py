"""Publishing a release of the agent: a folder of wheels becomes one target that devices install from.

Invariants: what is signed of a release is read out of its own wheels, never typed; a version stands for one content on
each kind of machine; the tar lies under its digest, whole and flushed, before any metadata names it. The role
``targets`` signs it: whoever ships the agent commands the fleet, as whoever lists its keys does.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tuf.api.metadata import TargetFile

from agent.base.errors import ConflictError, NotFoundError, PeerError
from agent.base.files import fsync_directory, temporary_name
from agent.bundles.ustar import BLOCK, encode_header, padding
from agent.fleet.repository import Repository
from agent.trust.releases import (
    MAX_RELEASE_BYTES,
    MAX_WHEELS,
    Kind,
    Release,
    is_wheel,
    order,
    parse_release,
    release_target,
)
from agent.trust.wants import TARGETS, target_file

_AGENT = re.compile(r"edge_agent-([^-]+)-py3-none-any\.whl")
_PLATFORM = re.compile(r"(?:manylinux|musllinux|linux)_(?:[0-9]+_[0-9]+_)?(x86_64|aarch64|armv7l)")
_OLD_PLATFORM = re.compile(r"manylinux(?:1|2010|2014)_(x86_64|aarch64|armv7l)")
_PYTHON = re.compile(r"cp3([0-9]{1,2})")
#: Where the formats of store and journal are said, inside the agent's wheel.
_TERMS = "agent/trust/releases.py"
_MAX_TERMS = 1 << 18
_PIECE = 1 << 20


@dataclass(frozen=True, slots=True)
class Shipped:
    """What came of it. ``again``: it was there already, nothing was changed."""

    release: Release
    target: str
    size: int
    wheels: int
    again: bool


def describe(wheelhouse: Path, instead_of: Sequence[str] = ()) -> tuple[Release, list[Path]]:
    """What a wheelhouse holds, and its wheels in the order of the tar. PeerError names what does not belong."""
    paths = sorted(wheelhouse.iterdir())
    cannot = f"cannot publish {wheelhouse}"
    for path in paths:
        if path.is_symlink() or not path.is_file() or not is_wheel(path.name):
            raise PeerError(f"{cannot}: {path.name} is no wheel", hint="pip wheel -w WHEELHOUSE 'CLONE[device]'")
    if len(paths) > MAX_WHEELS or sum(path.stat().st_size for path in paths) > MAX_RELEASE_BYTES:
        raise PeerError(f"{cannot}: more than devices take ({MAX_WHEELS} wheels, {MAX_RELEASE_BYTES >> 20} MB)")
    own = [path for path in paths if path.name.startswith("edge_agent-")]
    match = _AGENT.fullmatch(own[0].name) if len(own) == 1 else None
    if match is None:
        raise PeerError(f"{cannot}: the agent's own wheel must be in it once, {len(own)} are")
    order(match[1])
    kind = _kind_of(paths, cannot)
    state, reads = _formats_of(own[0])
    document = {
        "version": match[1], "arch": kind.arch, "python": kind.python, "state": state, "reads": reads,
        "instead_of": list(instead_of),
    }  # fmt: skip
    for later in instead_of:
        if order(later) <= order(match[1]):
            raise PeerError(f"{cannot}: {later} is no later version than {match[1]}")
    return parse_release({"format": "edge-agent-release/1", **document}), paths


def publish_release(repository: Repository, wheelhouse: Path, instead_of: Sequence[str] = ()) -> Shipped:
    """List a wheelhouse as a release. ConflictError when its version stands for another content, PeerError, OSError."""
    release, wheels = describe(wheelhouse, instead_of)
    path = release_target(release.version, Kind(release.arch, release.python))
    folder = repository.folder.site / TARGETS
    listed = repository.edition.targets.signed.targets
    length, digest = _measure(wheels)
    known = listed.get(path)
    if known is not None and known.hashes["sha256"] != digest:
        raise ConflictError(
            f"cannot publish {path}: it was published with another content", hint="give the new content a new version"
        )
    custom = release.model_dump(mode="json")
    place = folder / target_file(path, digest)
    whole = place.is_file() and place.stat().st_size == length
    shipped = Shipped(release, path, length, len(wheels), again=known is not None and known.custom == custom and whole)
    if shipped.again:
        return shipped
    if not whole:
        _write(place, folder, wheels)
    listed[path] = TargetFile(length, {"sha256": digest}, path, {"custom": custom})
    repository.edition.changed.add("targets")
    repository.save()
    return shipped


def withdraw_release(repository: Repository, version: str) -> list[str]:
    """Take a version out of the repository, for all kinds of machines; its targets. NotFoundError."""
    order(version)
    listed = repository.edition.targets.signed.targets
    gone = [path for path in listed if path.startswith(f"releases/{version}/")]
    if not gone:
        raise NotFoundError(f"cannot withdraw {version}: it is not published", hint="edge-fleet repository show")
    for path in gone:
        del listed[path]
    repository.edition.changed.add("targets")
    repository.save()
    place = repository.folder.site / TARGETS / "releases" / version
    for file in place.iterdir() if place.is_dir() else ():
        file.unlink()
    with contextlib.suppress(OSError):
        place.rmdir()
    return gone


# -- within -----------------------------------------------------------------------------------------------------------


def _kind_of(paths: Sequence[Path], cannot: str) -> Kind:
    """The one kind of machine for which all these wheels are."""
    archs: dict[str, str] = {}
    pythons: dict[str, str] = {}
    for path in paths:
        *_, python, abi, platform = path.name.removesuffix(".whl").split("-")
        if platform != "any":
            found = {
                match[1]
                for tag in platform.split(".")
                if (match := _PLATFORM.fullmatch(tag) or _OLD_PLATFORM.fullmatch(tag))
            }
            if len(found) != 1:
                raise PeerError(f"{cannot}: {path.name} is for {platform}, not for one kind of Linux machine")
            archs.setdefault(found.pop(), path.name)
        if abi.startswith("cp3") and (match := _PYTHON.fullmatch(python)):
            pythons.setdefault(f"3.{match[1]}", path.name)
    for what, named in (("processors", archs), ("versions of Python", pythons)):
        if len(named) != 1:
            told = ", ".join(f"{name} ({file})" for name, file in named.items()) or "none is named"
            raise PeerError(f"{cannot}: its wheels are for several {what}, or for any: {told}")
    return Kind(next(iter(archs)), next(iter(pythons)))


def _formats_of(wheel: Path) -> tuple[int, int]:
    """What the release's own code says that it writes, and the oldest that it reads."""
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(_TERMS) as source:
            text = source.read(_MAX_TERMS).decode("utf-8", "replace")
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise PeerError(f"cannot publish {wheel.name}: it is no wheel of an agent that updates itself") from error
    found = [re.search(rf"(?m)^{name} = ([0-9]{{1,6}})$", text) for name in ("STATE_FORMAT", "OLDEST_STATE")]
    if not all(found):
        raise PeerError(f"cannot publish {wheel.name}: it does not say which formats it reads and writes")
    state, reads = (int(match[1]) for match in found if match)
    return state, reads


def _pieces(wheels: Sequence[Path]) -> Iterator[bytes]:
    """The tar: plain headers without owner and date, so that equal wheels make equal releases."""
    for path in wheels:
        size = path.stat().st_size
        try:
            yield encode_header(path.name, size)
        except ValueError as error:
            raise PeerError(f"cannot publish {path.name}: {error}") from error
        left = size
        with path.open("rb") as source:
            while left and (piece := source.read(min(left, _PIECE))):
                left -= len(piece)
                yield piece
        if left:
            raise PeerError(f"cannot publish {path.name}: it became shorter meanwhile")
        yield bytes(padding(size))
    yield bytes(2 * BLOCK)


def _measure(wheels: Sequence[Path]) -> tuple[int, str]:
    digest, length = hashlib.sha256(), 0
    for piece in _pieces(wheels):
        digest.update(piece)
        length += len(piece)
    return length, digest.hexdigest()


def _write(place: Path, base: Path, wheels: Sequence[Path]) -> None:
    for folder in reversed([place.parent, *place.parent.parents]):
        if folder.is_relative_to(base) and not folder.is_dir():
            folder.mkdir(mode=0o755)
            fsync_directory(folder.parent)
    temporary = temporary_name(place)
    try:
        with temporary.open("xb") as out:
            for piece in _pieces(wheels):
                out.write(piece)
            out.flush()
            os.fsync(out.fileno())
        temporary.chmod(0o644)
        os.replace(temporary, place)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
        raise
    fsync_directory(place.parent)
