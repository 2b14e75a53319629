"""The fleet as its books know it: one view a device, for lists, filters and the live table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from agent.base.errors import NotFoundError
from agent.fleet.books import Books
from agent.fleet.documents import Outcome
from agent.fleet.filters import Filter
from agent.fleet.registry import Device
from agent.fleet.words import Word

#: By what groups are counted.
GROUPED = ("board", "profile", "agent", "health")


def views(books: Books) -> dict[str, dict[str, Any]]:
    """All devices, as filters look at them: what each said last, and when it was last heard of."""
    said = {kind: books.words.words(kind) for kind in ("info", "reported", "status")}
    alerts = Counter(device for device, _, _ in books.words.alerts())
    return {
        device.name: _view(device, {kind: words.get(device.name) for kind, words in said.items()}, alerts[device.name])
        for device in books.registry.devices()
    }


def _view(device: Device, said: Mapping[str, Word | None], alerts: int) -> dict[str, Any]:
    heard = [word.received for word in said.values() if word is not None]
    return {
        "device": device.name,
        "epoch": device.epoch,
        "keyid": device.identity.keyid,
        "origin": device.origin,
        "enrolled": device.enrolled,
        "certificate_until": device.certificate_until,
        "serial": device.serial,
        "revoked": device.revoked,
        "heard": max(heard, default=None),
        "alerts": alerts,
        **{kind: None if word is None else dict(word.payload) for kind, word in said.items()},
    }


def select(views: Mapping[str, Mapping[str, Any]], names: Sequence[str], filters: Sequence[Filter]) -> list[str]:
    """The devices that are named, or all; of these those that every filter matches. NotFoundError for a name."""
    for name in names:
        if name not in views:
            raise NotFoundError(f"cannot find device '{name}': it is not enrolled", hint="edge-fleet devices list")
    chosen = dict.fromkeys(names) if names else views
    return [name for name in chosen if all(each.matches(views[name]) for each in filters)]


def row(view: Mapping[str, Any]) -> dict[str, Any]:
    """One device in a few words; None for what it has not said."""
    info, reported = view["info"] or {}, view["reported"] or {}
    facts = info.get("facts") or {}
    return {
        "device": view["device"],
        "online": (view["status"] or {}).get("online"),
        "health": reported.get("health"),
        "board": facts.get("board") or facts.get("cpu_model"),
        "profile": info.get("profile"),
        "agent": info.get("agent_version"),
        "epoch": view["epoch"],
        "alerts": view["alerts"],
        "heard": view["heard"],
    }


def groups(rows: Iterable[Mapping[str, Any]]) -> list[tuple[str, str, int]]:
    """Filters that tell devices apart, with how many each picks: field, value, count."""
    counted = Counter((field, str(row[field])) for row in rows for field in GROUPED if row[field] is not None)
    return [
        (field, value, count)
        for (field, value), count in sorted(
            counted.items(), key=lambda item: (GROUPED.index(item[0][0]), -item[1], item[0][1])
        )
    ]


def job_document(outcome: Outcome) -> dict[str, Any]:
    """One job on one device, for ``--json``."""
    document, said = outcome.document, outcome.said
    return {
        "job": document.job_id,
        "device": document.device,
        "epoch": document.epoch,
        "op": document.op,
        "class": document.kind,
        "lane": document.lane,
        "args": dict(document.args),
        "cancels": list(document.cancels),
        "generation": document.generation,
        "seq": document.seq,
        "given": document.given,
        "published": document.published,
        "note": document.note,
        "state": outcome.state,
        "over": outcome.over,
        "heard": outcome.received,
        "said": None if said is None else said.model_dump(mode="json", exclude_none=True),
    }


def tally(outcomes: Iterable[Outcome]) -> str:
    """``3 succeeded, 1 running``."""
    counted = Counter(outcome.state for outcome in outcomes)
    return ", ".join(f"{count} {state}" for state, count in counted.most_common())


def why(outcome: Outcome) -> str:
    """Why a job is where it is, as far as somebody has said so."""
    if outcome.said is not None and outcome.said.error is not None:
        return f"{outcome.said.error.code}: {outcome.said.error.text}"
    return outcome.document.note
