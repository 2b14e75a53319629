"""``edge-fleet``: the operator's command line. Parses, calls, prints; exit status 1 for errors, 2 for usage.

Each group of commands has a module of its own and imports what it needs when it runs: packing needs quantizers, the
rest must not pay for them.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import agent.base.lean  # noqa: F401 - before whatever brings pydantic in
from agent import __version__
from agent.base.errors import AgentError
from agent.cli import (
    fleet_approve,
    fleet_blocks,
    fleet_desired,
    fleet_devices,
    fleet_export,
    fleet_fit,
    fleet_init,
    fleet_jobs,
    fleet_keys,
    fleet_pack,
    fleet_release,
    fleet_repository,
    fleet_rpc,
    fleet_watch,
)
from agent.cli.fleet_common import UsageError
from agent.cli.terminal import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_USAGE, print_error

_ABOUT = """\
Packs and publishes models for devices that run edge-agent, enrols devices, gives them signed jobs, asks them
questions and watches them.

What a fleet is made of lives in one folder: --fleet DIR, else EDGE_FLEET_DIR, else
~/.config/edge-fleet. Private keys in it have a password, which is asked for at a terminal, or
comes from --password-file or EDGE_FLEET_PASSWORD.
"""
_EPILOG = """\
examples:
  edge-fleet init --tenant acme --broker mqtt.acme.example
  edge-fleet approve door-cam-7 --keyid 3f9a
  edge-fleet job model.activate model=digits version=2.0.0 --where 'board=Raspberry Pi*' --wait
  edge-fleet rpc status --device door-cam-7
  edge-fleet watch

exit status: 0 done; 1 failed, with 'error: …' on stderr; 2 wrong usage; 130 interrupted
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit status."""
    options = parser().parse_args(arguments)
    options.json = getattr(options, "json", False)
    options.typed = list(sys.argv[1:] if arguments is None else arguments)
    try:
        status = int(options.run(options))
        sys.stdout.flush()
    except UsageError as error:
        print_error(error)
        return EXIT_USAGE
    except AgentError as error:
        print_error(error)
        return EXIT_FAILED
    except BrokenPipeError:  # the reader of our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        print_error(f"cannot {options.doing}: {error.strerror or error}{where}")
        return EXIT_FAILED
    except KeyboardInterrupt:
        print_error("interrupted")
        return EXIT_INTERRUPTED
    return status


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    output = _output()
    common = _common(output)
    top = argparse.ArgumentParser(
        prog="edge-fleet",
        description=_ABOUT,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[common],
    )
    top.add_argument("--version", action="version", version=f"edge-fleet {__version__}")
    commands = top.add_subparsers(title="commands", required=True, metavar="COMMAND")
    fleet_init.register(commands, common)
    fleet_keys.register(commands, common)
    fleet_devices.register(commands, common)
    fleet_approve.register(commands, common)
    fleet_fit.register(commands, common)
    fleet_jobs.register(commands, common)
    fleet_rpc.register(commands, common)
    fleet_desired.register(commands, common)
    fleet_watch.register(commands, common)
    fleet_pack.register(commands, output)
    fleet_repository.register(commands, common)
    fleet_release.register(commands, common)
    fleet_blocks.register(commands, common)
    fleet_export.register(commands, common)
    return top


def _output() -> argparse.ArgumentParser:
    """SUPPRESS keeps a value given before the command from being reset after it."""
    output = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    output.add_argument("--json", action="store_true", help="print JSON")
    return output


def _common(output: argparse.ArgumentParser) -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS, parents=[output])
    group = common.add_argument_group("common options")
    group.add_argument("--fleet", metavar="DIR", help="the fleet's folder")
    group.add_argument("--password-file", type=Path, metavar="FILE", help="its first line opens the private keys")
    return common


if __name__ == "__main__":
    raise SystemExit(main())
