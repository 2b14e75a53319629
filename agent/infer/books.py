"""What is kept of all models that have a cache: one book each, and the bound that holds for all of them. Pure.

Invariants: all books together hold no more than they were last bound to; a book is emptied when what its model's
answers depend on has changed, and closed when its model, or its wish for a cache, is gone. Time is an argument.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from agent.infer.cache import Cache
from agent.infer.cache_key import Source, answer_key, held_bytes
from agent.infer.favourites import Favourite, Favourites
from agent.infer.paying import Paying
from agent.infer.shelf import CacheLimits, Served, Shelf
from agent.infer.tensors import InferRequest, InferResponse, Tensor

#: Of a model's room so much may be inputs, where they are wanted for re-warming.
_INPUTS_SHARE = 0.5
#: A request that was not seen for so many lives of an answer is no favourite any more.
_REMEMBERED_LIVES = 10.0
_COUNTED = ("hits", "misses", "joined", "bypassed", "evicted", "expired", "rewarmed")


class Kept(NamedTuple):
    """An answer in memory; nobody can change its arrays."""

    outputs: tuple[Tensor, ...]
    parameters: dict[str, Any]


@dataclass(slots=True)
class Book:
    """Everything about one model. ``state``: what its answers depend on beside the request."""

    limits: CacheLimits
    state: tuple[Any, ...]
    cache: Cache[Kept]
    favourites: Favourites
    paying: Paying = field(default_factory=Paying)
    #: Rises with each change of the model: what was asked for before is not kept.
    generation: int = 0

    @property
    def held(self) -> int:
        """Bytes of answers and inputs."""
        return self.cache.size + self.cache.reserved

    def keep(self, source: Source, favourite: Favourite, response: InferResponse, now: float) -> None:
        """An answer that ``source`` has given. Its arrays cannot be changed any more."""
        favourite.saved_us = int(response.parameters.get("compute_us", 0))
        size = held_bytes(response.outputs)
        if size > self.limits.size:
            return
        for tensor in response.outputs:
            tensor.array.flags.writeable = False
        # An array that lies in memory of the runtime's would keep all of that.
        outputs = tuple([tensor if tensor.array.flags.owndata else copied(tensor) for tensor in response.outputs])
        kept = Kept(outputs, {**response.parameters, "queue_us": 0, "compute_us": 0})
        key = answer_key(source, favourite.digest)
        self.cache.put(key, kept, size, favourite.saved_us, now, int(favourite.uses - favourite.error))

    def keep_inputs(self, favourite: Favourite, request: InferRequest) -> bool:
        """For re-warming, where they are among the hottest; whether anything changed. Asked at each doubling alone."""
        uses = int(favourite.uses)
        if not self.limits.prewarm or favourite.request is not None or uses & (uses - 1):
            return False

        def copy() -> InferRequest:
            return InferRequest(tuple(map(copied, request.inputs)), request.outputs, "", dict(request.parameters))

        changed = self.favourites.offer(favourite, held_bytes(request.inputs), copy)
        if changed:
            self.cache.reserve(self.favourites.size)
        return changed

    def empty(self) -> int:
        """Answers go; what is under way is not kept. Returns how many there were."""
        self.generation += 1
        self.paying.afresh()
        return self.cache.clear()


class Books:
    """Books by model. ``changed`` is told of a version whose model was emptied, to re-warm; ``gone`` of a model."""

    def __init__(self, changed: Callable[[Served, Book], None], gone: Callable[[str], None]) -> None:
        self._changed = changed
        self._gone = gone
        self._shelf = Shelf()
        self._books: dict[str, Book] = {}

    @property
    def held(self) -> int:
        """Bytes of everything that is kept."""
        return sum(book.held for book in self._books.values())

    def of(self, model: str) -> Book | None:
        """That model's, if it has one."""
        return self._books.get(model)

    def put(self, shelf: Shelf) -> None:
        """What is installed from now on."""
        self._shelf = shelf
        wanted = {
            model: (served, served.cache)
            for model, version in shelf.active.items()
            if (served := shelf.versions.get((model, version))) is not None and served.cache is not None
        }
        for model in [model for model in self._books if model not in wanted]:
            self._close(model)
        for served, limits in wanted.values():
            self._open(served, limits)

    def _open(self, served: Served, limits: CacheLimits) -> None:
        model, state = served.model, state_of(served)
        book = self._books.get(model)
        if book is None:
            self._books[model] = Book(limits, state, Cache(limits), Favourites(*_room(limits)))
        elif (book.limits, book.state) != (limits, state):
            book.empty()
            book.limits, book.state = limits, state
            book.favourites.resize(*_room(limits))
            book.cache.resize(limits, book.favourites.size)
            self._changed(served, book)

    def _close(self, model: str) -> None:
        self._gone(model)
        self._books.pop(model).empty()

    def clear(self, model: str | None = None) -> int:
        """Forget everything about that model, or about all. Returns how many answers there were."""
        count = 0
        for name, book in self._books.items():
            if model in (None, name):
                self._gone(name)
                count += book.empty()
                book.favourites.clear()
                book.cache.reserve(0)
        return count

    def press(self, size: int) -> int:
        """Give up to so many bytes back: inputs first. Returns how many they were."""
        before = self.held
        for book in self._books.values():
            if self.held > before - size:
                book.favourites.drop_inputs()
                book.cache.reserve(0)
        return before - self.held

    def bound(self, size: int, now: float) -> None:
        """The model whose least worthy answer saves least gives it up, until no more than so many bytes are held."""
        while self.held > size:
            rates = [(rate, model) for model, book in self._books.items() if (rate := book.cache.least_rate(now))]
            if not rates:
                break
            cache = self._books[min(rates)[1]].cache
            cache.shrink(cache.size - 1)

    def expire(self, now: float) -> float | None:
        """Let go of what is over; when there is more of it, None where there is nothing."""
        ends = []
        for book in self._books.values():
            ends += [book.cache.expire(now), book.favourites.forget(now)]
            if book.cache.reserved != book.favourites.size:
                book.cache.reserve(book.favourites.size)
        return min((end for end in ends if end is not None), default=None)

    def source_of(self, served: Served, response: InferResponse) -> Source | None:
        """What has really given that answer; None where it is no longer what is installed."""
        variant, backend = response.parameters.get("variant"), response.parameters.get("backend")
        now = self._shelf.versions.get((served.model, served.version))
        digests = {option.digest for option in served.options if option.variant == variant}
        if now is None or len(digests) != 1 or not isinstance(variant, str) or not isinstance(backend, str):
            return None
        if digests != {option.digest for option in now.options if option.variant == variant}:
            return None
        return Source(served.model, served.version, variant, digests.pop(), backend)

    # -- telling ------------------------------------------------------------------------------------------------------

    def rows(self) -> list[dict[str, Any]]:
        """Statistics of each model."""
        return [self._row(model, book) for model, book in sorted(self._books.items())]

    def _row(self, model: str, book: Book) -> dict[str, Any]:
        counts = book.cache.counts
        return {
            "model": model,
            "version": self._shelf.active.get(model, ""),
            "state": "resting" if book.paying.resting else "on",
            "ttl_s": book.limits.ttl_s,
            "max_bytes": book.limits.size,
            "prewarm": book.limits.prewarm,
            "entries": len(book.cache),
            "bytes": book.held,
            **{name: getattr(counts, name) for name in _COUNTED},
            "hit_rate": round(counts.hit_rate, 4),
            "saved_us": counts.saved_us,
        }

    def hottest(self, model: str, most: int) -> list[dict[str, Any]]:
        """The requests of a model that come most often, by the compute time that they have saved."""
        book = self._books.get(model)
        return [
            {
                "request": favourite.digest.hex()[:16],
                "uses": int(favourite.uses - favourite.error),
                "compute_us": favourite.saved_us,
                "inputs_kept": favourite.request is not None,
            }
            for favourite in (book.favourites.hottest()[:most] if book is not None else ())
        ]


def _room(limits: CacheLimits) -> tuple[int, float]:
    """For favourites: bytes of inputs, and how long they are remembered."""
    return int(limits.size * _INPUTS_SHARE) if limits.prewarm else 0, limits.ttl_s * _REMEMBERED_LIVES


def state_of(served: Served) -> tuple[Any, ...]:
    """What the answers of the active version depend on."""
    return (served.version, tuple((option.candidate, option.digest) for option in served.options))


def copied(tensor: Tensor) -> Tensor:
    """An array of its own, that nobody can change."""
    array = tensor.array.copy()
    array.flags.writeable = False
    return Tensor(tensor.name, tensor.datatype, array)
