"""The job journal as core keeps it: opened, of one device, with the floor of the clock; what to do when it cannot be.

A journal that cannot be opened leaves the device serving and says what mends it.
"""

from __future__ import annotations

import contextlib
import logging
from datetime import datetime
from pathlib import Path
from typing import Any

from agent.base.clock import SystemClock, TrustedClock
from agent.base.errors import AgentError, ConflictError, DamagedError
from agent.core.enrolling import Enroller
from agent.core.telling import job_row
from agent.work.database import HINT
from agent.work.jobs import Refusal
from agent.work.journal import Journal

_LOG = logging.getLogger("edge_agent.fleet")
_FLOOR = "clock-floor"
#: Whose jobs the journal holds: tenant and device.
_OWNER = "owner"


class Ledger:
    """``is_open``: there are jobs; else ``problem`` says why not and ``mend`` what helps."""

    def __init__(self, path: Path, clock: TrustedClock, enroller: Enroller) -> None:
        self._path = path
        self._clock = clock
        self._enroller = enroller
        self.journal = Journal(path, SystemClock(), clock_trusted=clock.trusted)
        self.is_open = False
        self.problem = self.mend = ""

    def open(self) -> None:
        """Open the journal, or say why it cannot be."""
        try:
            self.journal.open()
            self._floor()
            self._begin_epoch()
        except AgentError as error:
            self._give_up(error)
        else:
            self.is_open, self.problem = True, ""

    def close(self) -> None:
        """Note the time, and close."""
        if self.is_open:
            self._floor()
            self.journal.close()
            self.is_open = False

    def begin_epoch(self) -> None:
        """Whom the device obeys has changed."""
        try:
            self._begin_epoch()
        except AgentError as error:
            self._give_up(error)

    def reset(self) -> dict[str, Any]:
        """Move a journal that cannot be opened aside and begin a new one. ConflictError for one that works."""
        if self.is_open:
            raise ConflictError("cannot reset the job journal: it is whole")
        from agent.work.mending import set_aside  # noqa: PLC0415 - hardly ever needed

        allegiance = self._enroller.allegiance
        stamp = self._clock.clock.now().strftime("%Y%m%dT%H%M%SZ")
        moved = set_aside(self._path, allegiance.epoch if allegiance else 0, stamp)
        self.open()
        return {"moved_to": str(moved.path) if moved.path else None, "counters_kept": moved.counters_kept}

    def require_later(self, tenant: str, device: str, epoch: int) -> None:
        """The journal's counters and jobs are of one device of one tenant: for another the number must rise.

        Refusal where it does not.
        """
        owner, known = self.journal.facts.get(_OWNER), self.journal.last()[0]
        if epoch < known or (epoch == known and owner not in (None, _owner(tenant, device))):
            raise Refusal(
                "old_epoch",
                f"cannot be {_owner(tenant, device)}, enrolment {epoch}: the job journal is of {owner}, up to {known}",
                hint=f"enrol the device with a number above {known} ('epoch' in trust.toml)",
            )

    def require_open(self) -> None:
        """DamagedError when there are no jobs."""
        if not self.is_open:
            raise DamagedError(f"cannot use the job journal: {self.problem}", hint="see edge-agent doctor")

    # -- what it holds ------------------------------------------------------------------------------------------------

    def jobs(self, limit: int = 100) -> list[dict[str, Any]]:
        """For ``jobs list`` and the rpc of that name."""
        return [job_row(status) for status in self.journal.jobs(limit=limit)] if self.is_open else []

    def job(self, job_id: str) -> dict[str, Any] | None:
        """One job, with what was asked for. DamagedError when there are none."""
        self.require_open()
        record = self.journal.job(job_id)
        if record is None:
            return None
        order = record.order
        asked = {"lane": order.lane, "priority": order.priority, "args": dict(order.args), "not_after": order.not_after}
        return job_row(record.status) | asked | {"accepted_at": record.accepted_at}

    def refusals(self) -> dict[str, int]:
        """How much was refused, by reason. Empty where the journal cannot be read: that is told elsewhere."""
        with contextlib.suppress(AgentError):
            return self.journal.refusals() if self.is_open else {}
        return {}

    def last(self) -> tuple[int, int, int]:
        """Enrolment, generation and sequence number of what was taken last."""
        return self.journal.last() if self.is_open else (0, 0, 0)

    def desired_version(self) -> int:
        """Of the latest that the fleet desires."""
        return self.journal.desired()[0] if self.is_open else 0

    # -- inside -------------------------------------------------------------------------------------------------------

    def _give_up(self, error: AgentError) -> None:
        self.is_open, self.problem, self.mend = False, str(error), error.hint
        self.journal.close()
        _LOG.error("no jobs: %s%s", error, f" ({error.hint})" if error.hint else "")

    def _begin_epoch(self) -> None:
        allegiance = self._enroller.allegiance
        if allegiance is None or allegiance.device is None:
            return
        self.require_later(allegiance.tenant, allegiance.device, allegiance.epoch)
        self.journal.facts.put(_OWNER, _owner(allegiance.tenant, allegiance.device))
        self.journal.begin_epoch(allegiance.epoch)

    def _floor(self) -> None:
        """The latest moment that is known to be past, kept over starts: a clock below it is wrong."""
        kept = self.journal.facts.get(_FLOOR)
        if kept is not None:
            try:
                self._clock.floor = max(self._clock.floor, datetime.fromisoformat(kept))
            except (ValueError, TypeError) as error:
                raise DamagedError(f"cannot read the job journal: '{kept}' is no moment", hint=HINT) from error
        now = self._clock.clock.now()
        if self._clock.trusted() and (kept is None or now > self._clock.floor):
            self.journal.facts.put(_FLOOR, now.isoformat())


def _owner(tenant: str, device: str) -> str:
    return f"{tenant}/{device}"
