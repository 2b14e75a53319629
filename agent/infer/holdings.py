"""What is in memory, to the byte: sessions and the plaintexts that they are made of. Pure bookkeeping.

Invariants: ``held`` is the sum of every session from the beginning of its load to the end of its closing, and of every
plaintext from the beginning of its reading to the end of its dropping; ``leaving`` is that part of it which is on its
way out. A plaintext goes only when no session is loading from it or made of it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

from agent.infer.eviction import Worth, choose
from agent.infer.tiers import FOREVER, Blob, Item, Name


class State(Enum):
    """Of a session or a plaintext; what is not in the tables is not in memory."""

    LOADING = "loading"
    READY = "ready"
    CLOSING = "closing"


@dataclass(slots=True)
class Session:
    """A session, as it was measured when its load began: what is counted does not change under way."""

    name: Name
    item: Item
    state: State = State.LOADING
    busy: int = 0
    score: float = 0.0
    used_at: float = 0.0
    expires: float = FOREVER
    tenure_until: float = 0.0
    #: To be closed once it is idle; nobody new is let in.
    retiring: bool = False
    #: Its plaintext goes with it.
    cold: bool = False

    @property
    def idle(self) -> bool:
        """Whether nobody is at it."""
        return self.state is State.READY and not self.busy


@dataclass(slots=True)
class Plaintext:
    """A plaintext. ``users`` counts the sessions that are loading from it, or made of it and not yet closed."""

    blob: Blob
    size: int
    state: State = State.LOADING
    users: int = 0
    score: float = 0.0
    used_at: float = 0.0
    expires: float = FOREVER

    @property
    def spare(self) -> bool:
        """Whether it can go now."""
        return self.state is State.READY and not self.users


class Holdings:
    """The tables. Each method is one step of a life; callers see to it that the steps come in order."""

    def __init__(self) -> None:
        self.sessions: dict[Name, Session] = {}
        self.loading: dict[Name, Session] = {}  # those of them
        self.plaintexts: dict[Blob, Plaintext] = {}
        self.held = 0
        self.leaving = 0
        self._worth = Worth()

    # -- lives --------------------------------------------------------------------------------------------------------

    def begin_load(self, name: Name, item: Item) -> tuple[Session, bool]:
        """A session is on its way; whether its plaintext was held before."""
        session = self.sessions[name] = self.loading[name] = Session(name, item)
        self.held += item.session
        plaintext = self.plaintexts.get(item.blob)
        held = plaintext is not None
        if plaintext is None and item.plaintext:
            plaintext = self.begin_reading(item)
        if plaintext is not None:
            plaintext.users += 1
            plaintext.expires = FOREVER
        return session, held

    def begin_reading(self, item: Item) -> Plaintext:
        """A plaintext is on its way."""
        plaintext = self.plaintexts[item.blob] = Plaintext(item.blob, item.plaintext)
        self.held += item.plaintext
        return plaintext

    def loaded(self, session: Session) -> None:
        """It answers from now on. What does not share its plaintext has no more use for it."""
        session.state = State.READY
        del self.loading[session.name]
        plaintext = self.plaintexts.get(session.item.blob)
        if plaintext is not None:
            plaintext.state = State.READY
            plaintext.users -= not session.item.shares

    def load_failed(self, session: Session, *, kept: bool) -> None:
        """It never came; ``kept``: its plaintext did."""
        del self.sessions[session.name], self.loading[session.name]
        self.held -= session.item.session
        plaintext = self.plaintexts.get(session.item.blob)
        if plaintext is not None:
            plaintext.users -= 1
            plaintext.state = State.READY
            if not kept and not plaintext.users:
                self._forget(plaintext)

    def read(self, blob: Blob, *, kept: bool) -> None:
        """A plaintext came, or did not."""
        plaintext = self.plaintexts[blob]
        plaintext.state = State.READY
        if not kept:
            self._forget(plaintext)

    def begin_closing(self, session: Session, *, cold: bool) -> Plaintext | None:
        """It answers no longer. With ``cold`` its plaintext leaves too: returned when it can go before the session."""
        session.state = State.CLOSING
        session.cold = cold
        self.leaving += session.item.session
        plaintext = self.plaintexts.get(session.item.blob)
        if cold and plaintext is not None and plaintext.state is State.READY:
            if not plaintext.users:
                return self.begin_dropping(plaintext)
            if plaintext.users == 1 and session.item.shares:
                self.begin_dropping(plaintext)
        return None

    def closed(self, session: Session) -> Plaintext | None:
        """Its memory is back. The plaintext is returned if it had to wait for that and goes now."""
        del self.sessions[session.name]
        self.held -= session.item.session
        self.leaving -= session.item.session
        plaintext = self.plaintexts.get(session.item.blob)
        if plaintext is None:
            return None
        plaintext.users -= session.item.shares
        plaintext.expires = session.expires
        return plaintext if plaintext.state is State.CLOSING and session.item.shares and not plaintext.users else None

    def begin_dropping(self, plaintext: Plaintext) -> Plaintext:
        """It is on its way out, at once or after the session that is made of it."""
        plaintext.state = State.CLOSING
        self.leaving += plaintext.size
        return plaintext

    def dropped(self, blob: Blob) -> None:
        """Its memory is back."""
        plaintext = self.plaintexts[blob]
        self.leaving -= plaintext.size
        self._forget(plaintext)

    def _forget(self, plaintext: Plaintext) -> None:
        del self.plaintexts[plaintext.blob]
        self.held -= plaintext.size

    # -- worth --------------------------------------------------------------------------------------------------------

    def use(self, session: Session, now: float) -> None:
        """It is worth more from now on, and so is what it was made of."""
        item = session.item
        self._worth.used(session.name)
        session.used_at = now
        session.score = self._worth.score(session.name, item.load_s, item.session)
        plaintext = self.plaintexts.get(item.blob)
        if plaintext is not None:
            plaintext.used_at = now
            plaintext.score = self._worth.score(session.name, item.read_s, item.plaintext)

    def lose(self, held: Session | Plaintext) -> None:
        """It is given up for others."""
        self._worth.lost(held.score)

    def forget(self, name: Name) -> None:
        """It is no longer installed."""
        self._worth.forget(name)

    # -- what can go --------------------------------------------------------------------------------------------------

    def choose(
        self, candidates: Iterable[Session | Plaintext], short: int, but: Blob | None = None
    ) -> list[Session | Plaintext]:
        """What goes of these to free ``short`` bytes; after a session also what it was made of, other than ``but``."""

        def behind(held: Session | Plaintext) -> Plaintext | None:
            if isinstance(held, Plaintext) or not held.item.shares or held.item.blob == but:
                return None
            return self.plaintexts.get(held.item.blob)

        return choose(candidates, short, size_of, behind, _users_of)

    def spare(self, but: Blob | None = None) -> list[Plaintext]:
        """Plaintexts that can go now."""
        return [held for held in self.plaintexts.values() if held.spare and held.blob != but]

    def ready(self, *, busy: bool) -> list[Session]:
        """Sessions that answer: those that somebody is at, or those that nobody is at."""
        return [s for s in self.sessions.values() if s.state is State.READY and bool(s.busy) is busy]


def _users_of(held: Session | Plaintext) -> int:
    return held.users if isinstance(held, Plaintext) else 0


def size_of(held: Session | Plaintext) -> int:
    """Bytes that its going gives back."""
    return held.size if isinstance(held, Plaintext) else held.item.session
