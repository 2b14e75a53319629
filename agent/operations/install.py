"""Putting a model on the device: store, try, choose, activate; and going back or away again.

Order: reserve space, encrypt while reading, try in children, commit, load, switch. A kill at any point leaves the
version wholly installed or not at all, and the one that answered before goes on answering until the new one has loaded.
"""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, Literal

from agent.base.clock import Clock, iso
from agent.base.errors import AgentError, ConflictError, NotFoundError, PeerError, RefusedError, UnsupportedError
from agent.bundles.manifest import FileRef, Manifest
from agent.operations.measured import Choice, ChooseVariant, Known, Progress
from agent.store.document import BlobRef, CatalogDocument, ModelEntry, VersionEntry
from agent.store.store import Store

#: (manifest, what is known, chosen candidate) -> what has changed since it was measured
Outdated = Callable[[Manifest, Known, "str | None"], Sequence[str]]
_LOG = logging.getLogger("edge_agent.operations")


@dataclass(frozen=True, slots=True)
class AddRequest:
    """What to add: an open file (bundle or bare model; a pipe for a bundle), and how to call it."""

    descriptor: int
    file_name: str = ""
    name: str | None = None
    shapes: Mapping[str, list[int]] | None = None


@dataclass(frozen=True, slots=True)
class Serving:
    """What the installer asks of the serving side; both return when it is done."""

    show: Callable[[CatalogDocument], None]
    load: Callable[[str, str], None]


