"""The roles of the repository and their keys: made, kept as PKCS#8 under the password, opened to sign.

A key is called ROLE-N. Its private half is ``ROLE-N.key`` below ``repository/keys``, or in a folder that is named for
one command (a stick that lies in a safe); ``ROLE-N.pub`` stays, so that a key whose private half is elsewhere has a
name. Who may sign what is in the root's metadata alone, never guessed from a file.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from securesystemslib.signer import CryptoSigner, SSlibKey

from agent.base.errors import DamagedError, NotFoundError
from agent.base.files import read_bounded
from agent.fleet.folder import Folder, write_new
from agent.fleet.keys import Passwords, private_pem
from agent.store.age import Identity, Recipient

Role = Literal["root", "targets", "models", "snapshot", "timestamp"]
#: Those that other keys vouch for, and last those that change with each publication.
ROLES: tuple[Role, ...] = ("root", "targets", "models", "snapshot", "timestamp")
_MOST_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Rule:
    """How many keys a role gets, how many must sign, and for how many days what they sign holds."""

    keys: int
    threshold: int
    days: int


#: Two of the keys must agree on what is installed; snapshot and timestamp are signed again by a machine.
RULES: Mapping[Role, Rule] = {
    "root": Rule(3, 2, 730),
    "targets": Rule(2, 2, 365),
    "models": Rule(2, 2, 365),
    "snapshot": Rule(1, 1, 90),
    "timestamp": Rule(1, 1, 30),
}


class RoleKeys:
    """The keys of one fleet's repository. ``elsewhere`` are further folders with private halves."""

    def __init__(self, folder: Folder, elsewhere: Sequence[Path] = ()) -> None:
        self._folder = folder.role_keys
        self._folders = (folder.role_keys, *elsewhere)
        self._signers: dict[str, CryptoSigner] = {}

    def make(self, role: Role, password: bytes | None) -> SSlibKey:
        """A new key of a role; its file is durable on return. ConflictError, OSError."""
        taken = [int(name.rpartition("-")[2]) for name in self.names().values() if name.rpartition("-")[0] == role]
        name = f"{role}-{max(taken, default=0) + 1}"
        key = Ed25519PrivateKey.generate()
        write_new(self._folder / f"{name}.key", private_pem(key, password))
        write_new(
            self._folder / f"{name}.pub", base64.b64encode(key.public_key().public_bytes_raw()) + b"\n", mode=0o644
        )
        return SSlibKey.from_crypto(key.public_key())

    def names(self) -> dict[str, str]:
        """The name of each key by its id, also of those that no longer count. DamagedError, OSError."""
        return {_public(path).keyid: path.stem for path in sorted(self._folder.glob("*-[0-9]*.pub"))}

    def held(self, keyids: Iterable[str]) -> list[str]:
        """Which of these have their private half here."""
        names = self.names()
        return [keyid for keyid in keyids if keyid in names and self._file(names[keyid]) is not None]

    def signer(self, keyid: str, passwords: Passwords) -> CryptoSigner:
        """One key, opened once. NotFoundError when it is not here, RefusedError, DamagedError, OSError."""
        if keyid not in self._signers:
            name = self.names().get(keyid, keyid)
            path = self._file(name)
            if path is None:
                raise NotFoundError(
                    f"cannot sign with {name}: its private key is not here", hint="--keys names a folder"
                )
            key = passwords.open(path)
            if not isinstance(key, Ed25519PrivateKey) or SSlibKey.from_crypto(key.public_key()).keyid != keyid:
                raise DamagedError(f"cannot sign with {path}: it holds another key than {name}")
            self._signers[keyid] = CryptoSigner(key)
        return self._signers[keyid]

    def _file(self, name: str) -> Path | None:
        return next((path for each in self._folders if (path := each / f"{name}.key").is_file()), None)


def _public(path: Path) -> SSlibKey:
    try:
        raw = base64.b64decode(read_bounded(path, _MOST_BYTES).strip(), validate=True)
        return SSlibKey.from_crypto(Ed25519PublicKey.from_public_bytes(raw))
    except ValueError as error:
        raise DamagedError(f"cannot read {path}: it is no public key") from error


# -- the identity that opens what was published ------------------------------------------------------------------------


def make_identity(folder: Folder, password: bytes | None) -> Recipient:
    """A new age identity in the folder. ConflictError when there is one, OSError."""
    key = X25519PrivateKey.generate()
    recipient = Recipient(key.public_key().public_bytes_raw())
    write_new(folder.identity_key, private_pem(key, password))
    write_new(folder.identity_key.with_suffix(".pub"), f"{recipient.text()}\n".encode(), mode=0o644)
    return recipient


def read_recipient(folder: Folder) -> Recipient:
    """To whom payloads are encrypted. DamagedError, OSError."""
    path = folder.identity_key.with_suffix(".pub")
    try:
        return Recipient.parse(read_bounded(path, _MOST_BYTES).decode("ascii", "replace").strip())
    except ValueError as error:
        raise DamagedError(f"cannot read {path}: {error}") from error


def open_identity(folder: Folder, passwords: Passwords) -> Identity:
    """The identity that opens payloads. RefusedError, DamagedError, OSError."""
    key = passwords.open(folder.identity_key)
    if not isinstance(key, X25519PrivateKey):
        raise DamagedError(f"cannot use {folder.identity_key}: it is no X25519 key")
    return Identity(key.private_bytes_raw())
