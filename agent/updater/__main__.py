"""The program: ``python -I -m agent.updater``, started by edge-agent-update.service as root."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from agent import __version__
from agent.base import config as configuration
from agent.base.errors import AgentError, ConfigError
from agent.base.files import exclusive_lock
from agent.trust.releases import STATE_FORMAT, this_kind
from agent.updater.ground import Ground
from agent.updater.services import Image, Installer, Services, Systemd
from agent.updater.updating import Present, Updater


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what is to be done; the exit status."""
    parser = argparse.ArgumentParser(prog="agent.updater", description="Root's part of an update of the agent.")
    parser.add_argument(
        "--root", type=Path, default=Path("/"), metavar="DIR", help="a root folder in which nothing runs"
    )
    parser.add_argument("--installer", type=Path, metavar="FILE", help="the installer (default: the one beside this)")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    ground = Ground(options.root.absolute())
    live = ground.root == Path("/")
    services: Services = Systemd(ground) if live else Image(ground)
    script = options.installer or Path(sys.prefix, "share/edge-agent/install.sh")
    try:
        ground.prepare()
        with exclusive_lock(ground.own / "lock"):
            present = Present(__version__, this_kind(), STATE_FORMAT)
            updater = Updater(ground, Installer(script, ground), services, present, within_s=_within_s(ground))
            updater.run()
    except (AgentError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201 - a program of its own
        return 1
    return 0


def _within_s(ground: Ground) -> float:
    """How long core has to confirm; a configuration that cannot be read must not stand in the way of going back."""
    try:
        return configuration.load(ground.trust_file.with_name("config.toml"), explicit=False).update.within_s
    except ConfigError:
        return configuration.Config().update.within_s


if __name__ == "__main__":
    raise SystemExit(main())
