"""Moving the device secret between TPM, host key and file, decided from what is there.

Root seals, core rotates: the new secret is sealed and given to core, core puts every header under it, and only then the
old one goes. Each move is decided from the world alone, so that what was cut off is finished by doing it again.
Invariants: at each moment the store opens after a power cut; core is never restarted, and no credential removed, unless
the secret in use is among those that core will find then; payloads are never touched.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal, Protocol

from agent.base.errors import AgentError, RefusedError
from agent.store.keys import CREDENTIAL_NEXT, FILE_NEXT, NAME, SECRET_BYTES, derive
from agent.store.reports import KnownKey
from agent.store.seals import Seal

Place = Literal["tpm2", "host", "file"]
Action = Literal["seal", "adopt", "remove", "restart", "rotate", "rotate to a file"]
#: The longest way has nine moves; whoever needs more goes round in circles.
_MOST_MOVES = 16


@dataclass(frozen=True, slots=True)
class Sealed:
    """A credential on disk. ``key_id`` is None where it cannot be opened here, for the ``reason``."""

    kind: Seal
    key_id: str | None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class World:
    """The credentials on disk by name, and what the running core has: the key in use, and all that it knows."""

    sealed: Mapping[str, Sealed]
    used: KnownKey
    known: tuple[KnownKey, ...]


@dataclass(frozen=True, slots=True)
class Move:
    """One step: what, with which credential, sealed with what."""

    action: Action
    name: str = ""
    place: Place | Literal[""] = ""

    def __str__(self) -> str:
        return {
            "seal": f"make a new secret and seal it with {self.place} as '{self.name}'",
            "adopt": f"seal the secret of '{CREDENTIAL_NEXT}' with {self.place} as '{NAME}'",
            "remove": f"remove the credential '{self.name}'",
            "restart": "restart core, so that it gets what is there now and nothing else",
            "rotate": "rotate the key: every header under the credential's secret",
            "rotate to a file": "rotate the key: every header under a new secret that core keeps in a file",
        }[self.action]


def next_move(world: World, to: Place, *, anew: bool = False) -> Move | None:
    """What is to be done next so that the secret is at ``to``, or None when it is there. RefusedError.

    ``anew``: another secret is wanted, also where it is sealed as it should be.
    """
    return _to_file(world, anew=anew) if to == "file" else _to_credential(world, to, anew=anew)


def _to_file(world: World, *, anew: bool) -> Move | None:
    if world.used.source == "credential" or world.used.name == FILE_NEXT or anew:
        return Move("rotate to a file")
    for name in (CREDENTIAL_NEXT, NAME):
        if name in world.sealed:
            return Move("remove", name)
    return Move("restart") if any(key.source == "credential" for key in world.known) else None


def _to_credential(world: World, to: Place, *, anew: bool) -> Move | None:  # noqa: PLR0911 - a table of cases
    current, waiting, used = world.sealed.get(NAME), world.sealed.get(CREDENTIAL_NEXT), world.used
    in_use = current is not None and current.key_id == used.key_id
    if waiting is not None and waiting.key_id == used.key_id:
        # Rotated to it. It takes the name that stays, and is sealed as it should be from there.
        return Move("remove", CREDENTIAL_NEXT) if in_use else Move("adopt", NAME, _as_sealed(waiting, to))
    _require_way_back(world)
    if waiting is not None and (waiting.kind != to or waiting.key_id is None):
        return Move("remove", CREDENTIAL_NEXT)
    if current is not None and current.key_id is None:
        return Move("remove", NAME)  # nobody uses it, and core would not start with it
    if waiting is not None:
        return _towards(waiting, world)
    if current is None or (current.kind != to and not in_use):
        return Move("seal", NAME, to)
    if current.kind != to or (anew and in_use):
        return Move("seal", CREDENTIAL_NEXT, to)
    return _at_last(world) if in_use else _towards(current, world)


def _towards(sealed: Sealed, world: World) -> Move:
    """Core is to use it: it has what was there when it started, and rotates to the one called next."""
    target = _rotates_to(world)
    return Move("rotate") if target is not None and target.key_id == sealed.key_id else Move("restart")


def _rotates_to(world: World) -> KnownKey | None:
    given = {key.name: key for key in world.known if key.source == "credential"}
    return given.get(CREDENTIAL_NEXT) or given.get(NAME)


def _at_last(world: World) -> Move | None:
    """The right one is in use: no file with another is to stay, and core is to forget what is gone."""
    if any(key.source == "file" for key in world.known):
        return Move("rotate")
    return Move("restart") if len(world.known) > 1 else None


def _as_sealed(sealed: Sealed, otherwise: Place) -> Place:
    return sealed.kind if sealed.kind in ("tpm2", "host") else otherwise


def _require_way_back(world: World) -> None:
    """Whether core would find the secret in use after a start."""
    found = {sealed.key_id for sealed in world.sealed.values()}
    if world.used.source == "credential" and world.used.key_id not in found:
        reasons = "; ".join(sealed.reason for sealed in world.sealed.values() if sealed.reason)
        raise RefusedError(
            "cannot go on: the secret that core uses could not be had again after a restart"
            + (f": {reasons}" if reasons else ""),
            hint="leave core running, and save the store now: edge-agent seal --to file",
        )


def after(world: World, move: Move, fresh: Callable[[], str]) -> World:
    """The world after a move, with ``fresh`` for the ids of new keys. What ``--dry-run`` looks ahead with."""
    sealed, files = dict(world.sealed), [key for key in world.known if key.source == "file"]
    if move.action == "remove":
        del sealed[move.name]
    elif move.action in ("seal", "adopt"):
        key_id = fresh() if move.action == "seal" else sealed[CREDENTIAL_NEXT].key_id
        sealed[move.name] = Sealed("tpm2" if move.place == "tpm2" else "host", key_id)
    elif move.action == "restart":
        names = [name for name in (NAME, CREDENTIAL_NEXT) if name in sealed]
        given = tuple(KnownKey(sealed[name].key_id or "", "credential", name) for name in names)
        unlike = {key.key_id: key for key in reversed((*given, *files))}
        return replace(world, known=tuple(unlike.values()), used=unlike.get(world.used.key_id, world.used))
    elif move.action == "rotate":
        given = tuple(key for key in world.known if key.source == "credential")
        return replace(world, used=_rotates_to(world) or world.used, known=given)
    else:
        used = KnownKey(fresh(), "file", NAME)
        return replace(world, used=used, known=(*(key for key in world.known if key.source == "credential"), used))
    return replace(world, sealed=sealed)


# -- doing it ---------------------------------------------------------------------------------------------------------


class Vault(Protocol):
    """Where credentials are. What is put is durable when ``put`` returns, and opens."""

    def look(self) -> Mapping[str, Sealed]:
        """Those of ours."""
        ...

    def put(self, name: str, secret: bytes, place: Place) -> None:
        """Seal and keep one in place of what has the name."""
        ...

    def open(self, name: str) -> bytes:
        """The secret in one."""
        ...

    def remove(self, name: str) -> None:
        """Delete one."""
        ...


class Core(Protocol):
    """The running core."""

    def keys(self) -> tuple[KnownKey, tuple[KnownKey, ...]]:
        """The key in use, and all that it knows."""
        ...

    def restart(self) -> None:
        """Returns when it serves again."""
        ...

    def rotate(self, *, to_file: bool) -> None:
        """Every header under the next secret."""
        ...


def look(vault: Vault, core: Core) -> World:
    """The world as it is."""
    used, known = core.keys()
    return World(vault.look(), used, known)


def plan(world: World, to: Place, *, anew: bool = False) -> list[Move]:
    """All moves, as far as they can be foreseen."""
    numbers = iter(range(100))
    moves: list[Move] = []
    while (move := next_move(world, to, anew=anew and not moves)) is not None:
        if len(moves) == _MOST_MOVES:
            raise AgentError("cannot find a way to there from here", hint="edge-agent doctor")
        moves.append(move)
        world = after(world, move, lambda: f"new {next(numbers)}")
    return moves


def carry_out(vault: Vault, core: Core, to: Place, *, anew: bool = False) -> Iterator[Move]:
    """Do what is to be done, and tell each move before it is made. RefusedError, and whatever the parts raise."""
    for count in range(_MOST_MOVES):
        move = next_move(look(vault, core), to, anew=anew and not count)
        if move is None:
            return
        yield move
        _make(move, vault, core)
    raise AgentError("cannot find a way to there from here", hint="edge-agent doctor")


def _make(move: Move, vault: Vault, core: Core) -> None:
    if move.action == "remove":
        vault.remove(move.name)
    elif move.action == "restart":
        core.restart()
    elif move.action in ("rotate", "rotate to a file"):
        core.rotate(to_file=move.action != "rotate")
    elif move.action == "seal" and move.place:
        vault.put(move.name, secrets.token_bytes(SECRET_BYTES), move.place)
    elif move.action == "adopt" and move.place:
        if len(core.keys()[1]) > 1:
            core.rotate(to_file=False)  # to its end: a cut may have left one generation under the secret that goes now
        vault.put(move.name, vault.open(CREDENTIAL_NEXT), move.place)


def key_id_of(secret: bytes) -> str:
    """The id of the key of a secret, as core tells it."""
    return derive(secret, "credential", NAME).key_id
