"""Publishing: a bundle becomes targets of the repository, each file encrypted once; and taking a version back.

Invariants: no plaintext is written; a payload lies under its digest, whole and flushed, before any metadata names it;
file keys are kept only as age headers for the operator's identity; a version is published once, and is the same ever
after; cut off anywhere, publishing again finishes it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tuf.api.metadata import TargetFile

from agent.base.clock import iso
from agent.base.errors import ConflictError, DamagedError, NotFoundError, RefusedError
from agent.base.files import fsync_directory, temporary_name, write_atomically
from agent.bundles.archive import BundleReader
from agent.bundles.manifest import FileRef, Manifest
from agent.fleet.books import Books
from agent.fleet.registry import Device
from agent.fleet.releases import Payload
from agent.fleet.repository import Repository
from agent.fleet.roles import read_recipient
from agent.store import stream
from agent.store.age import (
    FILE_KEY_BYTES,
    AgeError,
    Identity,
    Recipient,
    open_header,
    parse_header,
    seal_x25519,
    write_header,
)
from agent.trust.grants import Grant, Purpose, seal_grant
from agent.trust.wants import METADATA, TARGETS, header_target, manifest_target, payload_target, target_file

#: Told what is being encrypted, bytes done, bytes in all.
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Published:
    """What came of it. ``again``: it was there already, nothing was changed."""

    manifest: Manifest
    payloads: tuple[Payload, ...]
    again: bool


def publish(
    repository: Repository,
    books: Books,
    bundle: Path,
    progress: Progress = lambda what, done, total: None,
    random: Callable[[int], bytes] = secrets.token_bytes,
) -> Published:
    """Encrypt a bundle's files and list them. ConflictError when its version stands for something else, PeerError."""
    with bundle.open("rb") as source:
        reader = BundleReader(source)
        manifest = reader.read_manifest()
        data = manifest.to_json()
        name, version = manifest.name, manifest.version
        known = books.releases.find(name, version)
        standing = repository.edition.models.signed.targets.get(manifest_target(name, version))
        if standing is not None and standing.hashes["sha256"] != hashlib.sha256(data).hexdigest():
            raise ConflictError(
                f"cannot publish {name} {version}: it was published with another content",
                hint="a version stays what it is: give the new content a new one",
            )
        if known is not None and _is_whole(repository, books, name, version):
            for _, chunks in reader.files():  # a bundle that is damaged now is said to be
                for _ in chunks:
                    pass
            payloads_known = books.releases.payloads(name, version)
            if known.state != "published":  # cut off after the timestamp was written
                with books.database.transaction():
                    books.releases.put(name, version, data, payloads_known, "published", iso(repository.now))
            return Published(manifest, payloads_known, again=True)
        folder = repository.folder.site / TARGETS
        recipient = read_recipient(repository.folder)
        payloads = []
        for ref, chunks in reader.files():
            payloads.append(_encrypted(folder, manifest, ref, _told(ref, chunks, progress), recipient, random))
    headers = {each.part: each.header for each in payloads}
    listed = {manifest_target(name, version): data}
    listed |= {header_target(name, version, part): header for part, header in headers.items()}
    targets = {path: _placed(folder, path, content) for path, content in listed.items()}
    for each in payloads:
        path = payload_target(name, version, each.part)
        targets[path] = TargetFile(each.payload_size, {"sha256": each.payload}, path)
    now = iso(repository.now)
    with books.database.transaction():
        books.releases.put(name, version, data, payloads, "staged", now)
    models = repository.edition.models.signed.targets
    for path in [path for path in models if path.startswith(f"models/{name}/{version}/")]:
        del models[path]
    models.update(targets)
    repository.edition.changed.add("models")
    repository.save()
    with books.database.transaction():
        books.releases.put(name, version, data, payloads, "published", now)
    _sweep(folder, name, version, targets.values())
    return Published(manifest, tuple(payloads), again=False)


