"""``edge-agent seal``: where the device secret of the service is, and moving it. For root."""

from __future__ import annotations

import argparse
import os
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING

from agent.base.errors import AgentError, ConflictError, DamagedError, RefusedError, TryLaterError, UnsupportedError
from agent.base.paths import DEFAULT_RUN_DIR, DEFAULT_STATE_DIR, Paths
from agent.cli.commands import Commands, add_command
from agent.cli.terminal import print_json, print_warning

if TYPE_CHECKING:
    from agent.cli.credstore import CredentialStore
    from agent.cli.sealing import Place, World
    from agent.store.reports import KnownKey

_CORE = "edge-agent-core.service"
#: A start of core on the slowest board, as its unit allows.
_START_S = 180.0
#: Blobs of an installation that is under way are in the way of a rotation.
_ROTATE_TRIES, _ROTATE_PAUSE_S = 30, 2.0


def register(commands: Commands, common: argparse.ArgumentParser) -> None:
    """Add the command to the parser."""
    seal = add_command(commands, common, "seal", "seal the device secret with the TPM or a key of this machine")
    seal.add_argument(
        "--to", choices=("tpm2", "host", "file"), metavar="PLACE", help="tpm2, host or file; else the best there is"
    )
    seal.add_argument("--pcrs", default="", metavar="LIST", help="with tpm2: registers that must not change, as 7+14")
    seal.add_argument("--rotate", action="store_true", help="a new secret, also where it is sealed as it should be")
    seal.add_argument("--dry-run", action="store_true", help="say what would be done, and do nothing")
    seal.add_argument("--first", action="store_true", help="only where there is no secret and no store yet")
    seal.add_argument(
        "--start-over", action="store_true", help="where the secret is lost: put the store aside, begin a new one"
    )
    seal.set_defaults(action=_seal)


def _seal(arguments: argparse.Namespace, paths: Paths) -> int:
    from agent.cli.credstore import CredentialStore  # noqa: PLC0415 - the other commands do not pay for it

    _require_service(paths)
    vault = CredentialStore(pcrs=arguments.pcrs) if arguments.pcrs else CredentialStore()
    if arguments.first:
        return _first(arguments, paths, vault)
    if arguments.start_over:
        return _start_over(arguments, paths, vault)
    from agent.cli import sealing  # noqa: PLC0415 - as above

    core = RunningCore(paths)
    core.require()
    to = arguments.to or _best(vault)
    if arguments.to and to != "file":
        vault.seal("device-secret", os.urandom(32), to)  # nothing is begun that could not be ended
        try:
            vault.require_lasting(to)
        except UnsupportedError as error:
            print_warning(error)
    world = sealing.look(vault, core)
    begun = place_in(world)
    moves = sealing.plan(world, to, anew=arguments.rotate)
    if arguments.dry_run or not moves:
        return _tell(arguments, begun, to, [str(move) for move in moves], done=not moves)
    if not arguments.json:
        print(f"the device secret is {_shown(begun)}; it is to be {_shown(to)}", flush=True)
    made = []
    for move in sealing.carry_out(vault, core, to, anew=arguments.rotate):
        made.append(str(move))
        if not arguments.json:
            print(f"doing: {move}", flush=True)
    return _tell(arguments, begun, to, made, done=True)


def _tell(arguments: argparse.Namespace, begun: str, to: str, moves: list[str], *, done: bool) -> int:
    if arguments.json:
        print_json({"from": begun, "to": to, "moves": moves, "done": done})
    elif done:
        print(f"{'sealed' if moves and to != 'file' else 'nothing to do' if not moves else 'moved'}: "
              f"the device secret is {_shown(to)}")  # fmt: skip
    else:
        print(f"the device secret is {_shown(begun)}; to be {_shown(to)} it takes:")
        for move in moves:
            print(f"  - {move}")
    return 0


def place_in(world: World) -> str:
    """Where the secret in use is."""
    if world.used.source == "file":
        return "file"
    kinds = {sealed.key_id: sealed.kind for sealed in world.sealed.values()}
    return kinds.get(world.used.key_id, "credential")


def _shown(place: str) -> str:
    shown = {
        "tpm2": "sealed by the TPM",
        "host": "sealed by the key of this machine",
        "file": "a file beside the store, which is weak",
    }
    return shown.get(place, "a credential")


def _best(vault: CredentialStore) -> Place:
    """The strongest that works here, and will after a reboot."""
    from agent.cli.credstore import has_tpm  # noqa: PLC0415 - as above

    places: list[Place] = ["tpm2", "host"] if has_tpm() else ["host"]
    problem: AgentError | None = None
    for place in places:
        try:
            vault.require_lasting(place)
            vault.seal("device-secret", os.urandom(32), place)
        except UnsupportedError as error:
            problem = problem or error
        else:
            if problem is not None:
                print_warning(problem)
            return place
    raise problem or UnsupportedError("cannot seal: neither TPM nor host key")


def _require_service(paths: Paths) -> None:
    if (paths.state_dir, paths.run_dir) != (DEFAULT_STATE_DIR, DEFAULT_RUN_DIR):
        raise RefusedError(
            "cannot seal: that is for the installed service", hint="elsewhere give core a credential 'device-secret'"
        )
    if os.geteuid() != 0:
        raise RefusedError("cannot seal: that takes root", hint="sudo edge-agent seal")


# -- the first start, and a start over --------------------------------------------------------------------------------


