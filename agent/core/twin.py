"""What the fleet desires, brought into force: the latest alone, once, and none lost to a kill.

A version counts as settled, and the journal notes it, when it is applied, reverted or refused. What is not settled is
brought into force at the next start, and again a little later where the time was not right.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from agent.base.config import Config
from agent.base.errors import AgentError, ConflictError, DeadlineError, PeerError
from agent.operations.configure import RemoteConfig, drift
from agent.trust.envelope import EnvelopeError
from agent.wire.messages import Desired, decode
from agent.work.journal import Journal

_LOG = logging.getLogger("edge_agent.twin")
_SETTLED = "desired-settled"
#: Who asked for the configuration in force, where it was ``dn/desired``: enrolment and version. No job's mark is so.
_MARK = "desired-{}-{}"
_RETRY_S = 20.0


class Twin:
    """``reconcile`` is for the event loop's thread; the work, which may wait for the link, in a thread of its own.

    ``submit`` has work done there, ``later`` calls something on the loop's thread after so many seconds (0: now, from
    any thread), ``opened`` gives the payload of an envelope whose signature still counts.
    """

    def __init__(
        self,
        journal: Journal,
        remote: RemoteConfig,
        submit: Callable[[str, Callable[[], None]], None],
        later: Callable[[float, Callable[[], None]], None],
        opened: Callable[[bytes, str], bytes],
        go_on: Callable[[], None],
    ) -> None:
        self._journal = journal
        self._remote = remote
        self._submit = submit
        self._later = later
        self._opened = opened
        self._go_on = go_on
        self._under_way = False

    def reconcile(self) -> None:
        """See to it that what is desired is settled."""
        if self._under_way:
            return
        try:
            if self._unsettled() is not None:
                self._submit("apply what is desired", self._bring)
                self._under_way = True
        except AgentError as error:
            _LOG.warning("what is desired must wait: %s", error)
            self._later(_RETRY_S, self.reconcile)

    def _unsettled(self) -> tuple[str, bytes] | None:
        """Mark and envelope of what is yet to be brought into force."""
        version, envelope = self._journal.desired()
        mark = _MARK.format(self._journal.last()[0], version)
        return (mark, envelope) if version and self._journal.facts.get(_SETTLED) != mark else None

    def _bring(self) -> None:
        settled = False
        try:
            found = self._unsettled()
            settled = found is None or self._settle(*found)
        except AgentError as error:
            _LOG.warning("what is desired is not in force yet: %s", error)
        finally:
            self._later(0.0, lambda: self._ended(settled=settled))

    def _ended(self, *, settled: bool) -> None:
        self._under_way = False
        if settled:
            self.reconcile()  # a later one may have come meanwhile
        else:
            self._later(_RETRY_S, self.reconcile)

    def _settle(self, mark: str, envelope: bytes) -> bool:
        """Apply it, or find that it cannot be; whether that is the end of it."""
        remote = self._remote
        if remote.entry.state == "confirming" and remote.entry.mark != mark:
            return False  # another change is on probation, and only its own way back is known
        try:
            document = decode(self._opened(envelope, Desired.KIND), Desired)
            remote.apply(document.config, mark)
            if remote.entry.state == "confirming":
                remote.confirm(mark, self._go_on)
        except (EnvelopeError, DeadlineError, ConflictError) as error:
            _LOG.error("what is desired is not in force: %s", error)
        except PeerError as error:
            remote.refuse(mark)
            _LOG.error("what is desired cannot be: %s", error)
        self._journal.facts.put(_SETTLED, mark)
        return True

    def drift(self, config: Config) -> list[dict[str, Any]]:
        """Where what holds is not what is desired."""
        try:
            version, envelope = self._journal.desired()
            if not version:
                return []
            wanted = decode(self._opened(envelope, Desired.KIND), Desired)
        except AgentError:  # signed by a key that counts no more, or the journal cannot be read
            return []
        return drift(wanted.config, config)
