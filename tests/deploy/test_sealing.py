"""Moving the device secret, on the real store: at each moment the power may go, and the store opens and has all."""

from __future__ import annotations

import contextlib
import itertools
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from agent.base.errors import DamagedError, RefusedError
from agent.cli.sealing import (
    Move,
    Place,
    Sealed,
    World,
    after,
    carry_out,
    key_id_of,
    look,
    next_move,
    plan,
)
from agent.store.keys import CREDENTIAL_NEXT, FILE_NEXT, NAME, DeviceKeys
from agent.store.reports import KnownKey
from agent.store.store import Store
from tests.store.conftest import MIB, install, plain

PLACES: tuple[Place, ...] = ("tpm2", "host", "file")


class CutError(Exception):
    """The power went."""


class Power:
    """Goes after so many durable steps; each is told by what makes it."""

    def __init__(self) -> None:
        self.left: int | None = None
        self.steps = 0

    def step(self, _: str = "") -> None:
        self.steps += 1
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise CutError


class Device:
    """Credentials as files, and a core: a store that gets them when it starts. Both sides of ``sealing``."""

    def __init__(self, folder: Path) -> None:
        self.disk, self.given, self.state = folder / "credstore", folder / "given", folder / "state"
        self.disk.mkdir(parents=True)
        self.state.mkdir()
        self.power = Power()
        self.kinds: dict[str, str] = {}
        self.lost: set[str] = set()
        self.store: Store | None = None

    # The vault: a byte before the secret tells with what it is sealed.

    def look(self) -> Mapping[str, Sealed]:
        return {path.name: self._look_at(path) for path in sorted(self.disk.iterdir())}

    def _look_at(self, path: Path) -> Sealed:
        kind = "tpm2" if path.read_bytes()[:1] == b"t" else "host"
        try:
            return Sealed(kind, key_id_of(self.open(path.name)))
        except DamagedError as error:
            return Sealed(kind, None, str(error))

    def put(self, name: str, secret: bytes, place: Place) -> None:
        self.power.step(f"seal {name}")
        (self.disk / name).write_bytes(place[:1].encode() + secret)
        self.power.step(f"sealed {name}")

    def open(self, name: str) -> bytes:
        data = (self.disk / name).read_bytes()
        if data[:1] == b"t" and "tpm2" in self.lost:
            raise DamagedError(f"cannot open {name}: the TPM was cleared")
        return data[1:]

    def remove(self, name: str) -> None:
        self.power.step(f"remove {name}")
        (self.disk / name).unlink()
        self.power.step(f"removed {name}")

    # Core.

    def boot(self) -> Store:
        """As systemd starts it: a credential that cannot be opened keeps it from starting."""
        self.halt()
        shutil.rmtree(self.given, ignore_errors=True)
        self.given.mkdir()
        for path in self.disk.iterdir():
            (self.given / path.name).write_bytes(self.open(path.name))
            (self.given / path.name).chmod(0o400)
        keys = DeviceKeys(self.state / "keys", self.given, step=self.power.step)
        self.store = Store(self.state / "store", keys, MIB, step=self.power.step).open()
        return self.store

    def halt(self) -> None:
        if self.store is not None:
            self.store.close()
            self.store = None

    def keys(self) -> tuple[KnownKey, tuple[KnownKey, ...]]:
        assert self.store is not None
        stats = self.store.stats()
        return next(key for key in stats.keys if key.key_id == stats.key_id), stats.keys

    def restart(self) -> None:
        self.power.step("restart")
        self.boot()

    def rotate(self, *, to_file: bool) -> None:
        assert self.store is not None
        self.store.rotate_key(to_file=to_file)

    def move(self, to: Place, *, anew: bool = False) -> list[Move]:
        return list(carry_out(self, self, to, anew=anew))

    def place(self) -> str:
        used = self.keys()[0]
        return "file" if used.source == "file" else self.look()[used.name].kind


@pytest.fixture
def device(tmp_path: Path) -> Iterator[Device]:
    """A device whose secret is a file, with a model."""
    made = Device(tmp_path)
    yield made
    made.halt()


WAYS = [(begin, end) for begin in PLACES for end in PLACES if begin != end]


