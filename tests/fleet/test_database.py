"""The operator's database: whole or not at all, shared by commands, and never opened by one that is too old."""

from __future__ import annotations

import sqlite3
import stat
import threading
from pathlib import Path

import pytest

from agent.base.errors import ConflictError, DamagedError, NotFoundError
from agent.fleet.books import Books
from agent.fleet.database import MIGRATIONS, Database
from agent.fleet.words import MOST_ALERTS, MOST_ANNOUNCEMENTS, Announced
from tests.fleet.offices import AT, Desktop


@pytest.fixture
def desk(tmp_path: Path):
    made = Desktop(tmp_path)
    yield made
    made.close()


def test_a_new_registry_is_its_owner_s_alone_and_has_the_present_schema(tmp_path: Path) -> None:
    path = tmp_path / "fleet.db"
    with Database(path) as database:
        assert database.connection.execute("PRAGMA user_version").fetchone()[0] == len(MIGRATIONS)
        assert database.connection.execute("PRAGMA journal_mode").fetchone()[0] == "wal"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_registry_of_a_newer_edge_fleet_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "fleet.db"
    with Database(path):
        pass
    with sqlite3.connect(path) as connection:
        connection.execute(f"PRAGMA user_version = {len(MIGRATIONS) + 1}")
    connection.close()
    with pytest.raises(ConflictError, match="a newer edge-fleet made it"):
        Database(path).__enter__()


def test_what_is_no_registry_is_told(tmp_path: Path) -> None:
    path = tmp_path / "fleet.db"
    path.write_bytes(b"not a database" * 100)
    with pytest.raises(DamagedError, match="cannot open"):
        Database(path).__enter__()


def test_a_transaction_that_fails_leaves_nothing(desk: Desktop) -> None:
    desk.enrol("cam-1")

    def fail() -> None:
        with desk.books.database.transaction():
            desk.books.registry.next_numbers("cam-1")
            desk.books.words.hear("cam-1", "status", AT, {"online": True})
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert desk.device("cam-1").generation == 0 and desk.books.words.word("cam-1", "status") is None


def test_two_that_open_a_new_registry_at_once_both_get_it(tmp_path: Path) -> None:
    path = tmp_path / "fleet.db"
    errors: list[BaseException] = []

    def open_it() -> None:
        try:
            with Books(path) as books:
                books.registry.devices()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=open_it) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert errors == []


def test_numbers_are_given_out_once_to_many_at_once(desk: Desktop, tmp_path: Path) -> None:
    desk.enrol("cam-1")
    given: list[tuple[int, int]] = []

    def take() -> None:
        with Books(tmp_path / "fleet.db") as books:
            for _ in range(20):
                with books.database.transaction():
                    given.append(books.registry.next_numbers("cam-1"))

    threads = [threading.Thread(target=take) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(given) == [(number, number) for number in range(1, 81)]


def test_what_comes_from_strangers_takes_a_bounded_room(desk: Desktop) -> None:
    desk.enrol("cam-1")
    words = desk.books.words
    with desk.books.database.transaction():
        taken = [
            words.announce(Announced(f"{number:032x}", "i", "c", None, None, "1", AT))
            for number in range(MOST_ANNOUNCEMENTS + 5)
        ]
        alerts = [words.set_alert("cam-1", f"a{number}", AT, {"text": "x"}) for number in range(MOST_ALERTS + 5)]
    assert taken == [True] * MOST_ANNOUNCEMENTS + [False] * 5 and alerts == [True] * MOST_ALERTS + [False] * 5
    with desk.books.database.transaction():
        assert words.set_alert("cam-1", "a0", AT, {"text": "y"})  # one that is there may change
        assert words.announce(Announced(f"{0:032x}", "i", "new", None, None, "1", AT))
    assert len(words.announced()) == MOST_ANNOUNCEMENTS


def test_keys_and_devices_that_are_not_there(desk: Desktop) -> None:
    registry = desk.books.registry
    with pytest.raises(NotFoundError), desk.books.database.transaction():
        registry.revoke_key("eve", AT)
    with pytest.raises(NotFoundError):
        registry.device("cam-9")
    with desk.books.database.transaction():
        registry.revoke_key("bob", AT)
        registry.revoke_key("bob", "2030-01-01T00:00:00Z")
    assert {row.name: row.revoked for row in registry.signing_keys()} == {"ann": None, "bob": AT}


def test_questions_get_numbers_that_rise_whatever_the_clock_does(desk: Desktop) -> None:
    with desk.books.database.transaction():
        numbers = [
            desk.books.words.ask("cam-1", "ping", "r", [], (AT, micro)) for micro in (500, 400, 501, 501, 10_000)
        ]
    assert numbers == [500, 501, 502, 503, 10_000]
