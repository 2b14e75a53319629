"""Credentials of the service below ``/etc/credstore.encrypted``, sealed and opened by ``systemd-creds``. For root.

Secrets go through pipes only: they are on no command line and in no file but sealed. What is written has been opened
again before it takes its place, since a TPM that seals what it cannot open has been seen.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from agent.base.errors import DamagedError, UnsupportedError
from agent.base.files import TEMPORARY_PREFIX, fsync_directory, write_atomically
from agent.cli.sealing import Place, Sealed, key_id_of
from agent.store.keys import CREDENTIAL_NEXT, NAME, SECRET_BYTES
from agent.store.seals import kind_of

FOLDER = "etc/credstore.encrypted"
#: Where systemd looks for a credential without a path, the first wins.
FOLDERS = (FOLDER, "run/credstore.encrypted", "usr/lib/credstore.encrypted")
NAMES = (NAME, CREDENTIAL_NEXT)
#: The key of the machine, which systemd-creds makes.
_HOST_KEY = "var/lib/systemd/credential.secret"
#: Where the whole system is laid over in memory (overlayroot, a live system, a container), nothing on it stays.
_PASSING = {"tmpfs", "ramfs", "overlay", "aufs"}
#: "Debug" in the TCG's table: zero from the start, and no firmware, loader or system writes to it.
NO_PCRS = "16"
#: Put before the name of a credential that is kept although nothing here can open it.
LOST = "lost-"
LOST_MEND = "put back the TPM, firmware or machine it was sealed on, or begin anew: edge-agent seal --start-over"
LOST_HINT = f"was the TPM cleared, or is this the disk of another machine? {LOST_MEND}"
#: A TPM on a slow bus takes seconds; one that never answers must not hold a device's start for long.
_TIMEOUT_S = 60.0
_LIBRARIES = "apt-get install libtss2-esys-3.0.2-0 libtss2-mu0 libtss2-rc0, or tpm2-tools, which brings them"


@dataclass(frozen=True, slots=True)
class CredentialStore:
    """See ``sealing.Vault``. ``pcrs``: registers of the TPM that must not change, as 7+14.

    By default one that nothing extends, since a device that nobody logs in to would lose its store with an update of
    its firmware; and not none, because systemd 252 seals with none what it then refuses to open (**measured**).
    """

    root: Path = Path("/")
    pcrs: str = NO_PCRS

    @property
    def folder(self) -> Path:
        return self.root / FOLDER

    def look(self) -> Mapping[str, Sealed]:
        """See ``Vault``."""
        return {name: self._look_at(name) for name in NAMES if os.path.lexists(self.folder / name)}

    def _look_at(self, name: str) -> Sealed:
        path = self.folder / name
        kind = kind_of(path.read_text(errors="replace"))
        try:
            return Sealed(kind, key_id_of(self.open(name)))
        except DamagedError as error:
            return Sealed(kind, None, str(error))

    def open(self, name: str) -> bytes:
        """See ``Vault``. DamagedError when it cannot be opened here."""
        path = self.folder / name
        done = _systemd_creds("decrypt", f"--name={name}", "--newline=no", str(path), "-")
        if done.returncode:
            raise DamagedError(f"cannot open {path}: {_last_line(done.stderr)}", hint=LOST_HINT)
        if len(done.stdout) != SECRET_BYTES:
            raise DamagedError(f"cannot use {path}: it holds {len(done.stdout)} bytes, {SECRET_BYTES} expected")
        return done.stdout

    def put(self, name: str, secret: bytes, place: Place) -> None:
        """See ``Vault``. UnsupportedError when it cannot be sealed."""
        sealed = self.seal(name, secret, place)
        if not self.folder.is_dir():
            self.folder.mkdir(mode=0o700, parents=True)
            fsync_directory(self.folder.parent)
        for leftover in self.folder.glob(f"{TEMPORARY_PREFIX}{NAME}*"):
            leftover.unlink(missing_ok=True)
        write_atomically(self.folder / name, sealed, mode=0o600)

    def seal(self, name: str, secret: bytes, place: Place) -> bytes:
        """``secret`` sealed, and opened again to see that it can be. UnsupportedError."""
        options = [f"--tpm2-pcrs={self.pcrs}"] if place == "tpm2" else []
        sealed = _systemd_creds("encrypt", f"--name={name}", f"--with-key={place}", *options, "-", "-", stdin=secret)
        if sealed.returncode:
            hint = f"is there one, and its libraries? {_LIBRARIES}" if place == "tpm2" else ""
            raise UnsupportedError(f"cannot seal with {place}: {_last_line(sealed.stderr)}", hint=hint)
        opened = _systemd_creds("decrypt", f"--name={name}", "--newline=no", "-", "-", stdin=sealed.stdout)
        if opened.returncode or opened.stdout != secret:
            raise UnsupportedError(f"cannot seal with {place}: it does not open again: {_last_line(opened.stderr)}")
        return sealed.stdout

    def require_lasting(self, place: Place) -> None:
        """UnsupportedError where what is sealed, or the key that it is sealed with, would be gone after a reboot."""
        mounts = (self.root / "proc/self/mountinfo").read_text(errors="replace")
        for folder in (FOLDER, *([_HOST_KEY] if place == "host" else [])):
            if (kind := file_system(f"/{folder}", mounts)) in _PASSING:
                raise UnsupportedError(
                    f"cannot rely on a secret sealed with {place}: /{folder} is on {kind}, and gone after a reboot",
                    hint="put it on a disk, or keep the secret in the file",
                )

    def remove(self, name: str) -> None:
        """See ``Vault``."""
        (self.folder / name).unlink()
        fsync_directory(self.folder)

    def set_aside(self, name: str) -> None:
        """Keep it under a name that the service does not look for."""
        os.replace(self.folder / name, self.folder / f"{LOST}{name}")
        fsync_directory(self.folder)


def file_system(path: str, mounts: str) -> str:
    """On what kind of file system a path is, by ``/proc/self/mountinfo`` (proc(5)); empty where that does not tell."""
    best, kind = "", ""
    for line in mounts.splitlines():
        fields, _, rest = line.partition(" - ")
        words = fields.split()
        point = words[4] if len(words) > 4 else ""
        if point and len(point) >= len(best) and f"{path}/".startswith(f"{point.rstrip('/')}/"):
            best, kind = point, rest.split(" ")[0]  # of two on one place the later one covers the other
    return kind


def has_tpm(root: Path = Path("/")) -> bool:
    """Whether there is one to try: firmware of boards without UEFI does not tell, so that the device node counts."""
    return bool(os.environ.get("SYSTEMD_TPM2_DEVICE")) or any((root / "dev").glob("tpmrm*"))


def _systemd_creds(*arguments: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    command: Sequence[str] = ("systemd-creds", *arguments)
    try:
        return subprocess.run(command, input=stdin, capture_output=True, timeout=_TIMEOUT_S, check=False)
    except FileNotFoundError as error:
        raise UnsupportedError(
            "cannot seal: there is no systemd-creds", hint="it came with systemd 250; before that the file is all"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise UnsupportedError(f"cannot seal: systemd-creds did not end within {_TIMEOUT_S:.0f} s") from error


def _last_line(text: bytes) -> str:
    """The last that is systemd's own: the TPM's libraries have their say before and after it."""
    lines = [line for line in text.decode(errors="replace").splitlines() if line.strip()]
    own = [line for line in lines if not line.startswith(("ERROR:", "WARNING:"))]
    return (own or lines)[-1].strip() if lines else "systemd-creds gave no reason"
