"""One update from its request to its end, over kills and power cuts: what is done next is written down before it is.

``current`` leads to an environment that is whole at every instant. Until the switch a cut costs what was done; from the
switch on the update is finished or taken back, never left. The way back is ``steady``: what was last confirmed, and
what this program itself is run from, so that a release never judges itself.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from agent.base.clock import SystemClock, iso
from agent.base.errors import AgentError, RefusedError, TryLaterError
from agent.base.files import fsync_directory
from agent.trust.releases import Course, Kind, Request, Verdict
from agent.updater.believing import believe
from agent.updater.ground import CURRENT, PREVIOUS, STEADY, Ground
from agent.updater.services import Installer, Services
from agent.updater.unpacking import unpack

_LOG = logging.getLogger("edge_agent.updater")
#: Failed starts of core, and beginnings anew of one update, after which it is given up.
MOST_FAILURES = 3
MOST_STARTS = 5
_LOOK_S = 1.0
#: After an update that came to nothing: whoever took core over must not keep the machine busy.
_REST_S = 10.0
#: The tar, its copy unpacked, and what pip needs meanwhile; the environment's own need is the installer's to check.
_SPACE_FACTOR = 2.5


@dataclass(frozen=True, slots=True)
class Present:
    """What runs this program: the version that can be relied on."""

    version: str
    kind: Kind
    state: int


class _Left(Exception):  # noqa: N818 - no error: nobody is there for whom to wait
    """The rest is done at another start."""


class Updater:
    """See the module. ``step`` is told before each durable step; ``within_s`` is how long core has to confirm."""

    def __init__(
        self,
        ground: Ground,
        installer: Installer,
        services: Services,
        present: Present,
        *,
        within_s: float,
        step: Callable[[str], None] = lambda name: None,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._ground = ground
        self._installer = installer
        self._services = services
        self._present = present
        self._within_s = within_s
        self._step = step
        self._monotonic = monotonic

    def run(self) -> None:
        """Finish what is under way, then do what core asks for.

        Until it asks for nothing more, or a release was kept: from then on that one is to judge.
        """
        self._ground.prepare()
        course = self._ground.course()
        if self._ground.is_pending:
            if course is None:
                self._begin_anew()
            elif course.has_ended:
                self._ground.forget()  # cut off just then: systemd would start this program for it again and again
        with contextlib.suppress(_Left):
            if course is not None and not course.has_ended and self._go_on(course):
                return
            while (request := self._asked()) is not None:
                fresh = Course(id=request.id, version=request.version, stage="verifying", at=_now())
                if self._go_on(fresh):
                    return

    def _begin_anew(self) -> None:
        """How far an update was is lost, to a damaged disk: what was confirmed last is what runs."""
        steady = self._ground.link(STEADY)
        if steady is not None and self._ground.link(CURRENT) != steady:
            self._ground.point(CURRENT, steady)
            self._restore(steady)
        self._ground.collect()
        self._ground.forget()

    def _asked(self) -> Request | None:
        """A request that was not answered yet."""
        request, last = self._ground.request(), self._ground.course()
        return None if request is None or (last is not None and last.id == request.id) else request

    def _go_on(self, course: Course) -> bool:
        """To the end, from wherever it is; whether the release was kept. Whatever fails, the version before stays.

        TryLaterError where the service manager does not answer, as while the machine goes down: that says nothing of
        the release, and the next start of this program goes on.
        """
        course = self._keep(course, starts=course.starts + 1)
        try:
            course = self._forward(course)
        except TryLaterError:
            raise
        except (AgentError, OSError) as error:
            _LOG.warning("update to %s: %s", course.version, error)
            course = self._back(self._ground.course() or course, str(error))
        if course.stage != "kept" and not self._services.wait(_REST_S):
            raise _Left
        return course.stage == "kept"

    # -- forward ------------------------------------------------------------------------------------------------------

    def _forward(self, course: Course) -> Course:
        if course.stage == "returning":
            return self._back(course, course.reason)
        if course.starts > MOST_STARTS:
            raise RefusedError(f"cannot update the agent to {course.version}: interrupted {MOST_STARTS} times")
        if course.stage in ("verifying", "making", "trying"):
            course = self._prepare(course)
        if course.stage == "switching":
            course = self._switch(course)
        return self._watch(course)

    def _prepare(self, course: Course) -> Course:
        """From a request to an environment that works. Begun anew after a cut: nothing of it is in use."""
        ground = self._ground
        ground.clear_work()
        course = self._keep(course, stage="verifying", name=None)
        target, _ = believe(ground, course.version, self._present.kind, self._present.version, self._present.state)
        self._step("release believed")
        wheels = ground.work / "wheels"
        wheels.mkdir(parents=True, mode=0o755)
        self._require_space(target.length)
        tar = ground.work / "release.tar"
        if ground.take("release.tar", tar, target.length, lambda: self._ask(course)) != target.sha256:
            raise RefusedError(f"cannot update the agent to {course.version}: wrong_content: not what the fleet signed")
        self._step("release copied")
        unpack(tar, wheels)
        tar.unlink()
        course = self._keep(course, stage="making")
        name = self._installer.make(wheels)
        self._step("environment made")
        ground.clear_work()
        before = ground.link(CURRENT)
        if name == before:
            raise RefusedError(f"cannot update the agent to {course.version}: it is installed already")
        course = self._keep(course, stage="trying", name=name, before=before, previous=ground.link(PREVIOUS))
        self._ask(course)
        if reason := self._services.try_out(name):
            raise RefusedError(f"cannot update the agent to {course.version}: it does not work here: {reason}")
        self._ask(course)
        return self._keep(course, stage="switching")

    def _require_space(self, length: int) -> None:
        free = shutil.disk_usage(self._ground.own).free
        if free < length * _SPACE_FACTOR:
            needed = int(length * _SPACE_FACTOR) >> 20
            raise RefusedError(f"cannot update the agent: {free >> 20} MB free, {needed} needed")

    def _switch(self, course: Course) -> Course:
        """Again is harmless: each part leads to the same."""
        assert course.name is not None
        ground = self._ground
        self._installer.put_units(course.name, all_of_them=False)
        self._step("units put")
        ground.point(PREVIOUS, course.before)
        self._step("way back noted")
        ground.point(CURRENT, course.name)
        self._step("switched")
        self._services.reload()
        return self._keep(course, stage="probation")

    def _watch(self, course: Course) -> Course:
        """On probation: until core says that all is well, or that it is not, or says nothing for too long."""
        ground = self._ground
        if ground.link(CURRENT) != course.name:
            raise RefusedError(f"cannot keep {course.version}: another version was installed meanwhile")
        if not course.restarted:
            self._services.restart()
            self._step("restarted")
            course = self._keep(course, restarted=True)
        deadline = self._monotonic() + self._within_s
        while not self._said(course, "keep"):
            self._ask(course)
            if (failures := self._services.failures()) >= MOST_FAILURES:
                words = self._services.last_words()
                told = f"core did not start, {failures} times{': ' * bool(words)}{words}"
                raise RefusedError(f"cannot keep {course.version}: {told}")
            if self._monotonic() >= deadline:
                raise RefusedError(f"cannot keep {course.version}: core did not confirm it in {self._within_s:g} s")
            if not self._services.wait(_LOOK_S):
                raise _Left
        return self._confirm(course)

    def _confirm(self, course: Course) -> Course:
        ground = self._ground
        assert course.name is not None
        ground.point(STEADY, course.name)
        self._step("steady")
        self._installer.put_units(course.name, all_of_them=True)
        self._services.reload()
        ground.collect()
        self._step("others gone")
        return self._keep(course, stage="kept", reason="")

    def _said(self, course: Course, word: str) -> Verdict | None:
        verdict = self._ground.verdict()
        return verdict if verdict is not None and (verdict.id, verdict.say) == (course.id, word) else None

    def _ask(self, course: Course) -> None:
        """A safe point: core may have been told to give it up."""
        if (verdict := self._said(course, "back")) is not None:
            raise RefusedError(verdict.reason or f"cannot update the agent to {course.version}: it was withdrawn")

    # -- back ---------------------------------------------------------------------------------------------------------

    def _back(self, course: Course, reason: str) -> Course:
        """As it was before. Before the switch there is nothing to do but to clean up."""
        ground = self._ground
        ground.clear_work()
        if course.stage in ("verifying", "making", "trying"):
            ground.collect()
            return self._keep(course, stage="refused", reason=reason)
        if ground.link(STEADY) == course.name and ground.link(CURRENT) == course.name:
            return self._confirm(course)  # it was confirmed, and what came after could not be done at once
        course = self._keep(course, stage="returning", reason=reason)
        self._step("returning")
        # Another one: somebody has installed it by hand meanwhile, and knows what he does.
        if course.before is not None and ground.link(CURRENT) in (course.name, course.before):
            ground.point(CURRENT, course.before)
            self._step("switched back")
            ground.point(PREVIOUS, course.previous if course.previous != course.name else None)
            self._restore(course.before)
        ground.collect()
        return self._keep(course, stage="returned")

    def _restore(self, before: str) -> None:
        """Units and processes of the version before. What cannot be done is told: the link is what counts."""
        parts: Mapping[str, Callable[[], Any]] = {
            "units": partial(self._installer.put_units, before, all_of_them=True),
            "reload": self._services.reload,
            "restart": self._services.restart,
        }
        for what, work in parts.items():
            try:
                work()
            except TryLaterError:
                raise
            except (AgentError, OSError) as error:
                _LOG.error("going back to %s: %s: %s", before, what, error)
            self._step(f"{what} restored")

    def _keep(self, course: Course, **changes: Any) -> Course:
        after = course.model_copy(update={**changes, "at": _now()})
        self._step(f"before: {after.stage}")
        self._ground.keep(after)
        fsync_directory(self._ground.own)
        self._step(f"after: {after.stage}")
        if after.stage != course.stage:
            _LOG.info("update to %s: %s%s", after.version, after.stage, f": {after.reason}" if after.reason else "")
        return after


def _now() -> str:
    return iso(SystemClock().now())
