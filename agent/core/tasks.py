"""The maintenance tasks of core: what each does and how its outcome is told. They run on the operations' thread."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from agent.base.clock import TrustedClock, iso
from agent.base.errors import AgentError
from agent.operations.drift import Recheck, recheck
from agent.operations.install import Installer
from agent.operations.maintain import Maintenance
from agent.operations.plan import GoOn, Result, Task
from agent.store.store import Store
from agent.trust.wants import DelayError

_LEAST_FREE = 0.05
#: JEDEC eMMC: life_time is in tenths of the rated wear (0x0a = 90 to 100 %), pre_eol 3 is urgent.
_WORN = 9


@dataclass(frozen=True, slots=True)
class Means:
    """What the tasks use. ``ask`` runs arrays through what serves a model; ``certificate_ends`` is link's word.

    ``look`` brings the repository's metadata up to date: when each role ends, or None where there is none.
    ``ran`` keeps what came of a golden set, ``kept`` has it written.
    """

    store: Store
    installer: Installer
    maintenance: Maintenance
    clock: TrustedClock
    ask: Callable[[str, str, Mapping[str, Any]], Mapping[str, Any]]
    certificate_ends: Callable[[], str | None]
    look: Callable[[GoOn], Mapping[str, datetime] | None]
    ran: Callable[[str, str, Recheck], None] = lambda model, version, found: None
    kept: Callable[[], None] = lambda: None


def tasks(means: Means) -> list[Task]:
    """The table."""
    return [
        Task("scrub", "verify every encrypted file", lambda c: c.scrub_h, lambda go_on: _scrub(means, go_on)),
        Task("sweep", "delete what nothing needs", lambda c: c.sweep_h, lambda go_on: _sweep(means)),
        Task("golden", "run the golden sets again", lambda c: c.golden_h, lambda go_on: _golden(means, go_on)),
        Task(
            "remeasure", "try again what has changed", lambda c: c.remeasure_h, lambda go_on: _remeasure(means, go_on)
        ),
        Task("ages", "ages of keys and certificate", lambda c: c.ages_h, lambda go_on: _ages(means)),
        Task("disk", "free space and wear", lambda c: c.disk_h, lambda go_on: _disk(means.store.root)),
        Task("clock", "whether the clock can be trusted", lambda c: c.clock_h, lambda go_on: _clock(means.clock)),
        Task("repository", "what the operator publishes", lambda c: c.repository_h, lambda go_on: _look(means, go_on)),
    ]


def _scrub(means: Means, go_on: GoOn) -> Result:
    found = means.maintenance.verify(lambda event: go_on())
    data = {"blobs": found["blobs"], "bytes": found["bytes"], "damaged": len(found["damaged"])}
    names = ", ".join(f"{blob['model']} {blob['version']} {blob['part']}" for blob in found["damaged"][:5])
    return Result(found["ok"], f"damaged: {names}" if names else f"{found['blobs']} blobs are whole", data)


def _sweep(means: Means) -> Result:
    found = means.maintenance.gc()
    return Result(True, f"{found['files']} files deleted", found)


def _golden(means: Means, go_on: GoOn) -> Result:
    """Every active model against its golden set: a drift is an answer that would not pass the trial any more."""
    rows: dict[str, Any] = {}
    bad: list[str] = []
    for name, model in means.store.document.models.items():
        go_on()
        if model.active is None:
            continue
        version = model.active
        try:
            found = recheck(
                model.versions[version],
                means.store.read,
                lambda arrays: means.ask(name, version, arrays),  # noqa: B023
            )
        except AgentError as error:
            go_on()
            rows[name] = {"error": str(error)[:200]}
            bad.append(name)
            continue
        if found is not None:
            means.ran(name, version, found)
            rows[name] = {"metric": found.metric, "value": found.value, "before": found.before, "ok": found.ok}
            if not found.ok:
                bad.append(name)
    if rows:
        means.kept()
    text = f"drifted: {', '.join(bad[:10])}" if bad else f"{len(rows)} models answer as their golden sets say"
    return Result(not bad, text, {"models": dict(list(rows.items())[:200])})


def _remeasure(means: Means, go_on: GoOn) -> Result:
    changed = means.installer.review(lambda event: go_on())
    text = "; ".join(f"{name}: {', '.join(why)}" for name, why in list(changed.items())[:5])
    return Result(True, text or "what was measured still holds", {"tried": {k: list(v) for k, v in changed.items()}})


def _ages(means: Means) -> Result:
    """The device secret's file tells when it was made; a credential does not. Link tells when its certificate ends."""
    data: dict[str, Any] = {"key": means.store.secret.key_id, "key_source": means.store.secret.source}
    path = means.store.root.parent / "keys" / means.store.secret.name
    if means.store.secret.source == "file" and path.exists() and means.clock.trusted():
        made = os.stat(path).st_mtime
        data["key_days"] = max(0, int((means.clock.clock.now().timestamp() - made) // 86_400))
    ends = means.certificate_ends()
    data["certificate_ends"] = ends
    text = f"key {data.get('key_days', '?')} days old" + (f", certificate until {ends}" if ends else "")
    return Result(True, text, data)


def _disk(root: Path) -> Result:
    space = os.statvfs(root)
    free = space.f_bavail / max(1, space.f_blocks)
    data: dict[str, Any] = {"free_mb": space.f_bavail * space.f_frsize >> 20, "free_share": round(free, 3)}
    wear = flash_wear()
    data["wear"] = wear
    worn = [name for name, tenths in wear.items() if tenths >= _WORN]
    text = f"{data['free_mb']} MB free" + (f", worn: {', '.join(worn)}" if worn else "")
    return Result(free >= _LEAST_FREE and not worn, text, data)


def flash_wear(root: Path = Path("/sys")) -> dict[str, int]:
    """Tenths of its rated life that each eMMC has used, by device: sysfs ``life_time``. SD cards do not tell."""
    found: dict[str, int] = {}
    for path in sorted(root.glob("class/block/mmcblk*/device/life_time"))[:8]:
        try:
            values: Sequence[str] = path.read_text("ascii", "replace").split()
            found[path.parts[-3]] = max(int(value, 16) for value in values[:2])
        except (OSError, ValueError):
            continue
    return found


def _look(means: Means, go_on: GoOn) -> Result:
    """A repository that cannot be reached is no fault of the device's; one that is not to be believed must be told."""
    try:
        ends = means.look(go_on)
    except DelayError as error:
        go_on()
        return Result(True, f"not looked at: {error.code}", {"reason": str(error)})
    if ends is None:
        return Result(True, "there is none for this device", {})
    until = {role: iso(moment) for role, moment in ends.items()}
    return Result(True, f"holds until {min(until.values())}", {"until": until})


def _clock(clock: TrustedClock) -> Result:
    trusted = clock.trusted()
    return Result(trusted or clock.trust == "never", "trusted" if trusted else "nobody vouches for the clock", {})
