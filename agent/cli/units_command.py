"""``edge-agent units``: the drop-in that gives core what this machine's accelerators need."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from agent.base.errors import PeerError
from agent.base.paths import Paths
from agent.cli.commands import Commands, add_command
from agent.cli.terminal import print_json

if TYPE_CHECKING:
    from agent.hardware.dropin import Allowance


def register(commands: Commands, common: argparse.ArgumentParser) -> None:
    """Add the command to the parser."""
    units = add_command(commands, common, "units", "the systemd drop-in for this device: accelerators and memory")
    units.add_argument("--root", type=Path, metavar="DIR", help="for a recorded machine, from files below DIR")
    units.set_defaults(action=_units)


def look(paths: Paths, root: Path | None = None) -> Allowance:
    """What the machine's accelerators need, by detection. PeerError for a root that is none."""
    from agent.hardware.dropin import allowance  # noqa: PLC0415 - the other commands do not pay for it
    from agent.hardware.probe import probe  # noqa: PLC0415
    from agent.hardware.profiles import choose_profile, load_profiles, shipped_profiles_dir  # noqa: PLC0415
    from agent.hardware.tree import Tree  # noqa: PLC0415

    if root is not None and not root.is_dir():
        raise PeerError(f"cannot detect below {root}: no such folder")
    facts = probe(root)
    profiles, _ = load_profiles([shipped_profiles_dir(), paths.user_profiles])
    return allowance(facts, choose_profile(facts, profiles), Tree(root))


def _units(arguments: argparse.Namespace, paths: Paths) -> int:
    from agent.hardware.dropin import dropin  # noqa: PLC0415 - as above

    allowed = look(paths, arguments.root)
    if arguments.json:
        print_json({**asdict(allowed), "dropin": dropin(allowed)})
    else:
        print(dropin(allowed), end="")
    return 0
