"""The operator at his desk: connected, hearing what devices say, and keeping the right document on each doorbell.

Invariants: what was heard is stored before it is acknowledged; after each publication the books are asked again, so
that of several commands at once the last one leaves the right document behind; only one command at a time has the
persistent session, in which the broker keeps job states for us while nobody is there. A broker that was killed may have
forgotten what was published last: after a lost connection, and some time after it was said, it is said again.
"""

from __future__ import annotations

import base64
import contextlib
import os
import secrets
from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta, timezone
from types import TracebackType

from agent.base.clock import Clock, iso
from agent.base.errors import ConflictError, DeadlineError, RefusedError
from agent.base.files import exclusive_lock, read_bounded
from agent.fleet.books import Books
from agent.fleet.broker import Broker, Outgoing
from agent.fleet.desiring import KIND as DESIRED
from agent.fleet.documents import Document
from agent.fleet.folder import Folder, Settings, write_new
from agent.fleet.hearing import Event, Hearing
from agent.wire.topics import ROOT, device_topic

#: How long the broker keeps job states for an operator who is away.
SESSION_S = 7 * 86_400
#: Retained messages have no end mark: after such a silence they are taken to have come.
_QUIET_S = 0.3
_MOST_SYNC_S = 30.0
#: A document that was published so long ago is published again: the device answers for it once more.
_AGAIN = timedelta(minutes=10)
#: More devices than this are listened to by a wildcard.
_MOST_NAMED = 50
_RETAINED = ("up/status", "up/info", "up/reported", "up/alert/+")
_REFUSED = 0x80


