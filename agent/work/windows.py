"""Maintenance windows: cron, duration and time zone, as openings in absolute time. Pure but for the zones' own files.

cron is read as Debian's cron reads it (by ``cronsim``): a fixed hour that the change to summer time leaves out happens
at the change, and one that comes twice in autumn happens the first time. A duration is absolute: it is as long on the
day of a change as on any other. An opening holds its first instant and not its last.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone, tzinfo
from zoneinfo import ZoneInfo

from agent.base.errors import PeerError
from agent.work.jobs import WindowSpec

#: A window that does not open within this is a mistake, and a job that waits for it would never end.
LONGEST_WAIT = timedelta(days=366)
_MAX_CRON = 120
_MAX_TZ = 64
_MAX_DURATION_S = 7 * 86_400


@dataclass(frozen=True, slots=True)
class Opening:
    """Both ends are aware, in UTC."""

    opens: datetime
    closes: datetime

    def holds(self, moment: datetime) -> bool:
        """Whether the window is open then."""
        return self.opens <= moment < self.closes


def opening_at(spec: WindowSpec, moment: datetime) -> Opening:
    """The opening that holds ``moment`` or else the next one. PeerError: no such cron or zone, or none in a year."""
    duration = _duration(spec)
    for opens in _matches(spec, moment - duration):
        if opens > moment + LONGEST_WAIT:
            break
        if opens + duration > moment:
            return Opening(opens, opens + duration)
    raise _wrong(spec, "it does not open within a year")


def _matches(spec: WindowSpec, after: datetime) -> Iterator[datetime]:
    """Whole minutes above ``after`` at which the cron matches."""
    from cronsim import CronSim, CronSimError  # noqa: PLC0415 - most devices never see a window

    zone = _zone(spec)
    if len(spec.cron) > _MAX_CRON or len(spec.cron.split()) != 5:
        raise _wrong(spec, "cron has five fields: minute, hour, day, month, day of the week")
    try:
        matches = CronSim(spec.cron, after.astimezone(zone))
    except (CronSimError, ValueError) as error:
        raise _wrong(spec, str(error)) from error
    for match in matches:
        yield match.astimezone(timezone.utc)


def _zone(spec: WindowSpec) -> tzinfo:
    if spec.tz == "UTC":
        return timezone.utc  # needs no files
    try:
        return ZoneInfo(spec.tz[:_MAX_TZ])
    except (KeyError, ValueError, OSError) as error:  # a folder of zones, a path out of it, an unknown name
        raise _wrong(spec, f"time zone {spec.tz[:_MAX_TZ]!r} is not known here") from error


def _duration(spec: WindowSpec) -> timedelta:
    if not 0 < spec.duration_s <= _MAX_DURATION_S:
        raise _wrong(spec, f"its duration must be 1 to {_MAX_DURATION_S} seconds")
    return timedelta(seconds=spec.duration_s)


def _wrong(spec: WindowSpec, reason: str) -> PeerError:
    return PeerError(f"cannot use window {spec.cron[:_MAX_CRON]!r}: {reason}")
