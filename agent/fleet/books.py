"""The fleet's books, opened together: keys and devices, versions, jobs, and what was heard."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

from agent.fleet.database import Database
from agent.fleet.documents import Documents
from agent.fleet.registry import Registry
from agent.fleet.releases import Releases
from agent.fleet.words import Words


class Books:
    """All tables of one database. A context manager; construction does no I/O."""

    def __init__(self, path: Path) -> None:
        self.database = Database(path)
        self.registry = Registry(self.database)
        self.releases = Releases(self.database)
        self.documents = Documents(self.database)
        self.words = Words(self.database)

    def __enter__(self) -> Books:
        self.database.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.database.close()
