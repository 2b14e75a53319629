"""The fleet's side of core, wired: journal and runner, inbox and outgoing, twin, questions, telemetry.

It exists only on a device with a ``trust.toml``; nothing else in core needs it. A journal that cannot be opened leaves
the device serving and says what mends it.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import secrets
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from typing import Any

from agent import __version__
from agent.base.clock import SystemClock, iso
from agent.base.config import Config, LinkConfig
from agent.base.errors import AgentError, ConflictError, DamagedError, PeerError, TryLaterError, one_line
from agent.base.paths import Paths
from agent.core import diagnostics, health
from agent.core.device import inventory_of
from agent.core.enrolling import Enroller, describe, identity_text, settings_state
from agent.core.inbox import Called, Inbox
from agent.core.link_api import LinkState
from agent.core.logs import RECENT
from agent.core.outgoing import Message, Outgoing
from agent.core.presenting import fleet_facts, reported_models
from agent.core.questions import Questions, lines_of, without_args
from agent.core.telemetry import Telemetry, energy_record, heat_record, memory_record, models_record
from agent.core.telling import job_row, job_state, last_lines, short_config, short_drift, without_story
from agent.core.twin import Twin
from agent.core.upkeep import Upkeep
from agent.core.within import Within
from agent.hardware.sensors import read_sensors
from agent.operations.configure import RemoteConfig
from agent.operations.jobs import Around, Jobs
from agent.selection.inventory import inventory_document
from agent.store.store import Store
from agent.trust.envelope import EnvelopeError, open_envelope, seal
from agent.wire import messages as wire
from agent.wire.ops import OPS
from agent.work.database import HINT
from agent.work.jobs import JobStatus, Lane, Order, Refusal
from agent.work.journal import Journal
from agent.work.runner import Runner

_LOG = logging.getLogger("edge_agent.fleet")
_FLOOR = "clock-floor"
#: Whose jobs the journal holds: tenant and device.
_OWNER = "owner"
_MOST_MODELS = 150
_MOST_SAID = 200
_REPORT_S = 1.0
#: Refusals cost whoever causes them nothing: they are told less often.
_REFUSED_S = 5.0
#: After the journal could not be read or written to.
_RETRY_S = 15.0


class Fleet:
    """See the module. ``start`` and ``stop`` belong to the event loop's thread."""

    def __init__(self, paths: Paths, store: Store, upkeep: Upkeep, within: Within) -> None:
        self._store = store
        self._within = within
        self._journal_path = paths.journal
        self._operations = within.operations
        self.boot_nonce = secrets.token_hex(16)
        self.enroller = Enroller(paths.trust_file, store)
        self.link = LinkState()
        self.clock = upkeep.clock
        self._upkeep = upkeep
        self.journal = Journal(paths.journal, SystemClock(), clock_trusted=self.clock.trusted)
        self.remote = RemoteConfig(store, within.file_config, self._hold, self._link_is_back)
        self._twin = Twin(
            self.journal, self.remote, self._operations.submit, self._later, self._opened, self._operations.go_on
        )
        #: Why there are no jobs, and what mends it.
        self.problem = self._mend = ""
        self._outgoing = Outgoing(self.boot_nonce, self._was_confirmed)
        self._rescue = ThreadPoolExecutor(1, thread_name_prefix="rescue")
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="inbox")
        self._csr = ""
        self.certificate_ends: str | None = None
        self._said: dict[str, tuple[str, int]] = {}
        self._tasks: list[asyncio.Task[Any]] = []
        self._jobs: asyncio.Task[None] | None = None
        self._news = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._report_due: asyncio.TimerHandle | None = None
        self._reported_version = 0
        self._inventory: dict[str, Any] = {}
        self._open = False

    # -- life ---------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Open the journal, resume what was under way, begin to say how the device is."""
        self._loop = asyncio.get_running_loop()
        self.enroller.read()
        self._build()
        self._open_journal()
        if self.enroller.allegiance is not None:
            self._tasks.append(asyncio.ensure_future(self._take_inventory()))
        self._telemetry.start()
        self._finish_probation()
        self._begin()

    def _open_journal(self) -> None:
        try:
            self.journal.open()
            self._floor()
            self._begin_epoch()
        except AgentError as error:
            self._close_journal(error)
        else:
            self._open, self.problem = True, ""

    def _close_journal(self, error: AgentError) -> None:
        self._open, self.problem, self._mend = False, str(error), error.hint
        self.journal.close()
        _LOG.error("no jobs: %s%s", error, f" ({error.hint})" if error.hint else "")

    def _begin(self) -> None:
        """What the journal holds goes on."""
        if self._open:
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

        self._operations.submit("confirm the configuration", work)

    def reset_journal(self) -> dict[str, Any]:
        """Move a journal that cannot be opened aside and begin a new one. ConflictError for one that works."""
        if self._open:
            raise ConflictError("cannot reset the job journal: it is whole")
        from agent.work.mending import set_aside  # noqa: PLC0415 - hardly ever needed

        allegiance = self.enroller.allegiance
        stamp = self.clock.clock.now().strftime("%Y%m%dT%H%M%SZ")
        moved = set_aside(self._journal_path, allegiance.epoch if allegiance else 0, stamp)
        self._open_journal()
        self._begin()
        return {"moved_to": str(moved.path) if moved.path else None, "counters_kept": moved.counters_kept}

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
        )
        handlers = Jobs(around).handlers()
        self.runner = Runner(
            self.journal,
            handlers,
            self._execute,
            clock=self.clock.clock,
            clock_trusted=self.clock.trusted,
            boot_nonce=self.boot_nonce,
            verify=self._verify,
            changed=self._wake,
        )

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
            seal=self._seal,
            boot_nonce=self.boot_nonce,
        )
        called = Called(
            jobs_changed=self._soon(self.changed),
            desired_changed=self._soon(self._desired_changed),
            asked=questions.asked,
            refused=self._soon(lambda: self._report_within(_REFUSED_S)),
            check_args=check_args,
        )
        self._inbox = Inbox(lambda: self.enroller.allegiance, self.journal, self.clock, self.boot_nonce, called)
        self._telemetry = Telemetry(
            self._outgoing,
            lambda: self.config.telemetry,
            self._streams(),
            within.findings,
            self.clock,
            self.boot_nonce,
            self._is_enrolled,
        )

    def _streams(self) -> dict[str, Callable[[], Mapping[str, Any] | None]]:
        within = self._within
        return {
            "status": within.figures,
            "models": lambda: models_record(within.statistics()),
            "heat": lambda: heat_record(read_sensors()),
            "memory": lambda: memory_record(read_sensors(), within.figures()),
            "energy": lambda: energy_record(read_sensors()),
            "health": lambda: {"verdict": health.verdict(within.findings())},
        }

    def stop(self) -> None:
        """What runs leaves at its next safe point."""
        self._outgoing.close()
        if not hasattr(self, "runner"):
            return
        self.runner.stop()
        self._telemetry.stop()
        for task in (*self._tasks, self._jobs):
            if task is not None:
                task.cancel()

    def close(self) -> None:
        """After the operations have ended."""
        self._rescue.shutdown()
        self._reader.shutdown()
        if self._open:
            self._floor()
            self.journal.close()
            self._open = False

    @property
    def config(self) -> Config:
        """What holds: the file, and what the fleet has set over it."""
        return self.remote.current()

    def reload(self) -> None:
        """The configuration file or ``trust.toml`` may have changed."""
        before = self.enroller.allegiance
        self.enroller.read()
        if not self._open:
            self._open_journal()
        elif self.enroller.allegiance != before:
            self._change_allegiance()
        self._telemetry.wake()
        self._begin()

    def _change_allegiance(self) -> None:
        """What was to be said was for another."""
        for topic in list(self._said):
            self._outgoing.drop(topic)
        self._said.clear()
        try:
            self._begin_epoch()
        except AgentError as error:
            self._close_journal(error)

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

    def _floor(self) -> None:
        """The latest moment that is known to be past, kept over starts: a clock below it is wrong."""
        kept = self.journal.facts.get(_FLOOR)
        if kept is not None:
            try:
                self.clock.floor = max(self.clock.floor, datetime.fromisoformat(kept))
            except (ValueError, TypeError) as error:
                raise DamagedError(f"cannot read the job journal: '{kept}' is no moment", hint=HINT) from error
        now = self.clock.clock.now()
        if self.clock.trusted() and (kept is None or now > self.clock.floor):
            self.journal.facts.put(_FLOOR, now.isoformat())

    def _begin_epoch(self) -> None:
        allegiance = self.enroller.allegiance
        if allegiance is None or allegiance.device is None:
            return
        self._require_later(allegiance.tenant, allegiance.device, allegiance.epoch)
        self.journal.facts.put(_OWNER, _owner(allegiance.tenant, allegiance.device))
        self.journal.begin_epoch(allegiance.epoch)

    def _require_later(self, tenant: str, device: str, epoch: int) -> None:
        """The journal's counters and jobs are of one device of one tenant: for another the number must rise."""
        owner, known = self.journal.facts.get(_OWNER), self.journal.last()[0]
        if epoch < known or (epoch == known and owner not in (None, _owner(tenant, device))):
            raise Refusal(
                "old_epoch",
                f"cannot be {_owner(tenant, device)}, enrolment {epoch}: the job journal is of {owner}, up to {known}",
                hint=f"enrol the device with a number above {known} ('epoch' in trust.toml)",
            )

    # -- jobs ---------------------------------------------------------------------------------------------------------

    def _execute(self, lane: Lane, name: str, work: Callable[[], None]) -> None:
        if lane == "normal":
            self._operations.submit(name, work)
            return
        try:
            self._rescue.submit(work)
        except RuntimeError as error:  # shut down
            raise TryLaterError(f"cannot start {name}: the agent is stopping") from error

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
                self._publish()
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
        self._report_within(_REPORT_S)

    def _report_within(self, seconds: float) -> None:
        loop = self._loop
        if loop is None or (self._report_due is not None and self._report_due.when() <= loop.time() + seconds):
            return
        if self._report_due is not None:
            self._report_due.cancel()
        self._report_due = loop.call_later(seconds, self._report)

    def _publish(self) -> None:
        """Hand every state that the fleet has not confirmed to link, the oldest jobs first."""
        if self.enroller.allegiance is None or self.enroller.allegiance.device is None or not self._open:
            return
        for status in self.journal.unpublished()[:_MOST_SAID]:
            topic = f"up/job/{status.job_id}"
            if self._said.get(topic, ("", 0))[1] < status.rev:
                self._said[topic] = (status.job_id, status.rev)
                self._outgoing.say(topic, self._sealed_state(status), confirm=True)

    def _sealed_state(self, status: JobStatus) -> bytes:
        try:
            return self._seal(job_state(status, self._address()))
        except ValueError as error:  # pydantic's errors are ValueErrors
            _LOG.error("job %s cannot be told in full: %s", status.job_id, one_line(str(error)))
            return self._seal(job_state(without_story(status), self._address()))

    def _was_confirmed(self, message: Message) -> None:
        job_id, rev = self._said.pop(message.topic, ("", 0))
        if not job_id or not self._open:
            return
        try:
            self.journal.published(job_id, rev)
        except AgentError as error:  # it is said again, and confirmed again
            _LOG.error("it is not noted that job %s was told: %s", job_id, error)
        self._news.set()

    def jobs(self, limit: int = 100) -> list[dict[str, Any]]:
        """For ``jobs list`` and the rpc of that name."""
        return [job_row(status) for status in self.journal.jobs(limit=limit)] if self._open else []

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

    def _link_is_back(self) -> bool:
        return self.link.connected(self.link_settings()["version"])

    def _report(self) -> None:
        self._report_due = None
        allegiance = self.enroller.allegiance
        if allegiance is None or allegiance.device is None or self.enroller.signer is None:
            return
        for topic, make in (("up/info", self._info), ("up/reported", self._reported)):
            try:
                self._outgoing.say(topic, self._seal(make()), retain=True)
            except (AgentError, ValueError) as error:  # pydantic's errors are ValueErrors
                _LOG.error("%s cannot be told: %s", topic, one_line(str(error)))

    def _info(self) -> wire.Info:
        _, generation, seq = self.journal.last() if self._open else (0, 0, 0)
        assert self.enroller.signer is not None
        return wire.Info(
            **self._address(),
            boot_nonce=self.boot_nonce,
            at=iso(self.clock.clock.now()),
            agent_version=__version__,
            identity=identity_text(self.enroller.signer),
            ops=sorted(OPS) if self._open else [name for name, row in sorted(OPS.items()) if row.rpc],
            last_seq=seq,
            last_generation=generation,
            desired_version=self.journal.desired()[0] if self._open else 0,
            facts=self._facts(),
            profile=self._within.device.profile.id,
            inventory=self._inventory,
        )

    def _reported(self) -> wire.Reported:
        self._reported_version += 1
        models = reported_models(self._store.document)
        config, entry = self.config, self.remote.entry
        return wire.Reported(
            **self._address(),
            version=self._reported_version,
            at=iso(self.clock.clock.now()),
            desired_version=self.journal.desired()[0] if self._open else 0,
            config_state=entry.state,
            config=short_config(entry.config),
            drift=short_drift(self.drift(config)),
            health=health.verdict(self._within.findings()),
            models=models[:_MOST_MODELS],
            models_left_out=max(0, len(models) - _MOST_MODELS),
            jobs={"under_way": _lanes(self.runner), "problem": self.runner.problem or self.problem or None},
            maintenance=self._upkeep.short(),
            refused=self._refusals(),
        )

    def drift(self, config: Config | None = None) -> list[dict[str, Any]]:
        """Where what holds is not what is desired."""
        return self._twin.drift(config or self.config) if self._open else []

    def _is_enrolled(self) -> bool:
        allegiance = self.enroller.allegiance
        return allegiance is not None and allegiance.device is not None

    def _refusals(self) -> dict[str, int]:
        """Empty where the journal cannot be read: that is told elsewhere."""
        with contextlib.suppress(AgentError):
            return self.journal.refusals() if self._open else {}
        return {}

    def _facts(self) -> dict[str, Any]:
        device = self._within.device
        return fleet_facts(device.facts, device.profile, device.problems)

    def _address(self) -> dict[str, Any]:
        allegiance = self.enroller.allegiance
        assert allegiance is not None
        return {"tenant": allegiance.tenant, "device": allegiance.device, "epoch": allegiance.epoch}

    def _seal(self, message: wire.JobState | wire.RpcAnswer | wire.Info | wire.Reported | wire.Announcement) -> bytes:
        assert self.enroller.signer is not None
        return seal(message.KIND, message.encode(), [self.enroller.signer])

    # -- link ---------------------------------------------------------------------------------------------------------

    def link_settings(self) -> dict[str, Any]:
        """See ``link_api``."""
        config, allegiance = self.config.link, self.enroller.allegiance
        state = settings_state(allegiance, config.host)
        settings: dict[str, Any] = {
            "state": state,
            "tenant": allegiance.tenant if allegiance else "",
            "device": (allegiance.device or "") if allegiance else "",
            "epoch": allegiance.epoch if allegiance else 0,
            "keyid": self.enroller.signer.keyid if self.enroller.signer else "",
            "broker": _broker(config, claiming=state == "claim"),
            "outbox_mb": config.outbox_mb,
            "splay_s": config.splay_s,
            "certificate": self.enroller.certificate or None,
        }  # fmt: skip
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
        return settings | {"boot_nonce": self.boot_nonce, "version": int(digest[:12], 16)}

    async def received(self, topic: str, data: bytes) -> dict[str, str]:
        """See ``link_api``. What is to be on disk before the verdict is waited for in a thread: disks stand still."""
        if topic.startswith("dn/rpc/"):  # questions need no journal
            return self._inbox.receive(topic, data).document()
        if not self._open:
            raise DamagedError(f"cannot take what the fleet says: {self.problem}")
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
        allegiance, signer = self.enroller.allegiance, self.enroller.signer
        if allegiance is None or signer is None or allegiance.device is not None:
            return
        self._csr = csr
        facts = self._facts()
        message = wire.Announcement(
            tenant=allegiance.tenant,
            identity=identity_text(signer),
            boot_nonce=self.boot_nonce,
            at=iso(self.clock.clock.now()),
            csr=csr,
            agent_version=__version__,
            board=facts.get("board"),
            facts=facts,
        )
        self._outgoing.say("up/announce", self._seal(message), retain=True, confirm=True)

    def enrolled(self, data: bytes) -> dict[str, str]:
        """See ``link_api``."""
        try:
            document = self.enroller.accept(data, self._require_later if self._open else lambda *_: None)
        except (EnvelopeError, Refusal) as error:
            _LOG.warning("not enrolled: %s (%s)", error, error.code)
            return {"verdict": "refused", "reason": error.code, "certificate": ""}
        except PeerError as error:
            _LOG.warning("not enrolled: %s", error)
            return {"verdict": "refused", "reason": "bad_message", "certificate": ""}
        self._outgoing.drop("up/announce")
        if self._open:
            self._change_allegiance()
        if not self._tasks:
            self._tasks.append(asyncio.ensure_future(self._take_inventory()))
        _LOG.info("enrolled as %s of %s, enrolment %d", document.device, document.tenant, document.epoch)
        self._outgoing.wake()
        self._begin()
        return {"verdict": "accepted", "reason": "", "certificate": document.certificate}

    # -- telling -------------------------------------------------------------------------------------------------------

    def job(self, job_id: str) -> dict[str, Any] | None:
        """One job, with what was asked for."""
        self._require_open()
        record = self.journal.job(job_id)
        if record is None:
            return None
        order = record.order
        asked = {"lane": order.lane, "priority": order.priority, "args": dict(order.args), "not_after": order.not_after}
        return job_row(record.status) | asked | {"accepted_at": record.accepted_at}

    def _require_open(self) -> None:
        if not self._open:
            raise DamagedError(f"cannot use the job journal: {self.problem}", hint="see edge-agent doctor")

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
        if self.problem:
            found.append(health.Finding("journal", "error", self.problem, self._mend))
        elif self.runner.problem:
            found.append(health.Finding("jobs", "warning", self.runner.problem))
        state = settings_state(self.enroller.allegiance, self.config.link.host)
        if state != "off" and not self.link.document.get("connected"):
            shown = self.link.shown()
            found.append(health.Finding("link", "note", f"not connected: {shown.get('reason') or 'no reason given'}"))
        return found

    def status(self) -> dict[str, Any]:
        """For ``status``."""
        return {
            "fleet": describe(self.enroller.allegiance, self.enroller.signer),
            "boot_nonce": self.boot_nonce,
            "link": self.link.shown() if self.link_settings()["state"] != "off" else None,
            "config_state": self.remote.entry.state,
            "drift": self.drift(),
            "jobs": _lanes(self.runner),
            "alerts": self._telemetry.alerts,
            "refused": self._refusals(),
        }


def _broker(config: LinkConfig, *, claiming: bool) -> dict[str, Any]:
    """Where and as whom to connect; a device that is not enrolled has a door and a certificate of its own for that."""
    return {
        "host": (claiming and config.claim_host) or config.host,
        "port": (claiming and config.claim_port) or config.port,
        "tls": config.tls,
        "ca_file": config.ca_file,
        "cert_file": config.claim_cert_file if claiming else config.cert_file,
        "key_file": config.claim_key_file if claiming else config.key_file,
        "username": config.username,
        "password_file": config.password_file,
        "keepalive_s": config.keepalive_s,
    }


def _lanes(runner: Runner) -> dict[str, Any]:
    return {str(lane): shown for lane, shown in runner.under_way().items()}


def _owner(tenant: str, device: str) -> str:
    return f"{tenant}/{device}"


def _tail(lines: int) -> list[str]:
    return last_lines(RECENT.tail(lines))