def _first(arguments: argparse.Namespace, paths: Paths, vault: CredentialStore) -> int:
    from agent.cli.credstore import FOLDERS  # noqa: PLC0415 - as above

    there = [paths.state_dir / "store" / "CURRENT", paths.device_secret]
    there += [Path("/", folder, "device-secret") for folder in FOLDERS]
    if any(os.path.lexists(path) for path in there):
        return _tell(arguments, "credential", "credential", [], done=True)
    try:
        to = arguments.to or _best(vault)
        if not arguments.dry_run and to != "file":
            vault.put("device-secret", os.urandom(32), to)
    except UnsupportedError as error:  # a device without one starts all the same, and doctor tells
        print_warning(error)
        to = "file"
    return _tell(arguments, "none", to, ["make a secret and seal it"], done=not arguments.dry_run)


def _start_over(arguments: argparse.Namespace, paths: Paths, vault: CredentialStore) -> int:
    """Each step leaves what the next run goes on from: the store first, since core must not begin one beside it."""
    lost = [name for name, sealed in vault.look().items() if sealed.key_id is None]
    store = paths.state_dir / "store"
    if not lost and _opens(paths):
        raise ConflictError("cannot start over: the secret opens, nothing is lost", hint="edge-agent seal --to PLACE")
    moves = [f"stop {_CORE}"]
    aside = _free_name(store)
    if os.path.lexists(store):
        moves.append(f"move {store} to {aside}: nothing here can open it")
    moves += [f"keep the credential '{name}' as 'lost-{name}'" for name in lost]
    moves += ["make a new secret and seal it", f"start {_CORE} with a new store"]
    to = arguments.to or _best(vault)
    if arguments.dry_run:
        return _tell(arguments, "lost", to, moves, done=False)
    _systemctl("stop", _CORE)
    if os.path.lexists(store):
        _move_aside(store, aside.name)
    for name in lost:
        vault.set_aside(name)
    if to != "file" and "device-secret" not in vault.look():
        vault.put("device-secret", os.urandom(32), to)
    _systemctl("start", _CORE)
    return _tell(arguments, "lost", to, moves, done=True)


def _opens(paths: Paths) -> bool:
    try:
        RunningCore(paths).require()
    except AgentError:
        return False
    return True


def _free_name(path: Path) -> Path:
    taken = (path.with_name(f"{path.name}.lost{number or ''}") for number in range(1000))
    return next(name for name in taken if not os.path.lexists(name))


def _move_aside(store: Path, name: str) -> None:
    """In a folder that belongs to core: by its descriptor, so that no link that core has put there is followed."""
    folder = os.open(store.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.rename(store.name, name, src_dir_fd=folder, dst_dir_fd=folder)
        os.fsync(folder)
    finally:
        os.close(folder)


# -- core -------------------------------------------------------------------------------------------------------------


class RunningCore:
    """See ``sealing.Core``: the service, by ``systemctl`` and its admin socket."""

    def __init__(self, paths: Paths) -> None:
        self._paths = paths

    def require(self) -> None:
        """It serves, or is started now. DamagedError when it cannot for want of its secret, else TryLaterError."""
        try:
            _systemctl("start", _CORE)  # nothing, where it runs; where it fails again and again, once more now
        except TryLaterError as error:
            raise self._why(error) from error

    def _why(self, error: AgentError) -> AgentError:
        from agent.cli.credstore import LOST_HINT, CredentialStore  # noqa: PLC0415 - as above

        reasons = [sealed.reason for sealed in CredentialStore().look().values() if sealed.key_id is None]
        return DamagedError("; ".join(reasons), hint=LOST_HINT) if reasons else error

    def keys(self) -> tuple[KnownKey, tuple[KnownKey, ...]]:
        """See ``Core``."""
        from agent.client import AdminClient  # noqa: PLC0415 - as above
        from agent.store.reports import KnownKey  # noqa: PLC0415

        with AdminClient(str(self._paths.admin_socket), timeout=_START_S) as admin:
            answer = admin.call("GET", "/v1/store")
        known = tuple(KnownKey(str(key["key_id"]), str(key["source"]), str(key["name"])) for key in answer["keys"])
        used = next((key for key in known if key.key_id == answer["key_id"]), None)
        if used is None:
            raise DamagedError("cannot seal: core does not tell its keys", hint=f"systemctl restart {_CORE}")
        return used, known

    def restart(self) -> None:
        """See ``Core``."""
        _systemctl("restart", _CORE)

    def rotate(self, *, to_file: bool) -> None:
        """See ``Core``."""
        from agent.cli.call import call_core  # noqa: PLC0415 - as above

        for _ in range(_ROTATE_TRIES):
            try:
                call_core(self._paths, "POST", "/v1/store/rotate-key", {"to_file": to_file})
            except TryLaterError as error:
                problem = error
                time.sleep(_ROTATE_PAUSE_S)
            else:
                return
        raise problem


def _systemctl(verb: str, unit: str) -> None:
    try:
        # Starts that failed before are not to count against this one.
        subprocess.run(["systemctl", "reset-failed", unit], capture_output=True, timeout=_START_S, check=False)
        done = subprocess.run(["systemctl", verb, unit], capture_output=True, timeout=_START_S, check=False)
    except FileNotFoundError as error:
        raise UnsupportedError(
            "cannot seal: there is no systemctl", hint="that is for the installed service"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise TryLaterError(f"cannot {verb} {unit}: it takes too long", hint=f"journalctl -u {unit}") from error
    if done.returncode:
        raise TryLaterError(f"cannot {verb} {unit}", hint=f"journalctl -u {unit}; edge-agent doctor")
