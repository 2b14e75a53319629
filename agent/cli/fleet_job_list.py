"""``edge-fleet job list | show | cancel``: what became of jobs, and how one is taken back."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from agent.base.errors import PeerError
from agent.cli.commands import Commands
from agent.cli.fleet_common import UsageError, cell, manual, opened, say, signers_for, table
from agent.cli.fleet_devices import refresh
from agent.cli.terminal import print_json
from agent.fleet.desk import Desk
from agent.fleet.documents import Document, Outcome
from agent.fleet.jobs import Office
from agent.fleet.overview import job_document, tally, why
from agent.wire.ops import OPS

_CANCEL = """\
A job that no device can have seen is taken back. Else the device is told: one that has not begun does not, one that has
stops at its next safe point and undoes what it did.
"""


def register(actions: Commands, common: argparse.ArgumentParser) -> None:
    """Add the commands to the parser of jobs."""
    listing = manual(
        actions,
        common,
        "list",
        "the last jobs, newest first",
        examples="  edge-fleet job list\n  edge-fleet job list --unfinished --device door-cam-7\n",
    )
    listing.set_defaults(run=_list, doing="list jobs")
    listing.add_argument("--unfinished", action="store_true", help="only those that have not ended")
    listing.add_argument("--device", "-d", metavar="NAME", help="only those of this device")
    listing.add_argument("--last", type=int, default=50, metavar="N", help="at most so many (50)")
    _offline(listing)
    show = manual(
        actions,
        common,
        "show",
        "what became of a job on each device",
        examples="  edge-fleet job show 20260131-1200-3f9a2c\n",
    )
    show.set_defaults(run=_show, doing="show a job")
    show.add_argument("job", metavar="JOB", help="its id")
    _offline(show)
    cancel = manual(
        actions,
        common,
        "cancel",
        "take a job back, or stop it at its next safe point",
        about=_CANCEL,
        examples="  edge-fleet job cancel 20260131-1200-3f9a2c\n",
    )
    cancel.set_defaults(run=_cancel, doing="cancel a job")
    cancel.add_argument("job", metavar="JOB", help="its id")
    cancel.add_argument("--device", "-d", action="append", metavar="NAME", help="only on this one; may be repeated")
    cancel.add_argument("--sign", action="append", metavar="KEY", help="sign with this key; may be repeated")


def _offline(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--offline", action="store_true", help="do not ask the broker: what was heard last")


def _list(options: argparse.Namespace) -> int:
    if options.last < 1:
        raise UsageError("cannot list jobs: --last must be at least 1")
    with opened(options) as fleet:
        if options.device is not None:
            fleet.books.registry.device(options.device)
        refresh(fleet, options, ())
        outcomes = fleet.books.documents.recent(device=options.device, unfinished=options.unfinished, most=options.last)
    by_job: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        by_job.setdefault(outcome.document.job_id, []).append(outcome)
    if options.json:
        print_json({"jobs": [_job_summary(job_id, each) for job_id, each in by_job.items()]})
        return 0
    table(
        ("JOB", "OP", "GIVEN", "DEVICES", "STATE"),
        [
            (
                job_id,
                _what(each[0].document),
                each[0].document.given,
                each[0].document.device if len(each) == 1 else len(each),
                tally(each),
            )
            for job_id, each in by_job.items()
        ],
    )
    return 0


def _job_summary(job_id: str, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    first = outcomes[0].document
    return {
        "job": job_id,
        "op": first.op,
        "class": first.kind,
        "args": dict(first.args),
        "given": first.given,
        "devices": {outcome.document.device: outcome.state for outcome in outcomes},
    }


def _what(document: Document) -> str:
    if document.cancels:
        return f"cancels {', '.join(document.cancels)}"
    args = " ".join(f"{name}={value}" for name, value in document.args.items())
    return f"{document.op} {args}".rstrip()


def _show(options: argparse.Namespace) -> int:
    with opened(options) as fleet:
        fleet.books.documents.outcomes(options.job)
        refresh(fleet, options, ())
        outcomes = fleet.books.documents.outcomes(options.job)
    if options.json:
        print_json({"job": options.job, "devices": [job_document(outcome) for outcome in outcomes]})
        return 0
    first = outcomes[0].document
    print(f"{options.job}: {cell(_what(first))}, class {first.kind}, given {first.given}")
    print_outcomes(outcomes)
    return 0


def print_outcomes(outcomes: Sequence[Outcome]) -> None:
    """A table, and the result of a single device as it is."""
    rows = []
    for outcome in outcomes:
        said = outcome.said
        rows.append(
            (
                outcome.document.device,
                outcome.state,
                "" if said is None else " ".join(part for part in (said.phase, said.step) if part),
                "" if said is None else said.attempt,
                "" if said is None else said.at,
                why(outcome),
            )
        )
    table(("DEVICE", "STATE", "WHERE", "STARTS", "SAID", "WHY"), rows, right=(3,))
    hint = next(
        (each.said.error.hint for each in outcomes if each.said and each.said.error and each.said.error.hint), ""
    )
    if hint:
        say(f"hint: {cell(hint)}")
    if len(outcomes) == 1 and outcomes[0].said is not None and outcomes[0].said.result:
        print_json(outcomes[0].said.result)


def _cancel(options: argparse.Namespace) -> int:
    with opened(options) as fleet:
        fleet.books.documents.outcomes(options.job)
        _, signers = signers_for(fleet, options, ["change", OPS["ping"].kind])
        with Desk(fleet.folder, fleet.settings, fleet.books, fleet.clock) as desk:
            desk.sync()
            done = Office(fleet.books, fleet.settings.tenant).cancel(
                options.job, options.device or (), signers, fleet.clock.now()
            )
            desk.ring([each.device for each in done])
    if options.json:
        print_json({"job": options.job, "devices": {each.device: each.result for each in done}})
        return 0
    words = {"withdrawn": "taken back before it was sent", "asked": "told to cancel it", "over": "had ended already"}
    table(("DEVICE", ""), [(each.device, words[each.result]) for each in done])
    if all(each.result == "over" for each in done):
        raise PeerError(f"cannot cancel job {options.job}: it has ended")
    return 0
