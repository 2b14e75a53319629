"""A disk whose power can be cut: what was written and not flushed is in its volatile cache, and may be lost.

Killing QEMU alone proves little. What the guest has sent lies in the host's page cache then, and survives, flushed or
not: a missing fsync would never show. So the disk is ours. It stands outside QEMU as an NBD server, acknowledges a
write as soon as it is in memory, makes it last at a flush, and at a cut forgets everything since the last flush, or
keeps an arbitrary part of it, as a real disk does that writes in an order of its own. QEMU must hand flushes through
(``cache=writeback`` does, ``cache=unsafe`` would not). Not simulated: sectors torn in the middle, and disks that lie
about a flush.

The base image below is never written to, so that copies are cheap. Source: the NBD protocol, "Simple replies".
"""

from __future__ import annotations

import os
import random
import socket
import struct
import threading
from pathlib import Path

#: Ext4's block, and the least that survives or not.
BLOCK = 4096

_GREETING = struct.pack(">8s8sH", b"NBDMAGIC", b"IHAVEOPT", 0b11)  # fixed newstyle, no zeroes after EXPORT_NAME
_OPTION = struct.Struct(">8sII")
_OPTION_REPLY = struct.Struct(">QIII")
_OPTION_REPLY_MAGIC = 0x0003E889045565A9
_EXPORT_NAME, _ABORT, _INFO, _GO = 1, 2, 6, 7
_ACK, _REPLY_INFO, _UNSUPPORTED = 1, 3, 0x80000001
_HAS_FLAGS, _SEND_FLUSH = 1, 4

_REQUEST = struct.Struct(">IHHQQI")
_REPLY = struct.Struct(">IIQ")
_REQUEST_MAGIC, _REPLY_MAGIC = 0x25609513, 0x67446698
_READ, _WRITE, _DISCONNECT, _FLUSH = range(4)
_INVALID = 22


class Disk:
    """Blocks over a base image. One user at a time."""

    def __init__(self, base: Path, lasting: dict[int, bytes] | None = None) -> None:
        self.base = base
        self.size = base.stat().st_size
        self.flushes = 0
        self._file = os.open(base, os.O_RDONLY | os.O_CLOEXEC)
        self._lasting = dict(lasting or {})
        self._cached: dict[int, bytes] = {}

    def copy(self) -> Disk:
        """Another disk with what lasts on this one."""
        return Disk(self.base, self._lasting)

    def read(self, offset: int, length: int) -> bytes:
        """What was written last, flushed or not."""
        data = bytearray(os.pread(self._file, length, offset))
        for number in range(offset // BLOCK, -(-(offset + length) // BLOCK)):
            block = self._cached.get(number) or self._lasting.get(number)
            if block is not None:
                at = number * BLOCK - offset
                begin = max(at, 0)
                data[begin : min(at + BLOCK, length)] = block[begin - at : length - at]
        return bytes(data)

    def write(self, offset: int, data: bytes) -> None:
        """Into the cache."""
        head, tail = offset % BLOCK, -(offset + len(data)) % BLOCK
        if head or tail:
            first, end = offset - head, offset + len(data)
            data = self.read(first, head) + data + self.read(end, tail)
            offset = first
        for at in range(0, len(data), BLOCK):
            self._cached[(offset + at) // BLOCK] = data[at : at + BLOCK]

    def flush(self) -> None:
        """Everything so far lasts."""
        self._lasting.update(self._cached)
        self._cached.clear()
        self.flushes += 1

    def cut(self, chance: random.Random, survives: float) -> int:
        """Lose power: each block in the cache survives with that probability. How many were lost."""
        kept = {number: block for number, block in self._cached.items() if chance.random() < survives}
        lost = len(self._cached) - len(kept)
        self._lasting.update(kept)
        self._cached.clear()
        return lost

    def close(self) -> None:
        """Nothing may be asked of it afterwards."""
        os.close(self._file)


class Server:
    """Serves a disk to one client on a Unix socket, until the client goes."""

    def __init__(self, disk: Disk, path: Path) -> None:
        self._disk = disk
        self._listening = socket.socket(socket.AF_UNIX)
        self._listening.bind(str(path))
        self._listening.listen(1)
        self._thread = threading.Thread(target=self._serve, name=f"disk {path.name}", daemon=True)
        self._thread.start()

    def join(self) -> None:
        """Once the client has gone: all that it had sent is in the disk."""
        # Wakes the thread where no client ever came.
        self._listening.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listening.close()

    def _serve(self) -> None:
        try:
            connection, _ = self._listening.accept()
        except OSError:  # nobody came
            return
        with connection:
            try:
                if self._agree(connection):
                    while self._one(connection):
                        pass
            except (EOFError, ConnectionError):
                return  # the client was killed

    def _agree(self, connection: socket.socket) -> bool:
        """The handshake; whether requests follow."""
        connection.sendall(_GREETING)
        _receive(connection, 4)
        export = struct.pack(">QH", self._disk.size, _HAS_FLAGS | _SEND_FLUSH)
        while True:
            _, option, length = _OPTION.unpack(_receive(connection, _OPTION.size))
            _receive(connection, length)
            if option == _EXPORT_NAME:
                connection.sendall(export)
                return True
            if option in (_GO, _INFO):
                _answer(connection, option, _REPLY_INFO, struct.pack(">H", 0) + export)
            _answer(connection, option, _ACK if option in (_GO, _INFO, _ABORT) else _UNSUPPORTED)
            if option in (_GO, _ABORT):
                return option == _GO

    def _one(self, connection: socket.socket) -> bool:
        magic, _, kind, handle, offset, length = _REQUEST.unpack(_receive(connection, _REQUEST.size))
        data, error = b"", 0
        if magic != _REQUEST_MAGIC or kind == _DISCONNECT:
            return False
        if kind == _READ:
            data = self._disk.read(offset, length)
        elif kind == _WRITE:
            self._disk.write(offset, _receive(connection, length))
        elif kind == _FLUSH:
            self._disk.flush()
        else:
            error = _INVALID
        connection.sendall(_REPLY.pack(_REPLY_MAGIC, error, handle) + data)
        return True


def _answer(connection: socket.socket, option: int, kind: int, data: bytes = b"") -> None:
    connection.sendall(_OPTION_REPLY.pack(_OPTION_REPLY_MAGIC, option, kind, len(data)) + data)


def _receive(connection: socket.socket, length: int) -> bytes:
    data = bytearray(length)
    view = memoryview(data)
    while view:
        count = connection.recv_into(view)
        if not count:
            raise EOFError
        view = view[count:]
    return bytes(data)
