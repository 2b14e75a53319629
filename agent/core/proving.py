"""The trial of a new environment, run from that environment before anything leads to it.

As core's user and behind core's walls, with the state folder read-only: whatever a release does here, it cannot change
what the release before relies on. Ends with status 0, or says on stderr why the environment does not work here.
"""

from __future__ import annotations

import argparse
import http.client
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from agent.base.errors import AgentError, DamagedError, RefusedError
from agent.base.files import read_bounded
from agent.base.systemd import take_environment
from agent.store.document import VersionEntry
from agent.store.glimpse import Glimpse
from agent.store.keys import DeviceKeys

_READY_S = 90.0
_LOOKS = 4
#: Models whose golden sets are asked; the trial is of the release, not of the models.
_MOST_MODELS = 2
#: The scratch core is no service, and has a secret of its own.
_NOT_ITS_OWN = ("NOTIFY_SOCKET", "CREDENTIALS_DIRECTORY", "WATCHDOG_USEC")
_CPU = {"onnx": "CPUExecutionProvider", "tflite": "cpu"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Try; the exit status."""
    parser = argparse.ArgumentParser(prog="agent.core.proving", description="Whether this environment works here.")
    parser.add_argument("--state-dir", type=Path, default=Path("/var/lib/edge-agent"), metavar="DIR")
    options = parser.parse_args(arguments)
    try:
        credentials = take_environment().credentials
        _import_all()
        _start_core()
        _ask_models(options.state_dir, credentials)
    except (AgentError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201 - a program of its own
        return 1
    return 0


def _import_all() -> None:
    """Both daemons with the fleet's side, and what verifies the next release."""
    import agent.core.daemon  # noqa: PLC0415 - what is tried
    import agent.core.fleet  # noqa: PLC0415
    import agent.link.main  # noqa: PLC0415
    import agent.updater.believing  # noqa: F401, PLC0415


def _start_core() -> None:
    """A core with a state of its own comes up, answers and goes."""
    with tempfile.TemporaryDirectory(prefix="edge-agent-try-") as text:
        folder = Path(text)
        (folder / "config.toml").touch()
        log = folder / "log"
        paths = ["--config", folder / "config.toml", "--state-dir", folder / "state", "--run-dir", folder / "run"]
        with log.open("wb") as out:
            process = subprocess.Popen(
                [sys.executable, "-I", "-m", "agent.cli.device", "core", *map(str, paths)],
                stdin=subprocess.DEVNULL, stdout=out, stderr=out,
                env={name: value for name, value in os.environ.items() if name not in _NOT_ITS_OWN},
            )  # fmt: skip
            try:
                _await_ready(process, folder / "run/infer.sock", log)
                process.send_signal(signal.SIGTERM)
                if status := process.wait(_READY_S):
                    raise RefusedError(f"core ended with status {status}: {_last_words(log)}")
            except subprocess.TimeoutExpired as error:
                raise RefusedError(f"core does not stop: {_last_words(log)}") from error
            finally:
                process.kill()
                process.wait()


def _await_ready(process: subprocess.Popen[bytes], path: Path, log: Path) -> None:
    deadline = time.monotonic() + _READY_S
    while not _is_ready(path):
        if process.poll() is not None:
            raise RefusedError(f"core does not start: {_last_words(log)}")
        if time.monotonic() > deadline:
            raise RefusedError(f"core is not ready after {_READY_S:g} s: {_last_words(log)}")
        time.sleep(0.1)


def _is_ready(path: Path) -> bool:
    connection = http.client.HTTPConnection("localhost", timeout=10)
    connection.sock = socket.socket(socket.AF_UNIX)
    try:
        connection.sock.settimeout(10)
        connection.sock.connect(str(path))
        connection.request("GET", "/v2/health/ready")
        return connection.getresponse().status == http.HTTPStatus.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _last_words(log: Path) -> str:
    lines = read_bounded(log, 1 << 20).decode("utf-8", "replace").splitlines()
    errors = [line for line in lines if "error" in line.lower()]
    return (errors or lines or ["it said nothing"])[-1][:500]


# -- the device's own models ------------------------------------------------------------------------------------------


def _ask_models(state_dir: Path, credentials: Path | None) -> None:
    """The store of this device opens, and golden sets in it are answered."""
    if not (state_dir / "store/catalog").is_dir():
        return
    keys = DeviceKeys(state_dir / "keys", credentials)
    for look in range(_LOOKS):  # core goes on meanwhile, and may sweep what is looked at
        try:
            _ask(Glimpse(state_dir / "store", keys))
        except DamagedError:
            if look == _LOOKS - 1:
                raise
            time.sleep(1.0)
        else:
            return


def _ask(glimpse: Glimpse) -> None:
    asked = 0
    for name, model in glimpse.document.models.items():
        entry = model.versions.get(model.active or "")
        if entry is None or entry.chosen is None or entry.manifest.golden is None or asked >= _MOST_MODELS:
            continue
        if _answers(glimpse, name, entry):
            asked += 1


def _answers(glimpse: Glimpse, name: str, entry: VersionEntry) -> bool:
    """Whether there was something to ask. RefusedError where the answer is another than before."""
    from agent.infer.runtimes.base import LoadOptions, load_runtime  # noqa: PLC0415 - brings in a runtime
    from agent.operations.drift import recheck  # noqa: PLC0415 - as above

    variant_id, _, provider = (entry.chosen or "").partition("@")
    variant = entry.manifest.variant(variant_id)
    if provider != _CPU.get(variant.runtime) or entry.damaged:
        return False  # an accelerator belongs to the core that runs
    with glimpse.read(entry.blobs[variant.file.name]) as plaintext:
        options = LoadOptions(provider, parameters=variant.parameters)
        session = load_runtime(variant.runtime).load(plaintext.fd, options)
        names = [spec.name for spec in session.outputs]

        def ask(arrays: dict[str, Any]) -> Mapping[str, Any]:
            return dict(zip(names, session.run(arrays, names), strict=True))

        found = recheck(entry, glimpse.read, ask)
        session.close()
    if found is not None and not found.ok:
        raise RefusedError(f"model '{name}' answers otherwise: {found.metric} {found.value:g}, {found.before} before")
    return True


if __name__ == "__main__":
    raise SystemExit(main())
