"""The job ``agent.update``: a release of the agent is fetched and handed to root; the job ends with what came of it.

Core changes nothing of the installation. Steps: ``refresh`` what the repository says, ``fetch`` the release,
``install`` waits until root has switched to it, ``probation`` until it was kept or is gone. In between core is another
process, of another version: the journal tells that one where the job is, and root's own file what has happened.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any
from urllib.parse import quote

from agent import __version__
from agent.base.errors import ConflictError, DamagedError, RefusedError, TryLaterError, UnsupportedError
from agent.operations.origin import Origin
from agent.operations.probation import mark
from agent.operations.updates import Updates
from agent.store.store import Store
from agent.trust.releases import (
    MAX_RELEASE_BYTES,
    Course,
    Request,
    Verdict,
    order,
    parse_release,
    release_target,
    require_fit,
    this_kind,
)
from agent.trust.wants import DelayError, DeliveryError, Want, ids
from agent.work.steps import Pause, Step, Turn

_PAUSES_S = (1.0, 5.0, 15.0, 60.0)
_LOOK_S = 2.0
#: Requests that nobody took notice of, the last ones a minute apart, after which there is nobody.
_MOST_ASKED = 12
_LONGEST_S = 60.0
_PATIENCE_S, _LEAST_RATE = 60.0, 8192.0


class SelfUpdate:
    """One job's. ``link_is_up``: whether the fleet can be reached now."""

    def __init__(
        self,
        version: str,
        store: Store,
        origin: Origin,
        updates: Updates,
        link_is_up: Callable[[], bool],
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        order(version)
        self._version = version
        self._store = store
        self._origin = origin
        self._updates = updates
        self._link_is_up = link_is_up
        self._pause = pause
        self._ids = ids("r")

    def steps(self) -> list[Step]:
        """See the module."""
        return [
            Step("refresh", "verifying", self._refresh, apart=True),
            Step("fetch", "downloading", self._fetch, None, lambda turn: self._clear(), apart=True),
            Step("install", "installing", self._install, self._is_installed, self._take_back),
            Step("probation", "probation", self._watch, None, self._take_back),
        ]

    # -- fetching -----------------------------------------------------------------------------------------------------

    def _refresh(self, turn: Turn) -> None:
        turn.notes.update(here=self._version == __version__, before=__version__)
        turn.save()
        if turn.notes["here"]:
            return
        if not self._updates.is_possible:
            raise UnsupportedError(
                f"{self._cannot}: it was not installed by deploy/install.sh", hint="update it as it was installed"
            )
        course = self._updates.course()
        if course is not None and not course.has_ended and course.id != mark(turn):
            raise ConflictError(f"{self._cannot}: the update to {course.version} is under way")
        with self._told():
            target = self._patiently(turn, lambda: self._believe(turn))
        require_fit(parse_release(target.custom), self._version, this_kind(), __version__)
        if target.length > MAX_RELEASE_BYTES:
            raise RefusedError(f"{self._cannot}: it has {target.length} bytes, which is too much")
        turn.notes.update(file=target.file, length=target.length, sha256=target.sha256)
        with self._origin.reading, _disk(f"{self._cannot}: cannot hand over metadata"):
            self._updates.vouch(self._origin.metadata)

    def _believe(self, turn: Turn) -> Any:
        from agent.operations.believed import Believed  # noqa: PLC0415 - most starts update nothing

        with self._origin.reading:
            believed = Believed(self._store, self._origin, turn.go_on)
            believed.refresh()
            return believed.target(release_target(self._version, this_kind()))

    def _fetch(self, turn: Turn) -> None:
        notes = turn.notes
        if notes["here"]:
            return
        with _disk(f"{self._cannot}: cannot keep the release"):
            self._updates.prepare()
            tar = self._updates.tar
            written = tar.stat().st_size if tar.is_file() else 0
        length, sha256 = notes["length"], notes["sha256"]
        want = Want(self._ids(), quote(notes["file"]), length, _PATIENCE_S + length / _LEAST_RATE, length, sha256)
        held = self._store.hold_space(length, min(written, length))

        def progress(done: int) -> None:
            held.wrote(done)
            turn.tell({"stage": "fetch", "phase": "downloading", "bytes": done, "total": length})

        def fetch() -> None:
            try:
                self._origin.desk.fetch_file(want, tar, progress, turn.go_on)
            except DeliveryError as error:
                # Whoever brings it asks the place that had wrong bytes last from now on: another may have the right.
                turn.tell({"stage": "waiting", "reason": str(error)})
                self._origin.desk.fetch_file(replace(want, id=self._ids()), tar, progress, turn.go_on)

        try:
            with self._told():
                self._patiently(turn, fetch)
        finally:
            held.close()

    # -- root's part --------------------------------------------------------------------------------------------------

    def _install(self, turn: Turn) -> None:
        """Wait until the release runs. Whoever asks next may be the release itself."""
        if turn.notes["here"]:
            return
        course = self._course(turn)
        if course is None:
            self._ring(turn)
        elif course.stage in ("refused", "returned"):
            raise RefusedError(_reason(self._cannot, course))
        elif not self._is_installed(turn):
            turn.tell({"stage": course.stage, "phase": "trying" if course.stage == "trying" else "installing"})
            raise Pause(_LOOK_S)

    def _is_installed(self, turn: Turn) -> bool:
        course = self._course(turn)
        return course is not None and course.stage in ("probation", "returning", "returned", "kept")

    def _ring(self, turn: Turn) -> None:
        asked = int(turn.notes.get("asked", 0))
        if asked >= _MOST_ASKED:
            raise UnsupportedError(
                f"{self._cannot}: nobody took the request", hint="systemctl status edge-agent-update.path"
            )
        turn.notes["asked"] = asked + 1
        turn.notes.setdefault("link", self._link_is_up())
        turn.save()
        with _disk(f"{self._cannot}: cannot ask for it"):
            self._updates.ask(Request(id=mark(turn), version=self._version, link=turn.notes["link"]))
        raise Pause(min(_LONGEST_S, 2.0**asked))

    def _watch(self, turn: Turn) -> Mapping[str, Any]:
        if turn.notes["here"]:
            return {"version": self._version, "before": self._version}
        course = self._course(turn)
        if course is None:
            raise RefusedError(f"{self._cannot}: what came of it is not known, another update came in between")
        if course.stage in ("refused", "returned"):
            raise RefusedError(_reason(self._cannot, course))
        if course.stage != "kept":
            turn.tell({"stage": course.stage})
            raise Pause(_LOOK_S)
        self._clear()
        return {"version": self._version, "before": turn.notes["before"]}

    def _course(self, turn: Turn) -> Course | None:
        """What root says of this update; None while it says nothing of it."""
        course = self._updates.course()
        return course if course is not None and course.id == mark(turn) else None

    # -- back ---------------------------------------------------------------------------------------------------------

    def _take_back(self, turn: Turn) -> None:
        """Root is told to go back, where it is not there already. It does so once the job has ended."""
        course = self._course(turn)
        with _disk(f"{self._cannot}: cannot withdraw it"):
            self._updates.withdraw()
            if course is not None and not course.has_ended:
                reason = f"{self._cannot}: the job was given up"
                self._updates.say(Verdict(id=mark(turn), say="back", reason=reason))
        self._clear()
        if course is not None and course.stage == "kept":
            raise ConflictError(f"{self._version} was confirmed already, and stays")

    def _clear(self) -> None:
        with _disk("cannot delete what was fetched"):
            self._updates.clear()

    # -- within -------------------------------------------------------------------------------------------------------

    @property
    def _cannot(self) -> str:
        return f"cannot update the agent to {self._version}"

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """The reason code before the reason, as for models."""
        try:
            yield
        except DeliveryError as error:
            raise RefusedError(f"{self._cannot}: {error.code}: {error}", hint=error.hint) from error
        except DelayError as error:
            if error.code == "stopped":
                raise
            raise TryLaterError(f"{self._cannot}: {error.code}: {error}", hint=error.hint) from error

    def _patiently(self, turn: Turn, work: Callable[[], Any]) -> Any:
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
                self._pause(min(left_s, 0.5))
                left_s -= 0.5
                turn.go_on()


def _reason(cannot: str, course: Course) -> str:
    return course.reason if course.reason.startswith("cannot ") else f"{cannot}: {course.reason or course.stage}"


@contextlib.contextmanager
def _disk(cannot: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DamagedError(
            f"{cannot}: {error.strerror or error}", hint="check the disk and the state folder"
        ) from error
