"""Which session answers for a version, and which one takes its place.

One session of a version is the one that answers. A better one (of the option that was chosen, or of the form for the
long run) takes over once it is loaded; then the one before ends with its last request. When the chosen option cannot be
read or loaded, the next one answers, degraded.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

from agent.base.errors import AgentError, DamagedError, TryLaterError, UnsupportedError
from agent.infer.answering import Key, Resident, make_resident, require_options
from agent.infer.loading import EngineLimits, Loader, LoadError
from agent.infer.opening import Way
from agent.infer.runtimes.base import Runtime, Session
from agent.infer.shelf import Form, Option, Served, SessionName, Shelf

_LOG = logging.getLogger("edge_agent.engine")


class Standing:
    """The sessions that answer, by model and version. For the event loop's thread, once constructed."""

    def __init__(
        self,
        limits: Callable[[], EngineLimits],
        load_runtime: Callable[[str], Runtime],
        report_damage: Callable[[Key, Option, str], None],
        fence: Callable[[], None],
        give_back: Callable[[], None],
    ) -> None:
        self._report_damage = report_damage
        self.shelf = Shelf()
        self.loader = Loader(limits, load_runtime, self, fence, give_back)
        self._residents: dict[SessionName, Resident] = {}
        self._hot: dict[Key, Resident] = {}
        self._troubles: dict[SessionName, str] = {}
        self._changing: dict[Key, asyncio.Task[None]] = {}
        self._not_for_the_loop: set[str] = set()
        self.pins: set[Key] = set()
        self._closing = False

    # -- what there is ------------------------------------------------------------------------------------------------

    def now(self, served: Served) -> Resident | None:
        """The session that answers for that version, if one is loaded."""
        return self._hot.get((served.model, served.version))

    def all(self) -> list[Resident]:
        """The sessions that answer."""
        return list(self._hot.values())

    def put(self, shelf: Shelf) -> None:
        """Serve this shelf from now on. Sessions that it no longer holds end when their last request is done."""
        self.shelf = shelf
        ways = dict(_ways(shelf))
        chosen = {key: resident.served.options[0].candidate for key, resident in self._hot.items()}
        for name, resident in list(self._residents.items()):
            if name in ways:
                resident.served = ways[name].served
            elif self._hot.get(resident.key) is resident:
                del self._hot[resident.key]
        self.pins &= shelf.versions.keys()
        self.loader.put(ways)
        for key, resident in list(self._hot.items()):
            self._choose_again(resident, chosen[key])

    def _choose_again(self, resident: Resident, before: str) -> None:
        """The choice may be another than the candidate ``before``: it takes over, or is what answers already."""
        best = resident.served.options[0]
        if best.candidate == resident.option.candidate:
            if best.provider == resident.session.provider:
                resident.degraded_because = ""
        elif best.candidate != before or not resident.degraded_because:
            self._change(resident, self._lease_new(resident.served))

    def preload(self, served: Served) -> None:
        """Load it when there is room to spare, or at least decrypt it."""
        require_options(served)
        option = served.options[0]
        self.loader.preload(_name(served, option, option.ways()[0]))

    def unload(self, name: str) -> int:
        """Drop the model from memory; it comes back at the next request. Returns how many sessions there were."""
        dropped = [resident for resident in self._residents.values() if resident.name.model == name]
        for resident in dropped:
            self.pin(resident, pinned=False)
            self.retire(resident, cold=True)
        for session in [session for session, _ in _ways(self.shelf) if session.model == name]:
            self.loader.retire(session, cold=True)
        return len(dropped)

    def keep_off_the_loop(self, resident: Resident) -> None:
        """Its runs may take far longer than any before: they are made in threads from now on."""
        self._not_for_the_loop.add(resident.option.digest)
        resident.fast = False
        _LOG.warning("model %s %s: a run took far longer than any before", *resident.key)

    def pin(self, resident: Resident, *, pinned: bool) -> None:
        """Keep it in memory whatever comes, or no longer. TryLaterError when too much is pinned."""
        if pinned and resident.key not in self.pins:
            self.loader.pin(resident.name, pinned=True)
            self.pins.add(resident.key)
        elif not pinned:
            self.loader.pin(resident.name, pinned=False)
            self.pins.discard(resident.key)

    def retire(self, resident: Resident, *, cold: bool = False) -> None:
        """Out of the table now; closed when its last request is done."""
        if self._hot.get(resident.key) is resident:
            del self._hot[resident.key]
        resident.retired = True
        self.loader.retire(resident.name, cold=cold)

    async def close(self, timeout_s: float) -> bool:
        """Wait for loads under way, end every session; whether all has ended."""
        clean = await self.loader.close(timeout_s)
        self._hot.clear()
        self._residents.clear()
        return clean

    def stop(self) -> None:
        """Load nothing new; whoever waits for a load is told."""
        self._closing = True
        self.loader.refuse_all(_stopping())
        for task in self._changing.values():
            task.cancel()

    # -- leasing ------------------------------------------------------------------------------------------------------

    async def lease(self, served: Served, deadline: float | None) -> Resident:
        """The session of that version, leased: the one that is there, else the first option's that can be had."""
        while True:
            try:
                resident = self._hot.get((served.model, served.version))
                if resident is None:
                    return await self._lease_new(served, deadline)
                await self.loader.lease(resident.name, deadline)
                return self._residents[resident.name]
            except LoadError as error:  # what was there had to be loaded again, and could not, or it was replaced
                if error.error is None:
                    served = self.shelf.find(served.model, served.version)

    async def _lease_new(self, served: Served, deadline: float | None = None) -> Resident:
        """The first session of that version that can be had: options in their order, each as prepared, then plain.

        LoadError where they were replaced meanwhile.
        """
        require_options(served)
        if self._closing:
            raise _stopping()
        failures: list[str] = []
        for option in served.options:
            for form in _first_forms(option):
                name = _name(served, option, form)
                try:
                    await self.loader.lease(name, deadline)
                except LoadError as error:
                    if error.error is None:
                        raise
                    if not isinstance(error.error, (DamagedError, UnsupportedError)):
                        raise error.error from error
                    failures.append(f"{option.candidate}: {error.error}")
                else:
                    return self._residents[name]
        raise DamagedError(f"model '{served.model}': no variant can answer: {'; '.join(failures)}")

    # -- what the loader tells ----------------------------------------------------------------------------------------

    def opened(self, name: SessionName, way: Way, session: Session) -> None:
        """A session was loaded: it answers from now on, unless a better one does."""
        self._troubles.pop(name, None)
        key = (name.model, name.version)
        served = self.shelf.versions.get(key, way.served)
        fit = way.option.digest not in self._not_for_the_loop
        because = "; ".join(self._why_not(served, way.option))
        resident = make_resident(name, served, way.option, way.form, session, because, loop_fit=fit)
        self._residents[name] = resident
        before_it = self._hot.get(key)
        if before_it is not None and _rank(before_it) < _rank(resident):
            self.retire(resident)  # whoever waited for it gets it, nobody else
            return
        self._hot[key] = resident
        if before_it is not None:
            if key in self.pins:
                self.loader.pin(before_it.name, pinned=False)
                self.loader.pin(name, pinned=True)
            self.retire(before_it)

    def failed(self, name: SessionName, way: Way, error: BaseException) -> None:
        """A session could not be loaded."""
        _LOG.warning("model %s %s: %s: %s", name.model, name.version, name.candidate, error)
        if isinstance(error, (DamagedError, UnsupportedError)):
            self._troubles[name] = f"{name.candidate}: {error}"
            self._report_damage((name.model, name.version), way.option, str(error))

    def closing(self, name: SessionName) -> None:
        """A session is being closed."""
        resident = self._residents.pop(name)
        resident.retired = True
        if self._hot.get(resident.key) is resident:
            del self._hot[resident.key]

    def _why_not(self, served: Served, option: Option) -> Iterator[str]:
        """What kept the options before this one from answering."""
        for other in served.options:
            if other.candidate == option.candidate:
                return
            for form in (other.plain(), *other.ways()):
                if trouble := self._troubles.get(_name(served, other, form)):
                    yield trouble
                    break

    def consider_change(self, resident: Resident, compute_us: int) -> None:
        """Let the form for the long run take over once the first one's runs have cost more than its load would."""
        last = resident.option.ways()[-1]
        if last.name == resident.form.name or last.run_s is None or resident.key in self._changing:
            return
        resident.wasted_s += max(0.0, compute_us / 1e6 - last.run_s)
        if resident.wasted_s > last.load_s and not resident.retired and not self._closing:
            resident.wasted_s = 0.0
            self._change(resident, self._lease_form(resident, last))

    async def _lease_form(self, resident: Resident, form: Form) -> Resident:
        name = _name(resident.served, resident.option, form)
        await self.loader.lease(name)
        return self._residents[name]

    def _change(self, resident: Resident, leasing: Coroutine[Any, Any, Resident]) -> None:
        """Load another session for that version in the background; it takes over once it is there."""
        key = resident.key
        if key in self._changing:
            leasing.close()
            return

        async def change() -> None:
            try:
                self.loader.release((await leasing).name)
            except (AgentError, LoadError) as error:
                _LOG.warning("model %s %s keeps its session: %s", *key, error)

        task = self._changing[key] = asyncio.get_running_loop().create_task(change())
        task.add_done_callback(lambda _: self._changing.pop(key, None))


def _ways(shelf: Shelf) -> Iterator[tuple[SessionName, Way]]:
    """Every session that can be opened."""
    for served in shelf.versions.values():
        for option in served.options:
            for form in {form.name: form for form in (option.plain(), *option.ways())}.values():
                yield _name(served, option, form), Way(served, option, form)


def _first_forms(option: Option) -> tuple[Form, ...]:
    """What answers first, and what may be had when that fails."""
    first, plain = option.ways()[0], option.plain()
    return (first,) if first.name == plain.name else (first, plain)


def _name(served: Served, option: Option, form: Form) -> SessionName:
    return SessionName(served.model, served.version, option.candidate, option.digest, form.name)


def _rank(resident: Resident) -> tuple[int, int]:
    """Less is better: the chosen option before the others, the form for the long run before the first one."""
    candidates = [option.candidate for option in resident.served.options]
    forms = [form.name for form in resident.option.ways()]
    option = candidates.index(resident.option.candidate) if resident.option.candidate in candidates else len(candidates)
    return option, len(forms) - (forms.index(resident.form.name) if resident.form.name in forms else -1)


def _stopping() -> TryLaterError:
    return TryLaterError("cannot load model: the agent is stopping")
