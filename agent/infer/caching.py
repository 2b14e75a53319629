"""The result cache around the engine's own way of answering: looks up, lets equal requests share a run, keeps answers.

Opt-in per model (``Served.cache``). A hit is answered at once, on the event loop, without a session; it says what was
said when it was computed, and ``cache: hit``. An answer is kept under what really gave it, and only if nothing about
the model has changed since it was asked for. Errors are never kept. Who may use a model was checked before it came
here. Everything is for the event loop's thread; only the hashing of large inputs happens in one of its own.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

from agent.infer.answering import Resident
from agent.infer.books import Book, Books, state_of
from agent.infer.cache_key import Source, answer_key, request_digest, tensors_bytes
from agent.infer.favourites import Favourite
from agent.infer.flights import Flights
from agent.infer.loading import before, too_late
from agent.infer.rewarming import Rewarming
from agent.infer.shelf import Served, Shelf
from agent.infer.tensors import InferRequest, InferResponse, Tensor

#: Inputs of more bytes are hashed in a thread, so that the loop belongs to all; of far more, not at all.
_AT_ONCE_BYTES, _MOST_BYTES = 256 << 10, 8 << 20
#: All caches together may have so much of the budget for models.
_SHARE = 0.25
#: How often what is over is looked for, at most.
_SWEEP_S = 1.0

Answer = InferResponse | Awaitable[InferResponse]
_Waiter = asyncio.Future["InferResponse | None"]


@dataclass(frozen=True, slots=True)
class Around:
    """What the caches need of the engine. ``resident``: the session that answers now; ``touched``: it was not needed
    for a request that wished to keep it; ``replay``: one run of a kept request; ``idle``: whether nobody runs or
    waits; ``reserve``: told how many bytes are held; ``budget_mb``: for everything in memory."""

    resident: Callable[[Served], Resident | None]
    touched: Callable[[Served, float], None]
    replay: Callable[[Served, InferRequest], Coroutine[Any, Any, InferResponse]]
    idle: Callable[[], bool]
    reserve: Callable[[int], None]
    budget_mb: Callable[[], float]


class Asked(NamedTuple):
    """A request, and how to have it answered anew."""

    served: Served
    request: InferRequest
    deadline: float
    keep_s: float | None
    fresh: Callable[[], Answer]


@dataclass(frozen=True, slots=True)
class _Missed:
    """A request that was looked up and not found, as things stood then."""

    asked: Asked
    book: Book
    generation: int
    favourite: Favourite
    key: bytes


class Caching:
    """The caches of all models that have one."""

    def __init__(self, around: Around, now: Callable[[], float] = time.monotonic) -> None:
        self._around = around
        self._now = now
        self._flights: Flights[_Waiter] = Flights()
        self._hasher: ThreadPoolExecutor | None = None
        self._sweeping: asyncio.TimerHandle | None = None
        self._reserved = 0
        self._rewarming = Rewarming(around, self._keep_replayed)
        self.books = Books(self._changed, self._rewarming.cancel)

    # -- changes ------------------------------------------------------------------------------------------------------

    def put(self, shelf: Shelf) -> None:
        """What is installed from now on. What its answers depend on may have changed: then the model begins anew."""
        self.books.put(shelf)
        self._settle()

    def _changed(self, served: Served, book: Book) -> None:
        self._rewarming.begin(served, book.favourites.hottest())

    def clear(self, model: str | None = None) -> int:
        """Forget everything about that model, or about all. Returns how many answers there were."""
        count = self.books.clear(model)
        self._settle()
        return count

    def press(self, size: int) -> int:
        """The device is short of memory: give up to so many bytes back. Returns how many they were."""
        held = self.books.held
        self.books.press(size)
        self.books.bound(max(0, held - size), self._now())
        self._settle()
        return held - self.books.held

    def give_way(self) -> None:
        """A live request wants to run: what is computed ahead waits."""
        self._rewarming.give_way()

    def close(self) -> None:
        """The end: nothing is kept, nothing computed ahead."""
        self.books.clear()
        if self._sweeping is not None:
            self._sweeping.cancel()
        if self._hasher is not None:
            self._hasher.shutdown()

    def _settle(self) -> None:
        """All caches together keep to their share, the engine knows what they hold, and what is over will go."""
        self.books.bound(int(self._around.budget_mb() * (1 << 20) * _SHARE), self._now())
        held = self.books.held
        if held != self._reserved:
            self._reserved = held
            self._around.reserve(held)
        if self._sweeping is None and held:
            self._sweep_later(self.books.expire(self._now()))

    def _sweep_later(self, end: float | None) -> None:
        if end is not None:
            due_s = max(_SWEEP_S, end - self._now())
            self._sweeping = asyncio.get_running_loop().call_later(due_s, self._sweep)

    def _sweep(self) -> None:
        self._sweeping = None
        end = self.books.expire(self._now())
        self._settle()
        if self._sweeping is None:
            self._sweep_later(end)

    # -- answering ----------------------------------------------------------------------------------------------------

    def infer(
        self,
        served: Served,
        request: InferRequest,
        deadline: float,
        keep_s: float | None,
        fresh: Callable[[], Answer],
    ) -> Answer:
        """The kept answer, that of an equal request under way, or a fresh one. ``keep_s``: its wish for the model."""
        book = self.books.of(served.model)
        if book is None:
            return fresh()
        if not book.paying.worth_a_look(self._now()) or (size := tensors_bytes(request.inputs)) > _MOST_BYTES:
            return _bypassed(book, fresh())
        asked = Asked(served, request, deadline, keep_s, fresh)
        if size > _AT_ONCE_BYTES:
            return self._infer_apart(book, asked)
        begun = time.perf_counter()
        return self._look(book, asked, request_digest(asked.request), begun)

    async def _infer_apart(self, book: Book, asked: Asked) -> InferResponse:
        """As ``infer``, with the inputs hashed in a thread."""
        if self._hasher is None:
            self._hasher = ThreadPoolExecutor(1, thread_name_prefix="hash")
        hashing = asyncio.get_running_loop().run_in_executor(self._hasher, _timed_digest, asked.request)
        digest, took_s = await before(asked.deadline, hashing)
        answer = self._look(book, asked, digest, time.perf_counter() - took_s)
        return answer if isinstance(answer, InferResponse) else await answer

    def _look(self, book: Book, asked: Asked, digest: bytes | None, begun: float) -> Answer:
        resident = self._around.resident(asked.served)
        source = _answering(asked.served, resident)
        if digest is None or source is None:
            return _bypassed(book, asked.fresh())
        now = self._now()
        key = answer_key(source, digest)
        favourite = book.favourites.seen(digest, now)
        entry = book.cache.get(key, now)
        if entry is not None:
            kept, saved_us = entry.value, entry.saved_us
            if book.keep_inputs(favourite, asked.request):
                self._settle()
            if asked.keep_s is not None:
                self._around.touched(asked.served, asked.keep_s)
            book.paying.saved(saved_us)
            self._looked(book, begun)
            return _said(asked, kept.outputs, {**kept.parameters, "cache": "hit"})
        self._looked(book, begun)
        missed = _Missed(asked, book, book.generation, favourite, key)
        answer = asked.fresh()
        return self._computed(missed, answer) if isinstance(answer, InferResponse) else self._share(missed, answer)

    def _looked(self, book: Book, begun: float) -> None:
        book.paying.cost((time.perf_counter() - begun) * 1e6)
        book.paying.looked(self._now())

    async def _share(self, missed: _Missed, answer: Awaitable[InferResponse]) -> InferResponse:
        """The answer of an equal request that is under way, else the own one, which others may wait for."""
        begun = time.perf_counter()
        waiter: _Waiter = asyncio.get_running_loop().create_future()
        try:
            if not self._flights.board(missed.key, waiter):
                theirs = await self._follow(missed, waiter)
                if theirs is not None:
                    return _joined(missed, theirs, begun)
            return await self._lead(missed, answer)
        finally:
            if isinstance(answer, Coroutine):
                answer.close()  # where it was not needed; harmless where it was

    async def _follow(self, missed: _Missed, waiter: _Waiter) -> InferResponse | None:
        """What the leader brings; None when this one is to lead."""
        try:
            # Not wait_for: before Python 3.12 that drops a cancellation which comes together with the result.
            await asyncio.wait([waiter], timeout=max(0.0, missed.asked.deadline - time.monotonic()))
        except asyncio.CancelledError:
            if waiter.done() and waiter.result() is None:
                self._pass_on(missed.key)
            else:
                self._flights.leave(missed.key, waiter)
            raise
        if not waiter.done():
            self._flights.leave(missed.key, waiter)
            raise too_late()
        return waiter.result()

    async def _lead(self, missed: _Missed, answer: Awaitable[InferResponse]) -> InferResponse:
        try:
            response = self._computed(missed, await answer)
        except BaseException:
            self._pass_on(missed.key)
            raise
        for waiter in self._flights.landed(missed.key):
            waiter.set_result(response)
        return response

    def _pass_on(self, key: bytes) -> None:
        """The leader has failed: who has waited longest takes its place."""
        waiter = self._flights.failed(key)
        if waiter is not None:
            waiter.set_result(None)

    # -- keeping ------------------------------------------------------------------------------------------------------

    def _computed(self, missed: _Missed, response: InferResponse) -> InferResponse:
        """It is kept, and says that it was not found."""
        begun = time.perf_counter()
        book, asked = missed.book, missed.asked
        book.cache.counts.misses += 1
        source = self.books.source_of(asked.served, response)
        if source is not None and missed.generation == book.generation:
            book.keep(source, missed.favourite, response, self._now())
            self._settle()
        book.paying.cost((time.perf_counter() - begun) * 1e6)
        return _said(asked, response.outputs, {**response.parameters, "cache": "miss"})

    def _keep_replayed(self, served: Served, favourite: Favourite, response: InferResponse) -> None:
        """One of the hottest requests was answered again, ahead of time."""
        book, source = self.books.of(served.model), self.books.source_of(served, response)
        if book is not None and source is not None and book.state == state_of(served):
            book.keep(source, favourite, response, self._now())
            book.cache.counts.rewarmed += 1
            self._settle()


def _answering(served: Served, resident: Resident | None) -> Source | None:
    """What would answer now: the session that is loaded, else the option that was chosen."""
    if resident is not None:
        option, backend = resident.option, resident.session.provider
    elif served.options:
        option, backend = served.options[0], served.options[0].provider
    else:
        return None
    return Source(served.model, served.version, option.variant, option.digest, backend)


def _joined(missed: _Missed, theirs: InferResponse, begun: float) -> InferResponse:
    """What another request has computed."""
    book, saved_us = missed.book, int(theirs.parameters.get("compute_us", 0))
    book.cache.counts.joined += 1
    book.cache.counts.saved_us += saved_us
    book.paying.saved(saved_us)
    waited_us = int((time.perf_counter() - begun) * 1e6)
    parameters = {**theirs.parameters, "cache": "joined", "queue_us": waited_us, "compute_us": 0}
    return _said(missed.asked, theirs.outputs, parameters)


def _said(asked: Asked, outputs: tuple[Tensor, ...], parameters: dict[str, Any]) -> InferResponse:
    return InferResponse(asked.served.model, asked.served.version, outputs, asked.request.id, parameters)


def _bypassed(book: Book, answer: Answer) -> Answer:
    """A fresh answer that was not looked up. This is the way of most requests that never come again: no detours."""
    book.cache.counts.bypassed += 1
    return _marked(answer) if isinstance(answer, InferResponse) else _mark_later(answer)


def _marked(response: InferResponse) -> InferResponse:
    if isinstance(response.parameters, dict):  # made for this answer alone
        response.parameters["cache"] = "bypass"
    return response


async def _mark_later(answer: Awaitable[InferResponse]) -> InferResponse:
    return _marked(await answer)


def _timed_digest(request: InferRequest) -> tuple[bytes | None, float]:
    begun = time.perf_counter()
    return request_digest(request), time.perf_counter() - begun
