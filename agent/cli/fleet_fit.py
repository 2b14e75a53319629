"""``edge-fleet fit``: which devices can run a bundle, and why not."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agent.base.errors import RefusedError
from agent.cli.commands import Commands
from agent.cli.fleet_common import manual, opened, table
from agent.cli.fleet_devices import chosen_devices, which_devices
from agent.cli.terminal import EXIT_FAILED, print_json

if TYPE_CHECKING:
    from agent.bundles.manifest import Manifest
    from agent.fleet.fit import Fit

_ABOUT = """\
Goes by what each device said of itself when it was last online: its facts, its profile, its runtimes. The rules are the
device's own; what is free in memory may have changed since. Exit status 1 when no device can.
"""
_EXAMPLES = """\
  edge-fleet fit digits-2.0.0.edgemodel
  edge-fleet fit detector.onnx --where arch=aarch64 --json
"""


def register(commands: Commands, common: argparse.ArgumentParser) -> None:
    """Add the command to the parser."""
    fit = manual(
        commands, common, "fit", "which devices can run a bundle, and why not?", about=_ABOUT, examples=_EXAMPLES
    )
    fit.set_defaults(run=_fit, doing="judge what fits")
    fit.add_argument("bundle", type=Path, metavar="BUNDLE", help=".edgemodel, folder with a model.json, .onnx, .tflite")
    which_devices(fit)


def _fit(options: argparse.Namespace) -> int:
    from agent.cli.local_commands import read_manifest  # noqa: PLC0415 - readers of model files, for this command alone
    from agent.fleet.fit import fit  # noqa: PLC0415

    manifest = read_manifest(options.bundle)
    with opened(options) as fleet:
        chosen = chosen_devices(fleet, options)
    if not chosen:
        raise RefusedError("cannot judge what fits: no device is meant", hint="edge-fleet devices list")
    found = [fit(manifest, name, view["info"]) for name, view in chosen.items()]
    if options.json:
        print_json(_document(manifest, found, chosen))
    else:
        _print(manifest, found)
    return 0 if any(each.runs for each in found) else EXIT_FAILED


def _document(manifest: Manifest, found: Sequence[Fit], chosen: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    return {
        "model": manifest.name,
        "version": manifest.version,
        "devices": [
            {
                "device": each.device,
                "runs": each.runs,
                "best": each.best or None,
                "as_of": (chosen[each.device]["info"] or {}).get("at"),
                "reasons": each.reasons(),
                "explanation": each.explanation,
            }
            for each in found
        ],
    }


def _print(manifest: Manifest, found: Sequence[Fit]) -> None:
    able = sum(each.runs for each in found)
    print(f"{manifest.name} {manifest.version}: {able} of {len(found)} devices can run it")
    rows: list[tuple[object, ...]] = []
    for each in sorted(found, key=lambda each: (not each.runs, each.device)):
        first, *others = each.reasons() or [""]
        rows.append((each.device, "can run" if each.runs else "cannot", each.best, first))
        rows += [("", "", "", reason) for reason in others]
    table(("DEVICE", "", "FIRST CHOICE", "WHAT CANNOT, AND WHY"), rows)
