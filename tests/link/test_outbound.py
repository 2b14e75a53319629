"""What waits to be published: which goes first, what gives way, what happens to what the broker does not take."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from agent.link.outbound import ANSWER_S, MOST_BYTES, MOST_MESSAGES, Item, Outcome, Pending
from agent.link.settings import Kind, Message

_numbers = itertools.count(1000)


def message(
    topic: str, kind: Kind = "state", *, number: int | None = None, retain: bool = False, size: int = 1
) -> Message:
    number = next(_numbers) if number is None else number
    return Message(number, topic, kind, retain, kind == "state", bytes(size))


def names(pending: Pending, now: float = 0.0) -> list[str]:
    """Topics in the order in which they would go."""
    found = []
    while (item := pending.take(now)) is not None:
        found.append(item.message.topic)
    return found


def test_answers_go_first_then_states_then_alerts() -> None:
    pending = Pending()
    pending.put([message("up/alert/a", "alert"), message("up/job/1"), message("up/rpc", "rpc"), message("up/job/2")], 0)
    assert names(pending) == ["up/rpc", "up/job/1", "up/job/2", "up/alert/a"]


def test_of_a_retained_topic_only_the_latest_goes() -> None:
    pending = Pending()
    first = message("up/info", number=1, retain=True)
    pending.put([first, message("up/info", number=2, retain=True)], 0)
    item = pending.take(0)
    assert item is not None
    assert item.message.id == 2
    pending.put([message("up/info", number=3, retain=True)], 0)
    pending.taken(item)
    assert names(pending) == ["up/info"], "one that is under way is not taken back, the later one follows"


def test_states_of_a_job_keep_their_order_also_after_a_lost_connection() -> None:
    pending = Pending()
    pending.put([message("up/job/1", number=n) for n in range(3)], 0)
    items = [pending.take(0) for _ in range(3)]
    for item in items:
        pending.lost(item)
    assert [pending.take(0).message.id for _ in range(3)] == [0, 1, 2]


def test_a_refused_topic_waits_longer_and_longer_and_holds_up_nobody() -> None:
    pending = Pending()
    pending.put([message("up/job/1"), message("up/job/2")], 0)
    now, pauses = 0.0, []
    refused = pending.take(now)
    assert names(pending) == ["up/job/2"]
    for _ in range(10):
        pauses.append(pending.refused(refused, now))
        assert pending.take(now + pauses[-1] - 0.1) is None
        now += pauses[-1]
        refused = pending.take(now)
        assert refused.message.topic == "up/job/1"
    assert pauses == sorted(pauses)
    assert pauses[-1] == 600


def test_a_refused_state_never_comes_after_a_later_one() -> None:
    pending = Pending()
    pending.put([message("up/job/1", number=1), message("up/job/1", number=2)], 0)
    first, second = pending.take(0), pending.take(0)
    pending.refused(first, 0)
    pending.taken(second)
    assert names(pending, 1e6) == []


def test_an_answer_that_nobody_waits_for_any_more_is_dropped() -> None:
    pending = Pending()
    pending.put([message("up/rpc", "rpc")], 0.0)
    assert names(pending, ANSWER_S + 1) == []
    assert len(pending) == 0


def test_what_has_to_be_confirmed_gives_way_to_what_would_not_come_again() -> None:
    pending = Pending()
    pending.put([message(f"up/job/{n}") for n in range(MOST_MESSAGES + 10)], 0)
    assert len(pending) == MOST_MESSAGES
    assert pending.left_out
    pending.put([message("up/alert/a", "alert", retain=True)], 0)
    assert "up/alert/a" in names(pending)


def test_what_core_gives_again_is_not_here_twice_and_what_was_left_out_is_asked_for_again() -> None:
    pending = Pending()
    everything = [message(f"up/job/{n}", number=n) for n in range(MOST_MESSAGES + 100)]
    pending.put(everything, 0)
    assert pending.left_out
    assert not pending.has_room
    stuck = pending.take(0)
    pending.refused(stuck, 0)
    while not pending.has_room:
        pending.taken(pending.take(1))
    assert len(pending) > 0, "what is refused does not stand in the way"
    pending.put(everything, 1)
    held = [item.message.id for item in pending._items.values()]
    assert len(held) == len(set(held))


def _messages() -> st.SearchStrategy[Message]:
    return st.builds(
        message,
        st.sampled_from(["up/job/1", "up/job/2", "up/info", "up/alert/a", "up/rpc"]),
        st.sampled_from(["state", "rpc", "alert"]),
        number=st.integers(0, 99),
        retain=st.booleans(),
        size=st.integers(0, 200_000),
    )


@given(st.lists(st.one_of(st.lists(_messages(), max_size=60), st.sampled_from("tldr"), st.floats(0, 100)), max_size=60))
def test_it_is_bounded_and_counts_right_whatever_happens(steps: list) -> None:
    pending, flying, now = Pending(), [], 0.0
    ends = {"t": pending.taken, "l": pending.lost, "r": lambda item: pending.refused(item, now)}
    for step in steps:
        if isinstance(step, list):
            pending.put(step, now)
        elif isinstance(step, float):
            now += step
        elif step == "d":
            item = pending.take(now)
            flying += [item] if item else []
        elif flying:
            ends[step](flying.pop(0))
        assert len(pending) <= MOST_MESSAGES
        held = sum(len(item.message.payload) for item in pending._items.values())
        assert pending._bytes == held <= MOST_BYTES
    while flying:
        pending.taken(flying.pop())
    for item in list(pending._items.values()):
        assert isinstance(item, Item)
        pending.remove(item)
    assert pending._bytes == 0


def test_refusals_are_told_in_words() -> None:
    calls: list[None] = []
    outcome = Outcome(lambda: calls.append(None))
    outcome.note("up/tel/heat", 0x87)
    assert outcome.told() == "the broker refuses up/tel/heat (0x87)"
    assert calls
