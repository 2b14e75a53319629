"""Where the updater's files are: environments with their links, what is root's own, and what core hands over.

Invariants: nothing below core's folder is opened through a link, or believed; a link is swung by one rename; what is
written is flushed before the next step relies on it.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from agent.base.errors import PeerError, RefusedError
from agent.base.files import TEMPORARY_PREFIX, fsync_directory, read_bounded, temporary_name, write_atomically
from agent.trust.releases import MAX_DOCUMENT_BYTES, Course, Request, Verdict, parse

_PIECE = 1 << 20
_LOOK = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
CURRENT, PREVIOUS, STEADY = "current", "previous", "steady"


@dataclass(frozen=True, slots=True)
class Ground:
    """All paths, below ``root``."""

    root: Path

    @property
    def home(self) -> Path:
        """The environments and the links to them."""
        return self.root / "opt/edge-agent"

    @property
    def own(self) -> Path:
        """What the updater keeps; others may read it."""
        return self.home / "update"

    @property
    def trust_file(self) -> Path:
        """Beside it lies the root of the operator's repository."""
        return self.root / "etc/edge-agent/trust.toml"

    @property
    def state_dir(self) -> Path:
        """Core's folder."""
        return self.root / "var/lib/edge-agent"

    # -- links --------------------------------------------------------------------------------------------------------

    def link(self, name: str) -> str | None:
        """Where a link leads; None where there is none."""
        try:
            return os.readlink(self.home / name)
        except OSError:
            return None

    def point(self, name: str, target: str | None) -> None:
        """Let a link lead there, None: nowhere. Durable on return, and never absent in between."""
        path = self.home / name
        if self.link(name) == target:
            return
        if target is None:
            path.unlink(missing_ok=True)
        else:
            fresh = temporary_name(path)
            os.symlink(target, fresh)
            os.replace(fresh, path)
        fsync_directory(self.home)

    def environments(self) -> list[str]:
        """The names of all environments, whole or not."""
        return sorted(
            path.name
            for path in self.home.iterdir()
            if path.is_dir() and not path.is_symlink() and path != self.own and (path / "pyvenv.cfg").exists()
        )

    def collect(self) -> None:
        """Delete every environment to which no link leads, and what a kill left of a link."""
        kept = {self.link(name) for name in (CURRENT, PREVIOUS, STEADY)}
        for name in self.environments():
            if name not in kept:
                shutil.rmtree(self.home / name)
        for path in self.home.glob(f"{TEMPORARY_PREFIX}*"):
            path.unlink(missing_ok=True)

    # -- what is root's own -------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Make the folder."""
        if not self.own.is_dir():
            self.own.mkdir(mode=0o755)
            fsync_directory(self.home)
        for path in self.own.glob(f"{TEMPORARY_PREFIX}*"):
            path.unlink(missing_ok=True)

    def course(self) -> Course | None:
        """How far the last update came. None where there was none, or nothing can be read of it."""
        with contextlib.suppress(OSError, PeerError):
            return parse(read_bounded(self.own / "state.json", MAX_DOCUMENT_BYTES), Course)
        return None

    def keep(self, course: Course) -> None:
        """Durable on return. The mark ``pending`` stands as long as something is to be done: systemd looks for it.

        It comes before the note and goes after it: a mark without a note is taken away by the next start, but nobody
        would ever start for a note without a mark.
        """
        pending = self.own / "pending"
        if not course.has_ended and not pending.exists():
            write_atomically(pending, b"", mode=0o644)
        write_atomically(self.own / "state.json", course.model_dump_json().encode() + b"\n", mode=0o644)
        if course.has_ended:
            self.forget()

    @property
    def is_pending(self) -> bool:
        """Whether something was to be done."""
        return (self.own / "pending").exists()

    def forget(self) -> None:
        """Nothing is to be done."""
        (self.own / "pending").unlink(missing_ok=True)

    @property
    def work(self) -> Path:
        """What is being unpacked; nothing in it is needed after a kill."""
        return self.own / "work"

    def clear_work(self) -> None:
        """Delete it; again is harmless."""
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(self.work)

    # -- what core hands over -----------------------------------------------------------------------------------------

    def request(self) -> Request | None:
        """What core asks for, if that can be read."""
        data = self.handed("request.json", most=MAX_DOCUMENT_BYTES)
        with contextlib.suppress(PeerError):
            return parse(data, Request) if data is not None else None
        return None

    def verdict(self) -> Verdict | None:
        """What core says of the update, if that can be read."""
        data = self.handed("verdict.json", most=MAX_DOCUMENT_BYTES)
        with contextlib.suppress(PeerError):
            return parse(data, Verdict) if data is not None else None
        return None

    def handed(self, *names: str, most: int) -> bytes | None:
        """A small file of core's, None where there is none that may be read, or it is longer than ``most``."""
        try:
            with self._opened(*names) as descriptor:
                data = b"".join(_pieces(descriptor, most + 1))
        except RefusedError:
            return None
        return data if len(data) <= most else None

    def take(self, name: str, target: Path, length: int, step: Callable[[], None]) -> str:
        """Copy a file of core's of that length; the SHA-256 of what was copied. RefusedError, OSError for our disk."""
        digest, copied = hashlib.sha256(), 0
        with self._opened(name) as source, target.open("xb") as out:
            os.fchmod(out.fileno(), 0o600)
            for piece in _pieces(source, length + 1):
                digest.update(piece)
                copied += len(piece)
                out.write(piece)
                step()
        if copied != length:
            raise RefusedError(f"cannot take {name}: {copied} bytes or more, {length} belong there")
        return digest.hexdigest()

    @contextlib.contextmanager
    def _opened(self, *names: str) -> Iterator[int]:
        """A plain file below core's folder ``update``, by way of no link. RefusedError."""
        with contextlib.ExitStack() as held:
            folder: int | None = None
            try:
                for place in (str(self.state_dir), "update", *names[:-1]):
                    folder = os.open(place, _LOOK | os.O_DIRECTORY, dir_fd=folder)
                    held.callback(os.close, folder)
                # A pipe must not be waited for, and a file with a second name may be another user's.
                file = os.open(names[-1], _LOOK | os.O_NONBLOCK, dir_fd=folder)
                held.callback(os.close, file)
                status = os.fstat(file)
            except OSError as error:
                raise RefusedError(f"cannot read {names[-1]} of core's: {error.strerror}") from error
            if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:
                raise RefusedError(f"cannot read {names[-1]} of core's: it is no plain file of its own")
            yield file


def _pieces(descriptor: int, most: int) -> Iterator[bytes]:
    left = most
    while left > 0:
        try:
            piece = os.read(descriptor, min(left, _PIECE))
        except OSError as error:
            raise RefusedError(f"cannot read: {errno.errorcode.get(error.errno or 0, '?')}") from error
        if not piece:
            return
        left -= len(piece)
        yield piece
