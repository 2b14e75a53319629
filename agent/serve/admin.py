"""``admin.sock``: the same HTTP with descriptors, rights by uid, and events of long operations.

Files come as descriptors (SCM_RIGHTS), never as paths: core cannot see them, and a path would be opened with core's
rights instead of the caller's. They belong to the request whose bytes they were sent with; a handler takes exactly as
many as it wants and the rest is closed. Requests are not pipelined here, because the kernel could then hand over
descriptors of the next request together with the end of this one.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterable

from agent.serve.access import CARRY, OPERATE, Peer, admin_rights, peer_of
from agent.serve.limits import Limits
from agent.serve.routes import Route, RouteTable
from agent.serve.server import Server

#: Few callers, small bodies; blobs come in pieces of at most this size or as descriptors.
ADMIN_LIMITS = Limits(
    body_bytes=4 << 20,
    connections=64,
    connections_per_uid=32,
    bytes_per_uid=64 << 20,
    bytes_total=64 << 20,
    descriptors=4,
    pipelining=False,
)


def admin_server(
    routes: Iterable[Route],
    *,
    link_uid: int | None,
    limits: Limits = ADMIN_LIMITS,
    own_uid: int | None = None,
    peer: Callable[[socket.socket], Peer] = peer_of,
) -> Server:
    """A server for admin routes. root and ``own_uid`` (this process's by default) operate, ``link_uid`` carries.

    ValueError for a row whose right is neither, so that no row is open by mistake.
    """
    table = RouteTable(routes)
    for route in table.routes:
        if route.right not in (OPERATE, CARRY):
            raise ValueError(f"route {route.method} {route.pattern}: right '{route.right}' is no right of admin.sock")
    own = os.geteuid() if own_uid is None else own_uid
    return Server(table, limits, rights=admin_rights(own, link_uid), peer=peer)
