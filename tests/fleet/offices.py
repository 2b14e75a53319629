"""Books with enrolled devices and an operator's keys, without a broker."""

from __future__ import annotations

import base64
import secrets
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from agent.fleet.books import Books
from agent.fleet.documents import Document
from agent.fleet.enrolment import by_hand, enrol
from agent.fleet.hearing import Event, Hearing
from agent.fleet.jobs import Command, Office
from agent.fleet.keys import KeyRow
from agent.fleet.registry import Device
from agent.trust.allegiance import Allegiance, TrustedKey
from agent.trust.envelope import PublicKey, Signer
from tests.fleet.device import Identity, SimulatedDevice

TENANT = "acme"
NOW = datetime(2026, 1, 31, 12, 0, 0, tzinfo=timezone.utc)
AT = "2026-01-31T12:00:00Z"


class Desktop:
    """Open books, a key for everything and one for destroying only, and devices that speak by ``hear``."""

    def __init__(self, folder: Path) -> None:
        self.books = Books(folder / "fleet.db")
        self.books.__enter__()
        self.ann, self.bob = Signer(secrets.token_bytes(32)), Signer(secrets.token_bytes(32))
        with self.books.database.transaction():
            for name, signer, classes in (
                ("ann", self.ann, ("observe", "change", "destroy")),
                ("bob", self.bob, ("destroy",)),
            ):
                public = base64.b64encode(signer.public.raw).decode()
                self.books.registry.add_key(KeyRow(name, public, classes, AT))  # type: ignore[arg-type]
        self.office = Office(self.books, TENANT)
        self.hearing = Hearing(self.books, TENANT)

    @property
    def public_keys(self) -> list[PublicKey]:
        return [row.key for row in self.books.registry.signing_keys()]

    def close(self) -> None:
        self.books.__exit__(None, None, None)

    def enrol(self, name: str, identity: Identity | None = None) -> SimulatedDevice:
        """A device that obeys both keys."""
        identity = identity or Identity()
        enrolled = enrol(self.books, name, by_hand(identity.signer.public, "", NOW), None, NOW)
        keys = {key.keyid: TrustedKey(key.name, key.key, frozenset(key.classes)) for key in enrolled.keys}
        return SimulatedDevice(TENANT, identity, Allegiance(TENANT, name, enrolled.device.epoch, keys))

    def device(self, name: str) -> Device:
        return self.books.registry.device(name)

    def give(
        self, *names: str, op: str = "store.gc", signers: Any = None, **options: Any
    ) -> tuple[str, list[Document]]:
        args = {"model": "m"} if op == "model.remove" else {}
        devices = [self.device(name) for name in names]
        return self.office.give(Command(op, args), devices, signers or [self.ann], NOW, **options)

    def publish(self, *names: str) -> None:
        """What is due is put on the doorbells of ``names``."""
        due = [document for name in names if (document := self.books.documents.current(name)) is not None]
        with self.books.database.transaction():
            self.books.documents.set_published(due, AT)

    def hear(self, topic: str, payload: bytes) -> Event | None:
        with self.books.database.transaction():
            return self.hearing.hear(topic, payload, AT)

    def dropped(self) -> dict[tuple[str, str, str], int]:
        return {(row["device"], row["what"], row["reason"]): row["count"] for row in self.books.words.dropped()}
