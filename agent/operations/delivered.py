"""Installing a published version: believed, fetched, tried, and put beside the one that answers.

Steps: ``refresh`` what the repository says; ``reserve`` the worst case; ``fetch`` the variant that promises most and
the golden set; ``try`` it, and fetch the next one only if it is rejected. ``activate`` follows elsewhere, ``sweep`` at
the end. Invariants: what was verified lies in the catalog, so that going on after a kill needs no network for it; an
installation that does not succeed leaves nothing of it; the version that answers is not touched here.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from agent.base.errors import PeerError, RefusedError, TryLaterError, UnsupportedError
from agent.bundles.manifest import FileRef, Manifest
from agent.operations.believed import Believed, Release, require_same, with_delivery
from agent.operations.fetching import Fetching
from agent.operations.install import Installer, RejectedError
from agent.operations.measured import DeviceView
from agent.operations.origin import Origin
from agent.operations.probation import Watcher, mark
from agent.store.document import BlobRef, CatalogDocument, StagedVersion, VersionEntry
from agent.store.store import Store
from agent.trust.grants import Grant, GrantError, Purpose, open_grant, recipient_id
from agent.trust.wants import DelayError, DeliveryError
from agent.work.steps import Step, Turn

_T = TypeVar("_T")
#: How long is waited before what did not come is asked for again; the step's own time ends it.
_PAUSES_S = (1.0, 5.0, 15.0, 60.0)
_LOOK_S = 0.5
_MOST_GRANTS = 80


def parse_grants(documents: Mapping[str, Any]) -> dict[str, Grant]:
    """Grants by file, as a job brings them. PeerError."""
    if len(documents) > _MOST_GRANTS:
        raise PeerError(f"cannot take arguments: {len(documents)} grants, {_MOST_GRANTS} are allowed")
    try:
        return {name: Grant.parse(document) for name, document in documents.items()}
    except GrantError as error:
        raise PeerError(f"cannot take arguments: {error}") from error


@dataclass(frozen=True, slots=True)
class Asked:
    """What a job asks for. ``slower``: a version that is slower than the one that answers is taken, too."""

    model: str
    version: str
    grants: Mapping[str, Grant]
    slower: bool = False


class Installation:
    """One job's. Made anew at each start of the job: what lasts is in its notes and in the catalog."""

    def __init__(
        self,
        asked: Asked,
        store: Store,
        installer: Installer,
        origin: Origin,
        watcher: Watcher,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        self._model = asked.model
        self._version = asked.version
        self._grants = asked.grants
        self._slower = asked.slower
        self._store = store
        self._installer = installer
        self._origin = origin
        self._watcher = watcher
        self._pause = pause
        self._fetching = Fetching(asked.model, asked.version, store, origin.desk, origin.holds)

    def head(self) -> list[Step]:
        """Until the version is on the device and was tried."""
        return [
            Step("refresh", "verifying", self._refresh, None, self._clear, apart=True),
            Step("reserve", "verifying", self._reserve, None, self._fetching.release),
            Step("fetch", "downloading", self._fetch, None, self._clear, apart=True),
            Step("try", "trying", self._try, self._is_tried, self._take_back, apart=True),
        ]

    def tail(self) -> list[Step]:
        """Once it is sure that the version stays."""
        return [Step("sweep", "installing", self._sweep)]

    # -- steps --------------------------------------------------------------------------------------------------------

    def _refresh(self, turn: Turn) -> None:
        self._sweep_others(turn)
        entry = self._installed()
        here = entry is not None and entry.origin == "signed" and not entry.damaged
        turn.notes.update(here=here, had=entry is not None)
        turn.save()
        if here:
            return
        self._require_unpinned()
        with self._told():
            release = self._patiently(turn, lambda: self._believe(turn))
        require_same(self._store, release.manifest)
        with self._told():
            self._open(turn, release.manifest, release.payloads)
        turn.notes["lots"] = _lots(release.manifest, self._origin.view, self._grants)
        self._stage(turn, release)

    def _believe(self, turn: Turn) -> Release:
        with self._origin.reading:
            believed = Believed(self._store, self._origin, turn.go_on)
            believed.refresh()
            return believed.release(self._model, self._version)

    def _reserve(self, turn: Turn) -> None:
        if not turn.notes["here"]:
            self._hold(turn)

    def _fetch(self, turn: Turn) -> None:
        if not turn.notes["here"]:
            self._hold(turn)
            self._bring(turn)

    def _try(self, turn: Turn) -> Mapping[str, Any] | None:
        if turn.notes["here"]:
            turn.in_turn(lambda: self._try_again(turn))
            return None
        turn.in_turn(self._store.gc)  # what a kill left between taking over and committing
        rejected = list(turn.notes.get("rejected", ()))
        while lots := turn.notes["lots"]:
            self._hold(turn)
            self._bring(turn)
            try:
                turn.in_turn(lambda: self._examine(turn))
            except RejectedError as error:
                rejected.append(f"{', '.join(lots[0])}: {error}"[:300])
                turn.notes.update(lots=lots[1:], rejected=rejected)
                turn.save()
                self._fetching.keep(turn, self._staged(turn), self._files(turn))
            else:
                self._fetching.drop(turn)
                return {"fetched": lots[0]}
        raise UnsupportedError(
            f"{self._cannot}: no variant passed its trial: {'; '.join(rejected)}",
            hint="edge-fleet fit and edge-agent models check show what each variant needs",
        )

    def _try_again(self, turn: Turn) -> None:
        with self._watched():
            self._installer.retry(self._model, self._version, turn.tell, accept_slower=self._slower)

    def _is_tried(self, turn: Turn) -> bool:
        if turn.notes["here"]:
            return False
        entry = self._installed()
        tried = entry is not None and not entry.damaged and mark(turn) not in self._store.document.delivery.staged
        if tried:
            self._fetching.drop(turn)
        return tried

    def _sweep(self, turn: Turn) -> Mapping[str, Any]:
        """Published versions that no way leads back to give their space to the next one."""
        gone = self._installer.outdo(self._model)
        self._clear(turn)
        return {"removed": gone}

    # -- back ---------------------------------------------------------------------------------------------------------

    def _take_back(self, turn: Turn) -> None:
        """The version goes, unless somebody let another one answer meanwhile, whose way back it may be."""
        notes, model = turn.notes, self._store.document.models.get(self._model)
        overtaken = "before" in notes and model is not None and model.active not in (self._version, notes["before"])
        if notes.get("here") is False and not notes.get("had") and not overtaken:
            self._installer.withdraw(self._model, self._version, notes.get("previous"))
        self._clear(turn)

    def _clear(self, turn: Turn) -> None:
        """Nothing of what was fetched stays, nor of what was promised to it."""
        self._fetching.release(turn)
        self._unstage(lambda job: job == mark(turn))
        self._fetching.drop(turn)
        self._store.gc()

    def _sweep_others(self, turn: Turn) -> None:
        """One job of the lane is open at a time: whatever else lies there is of jobs that were lost."""
        self._fetching.drop_others(turn)
        self._unstage(lambda job: job != mark(turn))

    # -- within -------------------------------------------------------------------------------------------------------

    def _hold(self, turn: Turn) -> None:
        """The golden set and the largest of what may still be tried: each is gone before the next one comes."""
        manifest = self._staged(turn).manifest
        lots = [_files(manifest, lot) for lot in turn.notes["lots"]]
        self._fetching.hold(turn, self._staged(turn), lots)

    def _bring(self, turn: Turn) -> None:
        staged, files = self._staged(turn), self._files(turn)
        with self._told():
            self._patiently(turn, lambda: self._fetching.bring(turn, staged, files))

    def _examine(self, turn: Turn) -> None:
        """Take over, try, commit. RejectedError when the trial says no; then nothing of it is in the store."""
        staged, files = self._staged(turn), self._files(turn)
        # While it was fetched somebody may have added it here.
        require_same(self._store, staged.manifest)
        turn.notes["had"] = turn.notes["had"] or self._installed() is not None
        refs: dict[str, BlobRef] = {}
        turn.tell({"stage": "try", "phase": "trying"})
        with self._told():
            keys = self._open(turn, staged.manifest, {ref.name: staged.payloads[ref.name] for ref in files})
        try:
            for ref in files:
                refs[ref.name] = self._fetching.adopt(turn, staged, ref, keys[ref.name])
            with self._watched():
                entry = self._installer.examine(staged.manifest, refs, turn.tell, slower=self._slower)
                self._installer.put(entry, lambda document: _without_staged(document, {mark(turn)}))
        except BaseException:
            self._store.discard(refs.values())
            raise

    def _open(self, turn: Turn, manifest: Manifest, payloads: Mapping[str, str]) -> dict[str, bytes]:
        """The file keys of those files for which a grant came. GrantError, RefusedError without the golden set's."""
        if manifest.golden is not None and manifest.golden.file.name not in self._grants:
            raise RefusedError(f"{self._cannot}: no grant came for the golden set")
        identities = [identity.secret for identity in self._store.grant_identities]
        keys = {}
        for name, payload in payloads.items():
            if (grant := self._grants.get(name)) is not None:
                purpose = Purpose(self._origin.device(), turn.job.epoch, self._model, self._version, payload)
                keys[name] = open_grant(grant, identities, purpose)
        return keys

    def _stage(self, turn: Turn, release: Release) -> None:
        """What was verified, durable; a grant to the present identity shows that the former ones are not needed."""
        present = recipient_id(self._store.secret.grant_identity.recipient().public)
        acknowledged = any(grant.to == present for grant in self._grants.values())
        staged = StagedVersion(manifest=release.manifest, payloads=release.payloads)

        def change(document: CatalogDocument) -> CatalogDocument:
            known = document.delivery
            update: dict[str, Any] = {"staged": {**known.staged, mark(turn): staged}}
            if acknowledged:
                update["identities"] = ()
            return with_delivery(document, known.model_copy(update=update))

        self._store.commit(change)

    def _staged(self, turn: Turn) -> StagedVersion:
        staged = self._store.document.delivery.staged.get(mark(turn))
        if staged is None:
            raise RefusedError(f"{self._cannot}: what was verified for this job is not there any more")
        return staged

    def _unstage(self, which: Callable[[str], bool]) -> None:
        gone = {mark for mark in self._store.document.delivery.staged if which(mark)}
        if gone:
            self._store.commit(lambda document: _without_staged(document, gone))

    def _files(self, turn: Turn) -> list[FileRef]:
        lots = turn.notes["lots"]
        return _files(self._staged(turn).manifest, lots[0]) if lots else []

    def _installed(self) -> VersionEntry | None:
        model = self._store.document.models.get(self._model)
        return model.versions.get(self._version) if model else None

    def _require_unpinned(self) -> None:
        model = self._store.document.models.get(self._model)
        if model is not None and model.pinned and model.active not in (None, self._version):
            raise RefusedError(
                f"{self._cannot}: the model is pinned to {model.active}", hint="unpin it: model.pin pinned=false"
            )

    @property
    def _cannot(self) -> str:
        return f"cannot install '{self._model}' {self._version}"

    @contextlib.contextmanager
    def _watched(self) -> Iterator[None]:
        """The version that answers is measured with live requests meanwhile, for the probation of the new one."""
        self._watcher.look(self._model)
        try:
            yield
        except BaseException:
            self._watcher.disarm(self._model, self._version)
            raise

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """The reason code before the reason: whoever reads a job's error looks it up by that."""
        try:
            yield
        except (DeliveryError, GrantError) as error:
            raise RefusedError(f"{self._cannot}: {error.code}: {error}", hint=error.hint) from error
        except DelayError as error:
            if error.code == "stopped":
                raise
            raise TryLaterError(f"{self._cannot}: {error.code}: {error}", hint=error.hint) from error

    def _patiently(self, turn: Turn, work: Callable[[], _T]) -> _T:
        """Until it comes, or the step's time is over: a link may be away for hours."""
        tries = 0
        while True:
            try:
                return work()
            except DelayError as error:
                if error.code in ("stopped", "not_found"):
                    raise
                turn.tell({"stage": "waiting", "reason": str(error)})
            left_s = _PAUSES_S[min(tries, len(_PAUSES_S) - 1)]
            tries += 1
            while left_s > 0:
                self._pause(min(left_s, _LOOK_S))
                left_s -= _LOOK_S
                turn.go_on()


def _lots(manifest: Manifest, view: DeviceView, grants: Mapping[str, Grant]) -> list[list[str]]:
    """The variants that may be chosen here, in the order in which they are fetched; those of a cascade together.

    UnsupportedError when there is none, with every reason.
    """
    from agent.selection.prior import rank_by_prior, to_try  # noqa: PLC0415 - most starts rank nothing
    from agent.selection.rules import accepted, candidates  # noqa: PLC0415 - as above

    verdicts = candidates(manifest, view.facts, view.profile.providers, view.inventory(), view.headroom_mb())
    priors = rank_by_prior(accepted(verdicts), view.facts, view.profile)
    ranked = dict.fromkeys(each.variant_id for each in to_try(manifest.policy, priors, len(priors)))
    granted = [name for name in ranked if manifest.variant(name).file.name in grants]
    if not granted:
        reasons = [f"{each.candidate.id}: {', '.join(each.reasons)}" for each in verdicts if not each.accepted]
        reasons += [f"{name}: no grant came for it" for name in ranked]
        raise UnsupportedError(
            f"cannot install '{manifest.name}' {manifest.version}: no variant can run here: {'; '.join(reasons)}",
            hint="edge-fleet fit shows what each variant needs",
        )
    cascade = manifest.policy.cascade
    if cascade is not None and cascade.first in granted and cascade.then in granted:
        pair = [cascade.first, cascade.then]
        return [pair, *([name] for name in granted if name not in pair)]
    return [[name] for name in granted]


def _files(manifest: Manifest, lot: Sequence[str]) -> list[FileRef]:
    """What is fetched to try these variants."""
    golden = [manifest.golden.file] if manifest.golden is not None else []
    return list(dict.fromkeys([*golden, *(manifest.variant(name).file for name in lot)]))


def _without_staged(document: CatalogDocument, gone: set[str]) -> CatalogDocument:
    staged = {mark: kept for mark, kept in document.delivery.staged.items() if mark not in gone}
    return with_delivery(document, document.delivery.model_copy(update={"staged": staged}))
