"""The operations that a fleet may ask for: one row each, with its class and its lane. Pure.

``observe`` changes nothing, ``change`` can be taken back, ``destroy`` cannot: it needs two signatures and the nonce of
the device's present start. The signer's keys must allow the class of the row; what a message itself claims to be is
only compared with it. A job in the rescue lane is never behind another job.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

OpClass = Literal["observe", "change", "destroy"]
Lane = Literal["normal", "rescue"]
CLASSES: tuple[OpClass, ...] = ("observe", "change", "destroy")

#: Signatures by different keys that a class needs.
SIGNATURES: dict[OpClass, int] = {"observe": 1, "change": 1, "destroy": 2}


@dataclass(frozen=True, slots=True)
class Op:
    """One row. ``job``: may be a durable job; ``rpc``: may be asked of an online device."""

    name: str
    kind: OpClass
    lane: Lane = "normal"
    job: bool = True
    rpc: bool = False


_ROWS = (
    Op("ping", "observe", "rescue", rpc=True),
    Op("status", "observe", "rescue", job=False, rpc=True),
    Op("jobs.list", "observe", "rescue", job=False, rpc=True),
    Op("logs.tail", "observe", "rescue", rpc=True),
    Op("diagnostics.collect", "observe", "rescue", rpc=True),
    Op("model.install", "change"),
    Op("model.activate", "change"),
    Op("model.rollback", "change"),
    Op("model.pin", "change"),
    Op("model.remove", "destroy"),
    Op("config.apply", "change"),
    Op("store.scrub", "change"),
    Op("store.gc", "change"),
    Op("store.rotate-key", "change"),
    Op("cache.flush", "change"),
    Op("bench.run", "change"),
    Op("maintenance.plan", "change"),
    Op("agent.update", "change"),
    Op("agent.restart", "change", "rescue"),
    Op("device.reboot", "change", "rescue"),
)
OPS: dict[str, Op] = {row.name: row for row in _ROWS}
