"""The catalog alone: any order of commits, kills at any step of one, openings, and damage to any of its files.

Against a list of what was committed. A kill is a copy of the folder as it was at that step, put back afterwards: what
the disk of a machine would hold whose power went at that moment, all flushes having been honoured.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from agent.base.errors import DamagedError
from agent.store.catalog import Catalog, Opened
from agent.store.document import CatalogDocument
from agent.store.keys import derive

SECRET = derive(bytes(range(32)), "file", "device-secret")
OTHER = derive(bytes(range(1, 33)), "file", "device-secret")
STEPS = ("generation sealed", "generation written", "CURRENT swung")


class CatalogMachine(RuleBasedStateMachine):
    @initialize()
    def start(self) -> None:
        place = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
        self.folder = Path(tempfile.mkdtemp(dir=place))
        self.root = self.folder / "store"
        self.root.mkdir()
        self.steps: list[str] = []
        self.kill_at: str | None = None
        self.catalog = self.restarted()
        self.current: int | None = None  # what an opening must give
        self.previous: int | None = None
        self.texts: dict[int, str] = {}

    def restarted(self) -> Catalog:
        catalog = Catalog(self.root, random=os.urandom, step=self.step)
        catalog.prepare()
        return catalog

    def step(self, name: str) -> None:
        self.steps.append(name)
        if name == self.kill_at:
            shutil.copytree(self.root, self.folder / "as it was")

    def opened(self) -> Opened:
        return self.catalog.open({SECRET.key_id: SECRET})

    def path(self, number: int) -> Path:
        return self.root / "catalog" / f"{number:012d}.age"

    def next(self) -> CatalogDocument:
        number = max([0, *self.catalog.numbers(), self.current or 0]) + 1
        self.texts[number] = f"{number} {os.urandom(4).hex()}"
        return CatalogDocument(generation=number, saved_at=self.texts[number])

    @rule()
    def save(self) -> None:
        document = self.next()
        saved = self.catalog.save(document, SECRET)
        assert saved.document == document
        self.catalog.sweep([number for number in (saved.number, self.current) if number])
        self.previous, self.current = self.current, saved.number

    @rule(step=st.sampled_from(STEPS), swept=st.booleans())
    def killed_while_saving(self, step: str, swept: bool) -> None:
        """What was reported is there; what was not is there wholly or not at all."""
        document, self.kill_at = self.next(), step
        saved = self.catalog.save(document, SECRET)
        self.kill_at = None
        swept = swept and step == "CURRENT swung"
        if swept:
            self.catalog.sweep([saved.number])
        else:
            shutil.rmtree(self.root)
            shutil.copytree(self.folder / "as it was", self.root)
        shutil.rmtree(self.folder / "as it was")
        # Written and not pointed to, the very first one is taken: before it there is nothing.
        if step == "CURRENT swung" or (step == "generation written" and self.current is None):
            self.previous, self.current = None if swept else self.current, saved.number
        self.restart()

    @rule()
    def restart(self) -> None:
        """As the store does it: what is open stays, what a kill left above it goes."""
        self.catalog = self.restarted()
        found = self.opened()
        self.catalog.sweep(kept.number for kept in (found.current, found.previous) if kept)

    @precondition(lambda self: self.current is not None)
    @rule(place=st.floats(0, 1, exclude_max=True), how=st.sampled_from(["flip", "cut", "grow", "delete", "older"]))
    def damage_the_newest(self, place: float, how: str) -> None:
        """It is noticed, said, and the one before answers, where there is one."""
        path, number = self.path(self.current), self.current
        data = path.read_bytes()
        at = int(place * len(data))
        older = self.path(self.previous).read_bytes() if self.previous else b""
        path.write_bytes({
            "flip": data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :], "cut": data[:at], "grow": data + b"x",
            "delete": b"", "older": older,
        }[how])  # fmt: skip
        if how == "delete":
            path.unlink()
        if self.previous is None:
            with pytest.raises(DamagedError) as refused:
                self.opened()
            assert refused.value.hint
            path.write_bytes(data)
            return
        found = self.opened()
        assert found.current is not None and found.current.number == self.previous
        assert any(f"generation {number}" in note for note in found.notes)
        path.write_bytes(data)
        assert self.opened().current.number == number

    @precondition(lambda self: self.current is not None)
    @rule(place=st.floats(0, 1, exclude_max=True), how=st.sampled_from(["flip", "cut", "delete", "nonsense"]))
    def damage_the_pointer(self, place: float, how: str) -> None:
        """No damage of ``CURRENT`` undoes a commit; the pointer stays as it is until the next save."""
        pointer = self.root / "CURRENT"
        data = pointer.read_bytes()
        at = int(place * len(data))
        if how == "delete":
            pointer.unlink()
        else:
            flipped = data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :]
            pointer.write_bytes({"flip": flipped, "cut": data[:at], "nonsense": os.urandom(20)}[how])
        found = self.opened()
        assert found.current is not None and found.current.number == self.current
        pointer.write_bytes(data)

    @precondition(lambda self: self.current is not None)
    @rule()
    def open_with_another_key(self) -> None:
        with pytest.raises(DamagedError, match="does not have") as refused:
            self.catalog.open({OTHER.key_id: OTHER})
        assert refused.value.hint

    @invariant()
    def what_was_committed_is_there(self) -> None:
        if not hasattr(self, "catalog"):
            return
        found = self.opened()
        if self.current is None:
            assert found.current is None
            return
        assert found.current is not None
        assert found.current.number == self.current
        assert found.current.document.saved_at == self.texts[self.current]
        assert (found.previous.number if found.previous else None) == self.previous

    @invariant()
    def nothing_lies_around(self) -> None:
        if hasattr(self, "root"):
            assert not list(self.root.rglob(".tmp-*"))

    def teardown(self) -> None:
        if hasattr(self, "folder"):
            shutil.rmtree(self.folder)


TestCatalogMachine = CatalogMachine.TestCase
TestCatalogMachine.settings = settings(
    max_examples=40, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
)
