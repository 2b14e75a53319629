"""Whether looking up answers pays: what it costs beside what it saves, as measured. Pure; time is an argument.

While it pays, every request is looked up. A window of lookups that cost more than they saved begins a rest, in which
requests go by at no cost. After so many of them, or so long, a short window probes again: it must save twice what it
costs to end the rest, else the next rest is twice as long. So unique requests cost next to nothing.
"""

from __future__ import annotations

#: Lookups after which they are judged; of a probe, fewer.
WINDOW, PROBE = 64, 32
#: Requests that go by in a rest, at least and at most.
LEAST_REST, MOST_REST = 512, 4096
#: The least rest lasts no longer than this, a longer one as many times longer: who asks seldom does not wait for many.
REST_S = 30.0
#: So many times its cost must a probe save.
_CONVINCING = 2.0


class Paying:
    """One model's balance."""

    def __init__(self) -> None:
        self.resting = False
        self._probing = False
        self._cost_us = self._saved_us = 0.0
        self._looked = 0
        self._rest, self._skipped, self._until = LEAST_REST, 0, 0.0

    def worth_a_look(self, now: float) -> bool:
        """Whether the request that has just come shall be looked up."""
        if not self.resting:
            return True
        self._skipped += 1
        if self._skipped <= self._rest and now < self._until:
            return False
        self.resting, self._probing = False, True
        self._begin()
        return True

    def cost(self, us: float) -> None:
        """Hashing, looking up or storing has taken so long."""
        self._cost_us += us

    def saved(self, us: float) -> None:
        """A run of that length was not needed."""
        self._saved_us += us

    def looked(self, now: float) -> None:
        """One lookup is over."""
        self._looked += 1
        if self._looked < (PROBE if self._probing else WINDOW):
            return
        if self._saved_us >= self._cost_us * (_CONVINCING if self._probing else 1.0):
            self._probing, self._rest = False, LEAST_REST
        else:
            self._rest = min(2 * self._rest, MOST_REST) if self._probing else LEAST_REST
            self.resting, self._skipped, self._until = True, 0, now + REST_S * self._rest / LEAST_REST
        self._begin()

    def afresh(self) -> None:
        """Everything has changed: judge anew."""
        self.resting = self._probing = False
        self._rest = LEAST_REST
        self._begin()

    def _begin(self) -> None:
        self._cost_us = self._saved_us = 0.0
        self._looked = 0
