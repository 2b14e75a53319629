"""Which keys and which devices a fleet has. Methods that write are called in a transaction of the database."""

from __future__ import annotations

import base64
import json
import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from agent.base.errors import ConflictError, NotFoundError
from agent.fleet.database import Database
from agent.fleet.keys import KeyRow
from agent.trust.envelope import PublicKey
from agent.trust.jobkeys import JobKeys, parse_table
from agent.wire.ops import CLASSES


@dataclass(frozen=True, slots=True)
class Device:
    """A device that is enrolled. ``obeys`` maps the keyids it was told of to the classes that each may sign.

    ``generation``, ``seq`` and ``desired`` are the last numbers given out in this enrolment. ``revoked``: since when it
    gets no key of any payload.
    """

    name: str
    identity: PublicKey
    epoch: int
    origin: str
    enrolled: str
    obeys: Mapping[str, tuple[str, ...]]
    certificate_until: str | None = None
    board: str | None = None
    serial: str | None = None
    generation: int = 0
    seq: int = 0
    desired: int = 0
    revoked: str | None = None


class Registry:
    """The tables of keys and devices."""

    def __init__(self, database: Database) -> None:
        self._database = database

    @property
    def _sql(self) -> sqlite3.Connection:
        return self._database.connection

    # -- keys ---------------------------------------------------------------------------------------------------------

    def signing_keys(self, held: Sequence[str] = ()) -> list[KeyRow]:
        """All keys in the order in which they came. ``held`` names those with a private half here."""
        rows = self._sql.execute("SELECT * FROM keys ORDER BY rowid")
        return [
            KeyRow(
                row["name"],
                row["public"],
                tuple(kind for kind in CLASSES if kind in row["classes"].split(",")),
                row["added"],
                row["revoked"],
                held=row["name"] in held,
            )
            for row in rows
        ]

    def add_key(self, key: KeyRow) -> None:
        """ConflictError when the name or the key is there."""
        for known in self.signing_keys():
            if key.name == known.name or key.public == known.public:
                what = "name" if key.name == known.name else "key"
                raise ConflictError(f"cannot add key '{key.name}': the {what} is there already (as '{known.name}')")
        self._sql.execute(
            "INSERT INTO keys(name, public, classes, added) VALUES(?, ?, ?, ?)",
            (key.name, key.public, ",".join(key.classes), key.added),
        )

    def revoke_key(self, name: str, now: str) -> None:
        """NotFoundError for a name that there is not; twice is once."""
        done = self._sql.execute("UPDATE keys SET revoked = coalesce(revoked, ?) WHERE name = ?", (now, name))
        if done.rowcount == 0:
            raise NotFoundError(f"cannot revoke '{name}': there is no such key", hint="edge-fleet keys list")

    # -- tables of keys, as the repository has them -------------------------------------------------------------------

    def last_table(self) -> JobKeys | None:
        """The latest that was published, or is about to be; None where there is none."""
        row = self._sql.execute("SELECT document FROM key_tables ORDER BY version DESC LIMIT 1").fetchone()
        return None if row is None else parse_table(row["document"])

    def add_table(self, version: int, document: bytes, now: str) -> None:
        """Keep a table under its number, which is given once."""
        self._sql.execute("INSERT INTO key_tables VALUES(?, ?, ?)", (version, document, now))

    def obeys_table(self, name: str, version: int) -> None:
        """The device says that it obeys the keys of that table. One that was never published says nothing."""
        row = self._sql.execute("SELECT document FROM key_tables WHERE version = ?", (version,)).fetchone()
        if row is not None:
            keys = parse_table(row["document"]).keys
            obeys = {keyid: [kind for kind in CLASSES if kind in key.classes] for keyid, key in keys.items()}
            self._sql.execute("UPDATE devices SET obeys = ? WHERE name = ?", (json.dumps(obeys), name))

    # -- devices ------------------------------------------------------------------------------------------------------

    def devices(self) -> list[Device]:
        """All enrolled devices by name."""
        return [_device(row) for row in self._sql.execute("SELECT * FROM devices ORDER BY name")]

    def device(self, name: str) -> Device:
        """NotFoundError for a name that there is not."""
        if (found := self.find_device(name)) is None:
            raise NotFoundError(f"cannot find device '{name}': it is not enrolled", hint="edge-fleet devices list")
        return found

    def find_device(self, name: str) -> Device | None:
        """A device, or None."""
        row = self._sql.execute("SELECT * FROM devices WHERE name = ?", (name,)).fetchone()
        return None if row is None else _device(row)

    def device_of(self, identity: str) -> Device | None:
        """The device with an identity key in base64."""
        row = self._sql.execute("SELECT * FROM devices WHERE identity = ?", (identity,)).fetchone()
        return None if row is None else _device(row)

    def enrol(self, device: Device, identity: str) -> None:
        """Put a device, or its next enrolment: counters restart, what was under way in earlier ones is void."""
        self._sql.execute("DELETE FROM devices WHERE name = ?", (device.name,))
        self._sql.execute("INSERT OR REPLACE INTO past VALUES(?, ?)", (device.name, device.epoch))
        self._sql.execute(
            "INSERT INTO devices(name, identity, epoch, origin, enrolled, certificate_until, board, serial, obeys)"
            " VALUES(?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                device.name,
                identity,
                device.epoch,
                device.origin,
                device.enrolled,
                device.certificate_until,
                device.board,
                device.serial,
                json.dumps({keyid: list(classes) for keyid, classes in device.obeys.items()}),
            ),
        )
        self._sql.execute("DELETE FROM words WHERE device = ?", (device.name,))
        self._sql.execute(
            "UPDATE documents SET state = 'void', note = 'the device was enrolled anew'"
            " WHERE device = ? AND state IN ('draft', 'waiting')",
            (device.name,),
        )

    def revoke_device(self, name: str, now: str | None) -> None:
        """No grant is made for the device from ``now`` on; None: again."""
        self._sql.execute("UPDATE devices SET revoked = ? WHERE name = ?", (now, name))

    def last_epoch(self, name: str) -> int:
        """The number of the last enrolment under a name, also of a device that was forgotten; 0 for none."""
        row = self._sql.execute("SELECT epoch FROM past WHERE name = ?", (name,)).fetchone()
        return 0 if row is None else int(row["epoch"])

    def forget_device(self, name: str) -> None:
        """Everything of a device but the number of its enrolment, which has to rise when it comes back."""
        for table, column in (
            ("devices", "name"), ("words", "device"), ("alerts", "device"), ("documents", "device"),
            ("states", "device"), ("dropped", "device"), ("questions", "device"),
        ):  # fmt: skip
            self._sql.execute(f"DELETE FROM {table} WHERE {column} = ?", (name,))  # noqa: S608 - from the table above

    def next_numbers(self, name: str) -> tuple[int, int]:
        """Generation and sequence for a new document, given out once."""
        self._sql.execute("UPDATE devices SET generation = generation + 1, seq = seq + 1 WHERE name = ?", (name,))
        row = self._sql.execute("SELECT generation, seq FROM devices WHERE name = ?", (name,)).fetchone()
        return int(row["generation"]), int(row["seq"])

    def next_desired(self, name: str) -> int:
        """A version for what is desired, given out once."""
        self._sql.execute("UPDATE devices SET desired = desired + 1 WHERE name = ?", (name,))
        return int(self._sql.execute("SELECT desired FROM devices WHERE name = ?", (name,)).fetchone()["desired"])


def _device(row: sqlite3.Row) -> Device:
    return Device(
        name=row["name"],
        identity=PublicKey(base64.b64decode(row["identity"])),
        epoch=row["epoch"],
        origin=row["origin"],
        enrolled=row["enrolled"],
        obeys={keyid: tuple(classes) for keyid, classes in json.loads(row["obeys"]).items()},
        certificate_until=row["certificate_until"],
        board=row["board"],
        serial=row["serial"],
        generation=row["generation"],
        seq=row["seq"],
        desired=row["desired"],
        revoked=row["revoked"],
    )