class Installer:
    """Adds, activates, rolls back and removes. One operation at a time: the caller sees to that."""

    def __init__(
        self,
        store: Store,
        choose: ChooseVariant,
        serving: Serving,
        clock: Clock,
        *,
        unsigned: Literal["allow", "refuse"] = "allow",
        outdated: Outdated = lambda manifest, known, chosen: (),
    ) -> None:
        self._store = store
        self._choose = choose
        self._serving = serving
        self._clock = clock
        self._unsigned = unsigned
        self._outdated = outdated

    def add(self, request: AddRequest, progress: Progress) -> dict[str, Any]:
        """Install and activate; returns when the model answers. Raises why it will not, and nothing is left then."""
        if self._unsigned == "refuse":
            raise RefusedError(
                "cannot add model: this device takes signed models only",
                hint='publish it to the fleet, or set unsigned = "allow" in [trust]',
            )
        with _opened(request.descriptor) as stream:
            manifest, files = _contents(stream, request)
            name, version = manifest.name, manifest.version
            if (existing := self._existing(manifest)) is not None:
                progress({"stage": "unchanged", "model": name, "version": version})
                if existing.active != version:
                    return self.activate(name, version)
                return self._result(name, version, unchanged=True)
            refs = self._encrypt(manifest, files, progress)
        try:
            choice = self._choose(manifest, refs, self._known(manifest), request.shapes or {}, progress)
            _require_choice(choice, f"cannot add model '{name}'")
            document = self._store.commit(lambda document: _with_version(document, manifest, refs, choice, self._now()))
        except BaseException:
            self._store.discard(refs.values())
            raise
        self._serving.show(document)
        return self.activate(name, version, progress)

    def activate(self, name: str, version: str, progress: Progress = lambda event: None) -> dict[str, Any]:
        """Let ``version`` answer: load it first, then switch. The version before stays installed for ``rollback``."""
        self._version(name, version)
        progress({"stage": "load", "model": name, "version": version})
        self._serving.load(name, version)
        self._serving.show(self._store.commit(lambda document: _with_active(document, name, version)))
        return self._result(name, version)

    def rollback(self, name: str) -> dict[str, Any]:
        """Back to the version that answered before the active one."""
        previous = self._model(name).previous
        if previous is None:
            raise ConflictError(f"cannot roll back '{name}': there is no previous version")
        return self.activate(name, previous)

    def remove(self, name: str, version: str | None) -> dict[str, Any]:
        """Delete a model, or one version of it that is not active, and give its space back."""
        model = self._model(name)
        if version is not None:
            self._version(name, version)
            if model.active == version and len(model.versions) > 1:
                raise ConflictError(
                    f"cannot remove '{name}' {version}: it is active", hint="activate another version first"
                )
        self._serving.show(self._store.commit(lambda document: _without(document, name, version)))
        freed = self._store.gc().freed_bytes
        return {"model": name, "version": version, "freed_bytes": freed}

    def choose_again(self, name: str, progress: Progress, shapes: Mapping[str, list[int]]) -> dict[str, Any]:
        """Try the active version's candidates anew and switch when another wins."""
        model = self._model(name)
        if model.active is None:
            raise ConflictError(f"cannot try '{name}': no version is active")
        version = model.active
        entry = model.versions[version]
        choice = self._choose(entry.manifest, entry.blobs, Known(quarantine=entry.quarantine), shapes, progress)
        _require_choice(choice, f"cannot choose a variant of '{name}'")
        self._serving.show(self._store.commit(lambda document: _with_choice(document, name, version, choice)))
        self._serving.load(name, version)
        return self._result(name, version)

    def review(self, progress: Progress = lambda event: None) -> dict[str, list[str]]:
        """Try anew every active version whose measurements no longer hold; what had changed, by model."""
        changed: dict[str, list[str]] = {}
        for name, model in self._store.document.models.items():
            entry = model.versions[model.active] if model.active else None
            if entry is None:
                continue
            known = Known(entry.measurements, entry.quarantine)
            if outdated := self._outdated(entry.manifest, known, entry.chosen):
                _LOG.info("model %s is tried again: %s", name, "; ".join(outdated))
                changed[name] = list(outdated)
                try:
                    self.choose_again(name, progress, {})
                except AgentError as error:
                    _LOG.warning("model %s keeps its variant: %s", name, error)
        return changed

    # -- within -------------------------------------------------------------------------------------------------------

    def _encrypt(
        self, manifest: Manifest, files: Iterator[tuple[FileRef, Iterator[bytes]]], progress: Progress
    ) -> dict[str, BlobRef]:
        total = sum(ref.size for ref in {ref.name: ref for ref in manifest.files()}.values())
        refs: dict[str, BlobRef] = {}
        done = 0

        def counted(chunks: Iterator[bytes]) -> Iterator[bytes]:
            nonlocal done
            for chunk in chunks:
                yield chunk
                done += len(chunk)
                progress({"stage": "encrypt", "bytes": done, "total": total})

        try:
            for ref, chunks in files:
                refs[ref.name] = self._store.add_blob(
                    manifest.name, manifest.version, ref.name, counted(chunks), ref.size, expected_sha256=ref.sha256
                )
        except BaseException:
            self._store.discard(refs.values())
            raise
        return refs

    def _existing(self, manifest: Manifest) -> ModelEntry | None:
        """The model, when this very version is installed already. ConflictError when another stands under its name."""
        model = self._store.document.models.get(manifest.name)
        entry = model.versions.get(manifest.version) if model else None
        if entry is None:
            return None
        if entry.manifest == manifest:
            return None if entry.damaged else model  # adding a damaged version again mends it
        raise ConflictError(
            f"cannot add '{manifest.name}' {manifest.version}: another content has that version already",
            hint="give the new content a new version, or remove the old one first",
        )

    def _known(self, manifest: Manifest) -> Known:
        """What was measured of this very version before it was damaged."""
        model = self._store.document.models.get(manifest.name)
        entry = model.versions.get(manifest.version) if model else None
        return Known(entry.measurements, entry.quarantine) if entry else Known()

    def _model(self, name: str) -> ModelEntry:
        model = self._store.document.models.get(name)
        if model is None:
            raise NotFoundError(f"model '{name}': no such model")
        return model

    def _version(self, name: str, version: str) -> VersionEntry:
        entry = self._model(name).versions.get(version)
        if entry is None:
            raise NotFoundError(f"model '{name}': no version '{version}'")
        return entry

    def _result(self, name: str, version: str, *, unchanged: bool = False) -> dict[str, Any]:
        entry = self._version(name, version)
        return {
            "model": name,
            "version": version,
            "chosen": entry.chosen,
            "unchanged": unchanged,
            "choice": entry.choice,
        }

    def _now(self) -> str:
        return iso(self._clock.now())


