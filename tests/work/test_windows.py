"""When windows open: summer time both ways, what no window can be made of, and every minute against a plain reading."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.base.errors import PeerError
from agent.work.jobs import WindowSpec
from agent.work.windows import opening_at


def utc(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=timezone.utc)


def opens(cron: str, at: str, *, tz: str = "Europe/Berlin", duration_s: int = 3600) -> str:
    """When the opening begins that holds at ``at`` or follows it, and whether it holds."""
    opening = opening_at(WindowSpec(cron, duration_s, tz), utc(at))
    assert (opening.closes - opening.opens).total_seconds() == duration_s
    return f"{opening.opens:%Y-%m-%d %H:%M}{' now' if opening.holds(utc(at)) else ''}"


def test_every_night() -> None:
    assert opens("0 3 * * *", "2026-01-10 12:00") == "2026-01-11 02:00"
    assert opens("0 3 * * *", "2026-01-11 01:59:59") == "2026-01-11 02:00"
    assert opens("0 3 * * *", "2026-01-11 02:00") == "2026-01-11 02:00 now"
    assert opens("0 3 * * *", "2026-01-11 02:59:59") == "2026-01-11 02:00 now"
    assert opens("0 3 * * *", "2026-01-11 03:00") == "2026-01-12 02:00"


def test_a_window_over_midnight_and_over_days() -> None:
    assert opens("0 23 * * SAT", "2026-01-12 05:00", tz="UTC", duration_s=86_400 * 2) == "2026-01-10 23:00 now"
    assert opens("0 23 * * SAT", "2026-01-12 23:00", tz="UTC", duration_s=86_400 * 2) == "2026-01-17 23:00"


def test_the_hour_that_summer_time_leaves_out() -> None:
    """On 2026-03-29 at 02:00 it is 03:00 in Berlin: 02:30 happens at the change, once, and lasts as long as ever."""
    assert opens("30 2 * * *", "2026-03-28 12:00") == "2026-03-29 01:00"
    assert opens("30 2 * * *", "2026-03-29 01:59") == "2026-03-29 01:00 now"
    assert opens("30 2 * * *", "2026-03-29 02:00") == "2026-03-30 00:30"
    assert opens("0 3 * * *", "2026-03-29 00:30") == "2026-03-29 01:00"


def test_the_hour_that_comes_twice() -> None:
    """On 2026-10-25 at 03:00 it is 02:00 again in Berlin: 02:30 happens the first time."""
    assert opens("30 2 * * *", "2026-10-24 12:00") == "2026-10-25 00:30"
    assert opens("30 2 * * *", "2026-10-25 01:29") == "2026-10-25 00:30 now"
    assert opens("30 2 * * *", "2026-10-25 01:30") == "2026-10-26 01:30"
    assert opens("30 2 * * *", "2026-10-25 01:45", duration_s=600) == "2026-10-26 01:30"
    # Every hour is every hour: here it does open twice.
    assert opens("30 * * * *", "2026-10-25 00:45", duration_s=600) == "2026-10-25 01:30"


def test_a_window_across_a_change_is_not_longer() -> None:
    assert opens("0 1 * * *", "2026-03-29 03:59", duration_s=4 * 3600) == "2026-03-29 00:00 now"
    assert opens("0 1 * * *", "2026-03-29 04:00", duration_s=4 * 3600) == "2026-03-29 23:00"


@pytest.mark.parametrize(
    "spec",
    [
        WindowSpec("0 3 30 2 *", 3600),
        WindowSpec("0 3 31 4,6,9,11 *", 3600),
        WindowSpec("0 3 29 2 *", 3600),
        WindowSpec("* * */20 * 1L", 3600),
        WindowSpec("", 3600),
        WindowSpec("0 3 * *", 3600),
        WindowSpec("0 3 * * * *", 3600),
        WindowSpec("@daily", 3600),
        WindowSpec("60 3 * * *", 3600),
        WindowSpec("0 3 * * " + "1," * 200 + "1", 3600),
        WindowSpec("0 3 * * *", 0),
        WindowSpec("0 3 * * *", -5),
        WindowSpec("0 3 * * *", 1 << 40),
        WindowSpec("0 3 * * *", 3600, "Mars/Olympus"),
        WindowSpec("0 3 * * *", 3600, ""),
        WindowSpec("0 3 * * *", 3600, "America"),
        WindowSpec("0 3 * * *", 3600, "../../etc/passwd"),
        WindowSpec("0 3 * * *", 3600, "/etc/localtime"),
        WindowSpec("0 3 * * *", 3600, "Europe/\0"),
        WindowSpec("0 3 * * *", 3600, "E" * 10_000),
    ],
    ids=lambda spec: f"{spec.cron[:20]}-{spec.duration_s}-{spec.tz[:16]!r}",
)
def test_what_is_no_window(spec: WindowSpec) -> None:
    with pytest.raises(PeerError, match="cannot use window"):
        opening_at(spec, utc("2026-03-01 00:00"))


def test_a_leap_day_opens_when_one_is_near() -> None:
    assert opens("0 3 29 2 *", "2027-12-01 00:00", tz="UTC") == "2028-02-29 03:00"


NUMBERS = st.integers(0, 60).map(str)
ITEMS = st.one_of(
    NUMBERS,
    st.sampled_from(["*", "*/5", "1-5", "L", "MON", "JAN", "5L", "1#2", "", "-", "/", "1/0", "²", "a" * 30]),
    st.text(st.characters(codec="utf-8"), max_size=5),
)
FIELDS = st.one_of(ITEMS, st.lists(ITEMS, max_size=4).map(",".join), st.tuples(ITEMS, ITEMS).map("/".join))


@settings(deadline=None)
@given(st.lists(FIELDS, min_size=4, max_size=6).map(" ".join), st.sampled_from(["UTC", "Europe/Berlin", "nowhere"]))
def test_any_text_is_a_window_or_an_error(cron: str, tz: str) -> None:
    try:
        opening = opening_at(WindowSpec(cron, 600, tz), utc("2026-03-29 00:30"))
    except PeerError:
        return
    assert opening.closes > utc("2026-03-29 00:30")


@given(
    st.integers(0, 59),
    st.sets(st.integers(0, 23), min_size=1, max_size=3),
    st.integers(1, 5 * 3600),
    st.integers(0, 400 * 86_400),
    st.sampled_from(["Europe/Berlin", "America/New_York", "Australia/Lord_Howe", "Asia/Kolkata", "UTC"]),
)
def test_openings_follow_each_other(minute: int, hours: set[int], duration_s: int, offset_s: int, tz: str) -> None:
    """From any moment: the next is the first that ends later, and nothing was open between."""
    spec = WindowSpec(f"{minute} {','.join(map(str, sorted(hours)))} * * *", duration_s, tz)
    moment = utc("2026-01-01 00:00") + timedelta(seconds=offset_s)
    opening = opening_at(spec, moment)
    assert opening.closes > moment
    assert opening.opens <= moment + timedelta(hours=26)
    if not opening.holds(moment):
        assert opening_at(spec, opening.opens) == opening
        between = moment + (opening.opens - moment) / 2
        assert opening_at(spec, between) == opening
    following = opening_at(spec, opening.closes)
    assert following.opens > opening.opens
