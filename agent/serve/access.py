"""Who is asking, and what they may use: peers by uid and groups, rules per model, rights on the admin socket.

Pure but for ``peer_of``. Nobody is ever authorised by pid: it is reused, and only kept for logs. The credentials are
those at ``connect()``, as the kernel recorded them (unix(7), SO_PEERCRED).
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass

INFER = "infer"
OPERATE = "operate"
CARRY = "carry"

_CREDENTIALS = struct.Struct("3i")
#: socket(7), asm-generic; Python has no name for it. getsockopt() of Python gives at most 1024 bytes: 256 groups.
_SO_PEERGROUPS = 59
_GROUPS_BYTES = 1024


@dataclass(frozen=True, slots=True)
class Peer:
    """The process at the other end, as it was when it connected. ``groups`` holds the primary one too."""

    uid: int
    gid: int
    groups: frozenset[int]
    pid: int


def peer_of(connection: socket.socket) -> Peer:
    """The peer of a connected Unix socket. A peer in more than 256 groups counts with its primary group only."""
    pid, uid, gid = _CREDENTIALS.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    try:
        raw = connection.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, _GROUPS_BYTES)
    except OSError:  # ERANGE: too many; ENOPROTOOPT: a kernel before 4.13. Fewer groups never mean more rights.
        raw = b""
    groups = struct.unpack(f"{len(raw) // 4}I", raw[: len(raw) // 4 * 4])
    return Peer(uid, gid, frozenset((gid, *groups)), pid)


@dataclass(frozen=True, slots=True)
class ModelRule:
    """Who may use a model: any of these uids, or members of any of these gids."""

    uids: frozenset[int] = frozenset()
    gids: frozenset[int] = frozenset()

    def admits(self, peer: Peer) -> bool:
        """Whether ``peer`` matches."""
        return peer.uid in self.uids or not self.gids.isdisjoint(peer.groups)


class ModelRules:
    """Rules by model name; ``default`` is for models without one (None: everyone who may open the socket).

    root is always admitted, since it could read the keys anyway.
    """

    def __init__(self, rules: Mapping[str, ModelRule] | None = None, default: ModelRule | None = None) -> None:
        self._rules = dict(rules or {})
        self._default = default

    def replace(self, other: ModelRules) -> None:
        """Hold what ``other`` holds from now on: a reload of the configuration."""
        self._rules, self._default = other._rules, other._default

    def allowed(self, peer: Peer, model: str) -> bool:
        """Whether ``peer`` may see and use ``model``, existing or not."""
        rule = self._rules.get(model, self._default)
        return rule is None or peer.uid == 0 or rule.admits(peer)

    def restricted(self, peer: Peer) -> bool:
        """Whether some model is closed to ``peer``: then it must not learn which names exist."""
        if peer.uid == 0:
            return False
        every = [*self._rules.values(), self._default]
        return any(rule is not None and not rule.admits(peer) for rule in every)


def admin_rights(own_uid: int, link_uid: int | None) -> Callable[[Peer], frozenset[str]]:
    """Rights on ``admin.sock``: root and the daemon's own uid operate (and may carry), the link's uid carries."""
    full = frozenset((OPERATE, CARRY))

    def rights(peer: Peer) -> frozenset[str]:
        if peer.uid in (0, own_uid):
            return full
        return frozenset((CARRY,)) if peer.uid == link_uid else frozenset()

    return rights


def infer_rights(_peer: Peer) -> frozenset[str]:
    """Rights on ``infer.sock``: its mode and group already say who may open it."""
    return frozenset((INFER,))
