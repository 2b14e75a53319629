"""``edge-agent link``: one process around ``Link``; logging, signals, the service manager.

Nothing here may import pydantic, numpy or cryptography: the process stays small.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import signal
import sys
from pathlib import Path

from agent.base.errors import ConfigError
from agent.base.files import exclusive_lock, require_own
from agent.base.systemd import Handover, Notifier
from agent.link.backoff import Draw
from agent.link.core_client import CoreClient
from agent.link.link import Link

_LOG = logging.getLogger("edge_agent.link")

#: How often the watchdog is fed where the service manager does not say; also how often the status line is renewed.
_FEED_S = 20.0


def run_link(admin_socket: Path, state_dir: Path, handover: Handover, *, draw: Draw = random.uniform) -> None:
    """Run until SIGTERM or SIGINT. ConfigError for a folder that cannot be used, ConflictError where a link runs.

    ``draw`` draws the pauses before attempts to connect.
    """
    _set_up_logging(journal="JOURNAL_STREAM" in os.environ)
    try:
        state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        require_own(state_dir)
    except OSError as error:
        raise ConfigError(
            f"cannot use {state_dir}: {error.strerror}", hint="choose a folder with --state-dir"
        ) from error
    with exclusive_lock(state_dir / ".lock"):
        asyncio.run(_serve(admin_socket, state_dir, handover, draw))


async def _serve(admin_socket: Path, state_dir: Path, handover: Handover, draw: Draw) -> None:
    core = CoreClient(admin_socket)
    notifier = Notifier(handover.notify_address)
    link = Link(core, state_dir, draw=draw)
    loop = asyncio.get_running_loop()

    def stop() -> None:
        notifier.stopping("saying goodbye")
        link.stop()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    feeder = loop.create_task(_feed(link, notifier, handover.watchdog_s))
    try:
        await link.run()
    finally:
        feeder.cancel()
        core.close()
    _LOG.info("stopped")


async def _feed(link: Link, notifier: Notifier, watchdog_s: float | None) -> None:
    """Ready at once: a device must come up without broker and core. Then the watchdog, while every part gets on."""
    notifier.ready(link.summary)
    said = ""
    while True:
        overdue = link.progress.overdue()
        if overdue:
            _LOG.error("no progress: %s", ", ".join(overdue))
        else:
            notifier.alive()
        if link.summary != said:
            said = link.summary
            notifier.status(said)
        await asyncio.sleep((watchdog_s or 3 * _FEED_S) / 3)


class _Journal(logging.Formatter):
    """sd-daemon(3): a prefix that journald turns into the priority."""

    def format(self, record: logging.LogRecord) -> str:
        priority = 3 if record.levelno >= logging.ERROR else 4 if record.levelno >= logging.WARNING else 6
        return "\n".join(f"<{priority}>{line}" for line in super().format(record).splitlines())


def _set_up_logging(*, journal: bool) -> None:
    """To stderr, unless whoever runs this has set up logging already."""
    if logging.getLogger().handlers:
        return
    handler = logging.StreamHandler(sys.stderr)
    plain = logging.Formatter("%(asctime)s %(levelname).1s %(name)s: %(message)s", "%H:%M:%S")
    handler.setFormatter(_Journal("%(message)s") if journal else plain)
    logging.basicConfig(level=logging.INFO, handlers=[handler])