def unpublish(repository: Repository, books: Books, name: str, version: str) -> None:
    """Take a version out of the repository, its files too: devices that have it keep it, no other gets it."""
    models = repository.edition.models.signed.targets
    paths = [path for path in models if path.startswith(f"models/{name}/{version}/")]
    known = books.releases.find(name, version)
    if known is None and not paths:
        raise NotFoundError(
            f"cannot unpublish {name} {version}: it is not published", hint="edge-fleet repository show"
        )
    with books.database.transaction():
        books.releases.withdraw(name, version, iso(repository.now))
    if paths:
        for path in paths:
            del models[path]
        repository.edition.changed.add("models")
        repository.save()
    _sweep(repository.folder.site / TARGETS, name, version, ())


def grants_for(
    books: Books,
    identity: Identity,
    name: str,
    version: str,
    device: Device,
    recipient: bytes,
    parts: Sequence[str] | None = None,
) -> dict[str, Grant]:
    """A grant for each payload of a version (or for ``parts`` of it), sealed to one device's grant key (32 bytes).

    NotFoundError for what is not published, RefusedError for what was withdrawn, DamagedError for a header that the
    identity does not open.
    """
    release = books.releases.find(name, version)
    if release is None:
        raise NotFoundError(f"cannot grant {name} {version}: it is not published", hint="edge-fleet publish")
    if release.state != "published":
        raise RefusedError(f"cannot grant {name} {version}: it is {release.state}")
    payloads = {each.part: each for each in books.releases.payloads(name, version)}
    grants = {}
    for part in payloads if parts is None else parts:
        if part not in payloads:
            raise NotFoundError(f"cannot grant {name} {version}: it has no file '{part}'")
        purpose = Purpose(device.name, device.epoch, name, version, payloads[part].payload)
        grants[part] = seal_grant(recipient, purpose, file_key_of(payloads[part], identity))
    return grants


def file_key_of(payload: Payload, identity: Identity) -> bytes:
    """What a payload opens with. DamagedError when its header is not for this identity."""
    try:
        return open_header(parse_header(payload.header), [identity])
    except AgeError as error:
        raise DamagedError(f"cannot open the key of {payload.part} {payload.payload[:16]}: {error}") from error


def copy_site(site: Path, out: Path, wanted: Callable[[str], bool] = lambda name: True) -> int:
    """Make ``out`` what ``site`` is, in an order in which readers of it are never wrong; how many files were copied.

    Targets first, then the metadata that names them, the timestamp last; only then what is named no more goes.
    ``wanted`` leaves targets out, by their names below the folder of targets. ConflictError where ``out`` holds
    something else, OSError.
    """
    first = out / METADATA / "1.root.json"
    is_ours = first.is_file() and _same_bytes(site / METADATA / "1.root.json", first)
    if not is_ours and any(_files(out / part) for part in (METADATA, TARGETS)):
        raise ConflictError(
            f"cannot copy to {out}: its {METADATA} and {TARGETS} are not of this repository", hint="name another folder"
        )
    for folder in (out, out / METADATA, out / TARGETS):
        folder.mkdir(mode=0o755, parents=True, exist_ok=True)
    copied = 0
    targets = [name for name in _files(site / TARGETS) if wanted(name)]
    for name in targets:
        copied += _copy(site / TARGETS / name, out / TARGETS / name, same=_same_size)
    order = {"targets": 0, "models": 0, "root": 1, "snapshot": 2, "timestamp": 3}
    metadata = sorted(_files(site / METADATA), key=lambda name: order[name.split(".")[-2]])
    for name in metadata:
        copied += _copy(site / METADATA / name, out / METADATA / name, same=_same_bytes)
    for name in set(_files(out / TARGETS)) - set(targets):
        (out / TARGETS / name).unlink()
    return copied


# -- within -----------------------------------------------------------------------------------------------------------


def _is_whole(repository: Repository, books: Books, name: str, version: str) -> bool:
    """Whether a version is listed, its files are there, and the registry knows how they open."""
    models = repository.edition.models.signed.targets
    folder = repository.folder.site / TARGETS
    listed = {path: target for path, target in models.items() if path.startswith(f"models/{name}/{version}/")}
    known = {payload_target(name, version, each.part): each.payload for each in books.releases.payloads(name, version)}
    return (
        bool(listed)
        and {path: target.hashes["sha256"] for path, target in listed.items() if path in known} == known
        and all(_lies(folder, target) for target in listed.values())
    )


