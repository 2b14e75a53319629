"""Somebody who needs a file from the desk, in a thread of its own."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from pathlib import Path

from agent.trust.desk import Desk
from agent.trust.wants import Want

PATIENCE_S = 30.0


def want_for(data: bytes, **changed: object) -> Want:
    """A want for exactly these bytes."""
    found: dict[str, object] = {
        "id": "w1", "path": "targets/x", "most": len(data), "within_s": PATIENCE_S,
        "length": len(data), "sha256": hashlib.sha256(data).hexdigest(),
    }  # fmt: skip
    return Want(**{**found, **changed})  # type: ignore[arg-type]


class Waiter(threading.Thread):
    """What it was told, and how it ended. Without a path the bytes go to ``data``."""

    def __init__(
        self, desk: Desk, want: Want, path: Path | None = None, go_on: Callable[[], None] = lambda: None
    ) -> None:
        super().__init__(daemon=True)
        self.told: list[int] = []
        self.error: BaseException | None = None
        self.data = b""
        self._desk, self._want, self._path, self._go_on = desk, want, path, go_on
        self.start()

    def run(self) -> None:
        try:
            if self._path is None:
                self.data = self._desk.fetch(self._want)
            else:
                self._desk.fetch_file(self._want, self._path, self.told.append, self._go_on)
        except BaseException as error:
            self.error = error

    def end_within(self, seconds: float) -> bool:
        """Whether it ends in that time."""
        self.join(seconds)
        return not self.is_alive()

    def end(self) -> BaseException | None:
        """How it ended, waited for."""
        self.join(PATIENCE_S)
        assert not self.is_alive()
        return self.error


def opened(desk: Desk) -> Want:
    """The one thing that is wanted, waited for."""
    (want,) = desk.open_wants(PATIENCE_S)
    return want
