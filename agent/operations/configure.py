"""The half of the configuration that the fleet may set, and its way back.

What the fleet sets lies over the configuration file and is kept in the catalog, sealed with the rest. A change holds at
once and is on probation until the link has come back with it; when it has not within ``link.confirm_s``, or the change
is undone, what held before holds again. All of it survives a kill: state, mark and the way back are one commit.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from agent.base.config import Config, parse
from agent.base.errors import ConfigError, ConflictError, DeadlineError, PeerError
from agent.store.document import CatalogDocument, FleetEntry
from agent.store.store import Store

#: What trusts, where the store is and who owns the sockets is the integrator's alone.
REMOTE = frozenset(
    (
        "server",
        "selection",
        "memory",
        "access",
        "log",
        "link",
        "delivery",
        "telemetry",
        "maintenance",
        "probation",
        "clock",
        "governor",
        "models",
    )
)
_POLL_S = 0.2


def effective(base: Config, over: Mapping[str, Any]) -> Config:
    """``base`` with what the fleet has set. PeerError names the section or field that it may not set, or not so."""
    if foreign := sorted(set(over) - REMOTE):
        raise PeerError(f"cannot set '{foreign[0]}' from afar", hint=f"a fleet may set {', '.join(sorted(REMOTE))}")
    document = base.model_dump(mode="json")
    for section, values in over.items():
        if not isinstance(values, dict):
            raise PeerError(f"cannot set '{section}': a table is expected")
        document[section] = {**document[section], **values}
    try:
        return parse(document, "the fleet's configuration")
    except ConfigError as error:
        raise PeerError(str(error), hint=error.hint) from error


class RemoteConfig:
    """See ``agent.operations.jobs.Configuring``. ``base`` is the file's configuration as it is now.

    ``hold`` puts a configuration into force, ``link_back`` tells whether link is connected with what is in force. For
    the threads of operations; ``hold`` is called on theirs.
    """

    def __init__(
        self,
        store: Store,
        base: Callable[[], Config],
        hold: Callable[[Config], None],
        link_back: Callable[[], bool],
        monotonic: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._store = store
        self._base = base
        self._hold = hold
        self._link_back = link_back
        self._monotonic = monotonic
        self._sleep = sleep
        self._lock = threading.Lock()

    @property
    def entry(self) -> FleetEntry:
        """What is committed."""
        return self._store.document.fleet

    def current(self) -> Config:
        """What holds. What no longer fits a newer file or agent is left out rather than keeping the agent down."""
        try:
            return effective(self._base(), self.entry.config)
        except PeerError:
            return self._base()

    def check(self, config: Mapping[str, Any]) -> None:
        """See ``Configuring``."""
        effective(self._base(), config)

    def apply(self, config: Mapping[str, Any], mark: str) -> None:
        """See ``Configuring``. ConflictError while another change is on probation."""
        with self._lock:
            self.check(config)
            entry = self.entry
            if entry.mark == mark:
                return
            if entry.state == "confirming":
                raise ConflictError("cannot apply configuration: another change has not been confirmed yet")
            self._commit(config=dict(config), before=entry.config, mark=mark, state="confirming")
        self._hold(self.current())

    def holds(self, mark: str) -> bool:
        """See ``Configuring``."""
        return self.entry.mark == mark and self.entry.state in ("confirming", "applied")

    def confirm(self, mark: str, go_on: Callable[[], None]) -> None:
        """See ``Configuring``."""
        deadline = self._monotonic() + self.current().link.confirm_s
        while self.entry.mark == mark and self.entry.state == "confirming":
            if self._link_back():
                self._commit(state="applied")
            elif self._monotonic() >= deadline:
                self.revert(mark)
                raise DeadlineError(
                    "cannot keep configuration: the link did not come back with it in time",
                    hint="what was before holds again",
                )
            else:
                go_on()
                self._sleep(_POLL_S)
        if not self.holds(mark):
            raise ConflictError("cannot confirm configuration: it is no longer in force")

    def revert(self, mark: str) -> None:
        """See ``Configuring``."""
        with self._lock:
            entry = self.entry
            if entry.mark != mark or entry.state not in ("confirming", "applied"):
                return
            self._commit(config=entry.before, before={}, state="reverted")
        self._hold(self.current())

    def refuse(self, mark: str) -> None:
        """Note that what ``mark`` asked for cannot be set."""
        with self._lock:
            if self.entry.mark != mark:
                self._commit(mark=mark, state="refused")

    def _commit(self, **changes: Any) -> None:
        def change(document: CatalogDocument) -> CatalogDocument:
            return document.model_copy(update={"fleet": document.fleet.model_copy(update=changes)})

        self._store.commit(change)


def drift(wanted: Mapping[str, Any], config: Config) -> list[dict[str, Any]]:
    """Where what holds is not what is desired: section, key, desired and actual value. Pure."""
    actual = config.model_dump(mode="json")
    return [
        {"key": f"{section}.{key}", "desired": value, "actual": actual.get(section, {}).get(key)}
        for section, values in sorted(wanted.items())
        if isinstance(values, dict)
        for key, value in sorted(values.items())
        if actual.get(section, {}).get(key) != value
    ]
