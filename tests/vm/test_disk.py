"""The disk of the power cuts: what lasts, what may be lost, and that a client sees what it wrote."""

from __future__ import annotations

import random
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.vm.disk import BLOCK, Disk, Server

SIZE = 16 * BLOCK


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base"
    path.write_bytes(bytes(range(256)) * (SIZE // 256))
    return path


@pytest.fixture
def disk(base: Path) -> Iterator[Disk]:
    made = Disk(base)
    yield made
    made.close()


def test_what_was_flushed_survives_a_cut_and_the_rest_does_not(disk: Disk) -> None:
    before = disk.read(0, SIZE)
    disk.write(0, b"a" * BLOCK)
    disk.flush()
    disk.write(BLOCK, b"b" * BLOCK)
    disk.write(0, b"c" * 10)
    assert disk.read(0, 2 * BLOCK) == b"c" * 10 + b"a" * (BLOCK - 10) + b"b" * BLOCK
    assert disk.cut(random.Random(0), 0) == 2
    assert disk.read(0, SIZE) == b"a" * BLOCK + before[BLOCK:]
    assert disk.base.read_bytes() == before


def test_a_part_of_what_was_not_flushed_may_survive_in_any_order(disk: Disk) -> None:
    for number in range(16):
        disk.write(number * BLOCK, bytes([200]) * BLOCK)
    lost = disk.cut(random.Random(3), 0.5)
    survived = [number for number in range(16) if disk.read(number * BLOCK, 1) == bytes([200])]
    assert 0 < lost < 16 and len(survived) == 16 - lost
    assert survived != list(range(len(survived))), "not simply the first ones"


def test_a_copy_goes_its_own_way(disk: Disk) -> None:
    disk.write(0, b"one")
    disk.flush()
    other = disk.copy()
    other.write(0, b"two")
    assert (disk.read(0, 3), other.read(0, 3)) == (b"one", b"two")
    other.close()


@given(st.lists(st.tuples(st.integers(0, SIZE - 1), st.binary(min_size=1, max_size=3 * BLOCK), st.booleans())))
def test_it_reads_like_one_long_row_of_bytes(
    tmp_path_factory: pytest.TempPathFactory, writes: list[tuple[int, bytes, bool]]
) -> None:
    path = tmp_path_factory.getbasetemp() / "row"
    path.write_bytes(bytes(SIZE))
    disk, row = Disk(path), bytearray(SIZE)
    for offset, written, flushed in writes:
        data = written[: SIZE - offset]
        disk.write(offset, data)
        row[offset : offset + len(data)] = data
        if flushed:
            disk.flush()
        assert disk.read(offset // 2, len(data)) == row[offset // 2 : offset // 2 + len(data)]
    assert disk.read(0, SIZE) == row
    disk.close()


class Client:
    """As much of NBD as a client needs."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(10)
        self.socket.connect(str(path))
        self.stream = self.socket.makefile("rb")
        assert self.stream.read(18)[:16] == b"NBDMAGICIHAVEOPT"
        self.socket.sendall(struct.pack(">I", 3))
        assert self.option(8) == [0x80000001], "structured replies are not known here"
        assert self.option(7, struct.pack(">IH", 0, 0)) == [3, 1]

    def option(self, number: int, data: bytes = b"") -> list[int]:
        self.socket.sendall(struct.pack(">8sII", b"IHAVEOPT", number, len(data)) + data)
        kinds = []
        while not kinds or kinds[-1] == 3:
            _, _, kind, length = struct.unpack(">QIII", self.stream.read(20))
            self.stream.read(length)
            kinds.append(kind)
        return kinds

    def ask(self, kind: int, offset: int = 0, length: int = 0, data: bytes = b"") -> tuple[int, bytes]:
        self.socket.sendall(struct.pack(">IHHQQI", 0x25609513, 0, kind, 7, offset, length or len(data)) + data)
        magic, error, handle = struct.unpack(">IIQ", self.stream.read(16))
        assert (magic, handle) == (0x67446698, 7)
        return error, self.stream.read(length) if length and not error else b""

    def close(self) -> None:
        self.stream.close()
        self.socket.close()


def test_a_client_that_is_killed_leaves_what_it_had_flushed(disk: Disk, short_dir: Path) -> None:
    server = Server(disk, short_dir / "d")
    client = Client(short_dir / "d")
    assert client.ask(1, BLOCK, data=b"x" * 100) == (0, b"")
    assert client.ask(3) == (0, b"")
    assert client.ask(1, 2 * BLOCK, data=b"y" * 100) == (0, b"")
    assert client.ask(0, BLOCK, BLOCK + 100) == (0, disk.read(BLOCK, BLOCK) + b"y" * 100)
    assert client.ask(4, 0, BLOCK)[0] == 22, "trim"
    client.close()
    server.join()
    assert disk.flushes == 1
    assert disk.cut(random.Random(0), 0) == 1
    assert disk.read(BLOCK, 3) == b"xxx" and disk.read(2 * BLOCK, 3) != b"yyy"


def test_a_server_to_which_nobody_came_ends(disk: Disk, short_dir: Path) -> None:
    Server(disk, short_dir / "d").join()
