"""What is told of the store on the event loop: what is known, looked for again aside."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from agent.base.errors import DamagedError
from agent.core import storecheck
from agent.core.health import Finding
from agent.core.storecheck import StoreCheck
from agent.store.store import Store
from tests.store.workload import opened

WORSE = Finding("disk", "warning", "1 MB free")


class Disk:
    """A store of which something can be said, at a disk that can hang."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.document = SimpleNamespace(generation=1)
        self.found: list[Finding] | Exception = []
        self.works = threading.Event()
        self.works.set()
        self.looks = 0
        self.now = 0.0
        self.changes = 0
        monkeypatch.setattr(storecheck, "check_store", self._look)
        self.check = StoreCheck(cast("Store", self), self._changed, lambda: self.now)

    def _look(self, _store: Any) -> list[Finding]:
        self.looks += 1
        assert self.works.wait(20)
        if isinstance(self.found, Exception):
            raise self.found
        return list(self.found)

    def _changed(self) -> None:
        self.changes += 1

    def wait(self, looks: int) -> None:
        end = time.monotonic() + 20
        while self.looks < looks and time.monotonic() < end:
            time.sleep(0.005)
        assert self.looks == looks


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    made = Disk(monkeypatch)
    yield made
    made.works.set()


def test_it_is_looked_for_once_for_many_who_ask(disk: Disk) -> None:
    disk.found = [WORSE]
    assert [disk.check.findings() for _ in range(50)] == [[WORSE]] * 50
    assert disk.looks == 1


def test_who_asks_on_the_loop_does_not_wait_for_the_disk(disk: Disk) -> None:
    assert disk.check.findings() == []
    disk.works.clear()
    disk.found, disk.now = [WORSE], 60.0
    assert disk.check.findings() == [], "what is known"
    assert disk.check.findings() == []
    disk.wait(2)
    disk.works.set()
    end = time.monotonic() + 20
    while disk.check.findings() != [WORSE] and time.monotonic() < end:
        time.sleep(0.005)
    assert disk.check.findings() == [WORSE]
    assert (disk.looks, disk.changes) == (2, 1)


def test_status_waits_for_what_a_change_has_made_old(disk: Disk) -> None:
    async def story() -> None:
        await disk.check.look()
        assert disk.looks == 1
        await disk.check.look()
        assert disk.looks == 1
        disk.works.clear()
        disk.now = 60.0
        disk.check.findings()
        disk.wait(2)
        disk.document.generation = 2  # after that look has begun
        disk.found = [WORSE]
        asyncio.get_running_loop().call_later(0.05, disk.works.set)
        await disk.check.look()
        assert disk.looks == 3
        assert disk.check.findings() == [WORSE]

    asyncio.run(story())


def test_a_disk_that_hangs_keeps_nobody_for_ever(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storecheck, "_PATIENCE_S", 0.05)
    disk.check.findings()
    disk.check._clock = time.monotonic
    disk.document.generation = 2
    disk.works.clear()
    asyncio.run(asyncio.wait_for(disk.check.look(), 10))
    assert disk.check.findings() == []
    assert disk.looks == 2, "and no second thread hangs"


def test_a_store_that_cannot_be_examined_is_a_finding(disk: Disk) -> None:
    disk.found = DamagedError("cannot examine store: Input/output error")
    (finding,) = disk.check.findings()
    assert (finding.check, finding.level) == ("store", "error")
    assert "Input/output error" in finding.text


def test_of_a_real_store(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        check = StoreCheck(store, lambda: None)
        asyncio.run(check.look())
        assert {finding.level for finding in check.findings()} <= {"ok", "note", "warning"}
        (store.root / "blobs" / "of somebody else").write_bytes(b"")
        check._at -= 60.0
        asyncio.run(check.look())
        assert "foreign" in {finding.check for finding in check.findings()}
