"""The real daemon as a process: started, asked, killed and weighed from outside, for benchmarks.

Everything is read from ``/proc`` and from the sockets, so that what is measured is what a device would run. Readiness
is the 200 of ``GET /v2/health/ready``; the service manager's datagram only tells when to ask, which spares the polling
that would slow a small machine down.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from agent.bundles.archive import write
from agent.bundles.manifest import Manifest
from agent.client import AdminClient, Client

ROOT = Path(__file__).resolve().parents[1]
FEATURES, CLASSES = 16, 4
#: Trials as short as the configuration allows: here it matters that they happen, not what they find.
SHORT_TRIALS = "[selection]\nmin_rounds = 4\nmax_rounds = 4\n"
START_TIMEOUT_S = 60.0


class Daemon:
    """``edge-agent core`` on folders of its own below ``folder`` (a short path: a socket's has 107 bytes at most)."""

    def __init__(self, folder: Path, config: str = SHORT_TRIALS) -> None:
        self.folder = folder
        self.state, self.run, self.log = folder / "state", folder / "run", folder / "core.log"
        self.process: subprocess.Popen[bytes] | None = None
        self._notify = folder / "notify"
        (folder / "config.toml").write_text(config)

    def start(self) -> float:
        """Start it; seconds from exec until it says that it is ready."""
        self._notify.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notified, self.log.open("ab") as log:
            notified.bind(str(self._notify))
            notified.settimeout(0.5)
            began = time.perf_counter()
            self.process = subprocess.Popen(
                [*command(), "core"], env=self._environment(), stderr=log, cwd=self.folder, start_new_session=True
            )
            _as_polite_as_we(self.process.pid)
            while not self._said_ready(notified):
                if time.perf_counter() - began > START_TIMEOUT_S:
                    raise RuntimeError(f"not ready within {START_TIMEOUT_S:g} s:\n{self.log.read_text()[-2000:]}")
        with self.client() as client:
            if not client.ready():
                raise RuntimeError("it told the service manager that it is ready, and an app that it is not")
        return time.perf_counter() - began

    def _said_ready(self, notified: socket.socket) -> bool:
        if self.process is None or self.process.poll() is not None:
            raise RuntimeError(f"the daemon did not start:\n{self.log.read_text()[-2000:]}")
        try:
            return b"READY=1" in notified.recv(4096)
        except TimeoutError:
            return False

    def stop(self, number: int = signal.SIGTERM, timeout_s: float = 60.0) -> int:
        """End it by a signal; its exit status."""
        assert self.process is not None
        self.process.send_signal(number)
        status = self.process.wait(timeout_s)
        self.process = None
        return status

    def __enter__(self) -> Daemon:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.process is not None:
            self.stop(signal.SIGKILL)

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def client(self) -> Client:
        return Client(str(self.run / "infer.sock"), timeout=120)

    def admin(self) -> AdminClient:
        return AdminClient(str(self.run / "admin.sock"))

    def ask(self, method: str, path: str, body: dict | None = None) -> dict:
        """One call of the admin socket."""
        with self.admin() as admin:
            return admin.call(method, path, body)

    def add(self, path: Path, name: str | None = None) -> dict:
        """``models add``, as the command line does it."""
        with path.open("rb") as file, self.admin() as admin:
            options = {"file_name": path.name, **({"name": name} if name else {})}
            return admin.call("POST", "/v1/models", options, descriptors=(file.fileno(),))

    def settle(self, timeout_s: float = 120.0) -> None:
        """Wait until no operation is under way: after a start the models are reviewed."""
        end = time.monotonic() + timeout_s
        while self.ask("GET", "/v1/status")["under_way"] is not None:
            if time.monotonic() > end:
                raise RuntimeError("the daemon does not come to rest")
            time.sleep(0.05)

    def memory(self) -> dict[str, float]:
        """Resident MB: in all, of its own (anonymous), of files (libraries, shared with others), the highest so far."""
        fields = {"VmRSS": "rss_mb", "RssAnon": "anonymous_mb", "RssFile": "files_mb", "VmHWM": "peak_mb"}
        found = {}
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            name, _, value = line.partition(":")
            if name in fields:
                found[fields[name]] = round(int(value.split()[0]) / 1024, 2)
        return found

    def cpu_s(self) -> float:
        """CPU time of its living threads, to the nanosecond: the ticks of ``stat`` are too coarse for an idle one."""
        tasks = Path(f"/proc/{self.pid}/task").iterdir()
        return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9

    def wakeups(self) -> int:
        """How often its threads have gone to sleep so far."""
        count = 0
        for task in Path(f"/proc/{self.pid}/task").iterdir():
            for line in (task / "status").read_text().splitlines():
                if line.startswith("voluntary_ctxt_switches"):
                    count += int(line.split()[1])
        return count

    def _environment(self) -> dict[str, str]:
        own = {
            "EDGE_AGENT_STATE_DIR": str(self.state),
            "EDGE_AGENT_RUN_DIR": str(self.run),
            "EDGE_AGENT_CONFIG": str(self.folder / "config.toml"),
            "NOTIFY_SOCKET": str(self._notify),
        }
        return {**os.environ, **own}


def command() -> list[str]:
    """``edge-agent`` of this environment, else the module that it starts."""
    script = Path(sys.executable).with_name("edge-agent")
    return [str(script)] if script.exists() else [sys.executable, "-m", "agent.cli.device"]


def _as_polite_as_we(pid: int) -> None:
    """A session of its own gets a nice value of its own, which would decide every comparison on a busy machine."""
    with contextlib.suppress(OSError):  # where the kernel does not schedule by sessions
        ours = Path("/proc/self/autogroup").read_text().split()  # "/autogroup-N nice N", nothing without a session
        if ours:
            Path(f"/proc/{pid}/autogroup").write_text(ours[-1])


def linear(seed: int, note: str = "") -> bytes:
    """A tiny model: x[n, 16] -> y[n, 4] by the matrix of that seed. ``note`` makes other bytes of the same function."""
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "tiny",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", FEATURES])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", CLASSES])],
        [numpy_helper.from_array(weights(seed), "w")],
        doc_string=note,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()


