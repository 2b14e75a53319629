"""A simulated device around the state machine of residency: memory to the byte, threads and a clock of its own.

It does what the actions say and checks what must hold whatever happens; whoever uses it decides when things end.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from agent.infer import tiers
from agent.infer.residency import Residency
from agent.infer.tiers import FOREVER, Item


@dataclass
class Device:
    """``sessions`` and ``plaintexts`` map what is in memory to its bytes; the sets say what is under way."""

    budget: int
    lanes: int = 1
    keep_s: float = FOREVER
    now: float = 0.0
    items: dict = field(default_factory=dict)
    sessions: dict = field(default_factory=dict)
    plaintexts: dict = field(default_factory=dict)
    loading: dict = field(default_factory=dict)  # name -> (item, held, keep)
    warming: dict = field(default_factory=dict)  # blob -> name
    closing: set = field(default_factory=set)
    dropping: set = field(default_factory=set)
    made_of: dict = field(default_factory=dict)  # session that shares -> its blob
    running: list = field(default_factory=list)  # (ticket, name)
    waiting: dict = field(default_factory=dict)  # ticket -> name
    pins: set = field(default_factory=set)
    log: list = field(default_factory=list)
    granted: list = field(default_factory=list)
    refused: list = field(default_factory=list)
    loads: int = 0
    _tickets: int = 0

    def __post_init__(self):
        self.machine = Residency(self.budget, self.lanes, self.keep_s)

    # -- what users and the shell do --------------------------------------------------------------------------------

    def install(self, **items):
        self.items = dict(items)
        self.pins &= self.items.keys()
        self.feed(tiers.Shelf(dict(self.items)))

    def ask(self, name):
        self._tickets += 1
        self.waiting[self._tickets] = name
        self.feed(tiers.Request(self._tickets, name))
        return self._tickets

    def withdraw(self, ticket):
        del self.waiting[ticket]
        self.feed(tiers.Withdrawn(ticket))

    def finish(self, ticket=None, keep_s=None):
        index = next(i for i, (known, _) in enumerate(self.running) if ticket in (None, known))
        _, name = self.running.pop(index)
        self.feed(tiers.Finished(name, keep_s))

    def loaded(self, name=None):
        name = next(iter(self.loading)) if name is None else name
        item, _, keep = self.loading.pop(name)
        assert keep == (item.plaintext > 0)
        if item.shares and item.plaintext:
            self.made_of[name] = item.blob
        self.feed(tiers.Loaded(name))

    def load_failed(self, name=None, *, read=False, shortage=False):
        name = next(iter(self.loading)) if name is None else name
        item, held, keep = self.loading.pop(name)
        kept = held or (keep and read)
        del self.sessions[name]
        if not kept and keep:
            del self.plaintexts[item.blob]
        self.feed(tiers.LoadFailed(name, kept, shortage))

    def warmed(self, blob=None, *, kept=True):
        blob = next(iter(self.warming)) if blob is None else blob
        del self.warming[blob]
        if not kept:
            del self.plaintexts[blob]
        self.feed(tiers.Warmed(blob, kept))

    def closed(self, name=None):
        name = min(self.closing, key=str) if name is None else name
        self.closing.discard(name)
        del self.sessions[name]
        self.made_of.pop(name, None)
        self.feed(tiers.Closed(name))

    def dropped(self, blob=None):
        blob = min(self.dropping) if blob is None else blob
        self.dropping.discard(blob)
        del self.plaintexts[blob]
        self.feed(tiers.Dropped(blob))

    def pin(self, name, pinned=True):
        (self.pins.add if pinned else self.pins.discard)(name)
        self.feed(tiers.Pin(name, pinned))

    def resize(self, budget):
        self.budget = budget
        self.feed(tiers.Budget(budget))

    def pass_time(self, seconds):
        """The clock goes on; ticks come when they are due."""
        end = self.now + seconds
        while self.machine.wake_at <= end:
            self.now = max(self.now, self.machine.wake_at)
            self.feed(tiers.Tick())
        self.now = end

    def settle(self, *, steps=10_000):
        """Let everything under way end well, until nobody waits: that nobody waits for ever is the point."""
        for _ in range(steps):
            if self.step():
                continue
            if not self.waiting:
                return
            assert self.machine.wake_at < FOREVER, f"nothing under way, and still waiting: {self.waiting}"
            self.pass_time(max(0.0, self.machine.wake_at - self.now))
        raise AssertionError(f"still waiting after {steps} steps: {self.waiting}")

    def step(self):
        """End one thing that is under way, if there is one."""
        for under_way, end in (
            (self.closing, self.closed), (self.dropping, self.dropped), (self.warming, self.warmed),
            (self.loading, self.loaded), (self.running, self.finish),
        ):  # fmt: skip
            if under_way:
                end()
                return True
        return False

    # -- what it is told --------------------------------------------------------------------------------------------

    def feed(self, event):
        for action in self.machine.handle(event, self.now):
            self.log.append(action)
            getattr(self, f"_{type(action).__name__.lower()}")(action)
        assert self.machine.held == self.used, (self.machine.held, self.used)
        assert self.machine.sessions_held == sum(self.sessions.values())

    @property
    def used(self):
        return sum(self.sessions.values()) + sum(self.plaintexts.values())

    def _busy(self, name):
        return any(name == held for _, held in self.running)

    def _grant(self, action):
        assert self.waiting.pop(action.ticket) == action.name
        assert action.name in self.sessions
        assert action.name not in self.loading
        assert action.name not in self.closing
        self.running.append((action.ticket, action.name))
        self.granted.append((action.ticket, action.name))

    def _refuse(self, action):
        assert self.waiting.pop(action.ticket) == action.name
        self.refused.append((action.ticket, action.reason))
        if action.reason == "room":
            item = self.items[action.name]
            need = item.session + (0 if item.blob in self.plaintexts else item.plaintext)
            pinned = sum(size for name, size in self.sessions.items() if name in self.pins - {action.name})
            shared = {self.made_of[name] for name in self.pins - {action.name} if name in self.made_of} - {item.blob}
            pinned += sum(self.plaintexts[blob] for blob in shared)
            own = self.plaintexts.get(item.blob, 0)
            assert pinned
            assert 2 * need + own + pinned > self.budget
        elif action.reason == "gone":
            assert action.name not in self.items

    def _load(self, action):
        name, item = action.name, self.items[action.name]
        assert name not in self.sessions, "loaded twice"
        assert action.held == (item.blob in self.plaintexts)
        assert item.blob not in self.dropping
        assert item.blob not in self.warming
        assert len(self.loading) < self.lanes
        self.loads += 1
        self.sessions[name] = item.session
        if action.keep and not action.held:
            self.plaintexts[item.blob] = item.plaintext
        self.loading[name] = (item, action.held, action.keep)
        own = item.session + self.plaintexts.get(item.blob, 0)
        assert self.used <= self.budget or self.used == own, "more than the budget"

    def _warm(self, action):
        item = self.items[action.name]
        assert item.blob == action.blob
        assert item.blob not in self.plaintexts
        self.plaintexts[item.blob] = item.plaintext
        self.warming[item.blob] = action.name
        assert self.used <= self.budget

    def _demote(self, action):
        name = action.name
        assert name in self.sessions
        assert name not in self.closing
        assert name not in self.loading, "closed while it was loading"
        assert not self._busy(name), "closed while it was busy"
        self.closing.add(name)

    def _evict(self, action):
        assert action.blob in self.plaintexts
        assert action.blob not in self.dropping
        assert action.blob not in {item.blob for item, _, _ in self.loading.values()}
        assert action.blob not in self.made_of.values(), "dropped under a session that is made of it"
        self.dropping.add(action.blob)


def item(size=10, *, plaintext=0, blob=None, shares=False, load_s=0.02, read_s=0.005):
    """Something to install."""
    return Item(blob or "", size, plaintext, shares, load_s, read_s)
