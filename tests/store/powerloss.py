"""What a disk may hold after the power went: only what was flushed, or any mix that a file system is allowed to make.

A recorder beside the real file system: it watches flushes, renames and deletions, and at each can lay out the images
that a crash at that instant could leave:

- ``strict``: nothing but what was flushed. Files that were not are empty, names in folders that were not are missing.
- ``eager names``: the folders as they are, the contents as flushed (delayed allocation).
- ``eager deletions``: as strict, but every deletion has happened.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

VARIANTS = ("strict", "eager names", "eager deletions")


class Disk:
    """Watches the folder ``root``, which exists and counts as flushed. ``event`` is called after each operation."""

    def __init__(self, root: Path, event: Callable[[str], None]) -> None:
        self._root = root
        self._event = event
        self._contents: dict[int, bytes] = {}
        self._folders: dict[int, dict[str, int]] = {os.stat(root).st_ino: {}}
        self._kinds: dict[int, bool] = {}
        self._deletions: set[tuple[str, int]] = set()
        self._held: list[int] = []  # an open descriptor keeps an inode number from being used again

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Operations of the block are recorded."""
        with (
            mock.patch("os.fsync", self._wrap(os.fsync, self._flushed)),
            mock.patch("os.replace", self._wrap(os.replace)),
            mock.patch("os.unlink", self._wrap(os.unlink, before=self._deleted)),
        ):
            yield
        for descriptor in self._held:
            os.close(descriptor)

    def image(self, target: Path, variant: str) -> None:
        """Lay out below ``target`` what the disk could hold now."""
        self._lay_out(self._root, os.stat(self._root).st_ino, target, variant)

    def _wrap(
        self,
        real: Callable[..., Any],
        after: Callable[..., None] = lambda *_: None,
        before: Callable[..., None] = lambda *_: None,
    ) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **keywords: Any) -> Any:
            before(*arguments)
            result = real(*arguments, **keywords)
            after(*arguments)
            self._event(f"{real.__name__} {arguments[0]}")
            return result

        return wrapped

    def _flushed(self, descriptor: int) -> None:
        status = os.fstat(descriptor)
        self._held.append(os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY))
        if stat.S_ISDIR(status.st_mode):
            with os.scandir(descriptor) as entries:
                self._folders[status.st_ino] = {entry.name: self._hold(descriptor, entry) for entry in entries}
        else:
            with open(self._held[-1], "rb", closefd=False) as file:
                self._contents[status.st_ino] = file.read()

    def _deleted(self, path: str | Path) -> None:
        if os.path.lexists(path):
            self._deletions.add((os.path.basename(path), os.lstat(path).st_ino))

    def _hold(self, folder: int, entry: os.DirEntry[str]) -> int:
        self._held.append(os.open(entry.name, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=folder))
        number = entry.inode()
        self._kinds[number] = entry.is_dir(follow_symlinks=False)
        return number

    def _lay_out(self, real: Path, number: int, target: Path, variant: str) -> None:
        target.mkdir(mode=0o700)
        now = {entry.name: entry for entry in os.scandir(real)} if real.is_dir() else {}
        names = dict(self._folders.get(number, {}))
        if variant == "eager names":
            names = {name: entry.inode() for name, entry in now.items()}
        elif variant == "eager deletions":
            names = {name: inode for name, inode in names.items() if (name, inode) not in self._deletions}
        for name, inode in names.items():
            is_folder = now[name].is_dir() if name in now and now[name].inode() == inode else self._kinds.get(inode)
            if is_folder:
                self._lay_out(real / name, inode, target / name, variant)
            else:
                (target / name).write_bytes(self._contents.get(inode, b""))
                (target / name).chmod(0o600)
