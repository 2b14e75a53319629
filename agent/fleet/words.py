"""What was heard of devices, as it was last said, and what was asked. Methods that write are called in a transaction.

Invariant: what comes from senders that are not enrolled, or without a signature, takes a bounded room.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from agent.fleet.database import Database

#: Announcements come under a credential that every image holds: no more than this are remembered.
MOST_ANNOUNCEMENTS = 2000
MOST_ALERTS = 64


@dataclass(frozen=True, slots=True)
class Announced:
    """A device that asks to be enrolled; its signature was verified, who it is must be judged by a person."""

    keyid: str
    identity: str
    csr: str
    board: str | None
    serial: str | None
    agent_version: str
    received: str


@dataclass(frozen=True, slots=True)
class Word:
    """What a device said last of a kind (``info``, ``reported``: verified; ``status``: not), and when it came.

    ``start``: the nonce of the device's start at that moment, "" where that was not known.
    """

    received: str
    payload: Mapping[str, Any]
    start: str = ""


class Words:
    """The tables of what was heard."""

    def __init__(self, database: Database) -> None:
        self._database = database

    @property
    def _sql(self) -> sqlite3.Connection:
        return self._database.connection

    def hear(self, device: str, kind: str, now: str, payload: Mapping[str, Any], start: str = "") -> None:
        """Keep what a device said last of a kind."""
        self._sql.execute(
            "INSERT OR REPLACE INTO words VALUES(?, ?, ?, ?, ?)",
            (device, kind, now, _compact(payload), start),
        )

    def word(self, device: str, kind: str) -> Word | None:
        """What a device said last of a kind."""
        row = self._sql.execute(
            "SELECT received, payload, start FROM words WHERE device = ? AND kind = ?", (device, kind)
        ).fetchone()
        return None if row is None else Word(row["received"], json.loads(row["payload"]), row["start"])

    def start(self, device: str) -> str:
        """The nonce of a device's present start, "" while it has not said any."""
        info = self.word(device, "info")
        return "" if info is None else str(info.payload["boot_nonce"])

    def words(self, kind: str) -> dict[str, Word]:
        """The same of all devices."""
        rows = self._sql.execute("SELECT device, received, payload FROM words WHERE kind = ?", (kind,))
        return {row["device"]: Word(row["received"], json.loads(row["payload"])) for row in rows}

    def set_alert(self, device: str, alert: str, now: str, payload: Mapping[str, Any] | None) -> bool:
        """An alert, or with None its end; whether there was room for it."""
        if payload is None:
            self._sql.execute("DELETE FROM alerts WHERE device = ? AND id = ?", (device, alert))
            return True
        count = self._sql.execute(
            "SELECT count(*) FROM alerts WHERE device = ? AND id != ?", (device, alert)
        ).fetchone()[0]
        if count >= MOST_ALERTS:
            return False
        self._sql.execute("INSERT OR REPLACE INTO alerts VALUES(?, ?, ?, ?)", (device, alert, now, _compact(payload)))
        return True

    def alerts(self, device: str | None = None) -> list[tuple[str, str, Word]]:
        """Device, alert id and what it says, of one device or all."""
        rows = self._sql.execute(
            "SELECT * FROM alerts WHERE ? IS NULL OR device = ? ORDER BY device, id", (device, device)
        )
        return [(row["device"], row["id"], Word(row["received"], json.loads(row["payload"]))) for row in rows]

    def announce(self, announced: Announced) -> bool:
        """Remember who asks to be enrolled; False when too many ask already."""
        count = self._sql.execute("SELECT count(*) FROM announcements WHERE keyid != ?", (announced.keyid,)).fetchone()[
            0
        ]
        if count >= MOST_ANNOUNCEMENTS:
            return False
        self._sql.execute(
            "INSERT OR REPLACE INTO announcements VALUES(?, ?, ?, ?, ?, ?, ?)",
            (
                announced.keyid,
                announced.identity,
                announced.csr,
                announced.board,
                announced.serial,
                announced.agent_version,
                announced.received,
            ),
        )
        return True

    def announced(self) -> list[Announced]:
        """Who asks to be enrolled, oldest first."""
        rows = self._sql.execute("SELECT * FROM announcements ORDER BY received, keyid")
        return [Announced(**dict(row)) for row in rows]

    def find_announced(self, keyid: str) -> Announced | None:
        """Who asks to be enrolled with that identity."""
        row = self._sql.execute("SELECT * FROM announcements WHERE keyid = ?", (keyid,)).fetchone()
        return None if row is None else Announced(**dict(row))

    def withdraw_announcement(self, keyid: str) -> None:
        """Somebody has decided on it, or it is gone."""
        self._sql.execute("DELETE FROM announcements WHERE keyid = ?", (keyid,))

    def drop(self, device: str, what: str, reason: str, now: str) -> None:
        """Count something that was not believed. ``device`` "" stands for all that are not enrolled."""
        self._sql.execute(
            "INSERT INTO dropped VALUES(?, ?, ?, 1, ?) ON CONFLICT(device, what, reason)"
            " DO UPDATE SET count = count + 1, last = excluded.last",
            (device, what, reason, now),
        )

    def dropped(self, device: str | None = None) -> list[dict[str, Any]]:
        """What was not believed, of one device or of all."""
        rows = self._sql.execute(
            "SELECT * FROM dropped WHERE ? IS NULL OR device = ? ORDER BY device, what, reason", (device, device)
        )
        return [dict(row) for row in rows]

    # -- questions ----------------------------------------------------------------------------------------------------

    def ask(self, device: str, op: str, rpc_id: str, keyids: Sequence[str], now: tuple[str, int]) -> int:
        """Note a question and give it a number that rises: microseconds of the wall clock, so that it also rises when
        the same key is used elsewhere. ``now`` is the moment as text and in microseconds."""
        last = self._sql.execute("SELECT coalesce(max(n), 0) FROM questions").fetchone()[0]
        number = max(int(last) + 1, now[1])
        self._sql.execute(
            "INSERT INTO questions(n, rpc_id, device, op, keyids, asked) VALUES(?, ?, ?, ?, ?, ?)",
            (number, rpc_id, device, op, ",".join(keyids), now[0]),
        )
        return number

    def answer(self, number: int, now: str, outcome: str) -> None:
        """What became of a question."""
        self._sql.execute("UPDATE questions SET answered = ?, outcome = ? WHERE n = ?", (now, outcome[:200], number))


def _compact(payload: Mapping[str, Any]) -> str:
    return json.dumps(payload, separators=(",", ":"), ensure_ascii=False)
