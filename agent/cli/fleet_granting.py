"""What ``edge-fleet job model.install`` adds by itself: the keys of a published version, sealed to each device."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from agent.cli.fleet_common import Opened, passwords_of
from agent.cli.fleet_repository import require_tuf
from agent.fleet.jobs import Command
from agent.fleet.registry import Device
from agent.wire.ops import Op

_OP = "model.install"


def add_grant_key(parser: argparse.ArgumentParser, op: Op) -> None:
    """The option of the operation that brings grants."""
    if op.name == _OP:
        parser.add_argument(
            "--grant-key", metavar="AGE1", help="of one device that was never online: 'edge-agent status' shows it"
        )


class Granting:
    """For one command. A version that was never published here is on the device already, or nowhere: no grants."""

    def __init__(self, fleet: Opened, options: argparse.Namespace, command: Command) -> None:
        self._fleet = fleet
        self._options = options
        self._name, self._version = (str(command.args.get(key)) for key in ("model", "version"))
        self.is_needed = (
            command.op == _OP
            and "grants" not in command.args
            and fleet.books.releases.find(self._name, self._version) is not None
        )

    def arguments(self, devices: Sequence[Device]) -> Mapping[str, Mapping[str, Any]]:
        """Further arguments by device. RefusedError where one of them gets no keys, DamagedError."""
        if not self.is_needed:
            return {}
        require_tuf()
        from agent.fleet.granting import install_arguments  # noqa: PLC0415 - brings in tuf
        from agent.fleet.roles import open_identity  # noqa: PLC0415 - brings in tuf

        identity = open_identity(self._fleet.folder, passwords_of(self._options))
        return {
            device.name: install_arguments(
                self._fleet.books, identity, self._name, self._version, device, self._options.grant_key
            )
            for device in devices
        }
