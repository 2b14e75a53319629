"""What the device says of itself, signed: the states of its jobs, what it is, what holds on it.

For the event loop's thread, but for ``seal``.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

from agent import __version__
from agent.base.clock import TrustedClock, iso
from agent.base.errors import AgentError, one_line
from agent.core.enrolling import Enroller, identity_text
from agent.core.ledger import Ledger
from agent.core.outgoing import Message, Outgoing
from agent.core.telling import job_state, without_story
from agent.trust.envelope import seal
from agent.wire import messages as wire
from agent.wire.ops import OPS
from agent.work.jobs import JobStatus

_LOG = logging.getLogger("edge_agent.fleet")
_MOST_SAID = 200
_REPORT_S = 1.0
#: Refusals cost whoever causes them nothing: they are told less often.
_REFUSED_S = 5.0

Fields = Callable[[], dict[str, Any]]


class Reporting:
    """``info`` and ``reported`` give the fields of those messages that are not known here.

    ``confirmed`` is called when the broker has a state of a job: more may be said.
    """

    def __init__(
        self,
        enroller: Enroller,
        ledger: Ledger,
        clock: TrustedClock,
        boot_nonce: str,
        info: Fields,
        reported: Fields,
        confirmed: Callable[[], None],
    ) -> None:
        self._enroller = enroller
        self._ledger = ledger
        self._clock = clock
        self._boot_nonce = boot_nonce
        self._info_fields = info
        self._reported_fields = reported
        self._confirmed = confirmed
        self.outgoing = Outgoing(boot_nonce, self._was_confirmed)
        self._said: dict[str, tuple[str, int]] = {}
        self._due: asyncio.TimerHandle | None = None
        self._version = 0

    @property
    def is_enrolled(self) -> bool:
        """Whether there is somebody to report to."""
        return self._enroller.allegiance is not None and self._enroller.allegiance.device is not None

    def seal(self, message: wire.JobState | wire.RpcAnswer | wire.Info | wire.Reported | wire.Announcement) -> bytes:
        """The message's envelope, signed by the device. From any thread."""
        assert self._enroller.signer is not None
        return seal(message.KIND, message.encode(), [self._enroller.signer])

    def changed(self) -> None:
        """Something that the fleet is told of changed."""
        self._report_within(_REPORT_S)

    def refused(self) -> None:
        """Something was refused and counted."""
        self._report_within(_REFUSED_S)

    def publish(self) -> None:
        """Hand every state of a job that the fleet has not confirmed to link, the oldest jobs first."""
        if not self.is_enrolled or not self._ledger.is_open:
            return
        for status in self._ledger.journal.unpublished()[:_MOST_SAID]:
            topic = f"up/job/{status.job_id}"
            if self._said.get(topic, ("", 0))[1] < status.rev:
                self._said[topic] = (status.job_id, status.rev)
                self.outgoing.say(topic, self._sealed_state(status), confirm=True)

    def announce(self, csr: str, facts: dict[str, Any]) -> None:
        """Tell those who may enrol the device that it is there."""
        assert self._enroller.allegiance is not None
        assert self._enroller.signer is not None
        message = wire.Announcement(
            tenant=self._enroller.allegiance.tenant,
            identity=identity_text(self._enroller.signer),
            boot_nonce=self._boot_nonce,
            at=iso(self._clock.clock.now()),
            csr=csr,
            agent_version=__version__,
            board=facts.get("board"),
            facts=facts,
        )
        self.outgoing.say("up/announce", self.seal(message), retain=True, confirm=True)

    def forget(self) -> None:
        """What was to be said was for another."""
        for topic in list(self._said):
            self.outgoing.drop(topic)
        self._said.clear()

    # -- inside -------------------------------------------------------------------------------------------------------

    def _report_within(self, seconds: float) -> None:
        loop = asyncio.get_running_loop()
        if self._due is not None and self._due.when() <= loop.time() + seconds:
            return
        if self._due is not None:
            self._due.cancel()
        self._due = loop.call_later(seconds, self._report)

    def _report(self) -> None:
        self._due = None
        if not self.is_enrolled or self._enroller.signer is None:
            return
        for topic, make in (("up/info", self._info), ("up/reported", self._reported)):
            try:
                self.outgoing.say(topic, self.seal(make()), retain=True)
            except (AgentError, ValueError) as error:  # pydantic's errors are ValueErrors
                _LOG.error("%s cannot be told: %s", topic, one_line(str(error)))

    def _info(self) -> wire.Info:
        _, generation, seq = self._ledger.last()
        assert self._enroller.signer is not None
        return wire.Info(
            **self._address(),
            boot_nonce=self._boot_nonce,
            at=iso(self._clock.clock.now()),
            agent_version=__version__,
            identity=identity_text(self._enroller.signer),
            ops=sorted(OPS) if self._ledger.is_open else [name for name, row in sorted(OPS.items()) if row.rpc],
            last_seq=seq,
            last_generation=generation,
            desired_version=self._ledger.desired_version(),
            **self._info_fields(),
        )

    def _reported(self) -> wire.Reported:
        self._version += 1
        return wire.Reported(
            **self._address(),
            version=self._version,
            at=iso(self._clock.clock.now()),
            desired_version=self._ledger.desired_version(),
            refused=self._ledger.refusals(),
            **self._reported_fields(),
        )

    def _address(self) -> dict[str, Any]:
        allegiance = self._enroller.allegiance
        assert allegiance is not None
        return {"tenant": allegiance.tenant, "device": allegiance.device, "epoch": allegiance.epoch}

    def _sealed_state(self, status: JobStatus) -> bytes:
        try:
            return self.seal(job_state(status, self._address()))
        except ValueError as error:  # pydantic's errors are ValueErrors
            _LOG.error("job %s cannot be told in full: %s", status.job_id, one_line(str(error)))
            return self.seal(job_state(without_story(status), self._address()))

    def _was_confirmed(self, message: Message) -> None:
        job_id, rev = self._said.pop(message.topic, ("", 0))
        if not job_id or not self._ledger.is_open:
            return
        try:
            self._ledger.journal.published(job_id, rev)
        except AgentError as error:  # it is said again, and confirmed again
            _LOG.error("it is not noted that job %s was told: %s", job_id, error)
        self._confirmed()
