"""``edge-fleet job``: gives jobs, cancels them, and tells what became of them."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from agent.base.errors import RefusedError, TryLaterError
from agent.base.files import write_atomically
from agent.cli import fleet_job_list
from agent.cli.commands import Commands
from agent.cli.fleet_common import (
    Opened,
    UsageError,
    cell,
    choose_devices,
    confirm,
    duration,
    held_keys,
    manual,
    moment_after,
    opened,
    say,
    signers_for,
)
from agent.cli.fleet_granting import Granting, add_grant_key
from agent.cli.fleet_job_list import print_outcomes
from agent.cli.fleet_keys import read_export
from agent.cli.fleet_operations import arguments_of, job_rows, register_operations
from agent.cli.fleet_screen import Screen, columns
from agent.cli.terminal import EXIT_FAILED, print_json
from agent.fleet.desk import Desk
from agent.fleet.documents import Document, Outcome
from agent.fleet.filters import parse_filters
from agent.fleet.jobs import Command, Office, export_envelopes, require_op
from agent.fleet.keys import signatures_missing
from agent.fleet.overview import job_document, select, tally, views, why
from agent.trust.envelope import Signer
from agent.wire.messages import Window
from agent.wire.ops import Op
from agent.work.jobs import WindowSpec
from agent.work.windows import opening_at

_ABOUT = """\
A job is a durable command: signed, kept by the broker until the device is there, done once, through every restart. Each
device does its jobs in the order in which they were given, but for priorities; those of the rescue lane wait for
nobody. A device holds one new document at a time: while 'edge-fleet watch' or 'job … --wait' runs, and with every
command that talks to the broker, the next ones follow.