def weights(seed: int) -> np.ndarray:
    """The matrix behind ``linear``."""
    return np.random.default_rng(seed).standard_normal((FEATURES, CLASSES)).astype(np.float32)


def sample() -> np.ndarray:
    """An input for ``linear``."""
    return np.linspace(-1, 1, FEATURES, dtype=np.float32).reshape(1, FEATURES)


def bundle(path: Path, name: str, version: str, seed: int, variants: int) -> Path:
    """A bundle of ``variants`` files of one function with a golden set."""
    files = {f"v{index}.onnx": linear(seed, f"variant {index}") for index in range(variants)}
    inputs = np.random.default_rng(7).standard_normal((8, FEATURES)).astype(np.float32)
    stream = io.BytesIO()
    np.savez(stream, **{"input/x": inputs, "output/y": inputs @ weights(seed)})
    files["golden.npz"] = stream.getvalue()
    manifest = Manifest.model_validate(
        {
            "format": "edge-model/1",
            "name": name,
            "version": version,
            "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, FEATURES]}],
            "outputs": [{"name": "y", "datatype": "FP32", "shape": [-1, CLASSES]}],
            "variants": [
                {"id": f"v{index}", "runtime": "onnx", "precision": "fp32", "file": _reference(files, f"v{index}.onnx")}
                for index in range(variants)
            ],
            "golden": {"file": _reference(files, "golden.npz"), "metric": "cosine", "threshold": 0.99},
        }
    )
    with path.open("wb") as file:
        write(manifest, files, file)
    return path


def _reference(files: dict[str, bytes], name: str) -> dict[str, object]:
    return {"name": name, "sha256": hashlib.sha256(files[name]).hexdigest(), "size": len(files[name])}
