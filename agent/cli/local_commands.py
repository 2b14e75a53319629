"""Commands that need no running core: detect, core, link, run, config, models check."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agent.base.errors import PeerError
from agent.base.paths import Paths
from agent.base.systemd import take_environment
from agent.cli.commands import Commands, add_command
from agent.cli.terminal import EXIT_FAILED, print_json

if TYPE_CHECKING:
    from agent.base.config import Config
    from agent.bundles.manifest import Manifest


def register(commands: Commands, common: argparse.ArgumentParser) -> None:
    """Add the commands to the parser."""

    detect = add_command(commands, common, "detect", "what this device is and can do")
    detect.add_argument("--root", type=Path, metavar="DIR", help="read the files of a recorded machine below DIR")
    detect.set_defaults(action=_detect)
    for name, text, action in (
        ("core", "run the daemon in the foreground (what the systemd unit starts)", _core),
        ("link", "run the connection to the fleet in the foreground (what its systemd unit starts)", _link),
        ("run", "run both in the foreground, without systemd", _run),
    ):
        add_command(commands, common, name, text).set_defaults(action=action)
    config = add_command(commands, common, "config", "show or check the configuration")
    actions = config.add_subparsers(dest="config_command", metavar="show|check", required=True)
    add_command(actions, common, "show", "every key with the value in force").set_defaults(action=_show)
    add_command(actions, common, "check", "is the file right?").set_defaults(action=_check)


def load_config(paths: Paths) -> Config:
    """The configuration in force."""
    from agent.base import config as configuration  # noqa: PLC0415 - brings pydantic in, which not every command needs

    return configuration.load(paths.config, explicit=paths.config_explicit)


def _core(arguments: argparse.Namespace, paths: Paths) -> int:
    handover = take_environment()
    config = load_config(paths)
    from agent.core.daemon import run_core  # noqa: PLC0415 - the other commands do not pay for it

    run_core(paths, config, handover)
    return 0


def _link(arguments: argparse.Namespace, paths: Paths) -> int:
    from agent.link.main import run_link  # noqa: PLC0415 - the other commands do not pay for it

    run_link(paths.admin_socket, paths.link_dir, take_environment())
    return 0


def _run(arguments: argparse.Namespace, paths: Paths) -> int:
    from agent.cli.supervise import supervise  # noqa: PLC0415 - as above

    load_config(paths)
    options = ["--state-dir", str(paths.state_dir), "--run-dir", str(paths.run_dir)]
    if paths.config_explicit:
        options += ["--config", str(paths.config)]
    return supervise(paths, options)


def _detect(arguments: argparse.Namespace, paths: Paths) -> int:
    from agent.hardware.document import describe, document  # noqa: PLC0415 - as above
    from agent.hardware.probe import probe  # noqa: PLC0415
    from agent.hardware.profiles import choose_profile, load_profiles, shipped_profiles_dir  # noqa: PLC0415

    if arguments.root is not None and not arguments.root.is_dir():
        raise PeerError(f"cannot detect below {arguments.root}: no such folder")
    facts = probe(arguments.root)
    profiles, problems = load_profiles([shipped_profiles_dir(), paths.user_profiles])
    found = document(facts, choose_profile(facts, profiles), problems)
    if arguments.root is None:
        found["runtimes"] = _runtimes()
    if arguments.json:
        print_json(found)
    else:
        print(describe(found))
    return 0


def _runtimes() -> dict[str, Any]:
    from agent.infer.runtimes.probe import Runtimes  # noqa: PLC0415

    return {
        state.name: {"version": state.version, "providers": list(state.providers)}
        if state.usable
        else {"reason": state.reason}
        for state in Runtimes().states().values()
    }


def _show(arguments: argparse.Namespace, paths: Paths) -> int:
    document = load_config(paths).model_dump(mode="json", exclude_none=True)
    if arguments.json:
        print_json({"file": str(paths.config), "found": paths.config.exists(), "config": document})
        return 0
    source = paths.config if paths.config.exists() else "defaults, there is no " + str(paths.config)
    print(f"# {source}")
    for section, values in document.items():
        print(f"\n[{section}]")
        for key, value in values.items():
            print(f"{key if key.isidentifier() else json.dumps(key)} = {_toml(value)}")
    return 0


def _toml(value: object) -> str:
    """A value as TOML, so that what is shown can be a configuration file. Basic strings are JSON's."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        # Quoted: a model's name may have dots, which would make tables of a bare key.
        return (
            "{"
            + ", ".join(f"{json.dumps(key, ensure_ascii=False)} = {_toml(item)}" for key, item in value.items())
            + "}"
        )
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else str(value)


