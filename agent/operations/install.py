"""Putting a model on the device: store, try, choose, activate; and going back or away again.

Order: reserve space, encrypt while reading, try in children, load, then commit and switch in one. A kill at any point
leaves the version installed and active or not there at all, and the one that answered before goes on answering until
the new one has loaded. ``go_on`` raises once the agent is stopping; an operation asks it, and its progress, on its way.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from agent import __version__
from agent.base.clock import Clock, iso
from agent.base.errors import AgentError, ConflictError, NotFoundError, PeerError, RefusedError, UnsupportedError
from agent.bundles.manifest import FileRef, Manifest
from agent.operations.entries import (
    entry_with_forms,
    entry_with_gains,
    is_active,
    taken_back,
    version_entry,
    with_active,
    with_choice,
    with_forms,
    with_gains,
    with_model,
    with_story,
    with_version,
    without,
)
from agent.operations.forms import Forms
from agent.operations.incoming import contents, opened
from agent.operations.measured import Active, Choice, ChooseVariant, Known, Progress, active_beside, known_of
from agent.operations.probation import LOCAL, UNWATCHED, Case, Watcher
from agent.selection.versions import satisfies
from agent.store.document import BlobRef, CatalogDocument, ModelEntry, VersionEntry
from agent.store.store import Change, Store

#: (manifest, what is known, chosen candidate) -> what has changed since it was measured
Outdated = Callable[[Manifest, Known, "str | None"], Sequence[str]]
_LOG = logging.getLogger("edge_agent.operations")


class RejectedError(UnsupportedError):
    """No variant of a version may answer on this device: the trial, or a rule, says so."""


@dataclass(frozen=True, slots=True)
class AddRequest:
    """How to call what is added, and the shapes of inputs that are made up to try it."""

    file_name: str = ""
    name: str | None = None
    shapes: Mapping[str, list[int]] | None = None
    #: Take it also where it is slower than what answers now.
    accept_slower: bool = False


@dataclass(frozen=True, slots=True)
class Serving:
    """What the installer asks of the serving side; each returns when it is done."""

    show: Callable[[CatalogDocument], None]
    load: Callable[[str, str], None]
    watcher: Watcher = UNWATCHED


@dataclass(frozen=True, slots=True)
class Preparing:
    """How a version's prepared forms are made, and whether those that it has still hold (``operations.forms``).

    ``gauge`` and ``gains_hold``: the same for what joining its requests gains (``operations.batching``).
    """

    make: Callable[[Manifest, Mapping[str, BlobRef], Choice, Progress], Forms] = lambda *_: Forms()
    hold: Callable[[VersionEntry], bool] = lambda entry: True
    gauge: Callable[[Manifest, Mapping[str, BlobRef], Choice, Progress], Mapping[str, Any]] = lambda *_: {}
    gains_hold: Callable[[VersionEntry], bool] = lambda entry: True
    #: A version held against the one that it is to take the place of, by what is recorded of both.
    compare: Callable[[VersionEntry, Active], Mapping[str, Any]] = lambda entry, active: {}


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
        preparing: Preparing = Preparing(),
        go_on: Callable[[], None] = lambda: None,
    ) -> None:
        self._preparing = preparing
        self._store = store
        self._choose = choose
        self._serving = serving
        self._clock = clock
        self._unsigned = unsigned
        self._outdated = outdated
        self._go_on = go_on

    def add(self, descriptor: int, request: AddRequest, progress: Progress) -> dict[str, Any]:
        """Install and activate what ``descriptor`` holds: a bundle (file or pipe) or a bare model (file).

        Returns when the model answers. Raises why it will not, and nothing is left then.
        """
        if self._unsigned == "refuse":
            raise RefusedError(
                "cannot add model: this device takes signed models only",
                hint='publish it to the fleet, or set unsigned = "allow" in [trust]',
            )
        with opened(descriptor, self._go_on) as stream:
            manifest, files = contents(stream, file_name=request.file_name, name=request.name)
            require_agent(manifest.name, manifest.requires_agent)
            name, version = manifest.name, manifest.version
            if (existing := self._existing(manifest)) is not None:
                progress({"stage": "unchanged", "model": name, "version": version})
                if existing.active == version:
                    return self._result(name, version, unchanged=True)
                self._arm(name, version, slower=request.accept_slower or manifest.policy.accept_slower)
                return self.activate(name, version)
            refs = self._encrypt(manifest, files, progress)
        watcher = self._serving.watcher
        watcher.look(name)
        try:
            entry = self._examined(manifest, refs, request.shapes or {}, progress, slower=request.accept_slower)
            self._arm(name, version, slower=request.accept_slower or manifest.policy.accept_slower)
            self._commit_loaded(manifest, entry, progress)
        except BaseException:
            watcher.disarm(name, version)
            self._store.discard(refs.values())
            raise
        return self._result(name, version)

    def examine(
        self, manifest: Manifest, refs: dict[str, BlobRef], progress: Progress, *, slower: bool = False
    ) -> VersionEntry:
        """Try what was fetched of a published version: its entry, not committed yet. ``refs`` gets its forms, too.

        RejectedError when none of the variants that are there may answer.
        """
        entry = self._examined(manifest, refs, {}, progress, slower=slower)
        return entry.model_copy(update={"origin": "signed"})

    def put(self, entry: VersionEntry, also: Change = lambda document: document) -> None:
        """Install a version that was examined, beside the one that answers; ``also`` happens in the same commit."""
        name, version = entry.manifest.name, entry.manifest.version
        self._serving.show(self._store.commit(lambda document: also(with_version(document, name, version, entry))))

    def withdraw(self, name: str, version: str, previous: str | None = None) -> None:
        """Take a version away again, also where it is the one that answers; harmless where it is gone.

        ``previous``: what the way back led to before it came.
        """
        model = self._store.document.models.get(name)
        if model is not None and version in model.versions:
            self._serving.show(self._store.commit(lambda document: without(document, name, version, previous)))

    def outdo(self, name: str) -> list[str]:
        """Delete published versions that neither answer nor are the way back; which they were."""
        model = self._model(name)
        gone = [
            version
            for version, entry in model.versions.items()
            if entry.origin == "signed" and version not in (model.active, model.previous)
        ]
        for version in gone:
            self.withdraw(name, version)
        return gone

    def activate(self, name: str, version: str, progress: Progress = lambda event: None) -> dict[str, Any]:
        """Let ``version`` answer: load it first, then switch. The version before stays installed for ``rollback``."""
        self._version(name, version)
        progress({"stage": "load", "model": name, "version": version})
        self._serving.load(name, version)
        self._serving.show(self._store.commit(lambda document: with_active(document, name, version)))
        return self._result(name, version)

    def rollback(self, name: str) -> dict[str, Any]:
        """Back to the version that answered before the active one."""
        previous = self._model(name).previous
        if previous is None:
            raise ConflictError(f"cannot roll back '{name}': there is no previous version")
        return self.activate(name, previous)

    def take_back(self, case: Case, record: Mapping[str, Any], *, serving: bool = True) -> bool:
        """The version before ``case.version`` answers again; False where another does by now. ``record``: why.

        A later ``rollback`` does not lead to it. Without ``serving`` nothing is served yet, and nobody is told.
        """
        if not is_active(self._store.document, case.model, case.version):
            return False
        self._version(case.model, case.before)
        if serving:
            self._serving.load(case.model, case.before)
        document = self._store.commit(lambda document: taken_back(document, case, record))
        if serving:
            self._serving.show(document)
        return True

    def note_probation(self, case: Case, record: Mapping[str, Any]) -> None:
        """Keep what came of a version's probation, if it is still there."""
        if case.version in self._store.document.models.get(case.model, ModelEntry()).versions:
            self._store.commit(lambda document: with_story(document, case.model, case.version, "probation", record))

    def remove(self, name: str, version: str | None) -> dict[str, Any]:
        """Delete a model, or one version of it that is not active, and give its space back."""
        model = self._model(name)
        if version is not None:
            self._version(name, version)
            if model.active == version and len(model.versions) > 1:
                raise ConflictError(
                    f"cannot remove '{name}' {version}: it is active", hint="activate another version first"
                )
        self._serving.show(self._store.commit(lambda document: without(document, name, version)))
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
        self._serving.show(self._store.commit(lambda document: with_choice(document, name, version, choice)))
        self.renew_forms(name, version, progress)
        self._serving.load(name, version)
        return self._result(name, version)

    def retry(self, name: str, version: str, progress: Progress, *, accept_slower: bool = False) -> bool:
        """Try the candidates of an installed version where what was measured no longer holds; whether it did.

        UnsupportedError where none will do, or where it is worse than the version that answers now.
        """
        entry = self._version(name, version)
        active = self._active_beside(entry.manifest, slower=accept_slower)
        if not self._outdated(entry.manifest, known_of(entry), entry.chosen):
            self._compare(name, version, active)
            self.renew_forms(name, version, progress)
            return False
        known = Known(quarantine=entry.quarantine, active=active)
        choice = self._choose(entry.manifest, entry.blobs, known, {}, progress)
        _require_choice(choice, f"cannot choose a variant of '{name}'")
        self._serving.show(self._store.commit(lambda document: with_choice(document, name, version, choice)))
        self.renew_forms(name, version, progress)
        return True

    def renew_forms(self, name: str, version: str, progress: Progress) -> bool:
        """Prepare the chosen variant of a version anew where its forms no longer hold, and gauge its batches where
        that is missing; whether something was done."""
        entry = self._version(name, version)
        choice = Choice(entry.chosen, {}, measurements=dict(entry.measurements))
        gauged = not self._preparing.gains_hold(entry)
        if gauged:
            gains = self._preparing.gauge(entry.manifest, entry.blobs, choice, progress)
            self._serving.show(self._store.commit(lambda document: with_gains(document, name, version, gains)))
        if self._preparing.hold(entry):
            return gauged
        forms = self._preparing.make(entry.manifest, entry.blobs, choice, progress)
        try:
            self._serving.show(self._store.commit(lambda document: with_forms(document, name, version, forms)))
        except BaseException:
            self._store.discard(forms.blobs.values())
            raise
        self._store.gc()
        return True

    def pin(self, name: str, *, pinned: bool) -> None:
        """Let the fleet's jobs leave the active version alone, or no longer."""
        self._model(name)
        self._store.commit(
            lambda document: with_model(document, name, document.models[name].model_copy(update={"pinned": pinned}))
        )

    def review(self, progress: Progress = lambda event: None) -> dict[str, list[str]]:
        """Try anew every active version whose measurements no longer hold; what had changed, by model."""
        changed: dict[str, list[str]] = {}
        for name, model in self._store.document.models.items():
            entry = model.versions[model.active] if model.active else None
            self._go_on()
            if entry is None:
                continue
            if outdated := self._outdated(entry.manifest, known_of(entry), entry.chosen):
                _LOG.info("model %s is tried again: %s", name, "; ".join(outdated))
                changed[name] = list(outdated)
                try:
                    self.choose_again(name, progress, {})
                except AgentError as error:
                    _LOG.warning("model %s keeps its variant: %s", name, error)
        self._renew_all(progress)
        return changed

    def _renew_all(self, progress: Progress) -> None:
        """The prepared forms of every active version, where the runtime is another than they were made for, say."""
        for name, model in self._store.document.models.items():
            self._go_on()
            try:
                if model.active is not None and self.renew_forms(name, model.active, progress):
                    _LOG.info("model %s %s is prepared anew", name, model.active)
            except AgentError as error:
                _LOG.warning("model %s keeps its forms: %s", name, error)

    # -- within -------------------------------------------------------------------------------------------------------

    def _examined(
        self,
        manifest: Manifest,
        refs: dict[str, BlobRef],
        shapes: Mapping[str, list[int]],
        progress: Progress,
        *,
        slower: bool,
    ) -> VersionEntry:
        """Chosen, prepared and gauged. What is added to ``refs`` is to be discarded with the rest of it."""
        choice = self._choose(manifest, refs, self._known(manifest, slower=slower), shapes, progress)
        _require_choice(choice, f"cannot add model '{manifest.name}'")
        forms = self._preparing.make(manifest, refs, choice, progress)
        refs |= forms.blobs
        gains = self._preparing.gauge(manifest, refs, choice, progress)
        entry = entry_with_forms(version_entry(manifest, refs, choice, self._now()), forms)
        return entry_with_gains(entry, gains)

    def _arm(self, name: str, version: str, *, slower: bool) -> None:
        model = self._store.document.models.get(name)
        if model is not None and model.active not in (None, version):
            assert model.active is not None
            case = Case(name, version, model.active, model.previous, LOCAL, slower)
            self._serving.watcher.arm(case)

    def _compare(self, name: str, version: str, active: Active | None) -> None:
        """Hold it against what answers now by what is recorded of both, and note what came of that."""
        record = self._preparing.compare(self._version(name, version), active) if active is not None else {}
        if record.get("worse"):
            raise UnsupportedError(f"cannot install '{name}' {version}: {record['worse']}", hint=str(record["mend"]))
        if record:
            self._store.commit(lambda document: with_story(document, name, version, "beside", record))

    def _commit_loaded(self, manifest: Manifest, entry: VersionEntry, progress: Progress) -> None:
        """Install and activate in one commit, so that no kill can leave one without the other.

        The version is loaded before: shown to the serving side beside what is committed, without being active.
        """
        name, version = manifest.name, manifest.version
        self._serving.show(with_version(self._store.document, name, version, entry))
        try:
            progress({"stage": "load", "model": name, "version": version})
            self._serving.load(name, version)
            self._store.commit(
                lambda document: with_active(with_version(document, name, version, entry), name, version)
            )
        finally:
            self._serving.show(self._store.document)

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

    def _known(self, manifest: Manifest, *, slower: bool) -> Known:
        """What was measured of this very version before it was damaged, and what it is to take the place of."""
        model = self._store.document.models.get(manifest.name)
        entry = model.versions.get(manifest.version) if model else None
        return replace(known_of(entry) if entry else Known(), active=self._active_beside(manifest, slower=slower))

    def _active_beside(self, manifest: Manifest, *, slower: bool) -> Active | None:
        slower = slower or manifest.policy.accept_slower
        return active_beside(self._store.document, manifest.name, manifest.version, slower=slower)

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


def require_agent(name: str, wanted: str | None) -> None:
    """UnsupportedError where a version asks for another agent than this one; PeerError where it cannot be read."""
    if wanted is None:
        return
    try:
        fits = satisfies(__version__, wanted)
    except ValueError as error:
        raise PeerError(f"cannot add model '{name}': requires_agent: {error}") from error
    if not fits:
        raise UnsupportedError(
            f"cannot add model '{name}': it needs the agent {wanted}, this is {__version__}",
            hint="update the agent first",
        )


def _require_choice(choice: Choice, what: str) -> None:
    if choice.chosen is None:
        raise RejectedError(f"{what}: {choice.why}", hint=choice.hint)
