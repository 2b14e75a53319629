"""A device with its fleet for ``jobs.py``: real core, link and broker, a ledger of every job, and witnesses of effects.

The operator keeps to the doorbell: one document at a time, the next one when the device has answered, and the same one
again when nothing is heard, since a killed broker may have lost it.
"""

from __future__ import annotations

import base64
import contextlib
import ctypes
import json
import os
import shutil
import signal
import sqlite3
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from agent.base.errors import AgentError
from agent.trust.envelope import PublicKey, open_envelope, peek_payload
from agent.wire.messages import JobState, decode
from tests.core.fleet_device import ENDED, FleetDevice
from tests.link.broker import Broker
from tests.link.proxy import Proxy

ASK_AGAIN_S = 3.0
#: So long a job may take, whatever is killed meanwhile.
PATIENCE_S = 180.0
PAIR = ("1.0.0", "2.0.0")
_IN_MOVED_TO = 0x80


@dataclass
class Given:
    """A job as the operator knows it. ``revs``: the payloads by revision; ``kills``: what fell into it."""

    job_id: str
    op: str
    document: bytes
    heard: list[dict] = field(default_factory=list)
    revs: dict[int, bytes] = field(default_factory=dict)
    kills: list[str] = field(default_factory=list)
    again: int = 0

    @property
    def state(self) -> str:
        return self.heard[-1]["state"] if self.heard else ""

    @property
    def has_ended(self) -> bool:
        return self.state in ENDED


class Renames:
    """Counts files that are put under a name in a folder: inotify(7), so that no poll can miss one."""

    def __init__(self, folder: Path, name: str) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        self._name = name
        self._descriptor = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if libc.inotify_add_watch(self._descriptor, os.fsencode(folder), _IN_MOVED_TO) < 0:
            raise OSError(ctypes.get_errno(), "inotify_add_watch")
        self._count = 0

    def count(self) -> int:
        """So far."""
        with contextlib.suppress(BlockingIOError):
            while data := os.read(self._descriptor, 65536):
                while data:
                    _, _, _, length = struct.unpack_from("iIII", data)
                    self._count += data[16 : 16 + length].rstrip(b"\0").decode() == self._name
                    data = data[16 + length :]
        return self._count


