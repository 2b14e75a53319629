"""The result cache: keys, kept answers, the balance, flights, favourites; each alone, with a clock of its own."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from agent.base.errors import DeadlineError, PeerError
from agent.infer.books import Books
from agent.infer.cache import ENTRY_BYTES, Cache
from agent.infer.cache_key import INDIFFERENT, Source, answer_key, request_digest
from agent.infer.caching import Around, Caching
from agent.infer.favourites import KEPT_BYTES, MOST, Favourites
from agent.infer.flights import Flights
from agent.infer.paying import LEAST_REST, MOST_REST, PROBE, REST_S, WINDOW, Paying
from agent.infer.shelf import CacheLimits, Option, Served, Shelf
from agent.infer.tensors import InferRequest, InferResponse, RequestedOutput, Tensor

# -- keys -------------------------------------------------------------------------------------------------------------

NUMBERS = {"FP32": "<f4", "FP16": "<f2", "BF16": "<u2", "INT32": "<i4", "INT8": "<i1", "UINT8": "<u1", "BOOL": "?"}
names = st.text(max_size=3)


@st.composite
def tensors(draw):
    """Small ones of all kinds, alike enough that a careless encoding would confuse them."""
    datatype = draw(st.sampled_from([*NUMBERS, "BYTES"]))
    shape = draw(st.sampled_from([(), (0,), (1,), (2,), (4,), (1, 2), (2, 1), (2, 2), (1, 4), (0, 2)]))
    count = int(np.prod(shape))
    if datatype == "BYTES":
        array = np.empty(count, object)
        array[:] = draw(st.lists(st.binary(max_size=5), min_size=count, max_size=count))
    else:
        dtype = np.dtype(NUMBERS[datatype])
        values = draw(st.binary(min_size=count * dtype.itemsize, max_size=count * dtype.itemsize))
        array = np.frombuffer(bytes(v & 1 for v in values) if datatype == "BOOL" else values, dtype)
    return Tensor(draw(names), datatype, array.reshape(shape))


values = st.one_of(st.none(), st.booleans(), st.integers(-2, 2), st.sampled_from([0.0, -0.0, 1.0]), names)
requests = st.builds(
    InferRequest,
    st.lists(tensors(), max_size=3).map(tuple),
    st.lists(st.builds(RequestedOutput, names), max_size=2).map(tuple),
    names,
    st.dictionaries(st.one_of(names, st.sampled_from(sorted(INDIFFERENT))), values, max_size=3),
)


def meaning(request):
    """All that matters, as values that compare as they should, without the encoding."""

    def exact(array):
        flat = array.ravel().tolist() if array.dtype.hasobject else array.tobytes()
        return tuple(flat) if isinstance(flat, list) else flat

    return (
        tuple((t.name, t.datatype, t.array.dtype.str, t.array.shape, exact(t.array)) for t in request.inputs),
        tuple(output.name for output in request.outputs),
        frozenset((name, repr(value)) for name, value in request.parameters.items() if name not in INDIFFERENT),
    )


@settings(max_examples=200, deadline=None)
@given(requests, requests)
def test_two_requests_have_one_digest_exactly_when_nothing_that_matters_differs(one, other):
    assert (request_digest(one) == request_digest(other)) == (meaning(one) == meaning(other))
    again = InferRequest(
        tuple(Tensor(t.name, t.datatype, t.array.copy()) for t in one.inputs), one.outputs, "another id",
        {**dict(reversed(one.parameters.items())), "priority": 7, "timeout": 3, "pin": True, "keep_alive": 1},
    )  # fmt: skip
    assert request_digest(again) == request_digest(one)


X = np.arange(6, dtype=np.float32)


def ask(array=X, name="x", datatype="FP32", outputs=(), **parameters):
    return InferRequest(
        (Tensor(name, datatype, array),), tuple(RequestedOutput(o) for o in outputs), parameters=parameters
    )


def strings(*elements):
    array = np.empty(len(elements), object)
    array[:] = elements
    return ask(array, datatype="BYTES")


def test_what_a_careless_key_would_confuse_is_told_apart():
    alike = [
        ask(), ask(X.reshape(2, 3)), ask(X.reshape(3, 2)), ask(X.view("<i4"), datatype="INT32"),
        ask(X.view("<u4"), datatype="UINT32"), ask(name="y"), ask(outputs=["y"]), ask(outputs=["y", "z"]),
        ask(outputs=["z", "y"]), ask(outputs=["yz"]), ask(a=1), ask(a=1.0), ask(a=True), ask(a="1"), ask(a=None),
        ask(b=1), ask(X[::-1]), ask(X * -0.0), ask(X * 0.0), ask(np.zeros(0, np.float32)),
        ask(np.zeros((0, 2), np.float32)), strings(b"ab", b"c"), strings(b"a", b"bc"), strings(b"abc"),
        strings(b"abc", b""), strings(b"", b"abc"), strings(b"\x01\x00\x00\x00a"), ask(np.zeros(2000, np.float32)),
        ask(np.zeros(2001, np.float32)), InferRequest(ask().inputs + ask(name="z").inputs),
        InferRequest(ask(name="z").inputs + ask().inputs), InferRequest(()),
    ]  # fmt: skip
    digests = [request_digest(request) for request in alike]
    assert None not in digests
    assert len(set(digests)) == len(alike)
    assert all(len(digest) == 32 for digest in digests)


def test_the_same_values_have_one_key_however_they_lie_in_memory():
    wide = np.zeros((3000, 2), np.float32)
    wide[:, 0] = np.arange(3000)
    assert request_digest(ask(wide[:, 0])) == request_digest(ask(wide[:, 0].copy()))
    fortran = np.asfortranarray(wide)
    assert request_digest(ask(fortran)) == request_digest(ask(wide))


def test_what_cannot_be_told_apart_has_no_key():
    assert request_digest(ask(a=[1])) is None
    assert request_digest(strings(b"a", "b")) is None
    assert request_digest(ask(np.array([object()]))) is None


def test_the_source_is_part_of_the_key():
    digest = request_digest(ask())
    source = Source("m", "1.0.0", "fp32", "d", "cpu")
    others = [
        Source("n", "1.0.0", "fp32", "d", "cpu"), Source("m", "1.0.1", "fp32", "d", "cpu"),
        Source("m", "1.0.0", "int8", "d", "cpu"), Source("m", "1.0.0", "fp32", "e", "cpu"),
        Source("m", "1.0.0", "fp32", "d", "cuda"), Source("m", "1.0.0", "fp32d", "", "cpu"),
    ]  # fmt: skip
    assert len({answer_key(one, digest) for one in [source, *others]}) == 7
    assert (
        answer_key(source, digest)
        == answer_key(Source(*source), digest)
        != answer_key(source, request_digest(ask(a=1)))
    )


# -- kept answers -----------------------------------------------------------------------------------------------------

MOST_BYTES = 8 * ENTRY_BYTES


class CacheMachine(RuleBasedStateMachine):
    """Beside it: a plain list, searched from end to end at each step."""

    @initialize(ttl=st.sampled_from([1.0, 5.0]))
    def begin(self, ttl):
        self.ttl = ttl
        self.cache = Cache(CacheLimits(ttl, MOST_BYTES))
        self.now = 0.0
        self.reserved = 0
        self.rows = []  # [key, value, size, saved_us, expires, uses, score, order]
        self.age = 0.0
        self.stored = 0

    def row(self, key):
        return next((row for row in self.rows if row[0] == key), None)

    def expire(self):
        self.rows = [row for row in self.rows if row[4] > self.now]

    def evict(self, size):
        while sum(row[2] for row in self.rows) > size and self.rows:
            least = min(self.rows, key=lambda row: (row[6], row[7]))
            self.age = max(self.age, least[6])
            self.rows.remove(least)

    @rule(key=st.integers(0, 11).map(lambda n: bytes([n])), size=st.integers(0, 9 * 1024), us=st.integers(0, 5000),
          uses=st.integers(0, 5))  # fmt: skip
    def put(self, key, size, us, uses):
        self.stored += 1
        took = self.cache.put(key, self.stored, size, us, self.now, uses)
        self.expire()
        self.rows = [row for row in self.rows if row[0] != key]
        size += ENTRY_BYTES
        room = MOST_BYTES - self.reserved
        assert took == (size <= room)
        if took:
            self.evict(room - size)
            uses = max(1, uses)
            score = self.age + uses * max(1, us) / size
            self.rows.append([key, self.stored, size, us, self.now + self.ttl, uses, score, self.stored])

    @rule(key=st.integers(0, 11).map(lambda n: bytes([n])))
    def get(self, key):
        row = self.row(key)
        entry = self.cache.get(key, self.now)
        if row is None or row[4] <= self.now:
            assert entry is None
        else:
            row[5] += 1
            row[6] = self.age + row[5] * max(1, row[3]) / row[2]
            assert (entry.value, entry.uses, entry.saved_us) == (row[1], row[5], row[3])

    @rule(seconds=st.sampled_from([0.1, 0.5, 1.0, 3.0]))
    def pass_time(self, seconds):
        self.now += seconds

    @rule()
    def tick(self):
        due = self.cache.expire(self.now)
        self.expire()
        assert due == min((row[4] for row in self.rows), default=None)

    @rule(size=st.integers(0, MOST_BYTES))
    def reserve(self, size):
        self.reserved = size
        self.cache.reserve(size)
        self.evict(MOST_BYTES - size)

    @rule(size=st.integers(0, MOST_BYTES))
    def shrink(self, size):
        self.cache.shrink(size)
        self.evict(size)

    @rule()
    def clear(self):
        self.cache.clear()
        self.rows = []

    @invariant()
    def both_hold_the_same(self):
        if not hasattr(self, "cache"):
            return
        live = [row for row in self.rows if row[4] > self.now]
        assert all(row[0] in self.cache for row in live)
        held = sum(row[2] for row in self.rows)
        assert len(self.cache) >= len(live)
        assert self.cache.size + self.cache.reserved <= MOST_BYTES
        if len(self.cache) == len(self.rows):
            assert self.cache.size == held


CacheMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
TestCache = CacheMachine.TestCase


def cache(size=10 * ENTRY_BYTES, ttl=60.0):
    return Cache(CacheLimits(ttl, size))


def test_what_saves_more_for_its_bytes_stays_and_what_is_not_used_for_long_goes_all_the_same():
    kept = cache(4 * ENTRY_BYTES)
    for _ in range(2):
        kept.put(b"dear", 1, 0, 50_000, 0.0)
    for number in range(300):
        kept.put(b"%d" % number, number, 0, 1000, 0.0)
        if number == 50:
            assert b"dear" in kept  # though everything else came later
    assert b"dear" not in kept
    assert len(kept) == 4
    assert kept.counts.evicted == 297


def test_a_flood_of_answers_that_come_once_stays_within_the_bytes_and_leaves_no_trace():
    kept = cache(64 * ENTRY_BYTES, ttl=1.0)
    for number in range(5000):
        kept.put(number.to_bytes(32, "little"), None, 100, 10, number * 0.1)
        assert kept.size <= 64 * ENTRY_BYTES
    assert len(kept._heap) <= 2 * len(kept) + 65
    assert kept.expire(1e6) is None
    assert (len(kept), kept.size) == (0, 0)


def test_an_answer_larger_than_all_the_room_displaces_nobody():
    kept = cache(4 * ENTRY_BYTES)
    kept.put(b"a", 1, 0, 1, 0.0)
    assert not kept.put(b"b", 2, 4 * ENTRY_BYTES, 10**9, 0.0)
    assert b"a" in kept


# -- the balance ------------------------------------------------------------------------------------------------------


def spend(paying, count, cost, saved, now=0.0):
    """So many requests; how many of them were looked up."""
    looked = 0
    for _ in range(count):
        if paying.worth_a_look(now):
            looked += 1
            paying.cost(cost)
            paying.saved(saved)
            paying.looked(now)
    return looked


def test_what_does_not_pay_is_hardly_ever_looked_up_and_what_pays_always():
    assert spend(Paying(), 10_000, cost=10, saved=11) == 10_000
    looked = spend(Paying(), 100_000, cost=10, saved=0)
    assert WINDOW + PROBE < looked < 100_000 * 0.02


def test_it_comes_back_when_requests_repeat_again_and_not_for_a_little():
    paying = Paying()
    spend(paying, WINDOW, cost=10, saved=0)
    assert paying.resting
    spend(paying, LEAST_REST + PROBE, cost=10, saved=15)  # it pays, but not twice
    assert paying.resting
    spend(paying, 2 * LEAST_REST + PROBE, cost=10, saved=25)
    assert not paying.resting
    assert spend(paying, 1000, cost=10, saved=11) == 1000  # once on, it stays on while it pays at all


def test_who_asks_seldom_waits_for_a_probe_no_longer_than_a_while():
    paying = Paying()
    for _ in range(20):
        spend(paying, MOST_REST, cost=10, saved=0)
    assert paying.resting
    assert not paying.worth_a_look(0.0)
    assert paying.worth_a_look(REST_S * MOST_REST / LEAST_REST)


@given(st.lists(st.tuples(st.integers(0, 100), st.integers(0, 100)), min_size=1, max_size=20))
@settings(max_examples=10, deadline=None)
def test_whatever_comes_it_never_stops_probing(steps):
    paying, since = Paying(), 0
    for cost, saved in (steps * 10_000)[:10_000]:
        if paying.worth_a_look(0.0):
            since = 0
            paying.cost(cost)
            paying.saved(saved)
            paying.looked(0.0)
        else:
            since += 1
            assert since <= MOST_REST


# -- flights ----------------------------------------------------------------------------------------------------------


class FlightsMachine(RuleBasedStateMachine):
    """Every ticket has exactly one end."""

    def __init__(self):
        super().__init__()
        self.flights = Flights()
        self.leaders = {}  # key -> ticket
        self.waiting = {}  # key -> tickets in order
        self.tickets = 0

    keys = st.sampled_from([b"a", b"b"])

    @rule(key=keys)
    def board(self, key):
        self.tickets += 1
        leads = self.flights.board(key, self.tickets)
        assert leads == (key not in self.leaders)
        if leads:
            self.leaders[key] = self.tickets
            self.waiting[key] = []
        else:
            self.waiting[key].append(self.tickets)

    @rule(key=keys, data=st.data())
    def leave(self, key, data):
        if self.waiting.get(key):
            ticket = data.draw(st.sampled_from(self.waiting[key]))
            self.waiting[key].remove(ticket)
            self.flights.leave(key, ticket)

    @rule(key=keys)
    def land(self, key):
        if key in self.leaders:
            del self.leaders[key]
            assert self.flights.landed(key) == self.waiting.pop(key)

    @rule(key=keys)
    def fail(self, key):
        if key in self.leaders:
            following = self.waiting[key].pop(0) if self.waiting[key] else None
            assert self.flights.failed(key) == following
            if following is None:
                del self.leaders[key], self.waiting[key]
            else:
                self.leaders[key] = following

    @invariant()
    def one_flight_a_leader(self):
        assert len(self.flights) == len(self.leaders)


TestFlights = FlightsMachine.TestCase
TestFlights.settings = settings(max_examples=20, stateful_step_count=30, deadline=None)


# -- favourites -------------------------------------------------------------------------------------------------------


def test_the_hottest_are_found_in_a_flood_of_what_comes_once():
    favourites = Favourites(0, 60.0)
    for number in range(20_000):
        favourites.seen(b"flood%d" % number, 0.0)
        if number % 20 == 0:
            favourites.seen(b"hot", 0.0)
        if number % 40 == 0:
            favourites.seen(b"warm", 0.0)
    for favourite in favourites.hottest():
        favourite.saved_us = 10
    assert [favourite.digest for favourite in favourites.hottest()[:2]] == [b"hot", b"warm"]
    assert len(favourites) <= MOST


def test_inputs_are_kept_of_what_came_twice_within_the_room_and_the_hotter_take_it_from_the_lesser():
    room = 3 * (KEPT_BYTES + 100)
    favourites = Favourites(room, 60.0)

    def come(name, times):
        for _ in range(times):
            favourite = favourites.seen(name, 0.0)
            favourites.offer(favourite, 100, ask)
        return favourite

    assert come(b"once", 1).request is None
    kept = [come(name, times) for name, times in ((b"a", 2), (b"b", 3), (b"c", 4))]
    assert all(favourite.request is not None for favourite in kept)
    assert favourites.size == room
    assert come(b"d", 2).request is None
    assert come(b"d", 1).request is not None  # three times: more than a
    assert kept[0].request is None
    assert favourites.size == room
    assert come(b"e", 9).request is not None
    large = favourites.seen(b"large", 0.0)
    for _ in range(9):
        favourites.seen(b"large", 0.0)
    assert not favourites.offer(large, room, ask)
    assert favourites.forget(59.0) == 60.0
    assert favourites.forget(60.0) is None
    assert (len(favourites), favourites.size) == (0, 0)


# -- books ------------------------------------------------------------------------------------------------------------


def option(variant="fp32", digest="d", provider="cpu"):
    return Option(f"{variant}@{provider}", variant, "onnx", provider, 1, 1.0, None, digest=digest)


LIMITS = CacheLimits(60.0, 1 << 20)


def served(model="m", version="1.0.0", options=None):
    return Served(model, version, (), (), options or (option(),), cache=LIMITS)


def shelf(*models):
    return Shelf({(m.model, m.version): m for m in models}, {m.model: m.version for m in models})


def response(value=1.0, variant="fp32", backend="cpu", compute_us=5000):
    array = np.full(4, value, np.float32)
    parameters = {"variant": variant, "backend": backend, "cache": "off", "queue_us": 3, "compute_us": compute_us}
    return InferResponse("m", "1.0.0", (Tensor("y", "FP32", array),), "", parameters)


def test_a_book_is_emptied_by_what_changes_answers_and_by_nothing_else():
    told, gone = [], []
    books = Books(lambda changed, book: told.append(changed.version), gone.append)
    first = served()
    books.put(shelf(first))

    def fill():
        book = books.of("m")
        favourite = book.favourites.seen(request_digest(ask()), 0.0)
        book.keep(Source("m", "1.0.0", "fp32", "d", "cpu"), favourite, response(), 0.0)
        assert len(book.cache) == 1
        return book

    book = fill()
    books.put(shelf(first, served("other")))
    assert len(book.cache) == 1
    for change in (
        served(options=(option(digest="e"),)), served(options=(option("int8"), option())), served(version="1.1.0"),
    ):  # fmt: skip
        generation = book.generation
        books.put(shelf(change))
        assert (len(book.cache), book.generation) == (0, generation + 1)
        assert len(book.favourites) == 1  # they are what is re-warmed
        books.put(shelf(first))
        fill()
    assert told == ["1.0.0", "1.0.0", "1.0.0", "1.0.0", "1.1.0", "1.0.0"]
    assert gone == ["other"]
    before = list(told)
    books.put(shelf(replace(first, cache=CacheLimits(5.0, 1 << 20))))
    assert (len(books.of("m").cache), len(books.of("m").favourites)) == (0, 1)
    assert told == [*before, "1.0.0"]
    books.put(shelf(replace(first, cache=None)))
    assert books.of("m") is None
    assert gone == ["other", "m"]


def test_all_books_together_keep_to_their_bound_and_the_least_useful_answers_go_first():
    books = Books(lambda changed, book: None, lambda model: None)
    books.put(shelf(served("quick"), served("slow")))
    for model, compute_us in (("quick", 10), ("slow", 100_000)):
        book = books.of(model)
        for number in range(20):
            favourite = book.favourites.seen(request_digest(ask(a=number)), 0.0)
            source = Source(model, "1.0.0", "fp32", "d", "cpu")
            book.keep(source, favourite, response(compute_us=compute_us), 0.0)
    books.bound(30 * (ENTRY_BYTES + 16), 1.0)
    assert (len(books.of("quick").cache), len(books.of("slow").cache)) == (10, 20)
    books.bound(5 * (ENTRY_BYTES + 16), 1.0)
    assert (len(books.of("quick").cache), len(books.of("slow").cache)) == (0, 5)
    books.bound(0, 1.0)
    assert books.held == 0


def test_a_kept_answer_can_be_changed_by_nobody():
    books = Books(lambda changed, book: None, lambda model: None)
    books.put(shelf(served()))
    book, answer = books.of("m"), response()
    view = np.zeros((4, 4), np.float32)[1]
    answer = replace(answer, outputs=(*answer.outputs, Tensor("z", "FP32", view)))
    source = Source("m", "1.0.0", "fp32", "d", "cpu")
    book.keep(source, book.favourites.seen(b"d" * 32, 0.0), answer, 0.0)
    kept = book.cache.get(answer_key(source, b"d" * 32), 0.0).value
    for tensor in (*kept.outputs, *answer.outputs):
        with pytest.raises(ValueError, match="read-only"):
            tensor.array[0] = 7
    view.base[:] = 7  # whoever owns the memory behind a view
    assert kept.outputs[1].array.tolist() == [0, 0, 0, 0]


# -- sharing a run ----------------------------------------------------------------------------------------------------


class Model:
    """Something that answers when it is told to, and counts."""

    def __init__(self):
        self.runs = []
        self.shelf = shelf(served())
        self.reserved = []
        around = Around(
            resident=lambda _: None, touched=lambda *_: None, replay=lambda *_: self.run(), idle=lambda: True,
            reserve=self.reserved.append, budget_mb=lambda: 100.0,
        )  # fmt: skip
        self.caching = Caching(around)
        self.caching.put(self.shelf)

    async def run(self):
        end = asyncio.get_running_loop().create_future()
        self.runs.append(end)
        return await end

    def ask(self, request=None, deadline=1e12):
        what = self.shelf.find("m")
        return asyncio.ensure_future(self.caching.infer(what, request or ask(), deadline, None, self.run))

    def said(self, task):
        return task.result().parameters["cache"]

    @property
    def counts(self):
        return self.caching.books.of("m").cache.counts


def drive(story):
    async def main():
        model = Model()
        try:
            await asyncio.wait_for(story(model), 20)
        finally:
            model.caching.close()
        assert len(model.caching._flights) == 0

    asyncio.run(main())


async def settle():
    for _ in range(20):
        await asyncio.sleep(0)


def test_equal_requests_share_one_run_and_others_do_not():
    async def story(model):
        same = [model.ask() for _ in range(5)]
        other = model.ask(ask(X + 1))
        await settle()
        assert len(model.runs) == 2
        model.runs[0].set_result(response(1.0))
        model.runs[1].set_result(response(2.0))
        await asyncio.gather(*same, other)
        assert [model.said(task) for task in same] == ["miss", "joined", "joined", "joined", "joined"]
        assert {float(task.result().outputs[0].array[0]) for task in same} == {1.0}
        assert all(task.result().parameters["compute_us"] == 0 for task in same[1:])
        assert float(other.result().outputs[0].array[0]) == 2.0
        hit = model.caching.infer(model.shelf.find("m"), ask(), 0.0, None, model.run)
        assert isinstance(hit, InferResponse)
        assert hit.parameters["cache"] == "hit"
        assert (model.counts.hits, model.counts.misses, model.counts.joined) == (1, 2, 4)
        assert model.counts.saved_us == 5 * 5000

    drive(story)


def test_when_the_leader_fails_the_next_one_leads_and_no_error_is_kept():
    async def story(model):
        asked = [model.ask() for _ in range(3)]
        await settle()
        model.runs[0].set_exception(PeerError("no"))
        await settle()
        assert len(model.runs) == 2
        assert isinstance(asked[0].exception(), PeerError)
        model.runs[1].set_result(response())
        await asyncio.gather(*asked[1:])
        assert [model.said(task) for task in asked[1:]] == ["miss", "joined"]
        last = model.ask(ask(X + 1))
        await settle()
        model.runs[2].set_exception(PeerError("no"))
        await settle()
        assert last.exception() is not None
        again = model.ask(ask(X + 1))
        await settle()
        assert len(model.runs) == 4
        model.runs[3].set_result(response())
        await again
        assert model.said(again) == "miss"

    drive(story)


def test_when_the_leader_is_cancelled_another_leads_and_who_left_is_left_out():
    async def story(model):
        first, second, third = (model.ask() for _ in range(3))
        await settle()
        second.cancel()
        first.cancel()
        await settle()
        assert model.runs[0].cancelled()
        assert len(model.runs) == 2
        model.runs[1].set_result(response())
        await third
        assert model.said(third) == "miss"

    drive(story)


def test_a_follower_that_goes_just_when_it_is_to_lead_passes_it_on():
    async def story(model):
        first, second, third = (model.ask() for _ in range(3))
        await settle()
        model.runs[0].set_exception(PeerError("no"))
        await asyncio.sleep(0)  # the first one has failed, the second one is told, and has not heard it yet
        second.cancel()
        await settle()
        assert isinstance(first.exception(), PeerError)
        assert second.cancelled()
        model.runs[-1].set_result(response())
        await third
        assert model.said(third) == "miss"

    drive(story)


def test_each_waits_no_longer_than_its_own_deadline():
    async def story(model):
        loop = asyncio.get_running_loop()
        first = model.ask()
        hasty = model.ask(deadline=loop.time() + 0.05)
        patient = model.ask()
        await settle()
        with pytest.raises(DeadlineError):
            await hasty
        assert len(model.runs) == 1
        model.runs[0].set_result(response())
        await asyncio.gather(first, patient)
        assert [model.said(first), model.said(patient)] == ["miss", "joined"]

    drive(story)


def test_what_was_asked_before_a_change_is_not_kept_after_it():
    async def story(model):
        asked = model.ask()
        await settle()
        model.caching.put(shelf(served(options=(option(digest="e"),))))
        model.caching.put(model.shelf)  # and back again
        model.runs[0].set_result(response())
        await asked
        assert len(model.caching.books.of("m").cache) == 0
        cleared = model.ask()
        await settle()
        model.caching.clear()
        model.runs[1].set_result(response())
        await cleared
        assert len(model.caching.books.of("m").cache) == 0

    drive(story)


def test_large_inputs_are_hashed_apart_and_far_larger_ones_not_at_all():
    async def story(model):
        large = ask(np.zeros(1 << 18, np.float32))
        first, second = model.ask(large), model.ask(large)
        while not model.runs:
            await asyncio.sleep(0.001)
        await settle()
        model.runs[0].set_result(response())
        await asyncio.gather(first, second)
        assert model.said(first) == "miss"
        assert model.said(second) in ("joined", "hit")
        huge = model.ask(ask(np.zeros(3 << 20, np.float32)))
        await settle()
        model.runs[1].set_result(response())
        await huge
        assert model.said(huge) == "bypass"

    drive(story)


def test_pressure_gives_back_what_is_asked_for_and_the_engine_is_told():
    async def story(model):
        for number in range(10):
            asked = model.ask(ask(a=number))
            await settle()
            model.runs[-1].set_result(response())
            await asked
        one = ENTRY_BYTES + 16
        assert model.reserved[-1] == 10 * one
        assert model.caching.press(3 * one) == 3 * one
        assert model.reserved[-1] == 7 * one
        assert model.caching.press(1 << 30) == 7 * one
        assert model.reserved[-1] == 0

    drive(story)
