"""Keys of the operator: made, kept as PKCS#8 under a password, opened again, and which of them may sign what.

Invariants: a private key is on disk only as a file of its owner's (0600), encrypted unless that was asked for; what may
be signed is looked up in the registry, never guessed from the key; a password is asked for once and tried on each key.
"""

from __future__ import annotations

import base64
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from agent.base.errors import DamagedError, NotFoundError, PeerError, RefusedError
from agent.base.files import read_bounded
from agent.fleet.folder import Folder, write_new
from agent.trust.envelope import PublicKey, Signer
from agent.wire.ops import CLASSES, SIGNATURES, OpClass

VARIABLE = "EDGE_FLEET_PASSWORD"
#: The PEM's key derivation is the one that every OpenSSL reads, and a cheap one: short passwords would be guessed.
LEAST_PASSWORD = 12
_MOST_BYTES = 1 << 16
_ATTEMPTS = 3
_ENCRYPTED = b"-----BEGIN ENCRYPTED PRIVATE KEY-----"

PrivateKey = Ed25519PrivateKey | EllipticCurvePrivateKey | X25519PrivateKey


@dataclass(frozen=True, slots=True)
class KeyRow:
    """A key that may sign jobs, as the registry has it. ``held``: its private half is in this folder."""

    name: str
    public: str
    classes: tuple[OpClass, ...]
    added: str
    revoked: str | None = None
    held: bool = False

    @property
    def key(self) -> PublicKey:
        """The verifying key."""
        return PublicKey(base64.b64decode(self.public))

    @property
    def keyid(self) -> str:
        """What signatures name it by."""
        return self.key.keyid


class Passwords:
    """The password of the folder's keys: one that is known, or one that a person is asked for.

    ``known`` None means that nothing was said; ``ask`` gets the question, and is None where nobody can be asked.
    """

    def __init__(self, known: bytes | None = None, ask: Callable[[str], bytes] | None = None) -> None:
        self._tried = [] if known is None else [known]
        self._ask = ask

    def open(self, path: Path) -> PrivateKey:
        """The private key in a PEM file. RefusedError without the right password, DamagedError, OSError."""
        data = read_bounded(path, _MOST_BYTES)
        if not data.startswith(_ENCRYPTED):
            return _checked(_decoded(path, data, None), path)
        for password in self._tried:
            if (key := self._attempt(path, data, password)) is not None:
                return key
        if self._ask is None:
            reason = "the password is wrong" if self._tried else "it has a password and nobody can be asked for it"
            raise RefusedError(f"cannot open {path}: {reason}", hint=f"{VARIABLE} or --password-file gives it")
        for _ in range(_ATTEMPTS):
            password = self._ask(f"Password of {path.name}: ")
            if (key := self._attempt(path, data, password)) is not None:
                self._tried.append(password)
                return key
        raise RefusedError(f"cannot open {path}: the password is wrong")

    def choose(self, what: str) -> bytes:
        """A password for new keys: the known one, or what a person types twice. RefusedError, PeerError."""
        if self._tried:
            return _long_enough(self._tried[0])
        if self._ask is None:
            raise RefusedError(
                f"cannot make {what}: there is no password for it",
                hint=f"{VARIABLE} or --password-file gives one; --no-password leaves the files readable",
            )
        first = _long_enough(self._ask(f"Password for {what}: "))
        if self._ask("The same again: ") != first:
            raise PeerError(f"cannot make {what}: the two passwords differ")
        self._tried.append(first)
        return first

    @staticmethod
    def _attempt(path: Path, data: bytes, password: bytes) -> PrivateKey | None:
        try:
            return _checked(_decoded(path, data, password), path)
        except RefusedError:
            return None


def _long_enough(password: bytes) -> bytes:
    if len(password) < LEAST_PASSWORD:
        raise PeerError(f"cannot use the password: it is shorter than {LEAST_PASSWORD} characters")
    return password


def read_password(environ: Mapping[str, str], file: Path | None) -> bytes | None:
    """The password that a file (its first line) or the environment gives. PeerError for an empty one, OSError."""
    if file is not None:
        line = read_bounded(file, _MOST_BYTES).split(b"\n", 1)[0].rstrip(b"\r")
        if not line:
            raise PeerError(f"cannot take the password from {file}: its first line is empty")
        return line
    return os.fsencode(environ[VARIABLE]) if environ.get(VARIABLE) else None


def _decoded(path: Path, data: bytes, password: bytes | None) -> object:
    try:
        return serialization.load_pem_private_key(data, password)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        if password is not None:
            raise RefusedError(f"cannot open {path}: the password is wrong, or the file is damaged") from error
        raise DamagedError(f"cannot read {path}: it is no private key in PEM") from error


