"""Bounded, confined reading of a machine's files: the live one, or a tree of files below a root.

Invariants: no read is longer than its limit, none blocks (FIFOs and devices are never opened), none raises for what the
tree holds, and below a root nothing outside of it is opened: a symbolic link is followed as the recorded machine would
have done, with ``/`` standing for the root (as chroot does), so a captured tree keeps working and a hostile one gains
nothing. What is absent is ``None`` without a word; what is there and cannot be used is ``None`` with a note.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from agent.base.errors import NotFoundError

#: Enough for any one-value file of sysfs, which are at most one page.
SMALL = 4096
_MAX_LINKS = 40
_MAX_NOTES = 64
_ABSENT = frozenset({errno.ENOENT, errno.ENOTDIR})
_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY


class Tree:
    """One machine's files. Paths are relative to its root, without a leading slash."""

    def __init__(self, root: Path | None = None) -> None:
        """``root`` None is the live machine. No I/O is done here but the check that the root is a directory."""
        if root is not None and not os.path.isdir(root):
            raise NotFoundError(f"cannot detect below {root}: no such folder", hint="name the folder that holds proc/")
        self.live = root is None
        self._root = "" if root is None else os.path.realpath(root)
        self._folders: dict[str, str | None] = {}
        self._notes: dict[str, None] = {}

    @property
    def notes(self) -> tuple[str, ...]:
        """What was wrong so far, each once, in the order met."""
        return tuple(self._notes)

    def note(self, text: str) -> None:
        """Remember a problem for people; further ones are dropped when there are already many."""
        if len(self._notes) < _MAX_NOTES:
            self._notes[text[:300]] = None

    def read(self, path: str, limit: int = SMALL, *, quiet: bool = False) -> bytes | None:
        """The first ``limit`` bytes of a regular file; None when there is none (``quiet``: without a note)."""
        try:
            place = self._place(path)
            if place is None:
                return None
            mode = os.stat(place).st_mode
            if not stat.S_ISREG(mode):
                self.note(f"{path}: not a regular file, ignored")
                return None
            return self._read_place(path, place, limit)
        except OSError as error:
            if not quiet:
                self._note_error(path, error)
            return None

    def text(self, path: str, limit: int = SMALL) -> str | None:
        """The same, decoded; bytes that are not UTF-8 become U+FFFD, so that they never match a known word."""
        data = self.read(path, limit)
        return None if data is None else data.decode("utf-8", "replace").replace("\r\n", "\n")

    def line(self, path: str) -> str | None:
        """A one-value file without the white space at its ends; None when it is absent, empty or not printable."""
        text = (self.text(path) or "").strip("\0 \t\r\n")
        if not text.isprintable():
            self.note(f"{path}: not a line of text, ignored")
            return None
        return text or None

    def names(self, path: str, limit: int = 1024) -> tuple[str, ...]:
        """The plain printable names in a folder, at most ``limit``, shorter ones first (zone2 before zone10)."""
        found: list[str] = []
        try:
            place = self._place(path)
            if place is None:
                return ()
            with os.scandir(place) as entries:
                for entry in entries:
                    if len(found) >= limit:
                        self.note(f"{path}: more than {limit} entries, the rest is ignored")
                        break
                    if entry.name.isascii() and entry.name.isprintable():
                        found.append(entry.name)
        except OSError as error:
            self._note_error(path, error)
        return tuple(sorted(found, key=lambda name: (len(name), name)))

    def exists(self, path: str) -> bool | None:
        """Whether the name is there; None when a folder on the way may not be entered."""
        try:
            place = self._place(path)
            return place is not None and os.path.lexists(place)
        except PermissionError:
            return None
        except OSError:
            return False

    def _read_place(self, path: str, place: str, limit: int) -> bytes:
        # Below a root the place is free of links; O_NOFOLLOW keeps it so if the tree changes under us.
        descriptor = os.open(place, _FLAGS if self.live else _FLAGS | os.O_NOFOLLOW)
        try:
            parts: list[bytes] = []
            left = limit + 1
            while left > 0:
                part = os.read(descriptor, min(left, 1 << 18))
                if not part:
                    break
                parts.append(part)
                left -= len(part)
        finally:
            os.close(descriptor)
        data = b"".join(parts)
        if len(data) > limit:
            self.note(f"{path}: longer than {limit} bytes, the rest is not read")
        return data[:limit]

    def _note_error(self, path: str, error: OSError) -> None:
        if error.errno not in _ABSENT:
            self.note(f"{path}: cannot be read ({os.strerror(error.errno) if error.errno else error})")

    def _place(self, path: str) -> str | None:
        """Where the file lies on this machine; None when a folder on the way is missing."""
        if self.live:
            return "/" + path
        folder, _, name = path.rpartition("/")
        if folder not in self._folders:
            self._folders[folder] = self._follow(folder)
        base = self._folders[folder]
        if base is None:
            return None
        place = f"{base}/{name}"
        try:
            os.readlink(place)
        except OSError as error:
            if error.errno == errno.EINVAL:
                return place
            if error.errno in _ABSENT:
                return None
            raise
        return self._follow(path)

    def _follow(self, path: str) -> str | None:
        """Resolve every link on the way inside the root, ``..`` of the root being the root. Raises OSError(ELOOP)."""
        pending = path.split("/")[::-1]
        walked: list[str] = []
        links = 0
        while pending:
            part = pending.pop()
            if part in {"", "."}:
                continue
            if part == "..":
                walked = walked[:-1]
                continue
            place = "/".join([self._root, *walked, part])
            try:
                target = os.readlink(place)
            except OSError as error:
                if error.errno in _ABSENT:
                    return None
                if error.errno != errno.EINVAL:
                    raise
                walked.append(part)
                continue
            links += 1
            if links > _MAX_LINKS:
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)
            if target.startswith("/"):
                walked = []
            pending.extend(target.split("/")[::-1])
        return "/".join([self._root, *walked])