@pytest.mark.parametrize(("begin", "end"), [*WAYS, ("tpm2", "tpm2"), ("file", "file")])
def test_the_secret_moves_and_payloads_stay(device: Device, begin: Place, end: Place) -> None:
    (ref,) = install(device.boot(), "digits", "1.0.0", {"m.onnx": b"weights"})
    device.move(begin)
    assert device.place() == begin
    assert device.move(begin) == [], "a second run does nothing"
    store, payload = device.boot(), device.state / "store" / "blobs" / ref.payload
    before, key = payload.stat(), store.secret.key_id
    foreseen = plan(look(device, device), end, anew=begin == end)
    assert device.move(end, anew=begin == end) == foreseen, "what a dry run says is what is done"
    assert (payload.stat().st_ino, payload.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    for start in (lambda: device.store, device.boot):
        store = start()
        assert store is not None
        assert plain(store, ref) == b"weights"
        assert store.secret.key_id != key, "whoever has the former secret has nothing"
        assert [known.key_id for known in store.stats().keys] == [store.secret.key_id]
        assert device.place() == end
    assert sorted(device.look()) == ([] if end == "file" else [NAME])
    if end != "file":
        assert not any((device.state / "keys").iterdir()), "no copy beside the store"


@pytest.mark.slow
@pytest.mark.parametrize(("begin", "end"), WAYS)
def test_the_power_may_go_at_any_step(tmp_path: Path, begin: Place, end: Place) -> None:
    for cut in itertools.count():
        device = Device(tmp_path / str(cut))
        (ref,) = install(device.boot(), "digits", "1.0.0", {"m.onnx": b"weights"})
        device.move(begin)
        device.power.left = cut
        try:
            device.move(end)
        except CutError:
            pass
        else:
            assert cut > 10, "there are as many steps at least"
            break
        finally:
            device.power.left = None
        assert plain(device.boot(), ref) == b"weights", f"cut {cut}"
        device.move(end)
        store = device.boot()
        assert (plain(store, ref), device.place()) == (b"weights", end), f"cut {cut}"
        assert [key.key_id for key in store.stats().keys] == [store.secret.key_id]
        assert store.verify().damaged == ()
        assert {finding.code for finding in store.doctor()} <= {"key-weak", "unreached"}  # the next gc's
        device.halt()


@pytest.mark.slow
def test_another_way_than_the_one_that_was_cut_off(tmp_path: Path) -> None:
    """What the first way has left is cleared away by the second, in whatever state it is."""
    for cut, (begin, end, instead) in itertools.product(range(0, 30, 4), itertools.permutations(PLACES)):
        device = Device(tmp_path / f"{begin}-{end}-{cut}")
        (ref,) = install(device.boot(), "digits", "1.0.0", {"m.onnx": b"weights"})
        device.move(begin)
        device.power.left = cut
        with contextlib.suppress(CutError):
            device.move(end)
        device.power.left = None
        device.boot()
        device.move(instead)
        assert (plain(device.boot(), ref), device.place()) == (b"weights", instead)
        device.halt()


def test_a_tpm_that_was_cleared_while_core_runs_is_left_without_a_restart(device: Device) -> None:
    (ref,) = install(device.boot(), "digits", "1.0.0", {"m.onnx": b"weights"})
    device.move("tpm2")
    device.lost.add("tpm2")
    for place in ("tpm2", "host"):
        with pytest.raises(RefusedError, match="the TPM was cleared") as caught:
            device.move(place)
        assert "--to file" in caught.value.hint
    assert "restart" not in [move.action for move in plan(look(device, device), "file")][:2]
    device.move("file")
    assert plain(device.boot(), ref) == b"weights"
    device.move("host")
    assert (plain(device.boot(), ref), device.place()) == (b"weights", "host")


def test_a_credential_that_nobody_uses_and_nothing_opens_goes(device: Device) -> None:
    (ref,) = install(device.boot(), "digits", "1.0.0", {"m.onnx": b"weights"})
    device.put(CREDENTIAL_NEXT, bytes(32), "tpm2")
    device.lost.add("tpm2")
    device.move("host")
    assert (plain(device.boot(), ref), device.place()) == (b"weights", "host")


# -- all worlds -------------------------------------------------------------------------------------------------------


def worlds() -> Iterator[World]:
    """Every mixture of credentials, keys that core knows, and the one in use."""
    credentials = [None, *(Sealed(kind, key) for kind in ("tpm2", "host", "other") for key in ("A", "B", None))]
    keys = [
        KnownKey("A", "credential", NAME),
        KnownKey("B", "credential", CREDENTIAL_NEXT),
        KnownKey("C", "file", NAME),
        KnownKey("D", "file", FILE_NEXT),
    ]
    known = [found for size in range(1, 5) for found in itertools.combinations(keys, size)]
    for current, waiting, found in itertools.product(credentials, credentials, known):
        sealed = {NAME: current, CREDENTIAL_NEXT: waiting}
        for used in found:
            yield World({name: one for name, one in sealed.items() if one is not None}, used, found)


@pytest.mark.parametrize("to", PLACES)
def test_from_every_world_there_is_a_way_or_a_reason_and_never_a_lost_store(to: Place) -> None:
    count = 0
    for begun in worlds():
        count, world = count + 1, begun
        numbers = itertools.count()
        for _ in range(16):
            try:
                move = next_move(world, to)
            except RefusedError:
                assert world.used.source == "credential"
                break
            if move is None:
                break
            world = after(world, move, lambda: f"new {next(numbers)}")  # noqa: B023
            found = {sealed.key_id for sealed in world.sealed.values()}
            files = {key.key_id for key in world.known if key.source == "file"}
            if move.action in ("restart", "remove"):
                assert world.used.key_id in found | files, (move, world)
            if move.action == "restart":
                assert None not in found, (move, world)
        else:
            pytest.fail(f"goes round in circles: {begun}")
    assert count > 1000
