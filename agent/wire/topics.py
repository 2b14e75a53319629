"""The topics, as text and back. Pure; needs nothing but the standard library.

``eda/1/<tenant>/<device>/up/…`` is what a device says, ``…/dn/…`` what it is told: direction is a level of its own, so
that a broker's access list is two lines. Names of tenants and devices hold no character that means something to MQTT.
"""

from __future__ import annotations

import re
from typing import NamedTuple

ROOT = "eda/1"
CLAIM = "claim"

#: Tenants, devices, job ids, alert ids, streams: one level, no wildcard, nothing that a file name could not be.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}\Z")
#: What a device subscribes to, below ``dn/``.
DOWN = ("job", "desired", "rpc/+", "blk/+")
#: Blocks of a delivery: asked for, and given below it, by the transfer's name.
BLOCKS_UP = "up/blk"
BLOCKS_DOWN = "dn/blk/"
RETAINED = frozenset(("up/status", "up/info", "up/reported", "dn/desired", "dn/job"))


class Topic(NamedTuple):
    """One topic: whose it is, and the rest (``up/job/17``). ``device`` is ``claim/<keyid>`` before enrolment."""

    tenant: str
    device: str
    rest: str

    def __str__(self) -> str:
        return f"{ROOT}/{self.tenant}/{self.device}/{self.rest}"


def is_name(text: str) -> bool:
    """Whether ``text`` may name a tenant, a device, a job, an alert or a stream."""
    return NAME.match(text) is not None


def device_topic(tenant: str, device: str, rest: str) -> str:
    """The topic ``rest`` of a device. ValueError for names that are none."""
    if not is_name(tenant) or not is_name(device) or device == CLAIM:
        raise ValueError(f"{tenant!r}, {device!r} are not names of a tenant and a device")
    return f"{ROOT}/{tenant}/{device}/{rest}"


def claim_topic(tenant: str, keyid: str, rest: str) -> str:
    """The topic of a device that is not enrolled yet, named by its identity key."""
    if not is_name(tenant) or not is_name(keyid):
        raise ValueError(f"{tenant!r}, {keyid!r} are not names of a tenant and a key")
    return f"{ROOT}/{tenant}/{CLAIM}/{keyid}/{rest}"


def parse_topic(text: str) -> Topic | None:
    """A topic of ours, or None."""
    parts = text.split("/")
    if len(parts) < 6 or "/".join(parts[:2]) != ROOT or not all(is_name(part) for part in parts[2:]):
        return None
    if parts[3] == CLAIM:
        return Topic(parts[2], f"{CLAIM}/{parts[4]}", "/".join(parts[5:])) if len(parts) > 6 else None
    return Topic(parts[2], parts[3], "/".join(parts[4:])) if parts[4] in ("up", "dn") else None


def is_retained(rest: str) -> bool:
    """Whether messages on the topic are retained by the broker. An alert is, until it is over."""
    return rest in RETAINED or rest.startswith("up/alert/")
