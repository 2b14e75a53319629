"""Where wants wait for somebody to bring their bytes.

``fetch`` and ``fetch_file`` block the thread that needs the bytes; whoever brings them calls ``put`` from another
thread, which writes and hashes them. Invariants: not one byte more than a want takes is kept, whoever brings it; a want
ends, by its bytes, by a word why not, by its time or because nobody needs it any more, and then nothing is written.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from agent.base.errors import AgentError, DamagedError, NotFoundError, TryLaterError
from agent.trust.landing import File, Landing, Memory, Piece
from agent.trust.wants import Delay, DelayError, DeliveryError, Want

#: How often whoever waits is asked whether to go on.
_TURN_S = 0.5


@dataclass(frozen=True, slots=True)
class Taken:
    """What became of bytes that were brought: where the next belong, and whether there are any."""

    offset: int
    done: bool


@dataclass(slots=True, eq=False)
class _Waiting:
    want: Want
    landing: Landing
    #: Held while bytes are written: whoever ends the want waits for them.
    lock: threading.Lock = field(default_factory=threading.Lock)
    error: AgentError | None = None
    ended: bool = False

    @property
    def shown(self) -> Want:
        return replace(self.want, offset=self.landing.offset)


class Desk:
    """See the module. ``fetch`` is for what fits into memory (metadata, manifests), ``fetch_file`` for payloads."""

    def __init__(self, most_at_once: int = 4) -> None:
        self._most_at_once = most_at_once
        self._changed = threading.Condition()
        self._waiting: dict[str, _Waiting] = {}
        self._stopped = False
        self._tell: Callable[[], None] = lambda: None
        #: How often what was brought, and taken, turned out not to be believed.
        self.doubts = 0

    def watch(self, tell: Callable[[], None]) -> None:
        """``tell`` is called, from any thread, whenever other things are wanted than before. It must not block."""
        self._tell = tell

    # -- for whoever needs the bytes ----------------------------------------------------------------------------------

    def fetch(self, want: Want, go_on: Callable[[], None] = lambda: None) -> bytes:
        """See ``agent.trust.wants.Wants``. DelayError; DeliveryError too_long, wrong_content. ``go_on`` as below."""
        landing = Memory(want)
        with self._waiting_for(want, landing) as entry:
            self._await(entry, lambda done: None, go_on)
        return landing.data

    def fetch_file(
        self,
        want: Want,
        path: Path,
        progress: Callable[[int], None] = lambda done: None,
        go_on: Callable[[], None] = lambda: None,
    ) -> None:
        """Return when the wanted bytes lie flushed at ``path``. Those that lie there already are not brought again.

        The want must have ``length`` and ``sha256``. ``progress`` is told how many bytes are here; ``go_on`` is called
        at least each second, and what it raises withdraws the want. DeliveryError too_long, wrong_content: the file is
        deleted. DelayError, TryLaterError (no space), DamagedError (the disk): what came stays, for the next time.
        """
        file = File(want, path)
        if file.open(go_on):
            file.close()
            progress(file.offset)
            return
        try:
            with self._waiting_for(want, file) as entry:
                self._await(entry, progress, go_on)
        except DeliveryError:
            file.delete()
            raise
        finally:
            file.close()

    def doubt(self) -> None:
        """What was brought last is not believed, though it could not be told from its bytes: others may have better."""
        self.doubts += 1
        self._tell()

    @contextmanager
    def _waiting_for(self, want: Want, landing: Landing) -> Iterator[_Waiting]:
        entry = _Waiting(want, landing)
        with self._changed:
            if self._stopped:
                raise DelayError("stopped", "the agent is stopping")
            if len(self._waiting) >= self._most_at_once or want.id in self._waiting:
                raise DelayError("too_many", f"{len(self._waiting)} things are being fetched already")
            self._waiting[want.id] = entry
            self._changed.notify_all()
        self._tell()
        try:
            yield entry
        finally:
            with self._changed:
                entry.ended = True
                del self._waiting[want.id]
            self._tell()
            with entry.lock:  # a piece that is being written lands first
                pass

    def _await(self, entry: _Waiting, progress: Callable[[int], None], go_on: Callable[[], None]) -> None:
        """Until the want has ended. Raises what ended it."""
        end = time.monotonic() + entry.want.within_s
        told = -1
        while True:
            left_s = end - time.monotonic()
            with self._changed:
                self._changed.wait_for(lambda: entry.ended, max(0.0, min(left_s, _TURN_S if told >= 0 else 0.0)))
                ended = entry.ended
            if entry.landing.offset != told:
                told = entry.landing.offset
                progress(told)
            if ended:
                break
            go_on()
            if left_s <= 0:
                raise DelayError("too_slow", f"{entry.want.path} did not come within {entry.want.within_s:g} s")
        if entry.error is not None:
            raise entry.error

    # -- for whoever brings them --------------------------------------------------------------------------------------

    def open_wants(self, timeout_s: float = 0.0) -> tuple[Want, ...]:
        """What is waited for now; with a timeout, waits so long for there to be something."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or self._open(), timeout_s)
            return tuple(entry.shown for entry in self._open())

    def put(self, want_id: str, offset: int, pieces: Iterable[Piece], *, last: bool = True) -> Taken:
        """Bring bytes of a want, those from ``offset`` on, piece by piece; ``last``: there are no more.

        NotFoundError when nobody waits for it (any more). OffsetError when other bytes are waited for. DeliveryError
        when they are too many, or not those wanted: whoever waits is told the same, as is what the disk says. What
        ``pieces`` raises passes through; what came before it is taken, and the want stays open.
        """
        entry = self._entry(want_id)
        for piece in pieces:  # outside of the lock, since the source may be slow
            with self._landing(entry) as landing:
                landing.write(offset, piece)
            offset += len(piece)
        with self._landing(entry) as landing:
            done = landing.finish(offset, last)
            if done:
                self._end(entry, None)
        return Taken(offset, done)

    def fail(self, want_id: str, code: Delay, text: str) -> None:
        """Say that the bytes will not come. NotFoundError when nobody waits for them."""
        self._end(self._entry(want_id), DelayError(code, text))

    def stop(self) -> None:
        """Whoever waits is told, and nobody begins to wait again."""
        with self._changed:
            self._stopped = True
            entries = self._open()
            self._changed.notify_all()
        for entry in entries:
            self._end(entry, DelayError("stopped", "the agent is stopping"))

    def _entry(self, want_id: str) -> _Waiting:
        with self._changed:
            entry = self._waiting.get(want_id)
            if entry is None or entry.ended:
                raise _nobody(want_id)
            return entry

    @contextmanager
    def _landing(self, entry: _Waiting) -> Iterator[Landing]:
        with entry.lock:
            if entry.ended:
                raise _nobody(entry.want.id)
            try:
                yield entry.landing
            except (DeliveryError, TryLaterError, DamagedError) as error:
                self._end(entry, error)
                raise

    def _end(self, entry: _Waiting, error: AgentError | None) -> None:
        with self._changed:
            if not entry.ended:
                entry.error, entry.ended = error, True
            self._changed.notify_all()

    def _open(self) -> list[_Waiting]:
        return [entry for entry in self._waiting.values() if not entry.ended]


def _nobody(want_id: str) -> NotFoundError:
    return NotFoundError(f"cannot take '{want_id}': nobody waits for it")
