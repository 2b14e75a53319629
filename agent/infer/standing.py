"""Which session answers for a version, and which one takes its place.

Each option of a version has a lane, with one session at most that answers in it; one of these stands for the version:
it answers whoever asks for nothing special. A better one (of the option that shall answer, or of the form for the long
run) takes over once it is loaded; then the one before ends with its last request, unless its own lane is asked for.
When the chosen option cannot be read or loaded, or its provider is lost, the next one answers, degraded.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Iterator, Sequence
from typing import Any

from agent.base.errors import AgentError, DamagedError, TryLaterError, UnsupportedError
from agent.infer.answering import Key, Resident, make_resident, require_options
from agent.infer.loading import EngineLimits, Loader, LoadError
from agent.infer.opening import Way
from agent.infer.runtimes.base import Runtime, Session
from agent.infer.runtimes.failures import HOST, is_device_failure
from agent.infer.shelf import Form, Option, Served, SessionName, Shelf
from agent.infer.steering import Pressure, Steering

#: Model, version, candidate.
Lane = tuple[str, str, str]
#: The options that may answer a request, the first choice first.
Pick = Callable[[Served], Sequence[Option]]
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
        report_loss: Callable[[Option, str], None] = lambda option, reason: None,
    ) -> None:
        self._report_damage = report_damage
        self._report_loss = report_loss
        self.shelf = Shelf()
        self.loader = Loader(limits, load_runtime, self, fence, give_back)
        self.steering = Steering()
        self._residents: dict[SessionName, Resident] = {}
        self._lanes: dict[Lane, Resident] = {}
        self._hot: dict[Key, Resident] = {}
        self._troubles: dict[SessionName, str] = {}
        self._changing: dict[Key | Lane, asyncio.Task[None]] = {}
        self._not_for_the_loop: set[str] = set()
        self._once_lost: set[str] = set()
        self.pins: set[Key] = set()
        #: How often another option took over.
        self.switches = 0
        self._closing = False

    # -- what there is ------------------------------------------------------------------------------------------------

    def now(self, served: Served) -> Resident | None:
        """The session that answers for that version, if one is loaded."""
        return self._hot.get((served.model, served.version))

    def beside(self, served: Served, option: Option) -> Resident | None:
        """The session that answers in that option's lane, if one is loaded."""
        return self._lanes.get((served.model, served.version, option.candidate))

    def stands(self, resident: Resident) -> bool:
        """Whether it answers for its version."""
        return self._hot.get(resident.key) is resident

    def all(self) -> list[Resident]:
        """The sessions that answer, those that only some requests ask for among them."""
        return list(self._lanes.values())

    def put(self, shelf: Shelf) -> None:
        """Serve this shelf from now on. Sessions that it no longer holds end when their last request is done."""
        self.shelf = shelf
        ways = dict(_ways(shelf))
        heads = {key: self.steering.order(resident.served)[0].candidate for key, resident in self._hot.items()}
        for name, resident in list(self._residents.items()):
            if name in ways:
                resident.served = ways[name].served
            else:
                self._forget(resident)
        self.pins &= shelf.versions.keys()
        self.loader.put(ways)
        for key, resident in list(self._hot.items()):
            degraded = bool(resident.degraded_because)
            self._judge(resident)
            head = self.steering.order(resident.served)[0].candidate
            if head != resident.option.candidate and (head != heads[key] or not degraded):
                self._change(key, self._lease_new(resident.served))

    def preload(self, served: Served) -> None:
        """Load it when there is room to spare, or at least decrypt it."""
        require_options(served)
        option = self.steering.order(served)[0]
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
        """Out of the tables now; closed when its last request is done."""
        self._forget(resident)
        resident.retired = True
        self.loader.retire(resident.name, cold=cold)

    def _forget(self, resident: Resident) -> None:
        if self._hot.get(resident.key) is resident:
            del self._hot[resident.key]
        if self._lanes.get(_lane(resident.name)) is resident:
            del self._lanes[_lane(resident.name)]

    async def close(self, timeout_s: float) -> bool:
        """Wait for loads under way, end every session; whether all has ended."""
        clean = await self.loader.close(timeout_s)
        self._hot.clear()
        self._lanes.clear()
        self._residents.clear()
        return clean

    def stop(self) -> None:
        """Load nothing new; whoever waits for a load is told."""
        self._closing = True
        self.loader.refuse_all(_stopping())
        for task in self._changing.values():
            task.cancel()

    # -- leasing ------------------------------------------------------------------------------------------------------

    async def lease(self, served: Served, deadline: float | None, pick: Pick | None = None) -> Resident:
        """A session of that version, leased: the one that stands for it, else the first option's that can be had.

        With ``pick``: the first of its options that can be had, which stands for nobody else by that.
        """
        while True:
            try:
                if pick is not None:
                    return await self._lease_beside(served, pick(served), deadline)
                resident = self._hot.get((served.model, served.version))
                if resident is None:
                    return await self._lease_new(served, deadline)
                await self.loader.lease(resident.name, deadline)
            except LoadError as error:  # what was there had to be loaded again, and could not, or it was replaced
                if error.error is None:
                    served = self.shelf.find(served.model, served.version)
            else:
                again = self._residents[resident.name]
                if again is not resident:  # it was closed and opened meanwhile
                    self._stand(again)
                return again

    async def _lease_new(self, served: Served, deadline: float | None = None) -> Resident:
        """The first session of that version that can be had; it stands for the version, unless a better one does."""
        order = self.steering.order(served)
        resident = await self._lease_first(served, order, deadline)
        self._stand(resident)
        self._settle(resident.key, order[0].candidate)
        return resident

    async def _lease_beside(self, served: Served, options: Sequence[Option], deadline: float | None) -> Resident:
        resident = await self._lease_first(served, options, deadline)
        resident.asked_for = True
        return resident

    async def _lease_first(self, served: Served, options: Sequence[Option], deadline: float | None) -> Resident:
        """Options in their order, each by the session of its lane, or as prepared, then plain.

        LoadError where they were replaced meanwhile.
        """
        require_options(served)
        if self._closing:
            raise _stopping()
        failures: list[str] = []
        for option in options:
            ready = self.beside(served, option)
            for form in (ready.form,) if ready is not None else _first_forms(option):
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

    def _stand(self, resident: Resident) -> None:
        """It answers for its version from now on, unless a better one does."""
        key, before = resident.key, self._hot.get(resident.key)
        if before is resident or resident.retired:
            return
        order = self.steering.order(resident.served)
        if before is not None and _rank(before, order) <= _rank(resident, order):
            if not resident.asked_for:
                self.retire(resident)  # whoever waited for it gets it, nobody else
            return
        self._hot[key] = resident
        self._judge(resident)
        if before is not None:
            self.switches += 1
            self._pass_pin(before, resident)
            if not before.asked_for:
                self.retire(before)

    # -- what the loader tells ----------------------------------------------------------------------------------------

    def opened(self, name: SessionName, way: Way, session: Session) -> None:
        """A session was loaded: it answers in its lane from now on, unless one of a better form does."""
        self._troubles.pop(name, None)
        served = self.shelf.versions.get((name.model, name.version), way.served)
        fit = way.option.digest not in self._not_for_the_loop
        resident = make_resident(name, served, way.option, way.form, session, loop_fit=fit)
        self._residents[name] = resident
        before = self._lanes.get(_lane(name))
        if before is not None and _form_rank(before) < _form_rank(resident):
            self.retire(resident)
            return
        self._lanes[_lane(name)] = resident
        if before is not None:
            resident.asked_for = before.asked_for
            if self._hot.get(resident.key) is before:
                self._hot[resident.key] = resident
                self._judge(resident)
                self._pass_pin(before, resident)
            self.retire(before)

    def failed(self, name: SessionName, way: Way, error: BaseException) -> None:
        """A session could not be loaded."""
        _LOG.warning("model %s %s: %s: %s", name.model, name.version, name.candidate, error)
        if isinstance(error, (DamagedError, UnsupportedError)):
            provider = way.option.provider
            if provider not in HOST and (provider in self._once_lost or is_device_failure(str(error))):
                self.lose(way.option, str(error))
                return
            self._troubles[name] = f"{name.candidate}: {error}"
            self._report_damage((name.model, name.version), way.option, str(error))

    def closing(self, name: SessionName) -> None:
        """A session is being closed."""
        resident = self._residents.pop(name)
        resident.retired = True
        self._forget(resident)

    def _pass_pin(self, before: Resident, after: Resident) -> None:
        if after.key in self.pins:
            self.loader.pin(before.name, pinned=False)
            self.loader.pin(after.name, pinned=True)

    # -- why it is not the option that was asked for ------------------------------------------------------------------

    def why_not(self, served: Served, options: Sequence[Option], resident: Resident) -> str:
        """What kept ``options``, in their order, from answering before that session; empty where nothing did."""
        option = resident.option
        reasons = list(self._passed_over(served, options, option))
        if not reasons and options and option.candidate != options[0].candidate:
            reasons = [f"{options[0].candidate} is not loaded yet"]
        if not reasons and resident.session.provider != option.provider:
            reasons = [f"{option.provider} did not take the model"]
        return "; ".join(reasons)

    def hurried(self, served: Served) -> str:
        """Why that version shall not do more than it must; empty where it may."""
        return self.steering.pressure.reason if self.steering.pressed(served) else ""

    def _passed_over(self, served: Served, options: Sequence[Option], option: Option) -> Iterator[str]:
        if options and option.candidate != options[0].candidate and self.steering.pressed(served):
            yield self.steering.pressure.reason
        for other in options:
            if other.candidate == option.candidate:
                return
            if why := self.steering.why(other):
                yield why
                continue
            if trouble := self._trouble(served, other):
                yield trouble

    def _trouble(self, served: Served, option: Option) -> str:
        """Why that option could not be loaded when it was last tried."""
        names = (_name(served, option, form) for form in (option.plain(), *option.ways()))
        return next((self._troubles[name] for name in names if name in self._troubles), "")

    def _judge(self, resident: Resident) -> None:
        resident.degraded_because = self.why_not(resident.served, resident.served.options, resident)

    # -- changing what answers ----------------------------------------------------------------------------------------

    def press(self, pressure: Pressure) -> None:
        """Other options shall answer from now on: each takes over once it is loaded.

        With the same pressure again: those that found no room come to another try.
        """
        self.steering.pressure = pressure
        for key, resident in list(self._hot.items()):
            self._judge(resident)
            head = self.steering.order(resident.served)[0]
            self._settle(key, head.candidate if self._trouble(resident.served, head) else None)

    def lose(self, option: Option, reason: str) -> None:
        """That option's provider has failed: others answer from the next request on."""
        provider = option.provider
        self._once_lost.add(provider)
        if provider in self.steering.lost:
            return
        self.steering.lost[provider] = reason
        for resident in list(self._residents.values()):
            if provider in (resident.session.provider, resident.option.provider):
                self.retire(resident)
        self._report_loss(option, reason)

    async def regain(self, provider: str) -> str:
        """The provider works again: its options take over, each once it is loaded. Why not, where one cannot be."""
        self.steering.lost.pop(provider, None)
        for key, resident in list(self._hot.items()):
            self._settle(key, None)
            task = self._changing.get(key)
            if task is not None and any(option.provider == provider for option in resident.served.options):
                await asyncio.wait([task])
            if provider in self.steering.lost:
                break
            self._judge(self._hot.get(key, resident))
        return self.steering.lost.get(provider, "")

    def consider_change(self, resident: Resident) -> None:
        """After a run: let the form for the long run take over once the first one's runs have cost more than its load.

        By what was measured of both side by side: this run may have taken longer for many another reason. Only into
        room that nobody needs: where models come and go each would be loaded twice, and others for having gone for it.
        """
        form, last = resident.form, resident.option.ways()[-1]
        lane = _lane(resident.name)
        if last.name == form.name or last.run_s is None or form.run_s is None or lane in self._changing:
            return
        resident.wasted_s += max(0.0, form.run_s - last.run_s)
        if resident.wasted_s > last.load_s and not resident.retired and not self._closing:
            resident.wasted_s = 0.0
            name = _name(resident.served, resident.option, last)
            if self.loader.has_room(name):
                self._change(lane, self._lease_session(name))

    async def _lease_session(self, name: SessionName) -> Resident:
        await self.loader.lease(name)
        return self._residents[name]

    def _settle(self, key: Key, tried: str | None) -> None:
        """Have the option that shall answer now take over, unless it is the one that was just tried."""
        resident = self._hot.get(key)
        if resident is None or self._closing:
            return
        head = self.steering.order(resident.served)[0].candidate
        if head not in (resident.option.candidate, tried):
            self._change(key, self._lease_new(resident.served))

    def _change(self, at: Key | Lane, leasing: Coroutine[Any, Any, Resident]) -> None:
        """Load another session in the background; it takes over once it is there."""
        if at in self._changing:  # whoever is at it looks at its end whether it is still the right one
            leasing.close()
            return

        async def change() -> None:
            try:
                self.loader.release((await leasing).name)
            except (AgentError, LoadError) as error:
                _LOG.warning("model %s %s keeps its session: %s", *at[:2], error)

        resident = self._hot.get((at[0], at[1]))
        tried = self.steering.order(resident.served)[0].candidate if resident is not None else None

        def ended(_: asyncio.Task[None]) -> None:
            del self._changing[at]
            self._settle((at[0], at[1]), tried)

        task = self._changing[at] = asyncio.get_running_loop().create_task(change())
        task.add_done_callback(ended)


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


def _lane(name: SessionName) -> Lane:
    return (name.model, name.version, name.candidate)


def _rank(resident: Resident, order: Sequence[Option]) -> int:
    """Less is better: where its option stands in the order."""
    candidates = [option.candidate for option in order]
    option = resident.option.candidate
    return candidates.index(option) if option in candidates else len(candidates)


def _form_rank(resident: Resident) -> int:
    """Less is better: the form for the long run before the first one, before one that is none of the option's."""
    forms = [form.name for form in resident.option.ways()]
    return len(forms) - (forms.index(resident.form.name) if resident.form.name in forms else -1)


def _stopping() -> TryLaterError:
    return TryLaterError("cannot load model: the agent is stopping")