def _check(arguments: argparse.Namespace, paths: Paths) -> int:
    load_config(paths)
    from agent.hardware.profiles import load_profiles, shipped_profiles_dir  # noqa: PLC0415

    _, problems = load_profiles([shipped_profiles_dir(), paths.user_profiles])
    if arguments.json:
        print_json({"file": str(paths.config), "ok": not problems, "profile_problems": list(problems)})
    else:
        print(f"{paths.config}: " + ("right" if os.path.lexists(paths.config) else "not there, the defaults hold"))
        for problem in problems:
            print(f"profile: {problem}")
    return EXIT_FAILED if problems else 0


# -- models check -----------------------------------------------------------------------------------------------------


def check_model(arguments: argparse.Namespace, paths: Paths) -> int:
    """``models check FILE [--root DIR]``: which variants could run on this or on a recorded board, and why not."""
    from agent.hardware.probe import probe  # noqa: PLC0415
    from agent.hardware.profiles import choose_profile, load_profiles, shipped_profiles_dir  # noqa: PLC0415
    from agent.selection.explanation import explain, explain_text  # noqa: PLC0415
    from agent.selection.inventory import assumed_inventory  # noqa: PLC0415
    from agent.selection.prior import rank_by_prior  # noqa: PLC0415
    from agent.selection.rules import accepted, candidates, memory_headroom_mb  # noqa: PLC0415

    manifest = read_manifest(arguments.file)
    if arguments.root is not None and not arguments.root.is_dir():
        raise PeerError(f"cannot check for {arguments.root}: no such folder")
    facts = probe(arguments.root)
    profiles, _ = load_profiles([shipped_profiles_dir(), paths.user_profiles])
    profile = choose_profile(facts, profiles)
    inventory = assumed_inventory(facts, profile.providers) if arguments.root else _live_inventory()
    headroom = memory_headroom_mb(facts, profile)
    verdicts = candidates(manifest, facts, profile.providers, inventory, headroom)
    ranked = accepted(verdicts)
    document = explain(manifest, verdicts, rank_by_prior(ranked, facts, profile), None, facts, profile)
    document |= {"runs": bool(ranked), "assumed_runtimes": inventory.assumed}
    if arguments.json:
        print_json(document)
    else:
        print(explain_text(document))
        if inventory.assumed:
            print("The runtimes are assumed: nothing can be asked of a recorded board.")
    return 0 if ranked else EXIT_FAILED


def _live_inventory() -> Any:
    from agent.core.device import inventory_of  # noqa: PLC0415
    from agent.infer.runtimes.probe import Runtimes  # noqa: PLC0415

    return inventory_of(Runtimes())


def read_manifest(path: Path) -> Manifest:
    """The manifest of a bundle file, a bundle directory or a bare model."""
    from agent.bundles import archive, bare  # noqa: PLC0415
    from agent.bundles.kinds import HEAD_BYTES, kind_of  # noqa: PLC0415

    if path.is_dir():
        return archive.read_directory(path)[0]
    with path.open("rb") as stream:
        if kind_of(os.pread(stream.fileno(), HEAD_BYTES, 0)) == "edgemodel":
            return archive.read(stream).read_manifest()
        return bare.describe(stream.fileno(), file_name=path.name)
