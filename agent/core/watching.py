"""What live requests tell while somebody wants to know: times and failures by version, and when requests ran.

While nobody does, inference is not connected, and a request costs nothing more. For the event loop's thread.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from agent.base.errors import AgentError, DamagedError, DeadlineError, TryLaterError, UnsupportedError
from agent.infer.runtimes.failures import RunError
from agent.operations.probation import Tally

if TYPE_CHECKING:
    from agent.infer.tensors import InferRequest, InferResponse
    from agent.serve.inference import Watch

#: Spans of requests that are kept while something is measured: more than come in one round.
_MOST_SPANS = 4096
#: A request that began before has ended without a word.
_FORGOTTEN_NS = 120 * 10**9

#: Told of each answer that a version under watch has given.
Shadow = Callable[["InferRequest", "InferResponse"], None]


@dataclass(slots=True)
class _Followed:
    version: str
    tally: Tally
    shadow: Shadow | None


class Watching:
    """See ``agent.serve.inference.Watch``. ``connect`` tells inference whom to tell; None: nobody.

    While somebody gives way ``hold`` is called when a request comes, and ``let_go`` when none is left: through
    ``soon``, after what the event loop does now. By then the answer has been sent; who goes on before that may have the
    processor that the app wakes up for.
    """

    def __init__(
        self,
        connect: Callable[[Watch | None], None],
        hold: Callable[[], None] = lambda: None,
        let_go: Callable[[], None] = lambda: None,
        soon: Callable[[Callable[[], None]], object] = lambda act: act(),
    ) -> None:
        self._connect = connect
        self._hold = hold
        self._let_go = let_go
        self._soon = soon
        self._followed: dict[str, _Followed] = {}
        self._measuring = 0
        self._giving_way = False
        self._open: dict[int, None] = {}
        self._spans: deque[tuple[int, int]] = deque(maxlen=_MOST_SPANS)

    # -- who wants to know ----------------------------------------------------------------------------------------

    def follow(self, model: str, version: str, tally: Tally, shadow: Shadow | None = None) -> None:
        """Count into ``tally`` what that version does; whatever else of the model was followed is no more."""
        self._followed[model] = _Followed(version, tally, shadow)
        self._update()

    def unfollow(self, model: str, version: str) -> None:
        """If it is still that version which is followed."""
        followed = self._followed.get(model)
        if followed is not None and followed.version == version:
            del self._followed[model]
            self._update()

    def measure(self, *, on: bool) -> None:
        """Note when requests run, as often as it was asked for."""
        self._measuring += 1 if on else -1
        if not self._measuring:
            self._spans.clear()
        self._update()

    def give_way(self, *, on: bool) -> None:
        """Tell when requests come and when none is left."""
        self._giving_way = on
        self._update()

    def close(self) -> None:
        """Nobody wants to know any more."""
        self._followed.clear()
        self._connect(None)

    def _update(self) -> None:
        if not self._measuring and not self._giving_way:
            self._open.clear()
        if not self._giving_way or not self._open:
            self._let_go()
        self._connect(self if self._followed or self._measuring or self._giving_way else None)

    def spans(self, begin: float, end: float) -> list[tuple[float, float]]:
        """When requests ran between two moments of ``perf_counter``; one that still runs has no end yet."""
        first, last = int(begin * 1e9), int(end * 1e9)
        old = time.perf_counter_ns() - _FORGOTTEN_NS
        for at in [at for at in self._open if at < old]:
            self._close(at)
        found = [(start, stop) for start, stop in self._spans if start < last and stop > first]
        found += [(start, last) for start in self._open if start < last]
        return [(start / 1e9, stop / 1e9) for start, stop in found]

    # -- what inference tells -----------------------------------------------------------------------------------------

    def began(self, at: int) -> None:
        """See ``Watch``."""
        if self._measuring or self._giving_way:
            self._open[at] = None
        if self._giving_way:
            self._hold()

    def ended(self, at: int) -> None:
        """See ``Watch``."""
        if at in self._open:
            self._close(at)
            if self._measuring:
                self._spans.append((at, time.perf_counter_ns()))

    def _close(self, at: int) -> None:
        del self._open[at]
        if not self._open:
            self._soon(self._quiet)

    def _quiet(self) -> None:
        if not self._open:
            self._let_go()

    def answered(self, asked: InferRequest, response: InferResponse) -> None:
        """See ``Watch``."""
        followed = self._followed.get(response.model_name)
        if followed is None or followed.version != response.model_version:
            return
        said = response.parameters
        followed.tally.answered += 1
        if said.get("cache") not in ("hit", "joined") and (took := _milliseconds(said.get("compute_us"))) is not None:
            followed.tally.times.append(took)
            if followed.shadow is not None:
                followed.shadow(asked, response)

    def failed(self, model: str, version: str | None, error: AgentError, *, hurried: bool) -> None:
        """See ``Watch``."""
        followed = self._followed.get(model)
        if followed is not None and version in (None, followed.version) and is_own(error, hurried=hurried):
            followed.tally.failed += 1


def is_own(error: AgentError, *, hurried: bool) -> bool:
    """Whether the model may be to blame, and not surely who asked: it refused values, cannot be had, or is too slow."""
    if isinstance(error, DeadlineError):
        return not hurried
    return isinstance(error, (RunError, DamagedError, UnsupportedError, TryLaterError))


def _milliseconds(microseconds: Any) -> float | None:
    return microseconds / 1000 if isinstance(microseconds, (int, float)) else None