class Site:
    """The device, its broker, and what was given, heard and done so far."""

    def __init__(self, folder: Path, *, proxied: bool) -> None:
        (folder / "broker").mkdir()
        self.broker = Broker(folder / "broker")
        self.proxy = Proxy(self.broker.port) if proxied else None
        self._stack = contextlib.ExitStack()
        self._folder = folder
        self.jobs: dict[str, Given] = {}
        self.violations: list[str] = []
        self.clean_exits = 0
        self._seen = 0
        self._said_at = 0.0

    def __enter__(self) -> Site:
        self._stack.enter_context(self.broker)
        if self.proxy is not None:
            self._stack.enter_context(self.proxy)
        self.device = self._stack.enter_context(
            FleetDevice(
                self._folder,
                self.broker,
                config="[selection]\nmin_rounds = 4\nmax_rounds = 4\n[probation]\nseconds = 1",
                port=self.proxy.port if self.proxy else 0,
                longest_pause_s=0.3,
            )
        )
        self.device.connect()
        self.fleet = self.device.fleet
        self.rotations = Renames(self.device.state / "keys", "device-secret")
        identity = json.loads(peek_payload(self.fleet.operator.on(f"{self.device.name}/up/info")[0])[1])["identity"]
        key = PublicKey(base64.b64decode(identity))
        self._identity = {key.keyid: key}
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    # -- the operator -------------------------------------------------------------------------------------------------

    def make(self, op: str, args: dict[str, Any], **fields: Any) -> Given:
        """The next job, not given yet."""
        job = self.fleet.job(op, args, **fields)
        given = Given(job.job_id, op, self.fleet.sealed(self.fleet.document(job)))
        self.jobs[job.job_id] = given
        return given

    def carry_out(self, jobs: list[Given], meanwhile: Callable[[], None] = lambda: None) -> float:
        """Give the jobs and wait until all have ended; ``meanwhile`` is called all the time. Seconds."""
        began = time.monotonic()
        ringing = iter(jobs)
        current = next(ringing)
        self._ring(current)
        while not all(job.has_ended for job in jobs):
            self.listen()
            self._look_after_core()
            meanwhile()
            now = time.monotonic()
            if current.heard and (following := next(ringing, None)) is not None:
                current = following
                self._ring(current)
            elif now - self._said_at > ASK_AGAIN_S:
                self._ask_again(current, jobs)
            if now - began > PATIENCE_S:
                lost = [job.job_id for job in jobs if not job.has_ended]
                self.violations.append(f"lost: {lost}, {[job.heard[-1:] for job in jobs if not job.has_ended]}")
                break
            time.sleep(0.002)
        return time.monotonic() - began

    def _ring(self, job: Given) -> None:
        self._said_at = time.monotonic()
        self.fleet.say("dn/job", job.document, retain=True)

    def _ask_again(self, current: Given, jobs: list[Given]) -> None:
        """Say the document again; of a job before it, its end is asked for by a document of its own."""
        silent = [job for job in jobs if job.heard and not job.has_ended and job is not current]
        if current.has_ended and silent:
            job = silent[0]
            job.document = self.fleet.sealed(self.fleet.document(self._order_of(job)))
            current = job
        current.again += 1
        self._ring(current)

    def _order_of(self, job: Given) -> Any:
        from agent.wire.messages import JobDocument  # noqa: PLC0415

        return decode(peek_payload(job.document)[1], JobDocument).job

    def listen(self) -> None:
        """Take in what was heard since."""
        heard = self.fleet.operator.heard
        while self._seen < len(heard):
            message = heard[self._seen]
            self._seen += 1
            rest = message.topic.partition("/")[2]
            if rest.startswith("up/job/") and message.payload:
                self._note(message.payload)

    def _note(self, payload: bytes) -> None:
        state = decode(open_envelope(payload, JobState.KIND, self._identity).payload, JobState).model_dump(mode="json")
        job = self.jobs[state["job_id"]]
        rev, plain = state["rev"], peek_payload(payload)[1]
        if job.revs.setdefault(rev, plain) != plain:
            self.violations.append(f"{job.job_id}: two states of revision {rev}")
        if job.heard and rev <= job.heard[-1]["rev"]:
            return  # said again
        if job.has_ended:
            self.violations.append(f"{job.job_id}: said something after its end")
        job.heard.append(state)

    # -- processes ----------------------------------------------------------------------------------------------------

    def _look_after_core(self) -> None:
        """As the service manager: what ends is started again."""
        process = self.device.process
        if process is not None and process.poll() is not None:
            if process.returncode == 0:
                self.clean_exits += 1
            else:
                self.violations.append(f"core ended with status {process.returncode}")
            self.device.start(ready=False)

    def kill_core(self, *, children_too: bool) -> list[tuple[str, str | None, str, int]]:
        """SIGKILL, and what the journal says of its jobs: id, step, state and how far it was told; started anew."""
        process = self.device.process
        assert process is not None
        children = children_of(process.pid) if children_too else []
        process.kill()
        process.wait()
        for pid in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        rows = self.journal()
        self.device.start(ready=False)
        return rows

    def kill_link(self) -> None:
        """SIGKILL and started anew."""
        self.device.restart_link(signal.SIGKILL)

    def kill_broker(self) -> None:
        """SIGKILL and started anew: what it had not saved is lost."""
        self.broker.process.stop(signal.SIGKILL)
        self.broker.process.start()

    def journal(self) -> list[tuple[str, str | None, str, int]]:
        """Rows of the journal of a core that is not running (or a moment ago): id, step, state, told."""
        copy = self._folder / "journal-copy.db"
        for suffix in ("", "-wal"):
            copy.with_name(copy.name + suffix).unlink(missing_ok=True)
            original = self.device.state / f"journal.db{suffix}"
            if original.exists():
                shutil.copyfile(original, copy.with_name(copy.name + suffix))
        with contextlib.closing(sqlite3.connect(copy)) as connection:
            connection.execute("PRAGMA locking_mode = EXCLUSIVE")
            return connection.execute("SELECT job_id, step, state, published >= rev FROM jobs").fetchall()

    def ask(self, path: str) -> dict[str, Any]:
        """One call of the admin socket, patient with a core that is starting."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                return self.device.admin_get(path)
            except AgentError:
                self._look_after_core()
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.01)

    def complaints(self) -> Iterator[str]:
        """What no log may hold."""
        for line in self.device.logs().splitlines():
            if "Traceback" in line or " E edge_agent.core" in line or " E asyncio" in line:
                yield line


def children_of(parent: int) -> list[int]:
    """Processes whose parent that is."""
    done = subprocess.run(["pgrep", "-P", str(parent)], capture_output=True, text=True, check=False)
    return [int(pid) for pid in done.stdout.split()]
