"""A small service, run as a real process by the tests: takes what the manager hands over, reports it, serves it.

It answers each connection on a passed socket with a JSON report and ends when ``infer`` was asked. The report holds
what a child of its own sees, since that is what must not leak.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys

from agent.base import systemd
from agent.base.errors import ConfigError

GRANDCHILD = """
import json, os
fds = []
for fd in os.listdir("/proc/self/fd"):
    try:
        fds.append(os.readlink(f"/proc/self/fd/{fd}"))
    except OSError:
        pass
print(json.dumps({"env": sorted(os.environ), "fds": fds}))
"""


def main() -> int:
    try:
        handover = systemd.take_environment()
        sockets = systemd.adopt_sockets(handover.descriptors, ("infer", "admin"))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    notifier = systemd.Notifier(handover.notify_address)
    # close_fds=False: only close-on-exec may keep the sockets from a child.
    grandchild = subprocess.run(
        [sys.executable, "-c", GRANDCHILD], stdout=subprocess.PIPE, check=True, close_fds=False
    ).stdout
    report = {
        "pid": os.getpid(),
        "names": sorted(sockets),
        "blocking": [listener.getblocking() for listener in sockets.values()],
        "watchdog_s": handover.watchdog_s,
        "credentials": str(handover.credentials) if handover.credentials else None,
        "grandchild": json.loads(grandchild),
    }
    notifier.ready("serving")
    if not sockets:
        print(json.dumps(report))
        return 0
    by_fd = {listener.fileno(): (name, listener) for name, listener in sockets.items()}
    while True:
        for fd in select.select(list(by_fd), [], [], 30)[0]:
            name, listener = by_fd[fd]
            connection, _ = listener.accept()
            with connection:
                connection.setblocking(True)
                connection.sendall(json.dumps(report | {"asked": name}).encode())
            if name == "infer":
                notifier.stopping()
                return 0


if __name__ == "__main__":
    sys.exit(main())
