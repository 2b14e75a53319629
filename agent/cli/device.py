"""``edge-agent``: the device's command line.

Options for paths may stand before or after the command. Exit status 0, 1 for a failure (``error: …`` on stderr), 2 for
wrong usage. Each command imports what it needs when it runs: ``detect`` must not pay for an inference runtime.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence

import agent.base.lean  # noqa: F401 - before whatever brings pydantic in
from agent import __version__
from agent.base.errors import AgentError
from agent.base.paths import Paths, resolve_paths
from agent.cli import (
    admin_commands,
    deliver_command,
    fleet_commands,
    infer_command,
    local_commands,
    model_commands,
    seal_command,
    units_command,
)
from agent.cli.terminal import EXIT_FAILED, EXIT_INTERRUPTED, print_error

_EPILOG = """\
Paths: --config (EDGE_AGENT_CONFIG, /etc/edge-agent/config.toml), --state-dir (EDGE_AGENT_STATE_DIR,
/var/lib/edge-agent), --run-dir (EDGE_AGENT_RUN_DIR, /run/edge-agent).
"""


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    common = _common()
    top = argparse.ArgumentParser(
        prog="edge-agent",
        description="Detects what this device can do, chooses model variants by measuring, serves them locally.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[common],
    )
    top.add_argument("--version", action="version", version=f"edge-agent {__version__}")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    local_commands.register(commands, common)
    units_command.register(commands, common)
    seal_command.register(commands, common)
    model_commands.register(commands, common)
    infer_command.register(commands, common)
    admin_commands.register(commands, common)
    fleet_commands.register(commands, common)
    deliver_command.register(commands, common)
    return top


def _common() -> argparse.ArgumentParser:
    """Options of every command. SUPPRESS keeps a value given before the command from being reset after it."""
    common = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    group = common.add_argument_group("common options")
    group.add_argument("--config", metavar="FILE", help="configuration file")
    group.add_argument("--state-dir", metavar="DIR", help="where models, keys and catalog are kept")
    group.add_argument("--run-dir", metavar="DIR", help="where the sockets are")
    group.add_argument("--json", action="store_true", help="print JSON")
    return common


def paths_of(arguments: argparse.Namespace) -> Paths:
    """Where the files are, by flag, environment, default."""
    return resolve_paths(
        os.environ,
        config=getattr(arguments, "config", None),
        state_dir=getattr(arguments, "state_dir", None),
        run_dir=getattr(arguments, "run_dir", None),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    arguments = parser().parse_args(argv)
    arguments.json = getattr(arguments, "json", False)
    try:
        status: int = arguments.action(arguments, paths_of(arguments))
        sys.stdout.flush()
    except AgentError as error:
        print_error(error)
        return EXIT_FAILED
    except BrokenPipeError:  # the reader of our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except OSError as error:
        what = f"open {error.filename}" if error.filename else f"run '{arguments.command}'"
        print_error(f"cannot {what}: {error.strerror or error}")
        return EXIT_FAILED
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    return status


if __name__ == "__main__":
    sys.exit(main())
