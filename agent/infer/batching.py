"""Which requests for a session run together, and when: a state machine of values. Pure; time is an argument.

Requests of one kind (``Member.kind``: the same inputs but for the first axis, the same outputs and parameters) are
joined up to ``Pace.size`` rows and ``Pace.most_bytes``. A batch begins when a lane is free and it is full, or nobody
else is likely to come in time: waiting is worth it only while another batch runs, or while fewer are here than were
lately at once and the next one is expected sooner than its joining saves; never longer than ``Pace.delay_s`` after the
eldest member came, and never so long that the most pressing member would miss its deadline.

Who goes first: those of the more urgent priority (1, 2, ...; without one: 100), then who came first; who has waited for
long goes before all others, so that no flood of urgent requests starves the rest. Each ticket is answered by exactly
one ``Run`` or ``Expire``, unless it is ``Withdrawn`` before. Nobody is ever withheld while a lane is free for longer
than ``delay_s``.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

FOREVER = float("inf")
#: The level of who asks for none.
USUAL = 100
#: Who has waited so long goes first, seconds.
_PATIENCE_S = 0.5
#: Arrivals after which a crowd that was seen is forgotten, unless it is seen again.
_MEMORY = 64
#: How much one gap between arrivals, or one run's time, changes what is expected.
_SHARE = 0.125
#: A gap that is longer tells no more than one of this length.
_LONG_S = 0.01
#: After a failed batch requests run one by one for a while, longer each time.
_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 60.0
#: So many batches that went well let one that failed be forgotten.
_GOOD = 100


@dataclass(frozen=True, slots=True)
class Pace:
    """How to join. ``times``: seconds of a run by its number of rows, ascending; ``lanes``: runs at once."""

    size: int
    delay_s: float
    lanes: int = 1
    most_bytes: int = 1 << 62
    times: tuple[tuple[int, float], ...] = ()

    def run_s(self, rows: int) -> float:
        """Seconds of a run of so many rows, between and beyond what was measured in proportion."""
        before = (0, 0.0) if not self.times else (1, self.times[0][1] / self.times[0][0])
        for point in self.times:
            if rows <= point[0]:
                if point[0] == before[0]:
                    return point[1]
                share = (rows - before[0]) / (point[0] - before[0])
                return before[1] + share * (point[1] - before[1])
            before = point
        return before[1] * rows / before[0] if before[0] else 0.0


@dataclass(frozen=True, slots=True)
class Member:
    """One request: ``rows`` along the first axis, ``size`` bytes of inputs. Lower levels are more urgent."""

    ticket: int
    kind: Hashable
    rows: int
    size: int = 0
    deadline: float = FOREVER
    level: int = USUAL


# -- what shall be done -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Run:
    """Run these together, in this order. ``Queue.finished`` must follow. ``expected_s``: how long it should take."""

    run: int
    tickets: tuple[int, ...]
    rows: int
    expected_s: float


@dataclass(frozen=True, slots=True)
class Expire:
    """Its deadline has come before its turn."""

    ticket: int


Action = Run | Expire


@dataclass(frozen=True, slots=True)
class _Waiting:
    member: Member
    came: float


class Queue:
    """The requests that wait for one session. Tell it what happens, then ask it to ``decide``.

    ``wake_at``: when to ask again, though nothing has happened.
    """

    def __init__(self, pace: Pace) -> None:
        self._pace = pace
        self._most_rows = pace.size
        self._waiting: dict[int, _Waiting] = {}
        self._running: dict[int, Run] = {}
        self._runs = 0
        self._gap_s = _LONG_S
        self._came = -FOREVER
        self._crowd = [0, 0]  # the most at once, lately and before that
        self._arrivals = 0
        self._slower = 1.0
        self._failures = self._good = 0
        self._paused_until = -FOREVER
        self.wake_at = FOREVER

    # -- what happens -------------------------------------------------------------------------------------------------

    def add(self, member: Member, now: float) -> None:
        """A request has come."""
        self._waiting[member.ticket] = _Waiting(member, now)
        self._arrived(now)
        self.crowded(self.here)

    def withdraw(self, ticket: int) -> bool:
        """Nobody waits for it any more; whether it had not begun."""
        return self._waiting.pop(ticket, None) is not None

    def finished(self, run: int, seconds: float, now: float) -> None:
        """A run has ended well, after so long."""
        ran = self._running.pop(run)
        expected = self._pace.run_s(ran.rows)
        if expected:
            self._slower += _SHARE * (min(max(seconds / expected, 0.25), 16.0) - self._slower)
        if len(ran.tickets) > 1 and self._failures:
            self._good += 1
            if self._good >= _GOOD:
                self._failures = self._good = 0

    def failed(self, run: int, now: float, *, shortage: bool = False) -> None:
        """A run has failed. After one of several members they go one by one; ``shortage``: of memory, fewer rows."""
        ran = self._running.pop(run)
        if len(ran.tickets) > 1:
            self._paused_until = now + min(_PAUSE_S * 2.0**self._failures, _LONGEST_PAUSE_S)
            self._failures, self._good = self._failures + 1, 0
            if shortage:
                self._most_rows = max(1, ran.rows // 2)

    def passed_alone(self, now: float) -> None:
        """A request has come and was answered at once, without this queue."""
        self._arrived(now)

    def crowded(self, count: int) -> None:
        """So many were here at once."""
        self._crowd[0] = max(self._crowd[0], count)

    def repace(self, pace: Pace) -> None:
        """Join otherwise from now on."""
        self._pace, self._most_rows = pace, pace.size

    # -- what there is ------------------------------------------------------------------------------------------------

    @property
    def here(self) -> int:
        """Requests that wait or run."""
        return len(self._waiting) + sum(len(run.tickets) for run in self._running.values())

    @property
    def crowd(self) -> int:
        """The most that were here at once, lately."""
        return max(self._crowd)

    @property
    def quiet(self) -> bool:
        """Whether nobody is here, and there was never more than one lately: a request may run at once."""
        return not self._waiting and not self._running and max(self._crowd) <= 1

    # -- what shall be done -------------------------------------------------------------------------------------------

    def decide(self, now: float) -> list[Action]:
        """What shall be done now; then ``wake_at`` holds."""
        if not self._waiting:
            self.wake_at = FOREVER
            return []
        actions: list[Action] = []
        for waiting in [one for one in self._waiting.values() if one.member.deadline <= now]:
            del self._waiting[waiting.member.ticket]
            actions.append(Expire(waiting.member.ticket))
        begin_at = FOREVER
        while self._waiting and len(self._running) < self._pace.lanes:
            begin_at = self._begin_next(now, actions)
            if begin_at > now:
                break
            begin_at = FOREVER
        self.wake_at = min([begin_at, *(one.member.deadline for one in self._waiting.values())])
        return actions

    def _begin_next(self, now: float, actions: list[Action]) -> float:
        """Begin the first batch that need not wait; otherwise when the next one may."""
        order = sorted(self._waiting.values(), key=lambda one: _urgency(one, now))
        soonest = FOREVER
        for kind in dict.fromkeys(one.member.kind for one in order):
            chosen, full = self._fill([one for one in order if one.member.kind == kind], now)
            begin_at = now if full else self._begin_at(chosen, now)
            if begin_at <= now:
                actions.append(self._begin(chosen))
                return now
            soonest = min(soonest, begin_at)
        return soonest

    def _fill(self, order: list[_Waiting], now: float) -> tuple[list[_Waiting], bool]:
        """The members of the next batch of a kind, and whether there is no room for another."""
        pace = self._pace
        rows, size = order[0].member.rows, order[0].member.size
        chosen = order[:1]
        if now < self._paused_until or rows >= self._most_rows or size >= pace.most_bytes:
            return chosen, True
        for one in order[1:]:
            if rows + one.member.rows > self._most_rows or size + one.member.size > pace.most_bytes:
                return chosen, True  # whoever comes behind it waits as well: large ones are not passed over
            chosen.append(one)
            rows, size = rows + one.member.rows, size + one.member.size
        return chosen, rows >= self._most_rows

    def _begin_at(self, chosen: list[_Waiting], now: float) -> float:
        """When a batch with room left may begin: now, unless somebody is likely to come in time."""
        pace = self._pace
        rows = sum(one.member.rows for one in chosen)
        patient_to = min(
            min(one.came for one in chosen) + pace.delay_s,
            min(one.member.deadline for one in chosen) - self._slower * pace.run_s(rows + 1),
        )
        if self._running:  # one more lane, for a batch that is larger for having waited
            return patient_to
        if self.here >= max(self._crowd):
            return now
        saved_s = self._slower * (pace.run_s(rows) + pace.run_s(1) - pace.run_s(rows + 1))
        if self._gap_s > saved_s:
            return now
        return min(self._came + saved_s, patient_to)

    def _begin(self, chosen: list[_Waiting]) -> Run:
        for one in chosen:
            del self._waiting[one.member.ticket]
        self._runs += 1
        rows = sum(one.member.rows for one in chosen)
        tickets = tuple([one.member.ticket for one in chosen])
        run = self._running[self._runs] = Run(self._runs, tickets, rows, self._slower * self._pace.run_s(rows))
        return run

    def _arrived(self, now: float) -> None:
        gap = min(now - self._came, max(_LONG_S, self._pace.delay_s))
        self._gap_s = gap if self._came == -FOREVER else self._gap_s + _SHARE * (gap - self._gap_s)
        self._came = now
        self._arrivals += 1
        if self._arrivals >= _MEMORY:
            self._arrivals = 0
            self._crowd = [self.here, self._crowd[0]]


def _urgency(one: _Waiting, now: float) -> tuple[bool, int, float]:
    """Less goes first."""
    patient = now - one.came < _PATIENCE_S
    return patient, one.member.level if patient else 0, one.came


def level_of(priority: object) -> int:
    """The level of a request's ``priority``: 1 is the most urgent, 0 or nothing the usual one."""
    return priority if isinstance(priority, int) and priority > 0 else USUAL
