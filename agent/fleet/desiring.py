"""How devices should be: the desired half of the twin, signed and kept by the broker for each device.

Invariants: a version is given out once and only rises within an enrolment; what is desired replaces what was desired
before, it is never added to it unseen: ``changed`` makes the whole of the old one and the change.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from typing import Any

from agent.base.errors import PeerError, RefusedError, TooLargeError
from agent.fleet.books import Books
from agent.fleet.registry import Device
from agent.trust.envelope import Signer, seal
from agent.wire.messages import Desired

#: Kept among the words: what the device was told last, and when.
KIND = "desired"


def parse_settings(words: Sequence[str]) -> dict[str, dict[str, Any]]:
    """``section.key=VALUE`` words as sections. A value is JSON where it can be, else a text. PeerError."""
    found: dict[str, dict[str, Any]] = {}
    for word in words:
        path, equals, value = word.partition("=")
        section, dot, key = path.partition(".")
        if not (equals and dot and section and key):
            raise PeerError(f"cannot read setting '{word}': it is not like log.level=debug")
        if key in found.setdefault(section, {}):
            raise PeerError(f"cannot read settings: '{path}' is given twice")
        found[section][key] = _value(value)
    return found


def _value(text: str) -> Any:
    try:
        found = json.loads(text)
        json.dumps(found, allow_nan=False)  # what Python reads beyond JSON is a text, too
    except (ValueError, RecursionError):
        return text
    return found


def changed(before: Mapping[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    """``before`` with the sections of ``change`` laid over it; a key that becomes null is no longer desired."""
    result: dict[str, Any] = {section: dict(values) for section, values in before.items()}
    for section, values in change.items():
        if not isinstance(values, Mapping):
            raise PeerError(f"cannot desire '{section}': a table is expected")
        result[section] = {**result.get(section, {}), **values}
    kept = {
        section: {key: value for key, value in values.items() if value is not None}
        for section, values in result.items()
    }
    return {section: values for section, values in kept.items() if values}


def desire(
    books: Books, tenant: str, device: Device, config: Mapping[str, Any], signers: Sequence[Signer], now: str
) -> bytes:
    """Store what a device is to be like and give the envelope for ``dn/desired``. Called in a transaction.

    RefusedError when the device obeys none of the keys in changes, PeerError for what JSON cannot say, TooLargeError.
    """
    if not any("change" in device.obeys.get(signer.keyid, ()) for signer in signers):
        raise RefusedError(f"cannot tell '{device.name}' how to be: it obeys none of these keys in class change")
    try:
        json.dumps(config, allow_nan=False)
        message = Desired(
            tenant=tenant,
            device=device.name,
            epoch=device.epoch,
            version=books.registry.next_desired(device.name),
            config=dict(config),
        )
    except (ValueError, TypeError) as error:
        raise PeerError("cannot desire that: it cannot be said in JSON") from error
    try:
        envelope = seal(Desired.KIND, message.encode(), signers)
    except ValueError as error:
        raise TooLargeError(f"cannot tell '{device.name}' how to be: {error}") from error
    kept = {"version": message.version, "config": message.config, "envelope": base64.b64encode(envelope).decode()}
    books.words.hear(device.name, KIND, now, kept)
    return envelope


def desired_of(books: Books, device: str) -> Mapping[str, Any]:
    """Version and config that a device was told last; version 0 for none."""
    word = books.words.word(device, KIND)
    return {"version": 0, "config": {}} if word is None else word.payload


def twin(books: Books, device: str) -> dict[str, Any]:
    """Both halves for one device: what is desired, what it reports, and whether the one has become the other."""
    desired = desired_of(books, device)
    word = books.words.word(device, "reported")
    reported: Mapping[str, Any] = {} if word is None else word.payload
    return {
        "device": device,
        "version": desired["version"],
        "desired": desired["config"],
        "reported_version": reported.get("desired_version"),
        "state": reported.get("config_state"),
        "reported": reported.get("config"),
        "drift": reported.get("drift") or [],
        "there": bool(reported)
        and reported.get("desired_version") == desired["version"]
        and reported.get("config_state") in ("applied", "default")
        and not reported.get("drift"),
    }
