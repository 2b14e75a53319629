"""The fleet's side of core, wired: journal and runner, inbox and outgoing, twin, questions, telemetry.

It exists only on a device with a ``trust.toml``; nothing else in core needs it. A journal that cannot be opened leaves
the device serving and says what mends it.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from typing import Any

from agent.base.config import Config
from agent.base.errors import AgentError, DamagedError, PeerError, TryLaterError
from agent.base.paths import Paths
from agent.core import diagnostics, health
from agent.core.device import inventory_of
from agent.core.enrolling import Enroller, describe, settings_document, settings_state
from agent.core.inbox import Called, Inbox
from agent.core.lanes import Lanes
from agent.core.ledger import Ledger
from agent.core.link_api import LinkState
from agent.core.logs import RECENT
from agent.core.outgoing import Message
from agent.core.presenting import fleet_facts, reported_models
from agent.core.questions import Questions, lines_of, without_args
from agent.core.reporting import Reporting
from agent.core.telemetry import Telemetry, energy_record, heat_record, memory_record, models_record
from agent.core.telling import last_lines, short_config, short_drift
from agent.core.twin import Twin
from agent.core.updating import Updating
from agent.core.upkeep import Upkeep
from agent.core.within import Within
from agent.hardware.sensors import read_sensors
from agent.operations.configure import RemoteConfig
from agent.operations.jobs import Around, Jobs
from agent.operations.origin import Origin
from agent.selection.inventory import inventory_document
from agent.store.store import Store
from agent.trust.allegiance import shipped_root
from agent.trust.envelope import EnvelopeError, open_envelope
from agent.trust.wants import DelayError
from agent.work.jobs import Order, Refusal
from agent.work.runner import Runner

_LOG = logging.getLogger("edge_agent.fleet")
_MOST_MODELS = 150
#: After the journal could not be read or written to.
_RETRY_S = 15.0


class Fleet:
    """See the module. ``start`` and ``stop`` belong to the event loop's thread."""

    def __init__(self, paths: Paths, store: Store, upkeep: Upkeep, within: Within) -> None:
        self._store = store
        self._within = within
        self._operations = within.operations
        self._lanes = Lanes(within.operations)
        self.boot_nonce = secrets.token_hex(16)
        self.enroller = Enroller(paths.trust_file, store)
        self.link = LinkState()
        self.clock = upkeep.clock
        self._upkeep = upkeep
        self.ledger = Ledger(paths.journal, self.clock, self.enroller)
        self.remote = RemoteConfig(store, within.file_config, self._hold, self._link_is_back)
        self._twin = Twin(
            self.ledger.journal, self.remote, self._lanes.desire, self._later, self._opened, self._operations.go_on
        )
        self._news = asyncio.Event()
        self._reporting = Reporting(
            self.enroller,
            self.ledger,
            self.clock,
            self.boot_nonce,
            self._info,
            self._reported,
            self._news.set,
        )
        self._outgoing = self._reporting.outgoing
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="inbox")
        self.certificate_ends: str | None = None
        self._tasks: list[asyncio.Task[Any]] = []
        self._jobs: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._inventory: dict[str, Any] = {}
        self.updating = Updating(within.updates, lambda: self.config.update.settle_s, self._lacking, self.changed)
        self._origin = Origin(
            desk=within.desk,
            metadata=paths.repository,
            root=lambda: shipped_root(paths.trust_file),
            clock=self.clock,
            device=lambda: (self.enroller.allegiance and self.enroller.allegiance.device) or "",
            view=within.view,
            keys_changed=self._soon(self._keys_changed),
        )

    # -- life ---------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Open the journal, resume what was under way, begin to say how the device is."""
        self._loop = asyncio.get_running_loop()
        self.enroller.read()
        self._build()
        self.ledger.open()
        if self.enroller.allegiance is not None:
            self._tasks.append(asyncio.ensure_future(self._take_inventory()))
        self._telemetry.start()
        self._finish_probation()
        self.updating.start()
        self._begin()

    def _begin(self) -> None:
        """What the journal holds goes on."""
        if self.ledger.is_open:
            if self._jobs is None:
                self._jobs = asyncio.ensure_future(self._run_jobs())
            self._twin.reconcile()
        self.changed()

    def _finish_probation(self) -> None:
        """A configuration that was on probation stays so, also when the job that brought it is lost."""
        mark = self.remote.entry.mark
        if self.remote.entry.state != "confirming":
            return

        def work() -> None:
            try:
                self.remote.confirm(mark, self._operations.go_on)
            except AgentError as error:
                _LOG.warning("%s", error)

        self._lanes.desire("confirm the configuration", work)

    def reset_journal(self) -> dict[str, Any]:
        """Begin a new journal where the one that is there cannot be opened. ConflictError for one that works."""
        found = self.ledger.reset()
        self._begin()
        return found

    def _build(self) -> None:
        within, store = self._within, self._store
        around = Around(
            store=store,
            installer=within.installer,
            maintenance=within.maintenance,
            configuring=self.remote,
            unload_all=lambda: self._operations.on_loop(within.unload_all),
            tail=_tail,
            collect=self._collect,
            run_tasks=self._upkeep.plan.run,
            task_names=self._upkeep.plan.names,
            restart=lambda: self._on_loop(within.restart),
            reboot=within.reboot,
            stay=within.stay,
            origin=self._origin,
            updates=within.updates,
            link_is_up=lambda: bool(self.link.document.get("connected")),
            watcher=within.watcher,
        )
        handlers = Jobs(around).handlers()
        self.runner = Runner(
            self.ledger.journal,
            handlers,
            self._lanes,
            clock=self.clock.clock,
            clock_trusted=self.clock.trusted,
            boot_nonce=self.boot_nonce,
            verify=self._verify,
            changed=self._wake,
        )
        self.runner.paused = lambda: self._later(0.0, self._news.set)

        def check_args(op: str, args: Mapping[str, Any]) -> None:
            handlers[op](args)

        questions = Questions(
            self._outgoing,
            quick={
                "ping": without_args(lambda: {"pong": True}),
                "status": without_args(within.status),
                "jobs.list": without_args(lambda: {"jobs": self.jobs(20)}),
                "logs.tail": lambda args: {"lines": _tail(lines_of(args, 500))},
            },
            slow={"diagnostics.collect": without_args(self._collect)},
            seal=self._reporting.seal,
            boot_nonce=self.boot_nonce,
        )
        called = Called(
            jobs_changed=self._soon(self.changed),
            desired_changed=self._soon(self._desired_changed),
            asked=questions.asked,
            refused=self._soon(self._reporting.refused),
            check_args=check_args,
        )
        self._inbox = Inbox(lambda: self.enroller.allegiance, self.ledger.journal, self.clock, self.boot_nonce, called)
        self._telemetry = Telemetry(
            self._outgoing,
            lambda: self.config.telemetry,
            self._streams(),
            within.findings,
            self.clock,
            self.boot_nonce,
            lambda: self._reporting.is_enrolled,
        )

    def look(self, go_on: Callable[[], None]) -> Mapping[str, datetime] | None:
        """Bring what is known of the operator's repository up to date; on the operations' thread."""
        allegiance = self.enroller.allegiance
        if allegiance is None or allegiance.device is None or self._origin.root() is None:
            return None
        from agent.operations.believed import Believed  # noqa: PLC0415 - once a day

        if not self._origin.reading.acquire(blocking=False):
            raise DelayError("too_many", "a job looks at it now")
        try:
            return Believed(self._store, self._origin, go_on).refresh()
        finally:
            self._origin.reading.release()

    def _streams(self) -> dict[str, Callable[[], Mapping[str, Any] | None]]:
        within = self._within
        return {
            "status": within.figures,
            "models": lambda: models_record(within.statistics()),
            "heat": lambda: {**heat_record(read_sensors()), **within.governor()},
            "memory": lambda: {**memory_record(read_sensors(), within.figures()), **within.governor()},
            "energy": lambda: energy_record(read_sensors()),
            "health": lambda: {"verdict": health.verdict(within.findings())},
        }

    def stop(self) -> None:
        """What runs leaves at its next safe point."""
        self._outgoing.close()
        if not hasattr(self, "runner"):
            return
        self.runner.stop()
        self.updating.stop()
        self._telemetry.stop()
        for task in (*self._tasks, self._jobs):
            if task is not None:
                task.cancel()

    async def close(self) -> None:
        """After the operations have ended."""
        await asyncio.get_running_loop().run_in_executor(None, self._lanes.close)
        self._reader.shutdown()
        self.ledger.close()

    @property
    def config(self) -> Config:
        """What holds: the file, and what the fleet has set over it."""
        return self.remote.current()

    def reload(self) -> None:
        """The configuration file or ``trust.toml`` may have changed."""
        before = self.enroller.allegiance
        self.enroller.read()
        if not self.ledger.is_open:
            self.ledger.open()
        elif self.enroller.allegiance != before:
            self._change_allegiance()
        self._telemetry.wake()
        self._begin()

    def _keys_changed(self) -> None:
        self.enroller.obey()
        self.changed()

    def _change_allegiance(self) -> None:
        self._reporting.forget()
        self.ledger.begin_epoch()

    def _hold(self, config: Config) -> None:
        def do() -> None:
            self._within.hold(config)
            self._telemetry.wake()
            self.changed()

        self._on_loop(do)

    def _later(self, seconds: float, work: Callable[[], None]) -> None:
        """Call ``work`` on the loop's thread after so many seconds; 0 from any thread."""
        if self._loop is None or self._loop.is_closed():
            return
        if seconds:
            self._loop.call_later(seconds, work)
        else:
            self._loop.call_soon_threadsafe(work)

    def _on_loop(self, work: Callable[[], None]) -> None:
        if self._loop is None:
            raise TryLaterError("cannot do that yet: the agent is starting")
        self._loop.call_soon_threadsafe(work)

    # -- jobs ---------------------------------------------------------------------------------------------------------

    def _verify(self, order: Order) -> None:
        """Before a job runs: the journal may have been written to by whoever had the disk, a key may count no more."""
        signed = self._inbox.order(order.envelope)
        if signed is None or signed.digest() != order.digest():
            raise EnvelopeError("bad_signature", "the stored job is not the one that was signed")

    async def _run_jobs(self) -> None:
        """Wake the runner when something changed or the time it named is up, and publish."""
        while True:
            self._news.clear()
            wait = await asyncio.get_running_loop().run_in_executor(None, self.runner.wake)
            try:
                self._reporting.publish()
            except AgentError as error:
                _LOG.error("states of jobs must wait: %s", error)
                wait = _RETRY_S
            try:
                await asyncio.wait_for(self._news.wait(), wait)
            except asyncio.TimeoutError:  # on Python 3.10 a class of its own
                continue

    def _wake(self) -> None:
        """From any thread: something about the jobs changed."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self.changed)

    def changed(self) -> None:
        """Something that the fleet is told of changed; on the event loop's thread."""
        self._news.set()
        self._reporting.changed()

    def jobs(self, limit: int = 100) -> list[dict[str, Any]]:
        """For ``jobs list`` and the rpc of that name."""
        return self.ledger.jobs(limit)

    async def _take_inventory(self) -> None:
        """Probing a runtime starts a child that imports it: a second on a small board, and never on the loop."""
        found = await asyncio.get_running_loop().run_in_executor(None, inventory_of, self._within.runtimes)
        self._inventory = inventory_document(found)
        self.changed()

    # -- twin ---------------------------------------------------------------------------------------------------------

    def _desired_changed(self) -> None:
        self._twin.reconcile()
        self.changed()

    def _opened(self, envelope: bytes, kind: str) -> bytes:
        allegiance = self.enroller.allegiance
        if allegiance is None:
            raise EnvelopeError("not_enrolled", "this device has no fleet")
        return open_envelope(envelope, kind, allegiance.public_keys).payload

    def _lacking(self, link: bool) -> str:
        """What a release on probation lacks to be confirmed."""
        if not self.ledger.is_open:
            return f"the job journal: {self.ledger.problem}"
        if link and not self.link.document.get("connected"):
            return "the link, which was connected before"
        return ""

    def _link_is_back(self) -> bool:
        return self.link.connected(self.link_settings()["version"])

    def _info(self) -> dict[str, Any]:
        allegiance = self.enroller.allegiance
        return {
            "facts": self._facts(),
            "profile": self._within.device.profile.id,
            "inventory": self._inventory,
            "grant": self._recipients(),
            "keys_version": (allegiance and allegiance.keys_version) or None,
        }

    def _recipients(self) -> list[str]:
        """To whom grants for this device may be sealed, the key in use first."""
        return [identity.recipient().text() for identity in self._store.grant_identities]

    def _reported(self) -> dict[str, Any]:
        models = reported_models(self._store.document, self._within.quality)
        config, entry = self.config, self.remote.entry
        return {
            "config_state": entry.state,
            "config": short_config(entry.config),
            "drift": short_drift(self.drift(config)),
            "health": health.verdict(self._within.findings()),
            "models": models[:_MOST_MODELS],
            "models_left_out": max(0, len(models) - _MOST_MODELS),
            "jobs": {"under_way": _lanes(self.runner), "problem": self.runner.problem or self.ledger.problem or None},
            "maintenance": self._upkeep.short(),
            "agent": self.updating.status(),
        }

    def drift(self, config: Config | None = None) -> list[dict[str, Any]]:
        """Where what holds is not what is desired."""
        return self._twin.drift(config or self.config) if self.ledger.is_open else []

    def _facts(self) -> dict[str, Any]:
        device = self._within.device
        found = fleet_facts(device.facts, device.profile, device.problems)
        return {**found, "device_secret": self._within.key_place()}

    # -- link ---------------------------------------------------------------------------------------------------------

    def link_settings(self) -> dict[str, Any]:
        """See ``link_api``."""
        return settings_document(self.enroller, self.config.link, self.boot_nonce)

    async def received(self, topic: str, data: bytes) -> dict[str, str]:
        """See ``link_api``. What is to be on disk before the verdict is waited for in a thread: disks stand still."""
        if topic.startswith("dn/rpc/"):  # questions need no journal
            return self._inbox.receive(topic, data).document()
        if not self.ledger.is_open:
            raise DamagedError(f"cannot take what the fleet says: {self.ledger.problem}")
        loop = asyncio.get_running_loop()
        return (await loop.run_in_executor(self._reader, self._inbox.receive, topic, data)).document()

    def _soon(self, work: Callable[[], None]) -> Callable[[], None]:
        """``work`` on the loop's thread, from any."""
        return lambda: self._later(0.0, work)

    async def outgoing(self, cursor: str, wait_s: float) -> tuple[str, list[Message]]:
        """See ``link_api``."""
        return await self._outgoing.after(cursor, wait_s)

    def confirmed(self, ids: set[str]) -> None:
        """See ``link_api``."""
        self._outgoing.confirm(ids)

    def link_said(self, document: dict[str, Any]) -> None:
        """See ``link_api``."""
        self.link.heard, self.link.document = time.monotonic(), document
        ends = document.get("certificate_ends")
        self.certificate_ends = ends if isinstance(ends, str) else None

    def certificate_requested(self, csr: str) -> None:
        """See ``link_api``: announce the device to those who may enrol it."""
        allegiance = self.enroller.allegiance
        if allegiance is None or self.enroller.signer is None or allegiance.device is not None:
            return
        self._reporting.announce(csr, self._facts())

    def enrolled(self, data: bytes) -> dict[str, str]:
        """See ``link_api``."""
        try:
            document = self.enroller.accept(data, self.ledger.require_later if self.ledger.is_open else lambda *_: None)
        except (EnvelopeError, Refusal) as error:
            _LOG.warning("not enrolled: %s (%s)", error, error.code)
            return {"verdict": "refused", "reason": error.code, "certificate": ""}
        except PeerError as error:
            _LOG.warning("not enrolled: %s", error)
            return {"verdict": "refused", "reason": "bad_message", "certificate": ""}
        self._outgoing.drop("up/announce")
        if self.ledger.is_open:
            self._change_allegiance()
        if not self._tasks:
            self._tasks.append(asyncio.ensure_future(self._take_inventory()))
        _LOG.info("enrolled as %s of %s, enrolment %d", document.device, document.tenant, document.epoch)
        self._outgoing.wake()
        self._begin()
        return {"verdict": "accepted", "reason": "", "certificate": document.certificate}

    # -- telling -------------------------------------------------------------------------------------------------------

    def job(self, job_id: str) -> dict[str, Any] | None:
        """One job, with what was asked for. DamagedError when there are none."""
        return self.ledger.job(job_id)

    def _collect(self) -> dict[str, Any]:
        within = self._within
        parts = {
            "status": within.status(),
            "doctor": within.diagnose(),
            "facts": self._facts(),
            "config": self.config.model_dump(mode="json"),
            "jobs": self.jobs(50),
            "maintenance": self._upkeep.table(),
            "models": reported_models(self._store.document),
        }
        return diagnostics.archive(parts, RECENT.tail(400))

    def findings(self) -> list[health.Finding]:
        """What is wrong with the fleet's side."""
        found: list[health.Finding] = []
        if self.enroller.problem:
            found.append(health.Finding("trust", "error", self.enroller.problem, "correct trust.toml, then reload"))
        if self.ledger.problem:
            found.append(health.Finding("journal", "error", self.ledger.problem, self.ledger.mend))
        elif self.runner.problem:
            found.append(health.Finding("jobs", "warning", self.runner.problem))
        state = settings_state(self.enroller.allegiance, self.config.link.host)
        if state != "off" and not self.link.document.get("connected"):
            shown = self.link.shown()
            found.append(health.Finding("link", "note", f"not connected: {shown.get('reason') or 'no reason given'}"))
        return [*found, *self.updating.findings()]

    def status(self) -> dict[str, Any]:
        """For ``status``."""
        return {
            "fleet": describe(self.enroller.allegiance, self.enroller.signer) | {"grant": self._recipients()},
            "boot_nonce": self.boot_nonce,
            "link": self.link.shown() if self.link_settings()["state"] != "off" else None,
            "config_state": self.remote.entry.state,
            "drift": self.drift(),
            "update": self.updating.status(),
            "jobs": _lanes(self.runner),
            "alerts": self._telemetry.alerts,
            "refused": self.ledger.refusals(),
        }


def _lanes(runner: Runner) -> dict[str, Any]:
    return {str(lane): shown for lane, shown in runner.under_way().items()}


def _tail(lines: int) -> list[str]:
    return last_lines(RECENT.tail(lines))
