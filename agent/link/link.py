"""The link's life: talks to core, keeps the connection to the broker, and moves messages between the two.

Five tasks with one owner: the conversation with core (settings, messages to publish), the connection, confirmations,
the report of how things are, and the delivery of what core wants. Neither side waits for the other: without a broker
telemetry is kept and core is asked on, without core the session is held and nothing is acknowledged.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import random
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

from agent.base.clock import Clock, SystemClock, iso
from agent.base.errors import AgentError, DamagedError
from agent.base.files import read_bounded, write_atomically
from agent.link.backoff import Backoff, Draw
from agent.link.confirming import Confirmations
from agent.link.connection import LOST, NORMAL, WITH_WILL, Connection, End, Plan
from agent.link.core_client import Core, CoreAbsentError, CoreRefusalError, Verdict
from agent.link.delivery import Delivery
from agent.link.identity import Identity, certificate_end, chain_of, read_password, tls_context
from agent.link.inbound import Inbound
from agent.link.outbound import Outcome, Pending, Publisher
from agent.link.outbox import Outbox
from agent.link.progress import Progress
from agent.link.settings import Settings, known_streams
from agent.link.tasks import end

_LOG = logging.getLogger("edge_agent.link")

_MIB = 1 << 20
#: How long core may keep a question for messages, and the longest pause after it did not answer.
_POLL_S = 25.0
#: The same while messages were left out for room: it is soon time to begin again.
_RESYNC_S = 0.5
_RETRY_S = (0.1, 10.0)
_REPORT_S = 30.0
_GOODBYE_S = 2.0
#: Core's silence is told to the fleet after this.
_SILENCE_S = 30.0
#: The slowest that a part may be about what is never slow: look-up, handshakes, a disk that is busy.
_SLACK_S = 120.0


class Link:
    """``run`` until ``stop``. ``folder`` holds the outbox, the TLS key and the number of the last session."""

    def __init__(
        self,
        core: Core,
        folder: Path,
        *,
        clock: Clock | None = None,
        draw: Draw = random.uniform,
    ) -> None:
        self._core = core
        self._clock = clock or SystemClock()
        self._loop = asyncio.get_running_loop()
        self.progress = Progress(self._loop.time)
        self._identity = Identity(folder)
        self._session_file = folder / "session"
        self._outbox = Outbox(folder / "outbox.db", _MIB)
        self._backoff = Backoff(draw)
        self._pending = Pending()
        self._news = asyncio.Event()
        self._outcome = Outcome(self._news.set)
        self._settings: Settings | None = None
        self._connection: Connection | None = None
        self._publisher: Publisher | None = None
        self._stopping = False
        #: The connection is to look at settings and ``_stopping`` again.
        self._interrupt = asyncio.Event()
        self._confirmations = Confirmations(core)
        self._session = 0
        self._certificate_ends: str | None = None
        self._connected_with = 0  # version of the settings of the present connection
        self._connects = 0
        self._reason = "starting"
        self._trouble = ""
        self._heard_core = self._loop.time()
        self._core_start = ""
        self._told_silence = False
        self._delivery = Delivery(core, self._ask_for_blocks, self.progress, draw=draw)

    async def run(self) -> None:
        """Serve until ``stop``. Whatever ends one of the tasks ends the link: a half working one helps nobody."""
        self._outbox.open()
        parts = (
            self._keep_connected(),
            self._converse(),
            self._confirmations.run(),
            self._report(),
            self._delivery.run(),
        )
        tasks = [self._loop.create_task(part) for part in parts]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            await end(*tasks)
            if self._connection is not None:
                self._connection.abort("the link ends")
            self._outbox.close()

    def stop(self) -> None:
        """Begin the end: say goodbye to the broker, then ``run`` returns. Harmless when repeated."""
        self._stopping = True
        self._interrupt.set()

    @property
    def summary(self) -> str:
        """One line on how things are."""
        return "connected" if self._connection is not None else f"not connected: {self._reason}"

    # -- the conversation with core -----------------------------------------------------------------------------------

    async def _converse(self) -> None:
        cursor, pause_s = "", _RETRY_S[0]
        while True:
            self.progress.expect("core", _POLL_S + pause_s + _SLACK_S)
            try:
                cursor = await self._ask(cursor)
            except (CoreAbsentError, CoreRefusalError, DamagedError) as error:
                self._core_fails(error)
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, _RETRY_S[1])
            else:
                self._core_answers()
                pause_s = _RETRY_S[0]

    async def _ask(self, cursor: str) -> str:
        """One turn: settings where they are new, then messages; the next cursor."""
        if self._settings is None:
            await self._renew_settings()
        if self._pending.left_out and self._pending.has_room:
            self._pending.left_out = False
            cursor = ""
        answer = await self._core.outgoing(cursor, _RESYNC_S if self._pending.left_out else _POLL_S)
        if answer.start != self._core_start:
            self._core_start = answer.start
            self._news.set()  # a core that has just started does not know how things are
        known = self._settings
        if known is None or answer.settings_version != known.version:
            await self._renew_settings()
            if known is None or self._settings is None or self._settings.client_id != known.client_id:
                return ""  # what was asked for as somebody else is asked for again
        if self._settings is not None and self._settings.state != "off":
            self._outbox.add(known_streams(answer.messages))
            said = (message for message in answer.messages if message.kind != "tel")
            self._pending.put(said, self._loop.time())
            self._wake()
        return answer.cursor

    async def _renew_settings(self) -> None:
        settings = await self._core.settings()
        before = self._settings
        self._trouble = ""
        try:
            await self._prepare(settings)
        except (DamagedError, OSError) as error:
            self._trouble = str(error)
            _LOG.error("%s", error)
        if before is not None and before.client_id != settings.client_id:
            self._pending.clear()
        self._settings = settings
        if before is None or before.version != settings.version:
            self._backoff.reset()
            self._interrupt.set()
            self._news.set()

    async def _prepare(self, settings: Settings) -> None:
        self._outbox.resize(settings.outbox_mb * _MIB)
        if settings.state == "claim":
            await self._core.csr(self._identity.request(settings.keyid))
        elif settings.state == "enrolled" and settings.certificate:
            self._identity.store(settings.certificate)

    def _core_fails(self, error: AgentError) -> None:
        silent_s = self._loop.time() - self._heard_core
        if silent_s > _SILENCE_S and not self._told_silence:
            _LOG.error("core has not answered for %.0f s: %s", silent_s, error)
            self._told_silence = True
            self._say_status("core does not answer")

    def _core_answers(self) -> None:
        self._heard_core = self._loop.time()
        if self._told_silence:
            _LOG.info("core answers again")
            self._told_silence = False
            self._say_status("")

    async def _hand_in(self, rest: str, payload: bytes) -> Verdict:
        if rest != "dn/enrolment":
            return await self._core.received(rest, payload)
        # Not to be cut off by the end of the connection: what core has accepted has to be kept here too.
        return await asyncio.shield(self._loop.create_task(self._enrol(payload)))

    async def _enrol(self, payload: bytes) -> Verdict:
        verdict = await self._core.enrolment(payload)
        if verdict.verdict != "refused" and verdict.certificate:
            try:
                self._identity.store(verdict.certificate)
            except (DamagedError, OSError) as error:
                self._trouble = str(error)
                _LOG.error("%s", error)
        return verdict

    async def _report(self) -> None:
        """Tell core how things are, at each change and now and then."""
        while True:
            self.progress.expect("report", _REPORT_S + _SLACK_S)
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._news.wait(), _REPORT_S)
            self._news.clear()
            with contextlib.suppress(CoreAbsentError, CoreRefusalError, DamagedError):
                await self._core.state(self._state())

    def _state(self) -> dict[str, Any]:
        counts = self._outbox.counts()
        connected = self._connection is not None
        reasons = (self._outcome.told(), self._trouble) if connected else (self._reason, self._trouble)
        return {
            "connected": connected,
            "settings_version": self._connected_with if connected else None,
            "reason": "; ".join(filter(None, reasons))[:500],
            "session": self._session,
            "reconnects": max(0, self._connects - 1),
            "takeover": self._backoff.contested,
            "certificate_ends": self._certificate_ends,
            "delivery": self._delivery.state(),
            "outbox": {"records": counts.records, "bytes": counts.bytes, "dropped": counts.dropped},
        }

    # -- the connection -----------------------------------------------------------------------------------------------

    async def _keep_connected(self) -> None:
        while not self._stopping:
            self._interrupt.clear()
            settings = self._settings
            if settings is None or settings.broker is None:
                self.progress.end("connection")
                self._reason = "off" if settings else "core has not answered yet"
                await self._interrupt.wait()
                continue
            pause_s = self._backoff.next_pause(settings.splay_s)
            self.progress.expect("connection", pause_s + _SLACK_S)
            if not await self._interrupted(asyncio.sleep(pause_s)):
                await self._connect(settings)
        self._disconnected("stopped")
        with contextlib.suppress(AgentError, asyncio.TimeoutError):
            await asyncio.wait_for(self._core.state(self._state()), _GOODBYE_S)

    async def _connect(self, settings: Settings) -> None:
        """One connection, from dialling to its end."""
        inbound = Inbound(self._hand_in, lambda stop: connection.hold(stop=stop), self._delivery.take_block)
        try:
            session = self._last_session() + 1
            connection = Connection(self._plan(settings, session), inbound.take, lambda: self._ticked(began))
        except AgentError as error:
            self._disconnected(str(error))
            return
        began = self._loop.time()
        try:
            if await self._interrupted(connection.open()):
                return
            self._connected(connection, settings, session)
            self._connected_with = settings.version
            await self._interrupted(asyncio.shield(connection.ended))
            if not connection.ended.done():
                await self._goodbye(connection, settings)
        except AgentError as error:
            self._disconnected(str(error))
        else:
            end = connection.ended.result()
            now = self._loop.time()
            self._backoff.lost(now - began, now, takeover=end.takeover, closed=end.closed)
            self._disconnected(self._described(end))
        finally:
            inbound.stop()
            connection.abort("given up")

    def _plan(self, settings: Settings, session: int) -> Plan:
        broker = settings.broker
        assert broker is not None
        chain = chain_of(broker, self._identity if settings.state == "enrolled" else None)
        self._certificate_ends = certificate_end(chain[0]) if chain else None
        will = (settings.topic("up/status"), self._status(session, online=False, reason="lost", dated=False))
        return Plan(
            host=broker.host,
            port=broker.port,
            tls=tls_context(broker, chain),
            client_id=settings.client_id,
            keepalive_s=broker.keepalive_s,
            username=broker.username,
            password=read_password(broker),
            will=will if settings.state == "enrolled" else None,
            subscriptions=settings.subscriptions,
        )

    async def _interrupted(self, work: Coroutine[Any, Any, None] | asyncio.Future[Any]) -> bool:
        """Do ``work`` unless new settings or the end come first, which give True. Raises what ``work`` raises."""
        task = asyncio.ensure_future(work)
        interrupt = self._loop.create_task(self._interrupt.wait())
        try:
            await asyncio.wait({task, interrupt}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            await end(task, interrupt)
        if task.cancelled():
            return True
        task.result()
        return False

    def _connected(self, connection: Connection, settings: Settings, session: int) -> None:
        _LOG.info("connected to %s as %s", settings.broker and settings.broker.host, settings.client_id)
        self._connection = connection
        self._keep_session(session)
        self._connects += 1
        self._outcome.refused.clear()
        self._outbox.mark_backlog()
        publisher = Publisher(
            connection,
            settings.topic,
            self._pending,
            self._outbox,
            self._outcome,
            self._confirmations.put,
            telemetry_rate=settings.telemetry_rate,
        )
        self._publisher = publisher
        self._say_status("core does not answer" if self._told_silence else "")
        self._news.set()
        self._wake()

    def _disconnected(self, reason: str) -> None:
        was = self._connection is not None
        self._connection = self._publisher = None
        if was or reason != self._reason:
            _LOG.log(logging.INFO if self._stopping else logging.WARNING, "not connected: %s", reason)
        self._reason = reason
        self._news.set()

    def _described(self, end: End) -> str:
        if not self._backoff.contested:
            return end.reason
        return f"{end.reason}; does another client use this device's identity?"

    async def _goodbye(self, connection: Connection, settings: Settings) -> None:
        """Leave in order: "offline" is confirmed and the Will withdrawn, or the broker publishes the Will."""
        reason = "stopped" if self._stopping else "new settings"
        code = NORMAL
        if settings.state == "enrolled":
            payload = self._status(self._session, online=False, reason=reason)
            answer = connection.publish(settings.topic("up/status"), payload, retain=True)
            await asyncio.wait({answer}, timeout=_GOODBYE_S)
            code = NORMAL if answer.done() and 0 <= answer.result() < 0x80 else WITH_WILL
        await connection.close(code)

    def _say_status(self, reason: str) -> None:
        settings, connection = self._settings, self._connection
        if connection is None or settings is None or settings.state != "enrolled":
            return
        topic = settings.topic("up/status")
        answer = connection.publish(topic, self._status(self._session, online=True, reason=reason), retain=True)
        answer.add_done_callback(lambda done: self._status_answered(done.result()))

    def _status_answered(self, code: int) -> None:
        if code != LOST and code >= 0x80:
            self._outcome.note("up/status", code)

    def _status(self, session: int, *, online: bool, reason: str, dated: bool = True) -> bytes:
        at = iso(self._clock.now()) if dated else None
        return json.dumps({"online": online, "session": session, "at": at, "reason": reason}).encode()

    def _last_session(self) -> int:
        """The number of the last session. It rises with each, over restarts too while the disk takes it."""
        try:
            return max(int(read_bounded(self._session_file, 32)), self._session)
        except (OSError, ValueError):
            return self._session

    def _keep_session(self, number: int) -> None:
        self._session = number
        try:
            write_atomically(self._session_file, b"%d" % number)
        except OSError as error:
            _LOG.warning("cannot keep the number of the session: %s", error)

    def _ticked(self, began: float) -> None:
        settings = self._settings
        if settings is not None and settings.broker is not None:
            self.progress.expect("connection", settings.broker.keepalive_s + _SLACK_S)
        self._backoff.held(self._loop.time() - began)

    def _ask_for_blocks(self, rest: str, payload: bytes) -> asyncio.Future[int]:
        """With QoS 1 where there is room: its answer tells whether anybody listens."""
        settings, connection = self._settings, self._connection
        if connection is None or settings is None or settings.state != "enrolled":
            lost: asyncio.Future[int] = self._loop.create_future()
            lost.set_result(LOST)
            return lost
        qos = 1 if connection.under_way < connection.window else 0
        return connection.publish(settings.topic(rest), payload, retain=False, qos=qos)

    def _wake(self) -> None:
        if self._publisher is not None:
            self._publisher.wake()