def _lies(folder: Path, target: TargetFile) -> bool:
    path = folder / target_file(target.path, target.hashes["sha256"])
    return path.is_file() and path.stat().st_size == target.length


def _told(ref: FileRef, chunks: Iterable[bytes], progress: Progress) -> Iterator[bytes]:
    done = 0
    for chunk in chunks:
        yield chunk
        done += len(chunk)
        progress(ref.name, done, ref.size)


def _encrypted(
    folder: Path,
    manifest: Manifest,
    ref: FileRef,
    chunks: Iterable[bytes],
    recipient: Recipient,
    random: Callable[[int], bytes],
) -> Payload:
    """The payload of a file under its digest. The plaintext's own digest was checked by whoever gives the chunks."""
    target = payload_target(manifest.name, manifest.version, ref.name)
    place = (folder / target).parent
    _make_folders(folder, place)
    file_key = random(FILE_KEY_BYTES)
    digest, size = hashlib.sha256(), 0
    temporary = temporary_name(place / "payload")
    try:
        with temporary.open("xb") as out:
            for part in stream.encrypt(file_key, random(stream.NONCE_BYTES), chunks):
                digest.update(part)
                size += len(part)
                out.write(part)
            out.flush()
            os.fsync(out.fileno())
        temporary.chmod(0o644)
        os.replace(temporary, folder / target_file(target, digest.hexdigest()))
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
        raise
    fsync_directory(place)
    header = write_header([seal_x25519(file_key, recipient, random(32))], file_key)
    return Payload(ref.name, digest.hexdigest(), size, ref.size, ref.sha256, header)


def _placed(folder: Path, target: str, content: bytes) -> TargetFile:
    """A small target, written under its digest."""
    digest = hashlib.sha256(content).hexdigest()
    path = folder / target_file(target, digest)
    _make_folders(folder, path.parent)
    write_atomically(path, content, mode=0o644)
    return TargetFile(len(content), {"sha256": digest}, target)


def _make_folders(base: Path, place: Path) -> None:
    """Folders below ``base``, each durable."""
    if place != base and not place.is_dir():
        _make_folders(base, place.parent)
        place.mkdir(mode=0o755)
        fsync_directory(place.parent)


def _sweep(folder: Path, name: str, version: str, targets: Iterable[TargetFile]) -> None:
    """Delete what lies in a version's folder and is listed no more: a former attempt's, or all of it."""
    kept = {target_file(each.path, each.hashes["sha256"]) for each in targets}
    place = folder / "models" / name / version
    for path in [path for path in place.rglob("*") if path.is_file()]:
        if path.relative_to(folder).as_posix() not in kept:
            path.unlink()
    if not kept:
        shutil.rmtree(place, ignore_errors=True)
        with contextlib.suppress(OSError):  # other versions of the model are in it
            place.parent.rmdir()


def _files(folder: Path) -> list[str]:
    """Finished files below a folder, as paths relative to it."""
    found = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    return sorted(path.relative_to(folder).as_posix() for path in found)


def _copy(source: Path, out: Path, same: Callable[[Path, Path], bool]) -> bool:
    if out.is_file() and same(source, out):
        return False
    out.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    temporary = temporary_name(out)
    try:
        with source.open("rb") as reading, temporary.open("xb") as writing:
            shutil.copyfileobj(reading, writing, 1 << 20)
            writing.flush()
            os.fsync(writing.fileno())
        temporary.chmod(0o644)
        os.replace(temporary, out)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
        raise
    fsync_directory(out.parent)
    return True


def _same_size(source: Path, out: Path) -> bool:
    """Enough for what is named by its digest."""
    return source.stat().st_size == out.stat().st_size


def _same_bytes(source: Path, out: Path) -> bool:
    return source.read_bytes() == out.read_bytes()


def targets_by_release(paths: Iterable[str]) -> Mapping[tuple[str, str], int]:
    """How many targets each listed version has, by model and version."""
    found: dict[tuple[str, str], int] = {}
    for path in paths:
        _, model, version, _ = path.split("/", 3)
        found[model, version] = found.get((model, version), 0) + 1
    return found