def _require_choice(choice: Choice, what: str) -> None:
    if choice.chosen is None:
        raise UnsupportedError(f"{what}: {choice.why}", hint=choice.hint)


def _opened(descriptor: int) -> BinaryIO:
    """The descriptor as a stream of its own. PeerError for what is no file and no pipe."""
    mode = os.fstat(descriptor).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISFIFO(mode)):
        raise PeerError("cannot add model: neither a file nor a pipe")
    return os.fdopen(os.dup(descriptor), "rb", buffering=0)


def _contents(stream: BinaryIO, request: AddRequest) -> tuple[Manifest, Iterator[tuple[FileRef, Iterator[bytes]]]]:
    """The manifest and the files behind it, of a bundle or a bare model."""
    # Readers of hostile files are a good part of the code, and a device that has its models needs none of it.
    from agent.bundles import bare  # noqa: PLC0415 - see above
    from agent.bundles.archive import BundleReader  # noqa: PLC0415
    from agent.bundles.kinds import HEAD_BYTES, kind_of  # noqa: PLC0415

    descriptor = stream.fileno()
    regular = stat.S_ISREG(os.fstat(descriptor).st_mode)
    if not regular or kind_of(os.pread(descriptor, HEAD_BYTES, 0)) == "edgemodel":
        if regular:
            stream.seek(0)
        reader = BundleReader(stream)
        manifest = reader.read_manifest()
        if request.name is not None:
            manifest = Manifest.model_validate({**manifest.model_dump(), "name": request.name})
        return manifest, reader.files()
    manifest = bare.describe(descriptor, file_name=request.file_name, name=request.name)
    stream.seek(0)
    return manifest, iter([(manifest.variants[0].file, _blocks(stream))])


def _blocks(stream: BinaryIO, size: int = 1 << 18) -> Iterator[bytes]:
    while block := stream.read(size):
        yield block


# -- changes of the catalog: pure -------------------------------------------------------------------------------------


def _replace(document: CatalogDocument, name: str, model: ModelEntry | None) -> CatalogDocument:
    models = {key: entry for key, entry in document.models.items() if key != name}
    if model is not None:
        models[name] = model
    return document.model_copy(update={"models": models})


def _with_version(
    document: CatalogDocument, manifest: Manifest, refs: Mapping[str, BlobRef], choice: Choice, now: str
) -> CatalogDocument:
    model = document.models.get(manifest.name, ModelEntry())
    entry = VersionEntry(
        manifest=manifest,
        origin="unsigned",
        added_at=now,
        blobs=dict(refs),
        chosen=choice.chosen,
        choice=choice.document,
        measurements=choice.measurements,
        quarantine=choice.quarantine,
    )
    versions = {**model.versions, manifest.version: entry}
    return _replace(document, manifest.name, model.model_copy(update={"versions": versions}))


def _with_choice(document: CatalogDocument, name: str, version: str, choice: Choice) -> CatalogDocument:
    model = document.models[name]
    entry = model.versions[version].model_copy(
        update={
            "chosen": choice.chosen,
            "choice": choice.document,
            "measurements": choice.measurements,
            "quarantine": choice.quarantine,
        }
    )
    return _replace(document, name, model.model_copy(update={"versions": {**model.versions, version: entry}}))


def _with_active(document: CatalogDocument, name: str, version: str) -> CatalogDocument:
    model = document.models[name]
    if model.active == version:
        return document
    return _replace(document, name, model.model_copy(update={"active": version, "previous": model.active}))


def _without(document: CatalogDocument, name: str, version: str | None) -> CatalogDocument:
    model = document.models[name]
    versions = {key: entry for key, entry in model.versions.items() if version not in (None, key)}
    if not versions:
        return _replace(document, name, None)
    previous = model.previous if model.previous in versions else None
    return _replace(document, name, model.model_copy(update={"versions": versions, "previous": previous}))
