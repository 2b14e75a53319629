"""``edge-fleet watch``: devices, jobs and alerts as they change, and doorbells moved on meanwhile."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from agent.base.clock import iso
from agent.base.errors import TryLaterError
from agent.cli.commands import Commands
from agent.cli.fleet_common import Opened, cell, choose_devices, duration, manual, opened
from agent.cli.fleet_devices import FILTERS
from agent.cli.fleet_screen import Screen, columns
from agent.fleet.desk import Desk
from agent.fleet.filters import parse_filters
from agent.fleet.hearing import Event
from agent.fleet.overview import row, select, tally, views, why

_ABOUT = f"""\
On a terminal a table that is drawn anew as things change: alerts first, then jobs that are under way, then devices,
those that are offline or not well before the others. Elsewhere one line an event, with --json one JSON object; the
first ones tell how things are. While it runs, each device gets its next job as soon as it has answered for the last.

{FILTERS}
"""
_EXAMPLES = """\
  edge-fleet watch
  edge-fleet watch --where group=kitchens
  edge-fleet watch --json --for 1h > events.jsonl
"""
_DRAW_S = 0.5
_POLL_S = 1.0
_MOST_JOBS = 200
#: What happened while nobody watched, and is not how things are.
_MISSED = ("job", "announcement", "dropped")


def register(commands: Commands, common: argparse.ArgumentParser) -> None:
    """Add the command to the parser."""
    watch = manual(commands, common, "watch", "devices, jobs and alerts, live", about=_ABOUT, examples=_EXAMPLES)
    watch.set_defaults(run=_watch, doing="watch")
    choose_devices(watch, everyone=False)
    watch.add_argument("--telemetry", action="store_true", help="telemetry, too (for --json and lines)")
    watch.add_argument(
        "--for", type=duration, dest="period", metavar="TIME", help="end after that (default: Ctrl-C ends)"
    )


def _watch(options: argparse.Namespace) -> int:
    with opened(options) as fleet:
        filters = parse_filters(options.where or (), fleet.settings.groups)
        for name in options.device or ():
            fleet.books.registry.device(name)
        with Desk(fleet.folder, fleet.settings, fleet.books, fleet.clock) as desk:
            desk.listen(options.device, claims=not options.device, telemetry=options.telemetry)
            end = None if options.period is None else fleet.clock.monotonic() + options.period
            watcher = _Watcher(fleet, options, lambda: select(views(fleet.books), options.device or (), filters))
            with Screen(sys.stdout, whole=True) if not options.json else Screen(sys.stderr) as screen:
                watcher.run(desk, screen, end)
    return 0


class _Watcher:
    """Shows what the desk hears. ``chosen`` tells which devices are meant at this moment."""

    def __init__(self, fleet: Opened, options: argparse.Namespace, chosen: Callable[[], list[str]]) -> None:
        self._fleet = fleet
        self._options = options
        self._chosen = chosen
        self._connected = True
        self._connections = 1

    def run(self, desk: Desk, screen: Screen, end: float | None) -> None:
        """Until ``end`` on the clock, or an interruption, which is the ordinary way to end it."""
        clock = self._fleet.clock
        due = 0.0
        missed = desk.sync()
        live = screen.live and not self._options.json
        if not live:
            self._tell(self._present())
            self._tell([event for event in missed if event.kind in _MISSED])
        try:
            while end is None or clock.monotonic() < end:
                left = _POLL_S if end is None else min(_POLL_S, end - clock.monotonic())
                events = self._hear(desk, min(left, _DRAW_S) if live else left)
                if not live:
                    self._tell(events)
                elif (began := clock.monotonic()) >= due:
                    screen.draw(self._picture(desk, screen.size))
                    # A large fleet takes longer to look through: a fifth of the time at most.
                    due = began + max(_DRAW_S, 5 * (clock.monotonic() - began))
        except KeyboardInterrupt:
            if not live:
                raise

    def _hear(self, desk: Desk, timeout_s: float) -> list[Event]:
        """What has come; a broker that does not answer for a while is an event, not the end."""
        try:
            return [*desk.pump(timeout_s), *self._note_connection(desk)]
        except TryLaterError as error:
            return [Event("trouble", "", {"text": str(error)})]

    def _present(self) -> list[Event]:
        """How things are, as events."""
        seen = views(self._fleet.books)
        found = [Event("device", name, row(seen[name])) for name in self._chosen()]
        found += [
            Event("alert", device, {"id": alert, **word.payload})
            for device, alert, word in self._fleet.books.words.alerts()
        ]
        for outcome in self._fleet.books.documents.recent(_MOST_JOBS, unfinished=True):
            document = outcome.document
            said: dict[str, Any] = (
                {} if outcome.said is None else outcome.said.model_dump(mode="json", exclude_none=True)
            )
            data = {"job_id": document.job_id, "op": document.op, **said, "state": outcome.state}
            found.append(Event("job", document.device, data))
        return found

    def _note_connection(self, desk: Desk) -> list[Event]:
        """That the connection was lost or is there again, and then what had come meanwhile."""
        broker = desk.broker
        if (broker.connected, broker.connections) == (self._connected, self._connections):
            return []
        self._connected, self._connections = broker.connected, broker.connections
        told = Event("connection", "", {"connected": self._connected, "broker": broker.where})
        return [told, *desk.sync_again()] if self._connected else [told]

    # -- lines --------------------------------------------------------------------------------------------------------

    def _tell(self, events: Sequence[Event]) -> None:
        if not events or (sys.stdout.isatty() and not self._options.json):
            return
        chosen = set(self._chosen())
        now = iso(self._fleet.clock.now())
        for event in events:
            if event.device and event.device not in chosen:
                continue
            if self._options.json:
                document = {"event": event.kind, "device": event.device or None, "heard": now, **_data(event)}
                print(json.dumps(document, ensure_ascii=True), flush=True)
            else:
                print(f"{now}  {cell(event.device or '-')}  {cell(_line(event))}", flush=True)

    # -- the table ----------------------------------------------------------------------------------------------------

    def _picture(self, desk: Desk, size: tuple[int, int]) -> list[str]:
        seen = views(self._fleet.books)
        chosen = [row(seen[name]) for name in self._chosen()]
        height = size[1] - 1
        lines = [self._headline(desk, chosen)]
        for title, part in (
            ("ALERTS", self._alerts({each["device"] for each in chosen})),
            ("JOBS UNDER WAY", self._jobs({each["device"] for each in chosen})),
        ):
            if part:
                lines += ["", title, *_cut(part, max(3, height // 4))]
        room = max(3, height - len(lines) - 1)
        return [*lines, "", *_cut(_device_lines(chosen), room)]

    def _headline(self, desk: Desk, chosen: Sequence[Mapping[str, Any]]) -> str:
        online = sum(each["online"] is True for each in chosen)
        waiting = len(self._fleet.books.words.announced())
        dropped = sum(each["count"] for each in self._fleet.books.words.dropped())
        parts = [
            f"{self._fleet.settings.tenant}: {online} of {len(chosen)} devices online",
            f"{waiting} ask to be enrolled" if waiting else "",
            f"{dropped} messages not believed" if dropped else "",
            "" if desk.broker.connected else f"NO CONNECTION to {desk.broker.where}",
            iso(self._fleet.clock.now()),
        ]
        return " · ".join(part for part in parts if part)

    def _alerts(self, chosen: set[Any]) -> list[str]:
        return columns(
            [
                (cell(device), cell(word.payload.get("level"), 10), cell(alert, 40), cell(word.payload.get("text")))
                for device, alert, word in self._fleet.books.words.alerts()
                if device in chosen
            ]
        )

    def _jobs(self, chosen: set[Any]) -> list[str]:
        outcomes = [
            outcome
            for outcome in self._fleet.books.documents.recent(_MOST_JOBS, unfinished=True)
            if outcome.document.device in chosen
        ]
        rows = []
        for outcome in outcomes:
            said = outcome.said
            where = "" if said is None else " ".join(part for part in (said.phase, said.step) if part)
            document = outcome.document
            rows.append(
                (
                    cell(document.device),
                    cell(document.op),
                    document.job_id,
                    outcome.state,
                    cell(where),
                    cell(why(outcome)),
                )
            )
        lines = columns(rows)
        return [*lines, tally(outcomes)] if len(lines) > 1 else lines


def _device_lines(chosen: Sequence[Mapping[str, Any]]) -> list[str]:
    """Those that need somebody first."""
    ordered = sorted(
        chosen,
        key=lambda each: (
            not each["alerts"],
            each["health"] in ("healthy", None),
            each["online"] is True,
            each["device"],
        ),
    )
    header = ("DEVICE", "ONLINE", "HEALTH", "BOARD", "AGENT", "HEARD")
    rows = [
        (
            cell(each["device"]),
            cell(each["online"]),
            cell(each["health"], 20),
            cell(each["board"], 36),
            cell(each["agent"], 16),
            each["heard"] or "never",
        )
        for each in ordered
    ]
    return columns([header, *rows])


def _cut(lines: Sequence[str], most: int) -> list[str]:
    if len(lines) <= most:
        return list(lines)
    return [*lines[: most - 1], f"… and {len(lines) - most + 1} more"]


def _data(event: Event) -> dict[str, Any]:
    """What an event says beside its kind and device; the facts of a device are left to ``devices show``."""
    if event.kind == "info":
        return {
            name: event.data[name]
            for name in ("at", "boot_nonce", "agent_version", "profile", "last_seq", "last_generation", "ops")
        }
    return {name: value for name, value in event.data.items() if name not in ("device", "tenant")}


def _line(event: Event) -> str:
    """An event in words."""
    teller = _TELLERS.get(event.kind)
    return teller(event.data) if teller else f"{event.kind} {json.dumps(_data(event), ensure_ascii=True)}"


def _tell_job(data: Mapping[str, Any]) -> str:
    error = data.get("error")
    parts = [data["job_id"], data["op"], data["state"], data.get("phase"), data.get("step")]
    return " ".join(
        ["job", *(str(part) for part in parts if part), f"{error['code']}: {error['text']}" if error else ""]
    )


_ONLINE: Mapping[bool | None, str] = {True: "online", False: "offline", None: "not heard of"}
_TELLERS: Mapping[str, Callable[[Mapping[str, Any]], str]] = {
    "job": _tell_job,
    "status": lambda data: "online" if data["online"] else f"offline {data.get('reason') or ''}".rstrip(),
    "info": lambda data: f"started: agent {data['agent_version']}, profile {data['profile']}",
    "reported": lambda data: f"reports: {data['health']}, config {data['config_state']}, {len(data['models'])} models",
    "alert": lambda data: f"alert {data['id']}{' is over' if data.get('over') else ': ' + str(data.get('text'))}",
    "connection": lambda data: f"{'connected to' if data['connected'] else 'lost'} {data['broker']}",
    "device": lambda data: f"is {_ONLINE[data['online']]}, {data['health'] or 'health unknown'}, {data['board']}",
}
