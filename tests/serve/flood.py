"""A hostile user in a process of its own: ``flood.py PATH UID COUNT``.

Becomes UID, opens COUNT connections and asks on each, keeps all of them, prints how many were served and refused, and
stays until its standard input ends.
"""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import sys

LIVE = b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n\r\n"


def main() -> None:
    path, uid, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    resource.setrlimit(resource.RLIMIT_NOFILE, (count + 100, max(count + 100, 4096)))
    os.setgroups([])
    os.setgid(uid)
    os.setuid(uid)
    print("begun", flush=True)
    held, served, refused = [], 0, 0
    for _ in range(count):
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(30)
        sock.connect(path)
        with contextlib.suppress(BrokenPipeError):  # refused already; the reason can still be read
            sock.sendall(LIVE)
        first = sock.recv(12)
        served += first == b"HTTP/1.1 200"
        refused += first == b"HTTP/1.1 503"
        held.append(sock)
    print(served, refused, flush=True)
    sys.stdin.read()


main()