An operation of class destroy needs two people: 'job … --export FILE', then 'keys sign FILE', then 'job submit FILE'.
"""
_WAIT_S = 3600.0
#: What is fetched over a slow line must not be given up, and deleted, because of that.
_STEP_S = {"model.install": 12 * 3600.0}
_POLL_S = 1.0


def register(commands: Commands, common: argparse.ArgumentParser) -> None:
    """Add the commands to the parser."""
    job = manual(commands, common, "job", "give devices jobs: OP, list, show, cancel, submit", about=_ABOUT)
    actions = job.add_subparsers(dest="action", metavar="OP|ACTION", required=True)
    register_operations(actions, common, "job", job_rows(), _add_options)
    fleet_job_list.register(actions, common)
    submit = manual(
        actions,
        common,
        "submit",
        "give an exported job that has its signatures",
        examples="  edge-fleet job submit wipe.job --wait\n",
    )
    submit.set_defaults(run=_submit, doing="submit a job")
    submit.add_argument("file", type=Path, metavar="FILE", help="what 'job … --export' wrote and 'keys sign' signed")
    _waiting(submit)


def _waiting(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--wait", action="store_true", help="until it has ended everywhere; 0 only if it succeeded")
    parser.add_argument("--timeout", type=duration, default=_WAIT_S, metavar="TIME", help="… or for so long (1h)")


def _add_options(parser: argparse.ArgumentParser, op: Op) -> None:
    parser.set_defaults(run=_give)
    choose_devices(parser)
    job = parser.add_argument_group("the job")
    job.add_argument("--priority", type=int, choices=range(10), default=5, metavar="0-9", help="9 goes first (5)")
    job.add_argument("--lane", choices=("normal", "rescue"), help=f"which queue (default: {op.lane})")
    job.add_argument("--not-after", metavar="TIME", help="it must begin within 2h, or before 2026-01-31T12:00:00Z")
    job.add_argument("--window", metavar="CRON", help="begin only in windows that open at such times: '0 2 * * *'")
    job.add_argument("--window-for", type=duration, default=3600.0, metavar="TIME", help="how long one is open (1h)")
    job.add_argument("--window-tz", default="UTC", metavar="ZONE", help="time zone of the windows (UTC)")
    step_s = _STEP_S.get(op.name, 3600.0)
    told = f"for one step of it ({step_s / 3600:g}h)"
    job.add_argument("--step-timeout", type=duration, default=step_s, metavar="TIME", help=told)
    job.add_argument("--total-timeout", type=duration, default=86_400.0, metavar="TIME", help="for all of it (1d)")
    job.add_argument("--this-start", action="store_true", help="not if the device has restarted meanwhile")
    job.add_argument("--id", metavar="NAME", help="an id of one's own (default: made of the time)")
    signing = parser.add_argument_group("signing")
    signing.add_argument("--sign", action="append", metavar="KEY", help="sign with this key; may be repeated")
    signing.add_argument("--export", type=Path, metavar="FILE", help="write it for others to sign; nothing is sent")
    job.add_argument(
        "--to-file", type=Path, metavar="FILE", help="write it, to be carried there (job.json); of one --device"
    )
    signing.add_argument("--yes", action="store_true", help="do not ask")
    add_grant_key(parser, op)
    _waiting(parser)


# -- giving -----------------------------------------------------------------------------------------------------------


def _give(options: argparse.Namespace) -> int:
    row = require_op(options.op)
    if not (options.device or options.all or options.where):
        raise UsageError(f"cannot give '{row.name}': say which devices", hint="--device NAME, --where FILTER or --all")
    if options.wait and options.export:
        raise UsageError("cannot wait for an exported job: it is given by 'edge-fleet job submit FILE'")
    if options.to_file and (options.export or options.wait or options.where or len(options.device or ()) != 1):
        raise UsageError("cannot write the job: --to-file takes one --device, and neither --export, --wait nor --where")
    if getattr(options, "grant_key", None) and len(options.device or ()) != 1:
        raise UsageError("cannot seal grants: --grant-key is of one --device")
    with opened(options) as fleet:
        command = _command(options, row, fleet)
        rows, signers = signers_for(fleet, options, [row.kind])
        missing = signatures_missing(rows, row.kind)
        if missing and not options.export:
            raise RefusedError(
                f"cannot give '{row.name}': class {row.kind} needs {missing} more signature of another key",
                hint="add --export FILE; another person: edge-fleet keys sign FILE; then: edge-fleet job submit FILE",
            )
        granting = Granting(fleet, options, command)
        if options.to_file is not None:
            return _carried(fleet, options, command, signers, granting)
        with Desk(fleet.folder, fleet.settings, fleet.books, fleet.clock) as desk:
            fresh = row.kind == "destroy" or command.this_start or granting.is_needed
            devices = _meant(fleet, options, desk, fresh=fresh)
            _agree(options, row, command, devices)
            job_id, documents = _given(fleet, options, command, devices, signers, granting)
            if options.export is not None:
                return _export(options, job_id, documents)
            desk.ring(devices)
            return _end(fleet, options, desk, job_id, devices)


def _given(
    fleet: Opened,
    options: argparse.Namespace,
    command: Command,
    devices: Sequence[str],
    signers: Sequence[Signer],
    granting: Granting,
) -> tuple[str, list[Document]]:
    named = [fleet.books.registry.device(name) for name in devices]
    office = Office(fleet.books, fleet.settings.tenant)
    return office.give(
        command,
        named,
        signers,
        fleet.clock.now(),
        draft=options.export is not None,
        job_id=options.id,
        own=granting.arguments(named),
    )


def _carried(
    fleet: Opened, options: argparse.Namespace, command: Command, signers: Sequence[Signer], granting: Granting
) -> int:
    """Write the document of one device; the broker is not asked."""
    job_id, (document,) = _given(fleet, options, command, options.device, signers, granting)
    write_atomically(options.to_file, document.envelope)
    if options.json:
        print_json({"job": job_id, "file": str(options.to_file), "devices": [document.device]})
    else:
        print(f"wrote job {job_id} for {document.device} to {options.to_file}")
    return 0


def _command(options: argparse.Namespace, row: Op, fleet: Opened) -> Command:
    now = fleet.clock.now()
    return Command(
        op=row.name,
        args=arguments_of(options),
        lane=options.lane,
        priority=options.priority,
        window=_window(options, now),
        not_after=None if options.not_after is None else moment_after(options.not_after, now),
        step_timeout_s=options.step_timeout,
        total_timeout_s=options.total_timeout,
        this_start=options.this_start,
    )


def _window(options: argparse.Namespace, now: datetime) -> Window | None:
    if options.window is None:
        return None
    spec = WindowSpec(options.window, int(options.window_for), options.window_tz)
    opening_at(spec, now)
    return Window(cron=spec.cron, duration_s=spec.duration_s, tz=spec.tz)


def _meant(fleet: Opened, options: argparse.Namespace, desk: Desk, *, fresh: bool) -> list[str]:
    """The devices that are meant. ``fresh``: what they say of themselves must be of now."""
    filters = parse_filters(options.where or (), fleet.settings.groups)
    for name in options.device or ():
        fleet.books.registry.device(name)
    if filters or fresh:
        desk.listen(options.device)
        desk.sync()
    devices = select(views(fleet.books), options.device or (), filters)
    if not devices:
        raise RefusedError(f"cannot give '{options.op}': no device is meant", hint="edge-fleet devices list")
    return devices


def _agree(options: argparse.Namespace, row: Op, command: Command, devices: Sequence[str]) -> None:
    """Ask before something that cannot be taken back, and before many devices change at once."""
    if options.yes or row.kind == "observe" or (row.kind == "change" and len(devices) == 1):
        return
    if row.kind == "change" and not sys.stdin.isatty():
        return
    args = " ".join(f"{name}={value}" for name, value in command.args.items())
    where = devices[0] if len(devices) == 1 else f"{len(devices)} devices"
    confirm(f"Give {row.name} {cell(args)} ({row.kind}) to {where}?", yes=False)


def _export(options: argparse.Namespace, job_id: str, documents: Sequence[Document]) -> int:
    envelopes = [(document.device, document.envelope) for document in documents]
    write_atomically(options.export, json.dumps(export_envelopes(envelopes), indent=1).encode())
    if options.json:
        print_json({"job": job_id, "file": str(options.export), "devices": [name for name, _ in envelopes]})
    else:
        print(f"wrote job {job_id} for {len(envelopes)} device{'s' * (len(envelopes) > 1)} to {options.export}")
        say(
            f"next: another person: edge-fleet keys sign {options.export}; then: edge-fleet job submit {options.export}"
        )
    return 0


def _submit(options: argparse.Namespace) -> int:
    entries = read_export(options.file)
    with opened(options) as fleet:
        keys = [row.key for row in held_keys(fleet.folder, fleet.books) if row.revoked is None]
        with Desk(fleet.folder, fleet.settings, fleet.books, fleet.clock) as desk:
            desk.listen([name for name, _ in entries])
            desk.sync()
            documents = Office(fleet.books, fleet.settings.tenant).submit(entries, keys)
            devices = [document.device for document in documents]
            desk.ring(devices)
            return _end(fleet, options, desk, documents[0].job_id, devices)


# -- waiting ----------------------------------------------------------------------------------------------------------


def _end(fleet: Opened, options: argparse.Namespace, desk: Desk, job_id: str, devices: Sequence[str]) -> int:
    """Say what was given; with ``--wait`` see it through."""
    if not options.wait:
        if options.json:
            print_json({"job": job_id, "devices": list(devices)})
        else:
            print(f"gave job {job_id} to {len(devices)} device{'s' * (len(devices) > 1)}")
        return 0
    if not options.json:
        say(f"job {job_id}")
    outcomes = _wait(fleet, options, desk, job_id)
    if options.json:
        print_json({"job": job_id, "devices": [job_document(outcome) for outcome in outcomes]})
    else:
        print_outcomes(outcomes)
    return 0 if all(outcome.state == "succeeded" for outcome in outcomes) else EXIT_FAILED


def _wait(fleet: Opened, options: argparse.Namespace, desk: Desk, job_id: str) -> list[Outcome]:
    """Until the job is over everywhere, or the time is."""
    deadline = fleet.clock.monotonic() + options.timeout
    told: dict[str, tuple[object, ...]] = {}
    with Screen(sys.stderr) as screen:
        while True:
            outcomes = fleet.books.documents.outcomes(job_id)
            screen.draw(_lines(outcomes, screen.size[1] - 3))
            if not screen.live and not options.json:
                _tell_changes(outcomes, told)
            left = deadline - fleet.clock.monotonic()
            if left <= 0 or all(outcome.over for outcome in outcomes):
                screen.draw([])
                return outcomes
            try:
                desk.pump(min(left, _POLL_S))
            except TryLaterError as error:
                say(f"warning: {error}")


def _lines(outcomes: Sequence[Outcome], most: int) -> list[str]:
    """Who is under way first; what does not fit is counted."""
    ordered = sorted(outcomes, key=lambda outcome: (outcome.over, outcome.document.device))
    lines = columns([_short(outcome) for outcome in ordered[: max(1, most)]])
    if len(ordered) > len(lines):
        lines.append(f"… and {len(ordered) - len(lines)} more")
    return [*lines, tally(outcomes)]


def _short(outcome: Outcome) -> tuple[str, ...]:
    said = outcome.said
    phase = "" if said is None else " ".join(part for part in (said.phase, said.step) if part)
    attempt = f"attempt {said.attempt}" if said is not None and said.attempt > 1 else ""
    return cell(outcome.document.device), outcome.state, cell(phase), attempt, cell(why(outcome), 100)


def _tell_changes(outcomes: Sequence[Outcome], told: dict[str, tuple[object, ...]]) -> None:
    """One line on stderr for each device whose job has moved."""
    for outcome in outcomes:
        short = _short(outcome)
        if told.get(short[0]) != short:
            told[short[0]] = short
            say("  ".join(part for part in short if part))