def _checked(key: object, path: Path) -> PrivateKey:
    if not isinstance(key, Ed25519PrivateKey | EllipticCurvePrivateKey | X25519PrivateKey):
        raise DamagedError(f"cannot use {path}: it is neither an Ed25519, an X25519 nor an EC key")
    return key


def private_pem(key: PrivateKey, password: bytes | None) -> bytes:
    """PKCS#8 in PEM, encrypted where there is a password."""
    encryption: serialization.KeySerializationEncryption = (
        serialization.NoEncryption() if password is None else serialization.BestAvailableEncryption(password)
    )
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)


def make_signing_key(path: Path, password: bytes | None) -> PublicKey:
    """A new Ed25519 key in ``path``. ConflictError when something is there, OSError."""
    key = Ed25519PrivateKey.generate()
    write_new(path, private_pem(key, password))
    return PublicKey(key.public_key().public_bytes_raw())


def open_signer(path: Path, passwords: Passwords) -> Signer:
    """The signer in ``path``. RefusedError, DamagedError, OSError."""
    key = passwords.open(path)
    if not isinstance(key, Ed25519PrivateKey):
        raise DamagedError(f"cannot sign with {path}: it is no Ed25519 key")
    return Signer(key.private_bytes_raw())


def parse_public(text: str) -> PublicKey:
    """A public key as people pass it on: base64 of 32 bytes, or a PEM. PeerError."""
    try:
        if "BEGIN PUBLIC KEY" in text:
            key = serialization.load_pem_public_key(text.encode())
            return PublicKey(key.public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw))
        raw = base64.b64decode("".join(text.split()), validate=True)
        return PublicKey(raw)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise PeerError("cannot read public key: it is not the base64 of an Ed25519 key") from error


def parse_classes(text: str) -> tuple[OpClass, ...]:
    """``observe,change`` in the order of the table. ValueError for a class that there is not."""
    wanted = set(re.split(r"[,\s]+", text.strip()))
    unknown = sorted(wanted - set(get_args(OpClass)))
    if unknown or not wanted:
        raise ValueError(f"unknown class {unknown[0]!r}; there are {', '.join(CLASSES)}")
    return tuple(kind for kind in CLASSES if kind in wanted)


def choose_keys(keys: Sequence[KeyRow], kinds: Sequence[OpClass], named: Sequence[str]) -> list[KeyRow]:
    """The keys to sign with: those that were named, else the first held ones that suffice for all of ``kinds``.

    RefusedError when they may not, or are too few: then the hint tells how a second person signs.
    """
    by_name = {row.name: row for row in keys}
    for name in named:
        _require_usable(by_name.get(name), name)
    usable = [by_name[name] for name in dict.fromkeys(named)] if named else [row for row in keys if _usable(row)]
    chosen: list[KeyRow] = []
    for kind in kinds:
        able = [row for row in usable if kind in row.classes]
        if not able:
            who = f"{', '.join(named)} may not" if named else "no key of this folder may"
            raise RefusedError(f"cannot sign: {who} sign operations of class {kind}", hint="edge-fleet keys list")
        able.sort(key=lambda row: row not in chosen)  # a key that signs anyway rather than one more
        chosen += [row for row in able[: SIGNATURES[kind]] if row not in chosen]
    return [row for row in usable if row in chosen] if not named else usable


def signatures_missing(keys: Sequence[KeyRow], kind: OpClass) -> int:
    """How many signatures of other keys an operation of that class needs beside those of ``keys``."""
    return max(0, SIGNATURES[kind] - sum(kind in row.classes for row in keys))


def _usable(row: KeyRow) -> bool:
    return row.held and row.revoked is None


def _require_usable(row: KeyRow | None, name: str) -> None:
    if row is None:
        raise NotFoundError(f"cannot sign with '{name}': there is no such key", hint="edge-fleet keys list")
    if row.revoked is not None:
        raise RefusedError(f"cannot sign with '{name}': it was revoked on {row.revoked}")
    if not row.held:
        raise RefusedError(f"cannot sign with '{name}': its private key is not in this folder")


def open_signers(folder: Folder, rows: Sequence[KeyRow], passwords: Passwords) -> list[Signer]:
    """The signers of ``rows``. RefusedError, DamagedError for another key than the registry has, OSError."""
    signers = []
    for row in rows:
        signer = open_signer(folder.signing_key(row.name), passwords)
        if signer.keyid != row.keyid:
            raise DamagedError(f"cannot sign with '{row.name}': the file holds another key than the registry has")
        signers.append(signer)
    return signers
