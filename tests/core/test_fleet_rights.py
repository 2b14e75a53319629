"""What the link's own user may do on ``admin.sock`` of a real core: the rows of its table, and nothing else."""

from __future__ import annotations

import http.client
import json
import os
import pwd
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from agent.base.config import DeliveryConfig
from agent.core.admin_api import AdminApi, Documents
from agent.core.cache_api import CacheApi
from agent.core.incoming_api import IncomingApi
from agent.core.link_api import LinkApi, NoFleet
from agent.serve.access import CARRY, OPERATE
from agent.serve.routes import Route
from agent.trust.desk import Desk
from tests.core.conftest import Agent
from tests.core.desk import Keys

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
#: Any user of this machine but root, to stand for link's.
LINK = pwd.getpwnam("nobody")
STRANGER = 4343
LINKS = ("settings", "received", "outgoing", "confirmed", "state", "csr", "enrolment", "wants")

#: Asks for each target as another user: JSON in, statuses out.
_ASKING = """
import json, os, socket, sys
path, uid, gid, targets = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), json.load(sys.stdin)
os.setgroups([]); os.setgid(gid); os.setuid(uid)
found = []
for method, target in targets:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(30)
        sock.connect(path)
        sock.sendall(f"{method} {target} HTTP/1.1\\r\\nHost: x\\r\\nContent-Length: 2\\r\\n\\r\\n{{}}".encode())
        found.append(int(sock.recv(100).split()[1]))
print(json.dumps(found))
"""


def rows() -> list[Route]:
    """Every row that core serves on the admin socket, as it makes them itself."""
    nothing: Any = SimpleNamespace()
    api = AdminApi(nothing, nothing, nothing, nothing, Documents(nothing, dict, list, nothing), nothing, lambda: None)
    kept = CacheApi(nothing, nothing, nothing, nothing)
    incoming = IncomingApi(Desk(), DeliveryConfig)
    return [*api.routes(), *kept.routes(), *LinkApi(NoFleet).routes(), *incoming.routes()]


def target(route: Route) -> tuple[str, str]:
    path = route.pattern.replace("{name}", "m").replace("{id}", "j1")
    return route.method, path + ("?wait_s=0" if path.endswith("/outgoing") else "")


def asked_as(device: Agent, uid: int, gid: int, targets: list[tuple[str, str]]) -> list[int]:
    done = subprocess.run(
        [sys.executable, "-c", _ASKING, str(device.run / "admin.sock"), str(uid), str(gid)],
        input=json.dumps(targets), capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    statuses: list[int] = json.loads(done.stdout)
    return statuses


@pytest.fixture
def device(short_dir: Path):
    """A running core with a fleet, whose link runs as another user; the socket may be reached by it."""
    agent = Agent(short_dir)
    agent.config.write_text(f'[sockets]\nlink_user = "{LINK.pw_name}"\n[link]\nhost = "broker.example"\n')
    (short_dir / "trust.toml").write_text(Keys().trust("cam-1"))
    short_dir.chmod(0o755)
    agent.start()
    (agent.run / "admin.sock").chmod(0o666)  # under systemd the socket unit gives it to link's group
    yield agent
    assert agent.stop() == 0


def test_each_row_is_for_operators_unless_it_is_in_links_table(device: Agent) -> None:
    every = rows()
    assert {route.right for route in every} == {OPERATE, CARRY}
    assert {route.pattern for route in every if route.right == CARRY} == {
        "/v1/incoming/{id}",
        "/v1/incoming/{id}/failed",
        *(f"/v1/link/{name}" for name in LINKS),
    }
    statuses = asked_as(device, LINK.pw_uid, LINK.pw_gid, [target(route) for route in every])
    for route, status in zip(every, statuses, strict=True):
        if route.right == CARRY:
            assert status in (200, 400, 404), route  # 400: the body was none; 404: nobody waits for it
        else:
            assert status == 403, route
    assert device.process is not None and device.process.poll() is None


def test_a_stranger_gets_nothing(device: Agent) -> None:
    targets = [*(target(route) for route in rows()), ("GET", "/v1/no/such"), ("GET", "/v2/health/ready")]
    assert set(asked_as(device, STRANGER, STRANGER, targets)) == {403}


def test_root_may_ask_for_every_row(device: Agent) -> None:
    """The table of this test is that of core: no row is unknown, none is refused."""
    for route in rows():
        if route.method == "GET":
            method, path = target(route)
            connection = http.client.HTTPConnection("core")
            connection.sock = socket.socket(socket.AF_UNIX)
            connection.sock.connect(str(device.run / "admin.sock"))
            connection.request(method, path)
            status = connection.getresponse().status
            connection.close()
            assert status in (200, 404), route  # 404: there is no model m, no job j1
            assert status == 200 or "{" in route.pattern


def test_what_link_says_of_itself_does_not_grow(device: Agent) -> None:
    """It decides nothing but whether a configuration may stay, and is shown cut to size."""
    with device.admin() as admin:
        long = {f"field-{number}": "x" * 250 for number in range(200)}
        admin.call("POST", "/v1/link/state", {"connected": True, "outbox": long, "deep": {"a": {"b": 1}}, **long})
        shown = device.json("status")["link"]
    assert len(json.dumps(shown)) < 20_000
    assert shown["deep"] == {"a": None}
