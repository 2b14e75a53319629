"""What one caller may take: sizes, times, counts; and the ledger that counts what each uid has at the moment.

Pure. A limit of time is in seconds, of size in bytes. The ledger has one writer, the event loop.
"""

from __future__ import annotations

from dataclasses import dataclass

MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Limits:
    """The caps of one socket. Defaults suit ``infer.sock`` on a board with 1 GiB or more.

    ``request_s`` is absolute, from the first byte of a request to its answer, so that a sender of one byte a second is
    cut; a route may allow longer for its handler. ``write_s`` is absolute for taking an answer. ``bytes_per_uid`` and
    ``bytes_total`` count bodies and answers in memory, and are taken before anything is allocated.
    """

    request_line_bytes: int = 8192
    head_bytes: int = 16384
    head_fields: int = 64
    body_bytes: int = 64 * MIB
    json_bytes: int = 4 * MIB
    request_s: float = 30.0
    idle_s: float = 75.0
    write_s: float = 30.0
    linger_s: float = 1.0
    connections: int = 512
    connections_per_uid: int = 128
    bytes_per_uid: int = 128 * MIB
    bytes_total: int = 256 * MIB
    descriptors: int = 0
    pipelining: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.request_line_bytes <= self.head_bytes:
            raise ValueError("request_line_bytes must be positive and at most head_bytes")
        for name in ("head_fields", "body_bytes", "json_bytes", "connections", "connections_per_uid"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1")
        for name in ("request_s", "idle_s", "write_s", "linger_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive")
        if self.descriptors and self.pipelining:
            # The kernel may hand over the end of one request with the start and the descriptors of the next.
            raise ValueError("descriptors need pipelining off")


class Ledger:
    """Connections and bytes that each uid holds now, and the totals."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._connections: dict[int, int] = {}
        self._bytes: dict[int, int] = {}
        self.connections = 0
        self.bytes = 0

    def enter(self, uid: int) -> bool:
        """Count one more connection of ``uid``; False, and nothing counted, when a cap is reached."""
        held = self._connections.get(uid, 0)
        if self.connections >= self._limits.connections or held >= self._limits.connections_per_uid:
            return False
        self._connections[uid] = held + 1
        self.connections += 1
        return True

    def leave(self, uid: int) -> None:
        """One connection of ``uid`` ended."""
        left = self._connections[uid] - 1
        if left:
            self._connections[uid] = left
        else:
            del self._connections[uid]
        self.connections -= 1

    def reserve(self, uid: int, size: int) -> bool:
        """Count ``size`` more bytes for ``uid``; False, and nothing counted, when a cap would be passed."""
        held = self._bytes.get(uid, 0)
        if held + size > self._limits.bytes_per_uid or self.bytes + size > self._limits.bytes_total:
            return False
        self.charge(uid, size)
        return True

    def charge(self, uid: int, size: int) -> None:
        """Count ``size`` bytes that exist already (an answer): never refused, but it blocks further reservations."""
        self._bytes[uid] = self._bytes.get(uid, 0) + size
        self.bytes += size

    def release(self, uid: int, size: int) -> None:
        """``size`` bytes of ``uid`` are free again."""
        left = self._bytes[uid] - size
        if left:
            self._bytes[uid] = left
        else:
            del self._bytes[uid]
        self.bytes -= size
