"""``edge-fleet verify``: a folder of published files, checked as a device would, and further.

Everything is read through the same code that devices use, from the root that they were shipped with; then each target
is hashed, and with the operator's identity each payload is decrypted and compared with its manifest. Nothing is written
but to a folder of its own that goes at the end.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from urllib.parse import unquote

from agent.base.clock import Clock, TrustedClock
from agent.base.errors import AgentError
from agent.base.files import read_bounded
from agent.bundles.manifest import MAX_MANIFEST_BYTES, Manifest, parse_manifest
from agent.fleet.publishing import targets_by_release
from agent.fleet.repository import load
from agent.store import stream
from agent.store.age import MAX_HEADER_BYTES, AgeError, Identity, open_header, parse_header
from agent.trust.repository import Repository, State, Target
from agent.trust.wants import DelayError, DeliveryError, Want, header_target, manifest_target, payload_target

_CHUNK = 1 << 20
Progress = Callable[[str, int, int], None]


class FolderWants:
    """Wants answered from a folder, as a web server would: nothing of it is believed for that."""

    def __init__(self, site: Path) -> None:
        self._site = site

    def fetch(self, want: Want) -> bytes:
        """See ``Wants``."""
        try:
            data = read_bounded(self._site / unquote(want.path), want.most + 1)
        except FileNotFoundError as error:
            raise DelayError("not_found", f"{want.path} is not there") from error
        if len(data) > want.most:
            raise DeliveryError("too_long", f"{want.path} has more than {want.most} bytes")
        return data


@dataclass(frozen=True, slots=True)
class Checked:
    """What was found: the state that devices would believe, versions, bytes of targets, and what is wrong."""

    state: State
    releases: int
    targets: int
    size: int
    problems: tuple[str, ...]


def check_site(
    site: Path,
    shipped_root: bytes,
    clock: Clock,
    identity: Identity | None = None,
    progress: Progress = lambda what, done, total: None,
) -> Checked:
    """Check a folder. DeliveryError or DelayError when devices would not believe it, DamagedError, OSError."""
    with tempfile.TemporaryDirectory(prefix="edge-fleet-verify-") as folder:
        always = TrustedClock(clock, "always", datetime.fromtimestamp(0, clock.now().tzinfo))
        repository = Repository(Path(folder), shipped_root, FolderWants(site), always)
        state = repository.refresh()
        edition = load(site)
        models = edition.models.signed.targets
        listed = [*edition.targets.signed.targets, *models]
        problems: list[str] = []
        size = 0
        for number, path in enumerate(listed, 1):
            progress(path, number, len(listed))
            try:
                target = repository.find(path)
                size += target.length
                _check_file(site, target)
            except (AgentError, OSError) as error:
                problems.append(f"{path}: {error}")
        releases = targets_by_release(models)
        for model, version in releases:
            problems += _check_release(repository, site, model, version, identity)
    return Checked(state, len(releases), len(listed), size, tuple(problems))


def _check_file(site: Path, target: Target) -> None:
    digest, length = hashlib.sha256(), 0
    with (site / target.file).open("rb") as stream_:
        while block := stream_.read(_CHUNK):
            digest.update(block)
            length += len(block)
    if length != target.length or digest.hexdigest() != target.sha256:
        raise DeliveryError("wrong_content", f"{target.file} is not what is listed")


def _check_release(
    repository: Repository, site: Path, model: str, version: str, identity: Identity | None
) -> Iterator[str]:
    """What is wrong with a version as a whole."""
    try:
        manifest = parse_manifest(repository.read(manifest_target(model, version), MAX_MANIFEST_BYTES))
        if (manifest.name, manifest.version) != (model, version):
            yield f"{model} {version}: its manifest is that of {manifest.name} {manifest.version}"
            return
        yield from _check_payloads(repository, site, manifest, identity)
    except (AgentError, OSError) as error:
        yield f"{model} {version}: {error}"


def _check_payloads(repository: Repository, site: Path, manifest: Manifest, identity: Identity | None) -> Iterator[str]:
    for ref in manifest.files():
        where = f"{manifest.name} {manifest.version} {ref.name}"
        payload = repository.find(payload_target(manifest.name, manifest.version, ref.name))
        if payload.length != stream.payload_size(ref.size):
            yield f"{where}: its payload is not of the size that its manifest says"
            continue
        header = repository.read(header_target(manifest.name, manifest.version, ref.name), MAX_HEADER_BYTES)
        if identity is None:
            continue
        try:
            key = open_header(parse_header(header), [identity])
            digest = hashlib.sha256()
            descriptor = os.open(site / payload.file, os.O_RDONLY | os.O_CLOEXEC)
            with os.fdopen(descriptor, "rb") as source:
                for chunk in stream.decrypt(key, source.read):
                    digest.update(chunk)
        except AgeError as error:
            yield f"{where}: {error}"
            continue
        if digest.hexdigest() != ref.sha256:
            yield f"{where}: it opens to another content than its manifest says"
