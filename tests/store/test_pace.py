"""A disk that has become slow is named, and one that is quick again no longer."""

from __future__ import annotations

import pytest

from agent.store.pace import LONGEST_PAUSE_S, SLOWEST_BYTES_S, Pace, is_slow


class Watch:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


@pytest.mark.parametrize(
    ("size", "seconds", "slow"),
    [
        (0, 0.0, False),
        (0, LONGEST_PAUSE_S, False),
        (0, LONGEST_PAUSE_S + 0.1, True),
        (100 * SLOWEST_BYTES_S, 100.0, False),
        (100 * SLOWEST_BYTES_S, 104.0, True),
    ],
)
def test_a_pause_and_a_poor_card_are_no_fault_and_more_is(size: int, seconds: float, slow: bool) -> None:
    assert is_slow(size, seconds) is slow


def test_each_kind_of_work_speaks_for_itself_and_takes_its_word_back() -> None:
    watch = Watch()
    pace = Pace(watch)
    for doing, size, seconds in (("writing a model", 2_000_000, 10.0), ("saving the catalog", 0, 0.1)):
        with pace.timed(doing, size):
            watch.seconds += seconds
    assert pace.slow() == ("writing a model took 10.0 s for 2.0 MB",)
    pace.note("saving the catalog", 0, 4.0)
    assert pace.slow()[1] == "saving the catalog took 4.0 s"
    pace.note("writing a model", 2_000_000, 0.5)
    assert pace.slow() == ("saving the catalog took 4.0 s",)


def test_what_does_not_end_is_told_while_it_lasts() -> None:
    watch = Watch()
    pace = Pace(watch)
    with pace.timed("reading a model", SLOWEST_BYTES_S):
        watch.seconds += LONGEST_PAUSE_S
        assert pace.slow() == ()
        watch.seconds += 60
        assert pace.slow() == ("reading a model has taken 63.0 s for 1.0 MB until now",)
    assert pace.slow() == ("reading a model took 63.0 s for 1.0 MB",)


def test_what_fails_tells_nothing_of_the_pace() -> None:
    watch = Watch()
    pace = Pace(watch)

    def fail() -> None:
        with pace.timed("reading a model", 1):
            watch.seconds += 60
            raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        fail()
    assert pace.slow() == ()
