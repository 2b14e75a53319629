"""``edge-fleet rpc``: asks a device that is online, and prints its answer."""

from __future__ import annotations

import argparse
import base64
import binascii
import secrets
from pathlib import Path
from typing import Any

from agent.base.errors import PeerError
from agent.base.files import write_atomically
from agent.cli.commands import Commands
from agent.cli.fleet_common import cell, duration, manual, opened, say, signers_for, table
from agent.cli.fleet_operations import arguments_of, question_rows, register_operations
from agent.cli.terminal import EXIT_FAILED, megabytes, print_json
from agent.fleet.asking import Answer, Asker, require_question
from agent.fleet.broker import Broker
from agent.wire.ops import Op

_ABOUT = """\
A question is for a device that is online: it is answered now or not at all, and nothing waits for it. What comes back
was signed by the device. A device that is not there is told at once, with exit status 1.
"""
_TIMEOUT_S = 10.0


def register(commands: Commands, common: argparse.ArgumentParser) -> None:
    """Add the commands to the parser."""
    rpc = manual(commands, common, "rpc", "ask a device that is online", about=_ABOUT)
    actions = rpc.add_subparsers(dest="action", metavar="OP", required=True)
    register_operations(actions, common, "rpc", question_rows(), _add_options)


def _add_options(parser: argparse.ArgumentParser, op: Op) -> None:
    parser.set_defaults(run=_ask, out=None)
    parser.add_argument("--device", "-d", required=True, metavar="NAME", help="the device")
    parser.add_argument("--timeout", type=duration, default=_TIMEOUT_S, metavar="TIME", help="wait so long (10s)")
    parser.add_argument("--sign", action="append", metavar="KEY", help="sign with this key; may be repeated")
    if op.name == "diagnostics.collect":
        parser.add_argument("-o", "--out", type=Path, metavar="FILE", help="write the archive (.tar.gz) there")


def _ask(options: argparse.Namespace) -> int:
    row = require_question(options.op)
    args = arguments_of(options)
    with opened(options) as fleet:
        device = fleet.books.registry.device(options.device)
        _, signers = signers_for(fleet, options, [row.kind])
        # A session of its own: questions leave nothing behind, and job states belong to the desk's.
        client_id = f"{fleet.settings.tenant}/@ops/{secrets.token_hex(8)}"
        with Broker(fleet.folder, fleet.settings.broker, client_id) as broker:
            asker = Asker(broker, fleet.books, fleet.settings.tenant, fleet.clock)
            answer = asker.ask(device, row.name, args, signers, options.timeout)
    return _tell(options, answer)


def _tell(options: argparse.Namespace, answer: Answer) -> int:
    error = answer.message.error
    result: dict[str, Any] = dict(answer.message.result or {})
    if options.out is not None and error is None:
        _save(options.out, result)
    if options.json:
        print_json(
            {
                "device": options.device,
                "op": options.op,
                "took_s": round(answer.took_s, 4),
                "result": None if error else result,
                "error": None if error is None else error.model_dump(),
            }
        )
    elif error is not None:
        raise PeerError(f"cannot {options.op} on '{options.device}': {error.code}: {error.text}", hint=error.hint)
    else:
        _print(options, answer, result)
    return 0 if error is None else EXIT_FAILED


def _print(options: argparse.Namespace, answer: Answer, result: dict[str, Any]) -> None:
    lines = result.get("lines")
    if options.op == "ping":
        print(f"{options.device} answers after {answer.took_s * 1000:.0f} ms")
    elif isinstance(lines, list):
        for line in lines:
            print(cell(line, 2000))
    elif options.op == "jobs.list" and isinstance(result.get("jobs"), list):
        _print_jobs(result["jobs"])
    elif "archive" in result:
        print(f"{len(result.get('files') or ())} files: {cell(', '.join(map(str, result.get('files') or ())))}")
        if options.out is None:
            say("--out FILE keeps them")
    else:
        print_json(result)


def _print_jobs(jobs: list[Any]) -> None:
    names = ("job_id", "op", "state", "phase", "step", "attempt", "at")
    rows = [[job.get(name) for name in names] for job in jobs if isinstance(job, dict)]
    table(("JOB", "OP", "STATE", "PHASE", "STEP", "STARTS", "SAID"), rows)


def _save(path: Path, result: dict[str, Any]) -> None:
    """The archive of an answer, taken out of it. PeerError when there is none, OSError."""
    try:
        data = base64.b64decode(str(result["archive"]), validate=True)
    except (KeyError, binascii.Error) as error:
        raise PeerError("cannot keep the archive: the device sent none") from error
    write_atomically(path, data)
    result["archive"] = str(path)
    say(f"wrote {path} ({megabytes(len(data))})")
