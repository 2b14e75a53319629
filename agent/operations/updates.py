"""Core's end of an update: what it hands over to root's updater, and what that says of it.

Core can write only below its own folder, and root believes nothing of it: a request is no more than a name. It is
written last, in one piece, and again while nobody has taken notice of it: a doorbell may be missed.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

from agent.base.errors import PeerError
from agent.base.files import TEMPORARY_PREFIX, fsync_directory, read_bounded, write_atomically
from agent.trust.releases import MAX_DOCUMENT_BYTES, Course, Request, Verdict, parse

_MAX_METADATA = 4 << 20
_ROLES = ("timestamp.json", "snapshot.json", "targets.json")


class Updates:
    """``folder`` is core's, ``home`` the installation's (None: not one that updates itself)."""

    def __init__(self, folder: Path, home: Path | None) -> None:
        self.folder = folder
        self._home = home

    @property
    def is_possible(self) -> bool:
        """Whether the installation is one that root's updater looks after."""
        return self._home is not None

    @property
    def tar(self) -> Path:
        """Where the release gathers."""
        return self.folder / "release.tar"

    def course(self) -> Course | None:
        """What root says of the last update; None where there was none."""
        if self._home is None:
            return None
        with contextlib.suppress(OSError, PeerError):
            return parse(read_bounded(self._home / "update/state.json", MAX_DOCUMENT_BYTES), Course)
        return None

    def previous(self) -> str | None:
        """The environment that there is a way back to."""
        if self._home is None:
            return None
        with contextlib.suppress(OSError):
            return os.readlink(self._home / "previous")
        return None

    def request(self) -> Request | None:
        """What was asked for last."""
        with contextlib.suppress(OSError, PeerError):
            return parse(read_bounded(self.folder / "request.json", MAX_DOCUMENT_BYTES), Request)
        return None

    def prepare(self) -> None:
        """Make the folder. Raises OSError."""
        if not self.folder.is_dir():
            self.folder.mkdir(mode=0o700)
            fsync_directory(self.folder.parent)

    def vouch(self, metadata: Path) -> None:
        """Hand over the metadata that vouches for the release, as it is in ``metadata``. Raises OSError."""
        self.prepare()
        target = self.folder / "metadata"
        if target.exists():
            shutil.rmtree(target)
        history = target / "root_history"
        history.mkdir(mode=0o700, parents=True)
        for name in _ROLES:
            write_atomically(target / name, read_bounded(metadata / name, _MAX_METADATA))
        for path in (metadata / "root_history").iterdir():
            write_atomically(history / path.name, read_bounded(path, _MAX_METADATA))

    def ask(self, request: Request) -> None:
        """Ring the bell. Raises OSError."""
        self.prepare()
        (self.folder / "verdict.json").unlink(missing_ok=True)
        write_atomically(self.folder / "request.json", request.model_dump_json().encode())

    def say(self, verdict: Verdict) -> None:
        """What is to become of the update. Raises OSError."""
        self.prepare()
        write_atomically(self.folder / "verdict.json", verdict.model_dump_json().encode())

    def withdraw(self) -> None:
        """Ask for nothing any more. Raises OSError."""
        (self.folder / "request.json").unlink(missing_ok=True)

    def clear(self) -> None:
        """What was fetched goes, and what a cut left; the request stays as the mark of what was asked last. OSError."""
        self.tar.unlink(missing_ok=True)
        for path in self.folder.glob(f"{TEMPORARY_PREFIX}*"):
            path.unlink(missing_ok=True)
        shutil.rmtree(self.folder / "metadata", ignore_errors=True)


def home_of(prefix: Path, named: str | None) -> Path | None:
    """Where the environments are: ``named``, else beside the one that runs, where the installer made it."""
    if named:
        return Path(named)
    environment = prefix.resolve()
    return environment.parent if (environment / ".installed").is_file() else None
