"""Where the device secret comes from, and what is derived from it.

Providers, strongest first: a systemd credential (``$CREDENTIALS_DIRECTORY``), which the service manager unseals; else a
file of mode 0600 beside the store, made at first start and reported as weak, since it lies on the same disk.
Invariants: a secret is 32 random bytes; its key-encryption key, grant identity and id come from it by HKDF under labels
of their own; none of them is ever logged or shown; the old secret stays until the caller says that nothing needs it.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from agent.base.errors import DamagedError, RefusedError, UnsupportedError
from agent.base.files import TEMPORARY_PREFIX, fsync_directory, read_bounded, require_own, write_atomically
from agent.store.age import Identity, hkdf_sha256

SECRET_BYTES = 32
NAME = "device-secret"
CREDENTIAL_NEXT = "device-secret-next"
FILE_NEXT = "device-secret.next"

_LABEL = b"edge-agent/device-secret/1/"


@dataclass(frozen=True, slots=True)
class DeviceSecret:
    """What one device secret gives. ``key_id`` (16 hex digits) tells nothing of it; the rest is never shown."""

    key_id: str
    kek: bytes = field(repr=False)
    grant_identity: Identity = field(repr=False)
    source: Literal["credential", "file"]
    name: str

    @property
    def weak(self) -> bool:
        """Whether a thief of the disk has it too."""
        return self.source == "file"


def derive(secret: bytes, source: Literal["credential", "file"], name: str) -> DeviceSecret:
    """The keys of a 32-byte ``secret``; pure."""

    def branch(label: bytes) -> bytes:
        return hkdf_sha256(secret, b"", _LABEL + label)

    return DeviceSecret(
        key_id=branch(b"key-id")[:8].hex(),
        kek=branch(b"key-encryption-key"),
        grant_identity=Identity(branch(b"grant-identity")),
        source=source,
        name=name,
    )


class Keys(Protocol):
    """What the store asks of a key provider."""

    def load(self, *, create: bool) -> tuple[DeviceSecret, ...]:
        """Every secret there is, the one for new stores first; with ``create`` one is made where there is none."""
        ...

    def next_secret(self, active: str, *, to_file: bool = False) -> DeviceSecret:
        """The secret to rotate to from the one with id ``active``: durable when this returns, the same when resumed.

        With ``to_file`` it is one of the provider's own making, also where the one in use came from outside.
        """
        ...

    def promote(self, key_id: str) -> str:
        """Make it the only one. Returns what the integrator must do, or nothing."""
        ...


class DeviceKeys:
    """The device's providers: credentials below ``credentials`` (None: no such folder), files below ``folder``."""

    def __init__(
        self,
        folder: Path,
        credentials: Path | None = None,
        *,
        random: Callable[[int], bytes] = secrets.token_bytes,
        step: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._folder = folder
        self._credentials = credentials
        self._random = random
        self._step = step

    def __repr__(self) -> str:
        return f"<DeviceKeys {self._folder}>"

    def load(self, *, create: bool) -> tuple[DeviceSecret, ...]:
        """See ``Keys``. RefusedError for wrong owner or mode, DamagedError for a wrong size or a missing secret."""
        if self._folder.exists():
            require_own(self._folder)  # whoever may write to it puts a secret of his own there
        self._drop_temporaries()
        found = [*self._from_credentials(), *self._from_files()]
        if not found:
            if not create:
                raise DamagedError(
                    f"cannot load device secret: no credential '{NAME}' and no {self._folder / NAME}",
                    hint="give the service its credential back or restore the file: the store is sealed under it",
                )
            found = [self._make(NAME)]
        return tuple(found)

    def next_secret(self, active: str, *, to_file: bool = False) -> DeviceSecret:
        """See ``Keys``. Credentials cannot be written from here: UnsupportedError tells how to provide the next one."""
        credentials, files = self._from_credentials(), self._from_files()
        if credentials and not to_file:
            # The credential called next wins; without one a store still under a file's key moves to the credential, and
            # a move that was cut off before the file was deleted ends there.
            if len(credentials) > 1 or credentials[0].key_id != active or files:
                return credentials[-1]
            raise UnsupportedError(
                "cannot rotate key: the device secret is a credential, which only root can replace",
                hint="edge-agent seal --rotate, or give the service a second credential "
                f"'{CREDENTIAL_NEXT}' of 32 random bytes, restart, try again",
            )
        waiting = [secret for secret in files if secret.name == FILE_NEXT]
        return waiting[0] if waiting else self._make(FILE_NEXT)

    def promote(self, key_id: str) -> str:
        """See ``Keys``. After it no file holds any other secret."""
        credentials = self._from_credentials()
        if any(secret.key_id == key_id for secret in credentials):
            self._delete(NAME)
            self._delete(FILE_NEXT)
            if credentials[0].key_id != key_id:
                return f"replace the credential '{NAME}' by '{CREDENTIAL_NEXT}', then remove the latter"
            return ""
        if any(secret.key_id == key_id and secret.name == FILE_NEXT for secret in self._from_files()):
            os.replace(self._folder / FILE_NEXT, self._folder / NAME)
            self._step("next secret renamed")
            fsync_directory(self._folder)
            self._step("next secret promoted")
        return f"take the credential '{credentials[0].name}' from the service" if credentials else ""

    def _from_credentials(self) -> list[DeviceSecret]:
        if self._credentials is None:
            return []
        found = []
        for name in (NAME, CREDENTIAL_NEXT):
            secret = _read_secret(self._credentials / name, _check_credential)
            if secret is not None:
                found.append(derive(secret, "credential", name))
        return found

    def _from_files(self) -> list[DeviceSecret]:
        found = []
        for name in (NAME, FILE_NEXT):
            secret = _read_secret(self._folder / name, _check_file)
            if secret is not None:
                found.append(derive(secret, "file", name))
        return found

    def _make(self, name: str) -> DeviceSecret:
        if not self._folder.is_dir():
            self._folder.mkdir(mode=0o700)
            fsync_directory(self._folder.parent)
        secret = self._random(SECRET_BYTES)
        write_atomically(self._folder / name, secret, mode=0o600)
        self._step(f"{name} written")
        return derive(secret, "file", name)

    def _delete(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._folder / name)
            self._step(f"{name} deleted")
            fsync_directory(self._folder)

    def _drop_temporaries(self) -> None:
        """What a kill left while a secret was written: never used, but a secret all the same."""
        if self._folder.is_dir():
            for path in self._folder.glob(f"{TEMPORARY_PREFIX}*"):
                path.unlink(missing_ok=True)


def _read_secret(path: Path, check: Callable[[Path, os.stat_result], None]) -> bytes | None:
    try:
        status = os.lstat(path)
        check(path, status)
        secret = read_bounded(path, SECRET_BYTES + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DamagedError(
            f"cannot load device secret: {path}: {error.strerror}", hint="the service's user must be able to read it"
        ) from error
    if len(secret) != SECRET_BYTES:
        raise DamagedError(
            f"cannot load device secret: {path} has {status.st_size} bytes, {SECRET_BYTES} expected",
            hint="restore it from where it was made; a store sealed under another secret cannot be read",
        )
    return secret


def _check_file(path: Path, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise RefusedError(
            f"cannot load device secret: {path} is not a plain file",
            hint="move it away and put the secret's own file back",
        )
    if status.st_uid != os.geteuid():
        raise RefusedError(
            f"cannot load device secret: {path} belongs to user {status.st_uid}, not to {os.geteuid()}",
            hint=f"chown {os.geteuid()} {path}",
        )
    if status.st_mode & 0o177:
        raise RefusedError(
            f"cannot load device secret: {path} has mode {stat.S_IMODE(status.st_mode):04o}, others could use it",
            hint=f"chmod 0600 {path}; if others could read it, rotate the key",
        )


def _check_credential(path: Path, status: os.stat_result) -> None:
    # The service manager owns these: group bits are the mask of its access list for the service's user.
    if not stat.S_ISREG(status.st_mode) or status.st_mode & 0o007:
        raise RefusedError(
            f"cannot load device secret: credential {path} is not a plain file closed to others",
            hint="let the service manager place it (LoadCredentialEncrypted=)",
        )