class Desk:
    """One operator's connection with its books. A context manager. For one thread."""

    def __init__(self, folder: Folder, settings: Settings, books: Books, clock: Clock) -> None:
        self._folder = folder
        self._settings = settings
        self._books = books
        self._clock = clock
        self._hearing = Hearing(books, settings.tenant)
        self._rung: dict[str, tuple[int, int]] = {}
        self._connection = 0
        self._insist = False
        self._filters: set[str] = set()
        self._heard: set[str] = set()
        self._stack = contextlib.ExitStack()
        self._broker: Broker | None = None

    def __enter__(self) -> Desk:
        with contextlib.ExitStack() as stack:
            client_id, session_s = self._session(stack)
            self._broker = stack.enter_context(
                Broker(self._folder, self._settings.broker, client_id, session_s=session_s)
            )
            self.broker.subscribe({f"{ROOT}/{self._settings.tenant}/+/up/job/+": 1})
            self._stack = stack.pop_all()
        try:
            # Without a session the broker kept no answers: who has answered is asked to do so again.
            self._ring_all(insist=session_s > 0 and not self.broker.resumed)
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.broker.unsubscribe(sorted(self._filters))
        self._stack.close()
        self._broker = None

    @property
    def broker(self) -> Broker:
        """The open connection."""
        if self._broker is None:
            raise RuntimeError("the desk is not open")
        return self._broker

    def _session(self, stack: contextlib.ExitStack) -> tuple[str, int]:
        """Client id and how long the broker keeps its session: the persistent one, unless another command has it."""
        prefix = f"{self._settings.tenant}/@ops/"  # "@" is in no device's name
        try:
            stack.enter_context(exclusive_lock(self._folder.session_lock))
        except ConflictError:
            return prefix + secrets.token_hex(8), 0
        return prefix + _session_name(self._folder), SESSION_S

    # -- hearing ------------------------------------------------------------------------------------------------------

    def listen(self, devices: Iterable[str] | None, *, claims: bool = False, telemetry: bool = False) -> None:
        """Hear what these devices (None: all) say of themselves, and who asks to be enrolled. What is retained comes
        at once."""
        tenant = self._settings.tenant
        names = sorted(set(devices)) if devices is not None else ["+"]
        if len(names) > _MOST_NAMED:
            names = ["+"]
        filters = [f"{ROOT}/{tenant}/{name}/{rest}" for name in names for rest in _RETAINED]
        if claims:
            filters.append(f"{ROOT}/{tenant}/claim/+/up/announce")
        if telemetry:
            filters.append(f"{ROOT}/{tenant}/+/up/tel/+")
        if filters:
            self._filters.update(filters)
            self._heard.clear()
            # QoS 0: the broker would keep these for an operator who is away, in place of job states.
            self.broker.subscribe(dict.fromkeys(filters, 0))

    def pump(self, timeout_s: float) -> list[Event]:
        """Take in what has come (waiting up to ``timeout_s`` for it), and move doorbells on. What was new."""
        self._say_again_after_a_cut()
        messages = self.broker.receive(timeout_s)
        if not messages:
            return []
        now = iso(self._clock.now())
        events: list[Event] = []
        with self._books.database.transaction():
            for message in messages:
                event = self._hearing.hear(message.topic, message.payload, now)
                if event is not None:
                    events.append(event)
        self.broker.acknowledge(messages)
        self._heard.update(message.topic for message in messages if message.payload)
        self.ring(sorted({event.device for event in events if event.kind in ("job", "info")}))
        return events

    def sync(self) -> list[Event]:
        """Take in all that is retained, or was kept for us: until nothing has come for a moment.

        Alerts and announcements that are not among it were taken back while nobody listened.
        """
        events: list[Event] = []
        deadline = self._clock.monotonic() + _MOST_SYNC_S
        quiet_from = self._clock.monotonic()
        while self._clock.monotonic() < min(deadline, quiet_from + _QUIET_S):
            before = self.broker.taken
            events += self.pump(_QUIET_S)
            if self.broker.taken != before:
                quiet_from = self._clock.monotonic()
        self._take_back()
        return events

    def sync_again(self) -> list[Event]:
        """The same after a lost connection: what is retained has come anew with the next one."""
        self._heard.clear()
        return self.sync()

    def _take_back(self) -> None:
        """Forget what was retained once and is no more."""
        base = f"{ROOT}/{self._settings.tenant}"
        words, now = self._books.words, iso(self._clock.now())
        alerts = [
            (device, alert)
            for device, alert, _ in words.alerts()
            if self._listens_to(f"{base}/{device}/up/alert/+", f"{base}/+/up/alert/+")
            and f"{base}/{device}/up/alert/{alert}" not in self._heard
        ]
        claims = [
            each.keyid
            for each in words.announced()
            if self._listens_to(f"{base}/claim/+/up/announce")
            and f"{base}/claim/{each.keyid}/up/announce" not in self._heard
        ]
        if alerts or claims:
            with self._books.database.transaction():
                for device, alert in alerts:
                    words.set_alert(device, alert, now, None)
                for keyid in claims:
                    words.withdraw_announcement(keyid)

    def _listens_to(self, *filters: str) -> bool:
        return any(each in self._filters for each in filters)

    def _say_again_after_a_cut(self) -> None:
        if not self.broker.connected or self.broker.connections == self._connection:
            return
        self._rung.clear()
        self._ring_all(insist=True)

    def _ring_all(self, *, insist: bool) -> None:
        """Everything that is to be said. ``insist``: also what was said a short time ago."""
        now = self.broker.connections
        self._insist = insist
        try:
            self.ring(self._books.documents.devices_waiting())
            self._ask_for_ends()
            self._remind()
            self._connection = now
        finally:
            self._insist = False

    # -- saying -------------------------------------------------------------------------------------------------------

    def ring(self, devices: Sequence[str]) -> int:
        """Put the right document on the doorbell of each of ``devices`` where it is not there yet; how many."""
        rung = 0
        while documents := [document for name in devices if (document := self._to_ring(name)) is not None]:
            self._put(documents)
            rung += len(documents)
            devices = [document.device for document in documents]
        return rung

    def _put(self, documents: Sequence[Document]) -> None:
        with self._books.database.transaction():
            self._books.documents.set_published(documents, iso(self._clock.now()))
        self.say(
            [
                Outgoing(device_topic(self._settings.tenant, each.device, "dn/job"), each.envelope, retain=True)
                for each in documents
            ]
        )

    def _ask_for_ends(self) -> None:
        """What a device says when nobody listens, and to a broker that is killed then, it has said: it is to repeat."""
        self._put([each for each in self._books.documents.unended() if not self._is_recent(each.published)])

    def _to_ring(self, device: str) -> Document | None:
        document = self._books.documents.current(device)
        if document is None:
            return None
        number = (document.epoch, document.generation)
        last = self._rung.get(device)
        self._rung[device] = number
        if last == number or (last is None and self._is_recent(document.published)):
            return None
        return document

    def _remind(self) -> None:
        """Say once more what is desired of devices that have not reported it."""
        reported = self._books.words.words("reported")
        messages, now = [], iso(self._clock.now())
        with self._books.database.transaction():
            for device, word in self._books.words.words(DESIRED).items():
                known = reported.get(device)
                seen = known is not None and known.payload["desired_version"] >= word.payload["version"]
                if seen or self._is_recent(word.received):
                    continue
                self._books.words.hear(device, DESIRED, now, word.payload)
                topic = device_topic(self._settings.tenant, device, "dn/desired")
                messages.append(Outgoing(topic, base64.b64decode(word.payload["envelope"]), retain=True))
        self.say(messages)

    def _is_recent(self, published: str | None) -> bool:
        if published is None or self._insist:
            return False
        moment = datetime.strptime(published, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=timezone.utc)
        return timedelta(0) <= self._clock.now() - moment < _AGAIN

    def say(self, messages: Sequence[Outgoing]) -> None:
        """Publish. RefusedError where the broker's access list forbids it, DeadlineError without its word."""
        try:
            reasons = self.broker.publish(messages)
        except DeadlineError:
            self._connection = 0  # said again as soon as it listens
            raise
        for message, reason in zip(messages, reasons, strict=True):
            if reason >= _REFUSED:
                raise RefusedError(
                    f"cannot publish on {message.topic}: the broker refuses it (reason {reason:#x})",
                    hint="its access list must let the operator write below eda/1/TENANT/",
                )


def _session_name(folder: Folder) -> str:
    """The same as long as the folder lives."""
    path = folder.path / "session.id"
    if not os.path.lexists(path):
        write_new(path, secrets.token_hex(8).encode())
    name = read_bounded(path, 64).decode("ascii", "replace").strip()
    if not name.isalnum():
        raise ConflictError(f"cannot use {path}: it holds no name of a session", hint="delete it")
    return name
