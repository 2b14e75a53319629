"""Starting, asking and ending confined children from the daemon's side.

A child is started by exec (never fork: it would inherit the keys), gets its files as descriptors and an environment
of its own, and is killed when it outlasts a deadline or outgrows its memory. It runs only while it is asked something:
between an answer and the next request it is stopped, so that it neither disturbs others nor grows unseen, and so it is
while apps are answered (``right_of_way``). Whatever a child does ends as a ``ChildError`` with a kind; nothing of it
can block or crash the caller.

It has the lowest priority that there is, but for one that requests wait for (``urgent``), which would otherwise wait
for them in turn. So one that is slow to answer may be one that others leave no time: it hangs
only when it has had half of its time, or waits for something else than a processor, or is late many times over.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from agent.base.errors import AgentError, TryLaterError
from agent.infer.right_of_way import RIGHT_OF_WAY

_MB = 1 << 20
_POLL_S = 0.05
#: For the start of a child to become visible; it takes microseconds.
_WATCH_S = 2.0
_MAX_ANSWER_BYTES = 4 * _MB
#: How many times over a child may be late to which others leave no time: a twentieth of it, where requests never end.
_PATIENCE = 20
#: linux/posix-timers.h
_CPUCLOCK_SCHED = 2
#: Threads of numpy's and the runtime's pools: some for each core, and those that keep house.
_MAX_THREADS = 64 + 4 * (os.cpu_count() or 1)
#: Fields of proc(5)'s status whose memory is the process's own: pages of no file, pages of memory files and shared
#: mappings (which RLIMIT_DATA does not count), what was swapped out, and the tables that map it all.
_OWN_MEMORY = (b"RssAnon", b"RssShmem", b"VmSwap", b"VmPTE")
#: What an interpreter with numpy and a runtime reserves besides the model: thread stacks, arenas, tables.
_RESERVED_MB = 1024
_ROOT = Path(__file__).resolve().parents[2]
_BOOT = (
    "import sys; sys.path[:0] = [{root!r}]; from agent.infer.yielding import {manner}; {manner}(); "
    "from {module} import main; main()"
)
#: Libraries of an accelerator may be found only through these.
_KEPT_ENVIRONMENT = ("LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES", "LANG", "LC_ALL")

FailureKind = Literal["crashed", "hung", "memory", "refused"]


class ChildError(AgentError):
    """A child that did not answer as asked; ``kind`` says how, the text says why."""

    def __init__(self, kind: FailureKind, text: str, *, hint: str = "") -> None:
        super().__init__(text, hint=hint)
        self.kind: FailureKind = kind


@dataclass(frozen=True, slots=True)
class ChildLimits:
    """Bounds of one child: resident private memory in MB, seconds for a start, seconds of CPU time in all."""

    memory_mb: int
    start_s: float = 60.0
    cpu_s: int = 600


class ChildProcess:
    """One confined child. Use as a context manager; ``close`` is idempotent and always reaps."""

    def __init__(
        self,
        descriptors: Mapping[str, int | None],
        limits: ChildLimits,
        *,
        cpus: Sequence[int] = (),
        devices: Sequence[str] = (),
        module: str = "agent.infer.child",
        file_bytes: int = 0,
        urgent: bool = False,
        go_on: Callable[[], None] = lambda: None,
    ) -> None:
        """``go_on`` is called while the child is waited for; what it raises comes out of the call.

        ``urgent``: requests wait for what it says. It has the daemon's priority, and nothing holds it up.
        ``file_bytes``: it may write so many into a memory file among its descriptors.
        """
        self._go_on = go_on
        self._urgent = urgent
        self._limits = limits
        self._baseline_kb = 0
        given = [fd for fd in descriptors.values() if fd is not None]
        #: Mapped, a memory file that was handed over counts as the child's although it is the caller's.
        self._given_kb = (file_bytes + sum(os.fstat(fd).st_size for fd in given)) // 1024
        ours, theirs = _socket_pair()
        try:
            start = {
                **descriptors,
                "control": theirs.fileno(),
                "data_bytes": (limits.memory_mb + _RESERVED_MB) * _MB,
                "cpu_seconds": limits.cpu_s,
                "file_bytes": file_bytes,
                "cpus": list(cpus),
                "devices": [name for name in devices if Path(name).exists()],
            }
            self._process = subprocess.Popen(
                [sys.executable, "-s", "-E", "-c", _boot(module, urgent=urgent), json.dumps(start)],
                pass_fds=[*given, theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                env=_environment(),
                cwd="/",
            )
        except OSError as error:
            ours.close()
            raise TryLaterError(f"cannot start a trial: {error.strerror}") from error
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        if not urgent:
            RIGHT_OF_WAY.add(self._process)
        self._control = ours
        self._buffer = bytearray()
        self._status = self._open_status()

    def __enter__(self) -> ChildProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pid(self) -> int:
        """Process id of the child."""
        return self._process.pid

    def greet(self) -> dict[str, Any]:
        """The child's first word, sent once it is confined."""
        return self._receive(self._limits.start_s, "start")

    def call(self, operation: str, timeout_s: float, /, **arguments: object) -> dict[str, Any]:
        """Ask once and wait. ChildError: ``refused`` for an answered error, else how the child ended."""
        line = json.dumps({"op": operation, **arguments}).encode() + b"\n"
        RIGHT_OF_WAY.run(self._process)
        try:
            self._control.settimeout(timeout_s)
            self._control.sendall(line)
        except OSError as error:
            raise self._ended(operation) from error
        answer = self._receive(timeout_s, operation)
        if "error" in answer:
            text = plain(str(answer["error"]), 500)
            kind: FailureKind = "memory" if answer.get("memory") else "refused"
            raise ChildError(kind, text, hint=plain(str(answer.get("hint", "")), 200))
        if operation == "prepare":  # from here on growth is the model's
            self._baseline_kb = self._holds()[0]
        return answer

    def close(self) -> None:
        """Kill what is left, reap it, close the socket."""
        RIGHT_OF_WAY.take_out(self._process)
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        self._process.wait()
        self._control.close()
        status, self._status = self._status, -1
        if status >= 0:
            os.close(status)
        if self._process.stderr is not None:
            self._process.stderr.close()

    def _receive(self, timeout_s: float, doing: str) -> dict[str, Any]:
        begun, used = time.monotonic(), self._used_s()
        deadline = begun + timeout_s
        while (end := self._buffer.find(b"\n")) < 0:
            if time.monotonic() > deadline and not self._is_starved(begun, used, timeout_s):
                self.close()
                raise ChildError("hung", f"hung: no answer to '{doing}' within {timeout_s:.0f} s")
            self._require_within_limits(doing)
            self._go_on()
            if not self._urgent:
                RIGHT_OF_WAY.breathe()
            self._control.settimeout(_POLL_S)
            try:
                part = self._control.recv(1 << 16)
            except TimeoutError:
                continue
            except OSError as error:
                raise self._ended(doing) from error
            if not part:
                raise self._ended(doing)
            self._buffer += part
            if len(self._buffer) > _MAX_ANSWER_BYTES:
                self.close()
                raise ChildError("crashed", f"answered '{doing}' with more than {_MAX_ANSWER_BYTES} bytes")
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        self._require_within_limits(doing)
        RIGHT_OF_WAY.rest(self._process)
        try:
            answer = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ChildError("crashed", f"answered '{doing}' with something that is not JSON") from error
        if not isinstance(answer, dict):
            raise ChildError("crashed", f"answered '{doing}' with something that is no object")
        return answer

    def _require_within_limits(self, doing: str) -> None:
        held_kb, threads = self._holds()
        if held_kb - self._baseline_kb - self._given_kb > self._limits.memory_mb * 1024:
            self.close()
            raise ChildError("memory", f"used more than {self._limits.memory_mb} MB during '{doing}'")
        if threads > _MAX_THREADS:
            self.close()
            raise ChildError("crashed", f"started more than {_MAX_THREADS} threads during '{doing}'")

    def _open_status(self) -> int:
        """Opened before the child makes itself undumpable.

        Where /proc hides what may not be traced, the child is then hidden from us too, but an open file stays readable.
        """
        self._status = -1
        patience = time.monotonic() + _WATCH_S
        while True:
            try:
                return os.open(f"/proc/{self.pid}/status", os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                # The kernel closes what Popen waits for a moment before it makes the new program readable, so that for
                # this moment a child of an undumpable process is hidden as its parent would be.
                if time.monotonic() > patience or self._process.poll() is not None:
                    self.close()  # nobody would see it grow
                    raise TryLaterError(f"cannot watch a trial: {error.strerror}") from error
                time.sleep(0.0005)

    def _holds(self) -> tuple[int, int]:
        """Memory of its own in KB and number of threads; 0 when the process is gone. Costs no page walk."""
        try:
            lines = os.pread(self._status, 1 << 16, 0).splitlines()
        except OSError:
            return 0, 0
        fields = dict(line.split(b":", 1) for line in lines if b":" in line)
        held_kb = sum(int(fields[name].split()[0]) for name in _OWN_MEMORY if name in fields)
        return held_kb, int(fields.get(b"Threads", b"0"))

    def _is_starved(self, begun: float, used: float, timeout_s: float) -> bool:
        """Whether it would run and may not: others have the processors, or requests the right of way."""
        if time.monotonic() > begun + _PATIENCE * timeout_s or self._used_s() - used > timeout_s / 2:
            return False
        try:
            lines = os.pread(self._status, 1 << 16, 0).splitlines()
        except OSError:
            return False
        return any(line.startswith((b"State:\tR", b"State:\tT")) for line in lines)

    def _used_s(self) -> float:
        """Processor time of the process, by its own clock: clock_getcpuclockid(3) makes the number so."""
        try:
            return time.clock_gettime((~self.pid << 3) | _CPUCLOCK_SCHED)
        except OSError:
            return float("inf")

    def _ended(self, doing: str) -> ChildError:
        """Why the child is gone: its signal or status."""
        RIGHT_OF_WAY.take_out(self._process)
        try:
            status = self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self.close()
            return ChildError("crashed", f"closed its socket during '{doing}'")
        if status == -signal.SIGKILL:
            return ChildError("memory", f"killed by the kernel during '{doing}': out of memory")
        if status == -signal.SIGXCPU:
            return ChildError("hung", f"used up its {self._limits.cpu_s} s of CPU time during '{doing}'")
        if status < 0:
            return ChildError("crashed", f"crashed during '{doing}': {signal.Signals(-status).name}")
        return ChildError("crashed", f"exited with status {status} during '{doing}'{self._last_words()}")

    def _last_words(self) -> str:
        """Last line of its stderr. The pipe holds 64 KiB: a child that fills it hangs and is killed."""
        stream = self._process.stderr
        if stream is None or stream.closed:
            return ""
        os.set_blocking(stream.fileno(), False)
        lines = (stream.read() or b"").decode(errors="replace").strip().splitlines()
        return f": {plain(lines[-1], 300)}" if lines else ""


def _boot(module: str, *, urgent: bool) -> str:
    manner = "stand_apart" if urgent else "yield_to_others"
    return _BOOT.format(root=str(_ROOT), module=module, manner=manner)


def _environment() -> dict[str, str]:
    kept = {name: os.environ[name] for name in _KEPT_ENVIRONMENT if name in os.environ}
    return {**kept, "PYTHONDONTWRITEBYTECODE": "1", "HOME": "/", "PATH": "/usr/bin:/bin"}


def _socket_pair() -> tuple[socket.socket, socket.socket]:
    try:
        return socket.socketpair()
    except OSError as error:
        raise TryLaterError(f"cannot start a trial: {error.strerror}") from error


def plain(text: str, most: int) -> str:
    """At most ``most`` characters of what a child said, fit for a terminal and a log: nothing but printable ones."""
    return "".join(char if char.isprintable() else "?" for char in text[:most])
