"""One command for each operation of the table, below ``edge-fleet job`` and ``edge-fleet rpc``."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from agent.cli.commands import Commands
from agent.cli.fleet_common import UsageError, manual, read_json
from agent.fleet.arguments import USAGE, Usage, describe_arguments, parse_arguments
from agent.wire.ops import OPS, SIGNATURES, Op


def register_operations(
    commands: Commands,
    common: argparse.ArgumentParser,
    verb: str,
    rows: list[Op],
    add_options: Callable[[argparse.ArgumentParser, Op], None],
) -> None:
    """A command for each of ``rows``, with the arguments that all have: ``key=value`` words and ``--args``."""
    for op in rows:
        text = USAGE.get(op.name, Usage("")).text
        command = manual(commands, common, op.name, text, about=_about(op, verb), examples=_examples(op, verb))
        command.set_defaults(op=op.name, doing=f"{verb} {op.name}")
        command.add_argument("arguments", metavar="KEY=VALUE", nargs="*", help=describe_arguments(op.name))
        command.add_argument(
            "--args", metavar="JSON|@FILE", help="arguments as one JSON object, or a .json or .toml file"
        )
        add_options(command, op)


def _about(op: Op, verb: str) -> str:
    signatures = SIGNATURES[op.kind]
    people = "two signatures, for the present start of the device alone" if signatures > 1 else "one signature"
    lane = " Never waits behind other jobs." if op.lane == "rescue" and verb == "job" else ""
    return f"Class {op.kind}: {people}.{lane} {describe_arguments(op.name)}."


def _examples(op: Op, verb: str) -> str:
    usage = USAGE.get(op.name, Usage(""))
    words = " ".join(f"{name}={_SAMPLES.get(name, 'VALUE')}" for name in usage.needs)
    base = f"edge-fleet {verb} {op.name}{' ' + words if words else ''}"
    if verb == "rpc":
        return f"  {base} --device door-cam-7\n"
    if SIGNATURES[op.kind] > 1:
        return f"  {base} --device door-cam-7 --export wipe.job\n  edge-fleet job submit wipe.job --wait\n"
    return f"  {base} --device door-cam-7 --wait\n  {base} --where 'board=Raspberry Pi*' --not-after 2d\n"


_SAMPLES = {"model": "digits", "version": "2.0.0", "run": "scrub,sweep", "config": "@night.toml"}


def arguments_of(options: argparse.Namespace) -> dict[str, object]:
    """The arguments of the operation, as they were given. PeerError, UsageError."""
    given: dict[str, object] = {}
    if options.args is not None:
        document = read_json(options.args)
        if not isinstance(document, dict):
            raise UsageError("cannot read --args: it is no JSON object")
        given = document
    words = []
    for word in options.arguments:
        name, equals, value = word.partition("=")
        if equals and value.startswith("@"):
            given[name] = read_json(value)
        else:
            words.append(word)
    return parse_arguments(options.op, words, given)


def job_rows() -> list[Op]:
    """The operations that may be jobs."""
    return [op for op in OPS.values() if op.job]


def question_rows() -> list[Op]:
    """The operations that may be asked."""
    return [op for op in OPS.values() if op.rpc]
