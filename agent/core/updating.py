"""A release of the agent on probation, as core sees it: confirmed by core itself, told in status, doctor and the twin.

The release confirms itself, since it alone knows whether it works: when it has been up for ``settle_s``, its journal is
open, and the link is connected if it was before. Root waits for that word; without it the release before comes back.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Any

from agent import __version__
from agent.base.errors import one_line
from agent.core.health import Finding
from agent.operations.updates import Updates
from agent.trust.releases import Course, Verdict

_LOG = logging.getLogger("edge_agent.update")
_LOOK_S, _LOOK_IDLE_S = 2.0, 15.0


class Updating:
    """For the event loop's thread. ``lacking`` says what is not yet as it must be (told whether the link must be up),
    empty when all is well."""

    def __init__(
        self,
        updates: Updates,
        settle_s: Callable[[], float],
        lacking: Callable[[bool], str],
        changed: Callable[[], None],
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._updates = updates
        self._settle_s = settle_s
        self._lacking = lacking
        self._changed = changed
        self._monotonic = monotonic
        self._since = monotonic()
        self._task: asyncio.Task[None] | None = None
        self._waits_for = ""
        #: Also looked at when the update began with this release as the one before, to tell when it has ended.
        self._last: tuple[str, str] | None = None

    def start(self) -> None:
        """Begin to look, where updates are possible at all."""
        if self._updates.is_possible:
            self._task = asyncio.ensure_future(self._run())

    def stop(self) -> None:
        """Look no more; a probation goes on at the next start."""
        if self._task is not None:
            self._task.cancel()

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_S if self.look() else _LOOK_IDLE_S)

    def look(self) -> bool:
        """Confirm, if the time has come; whether an update is under way."""
        course = self._updates.course()
        seen = None if course is None else (course.id, course.stage)
        if seen != self._last:
            self._last = seen
            self._changed()
        if course is None or course.has_ended:
            return False
        if course.stage == "probation" and course.version == __version__ and course.restarted:
            self._consider(course)
        return True

    def _consider(self, course: Course) -> None:
        request = self._updates.request()
        self._waits_for = self._why_not(link=request is not None and request.id == course.id and request.link)
        if self._waits_for:
            return
        try:
            self._updates.say(Verdict(id=course.id, say="keep"))
        except OSError as error:
            self._waits_for = f"its word to be kept: {error.strerror}"
            return
        _LOG.info("release %s works here: confirmed", course.version)

    def _why_not(self, *, link: bool) -> str:
        left = self._settle_s() - (self._monotonic() - self._since)
        return f"{left:.0f} s more" if left > 0 else self._lacking(link)

    # -- telling ------------------------------------------------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        """The releases, and how the last update went."""
        found: dict[str, Any] = {"version": __version__, "previous": self._updates.previous(), "last": None}
        course = self._updates.course()
        if course is not None:
            found["last"] = {
                "version": course.version, "stage": course.stage, "at": course.at, "reason": course.reason or None,
            }  # fmt: skip
            if course.stage == "probation" and self._waits_for:
                found["last"]["waits_for"] = self._waits_for
        return found

    def findings(self) -> list[Finding]:
        """What an operator should know."""
        course = self._updates.course()
        if course is None:
            return []
        if course.stage in ("refused", "returned"):
            text = one_line(f"the update to {course.version} came to nothing: {course.reason}")
            return [Finding("update", "note", text)]
        if not course.has_ended:
            waits = f", waits for {self._waits_for}" if course.stage == "probation" and self._waits_for else ""
            return [Finding("update", "note", f"release {course.version}: {course.stage}{waits}")]
        return []
