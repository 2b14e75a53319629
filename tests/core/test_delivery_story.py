"""Delivery as a story: an operator, a broker, a web server, a device, and an app that must not notice any of it.

Everything is real: ``edge-fleet``, mosquitto as it is shipped, a static server over TLS, core and link as processes.
While it goes on a watcher reads every file that the device writes, and looks for the weights of the models in it.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from tuf.api.metadata import Metadata, MetaFile

from agent.base.errors import AgentError
from agent.client import Client
from agent.fleet.folder import Folder
from agent.fleet.keys import Passwords
from agent.fleet.repository import data_of, load, write_metadata
from agent.fleet.roles import RoleKeys
from tests import onnx_models
from tests.core.test_daemon import X, bundle
from tests.fleet.conftest import Fleet, fleet
from tests.fleet.test_whole_way import RealAgent
from tests.fleet.waiting import until
from tests.link.mirror_server import Mirror

__all__ = ["fleet"]

NAME, DEVICE = "m", "door-7"
#: Versions by the seed of their weights. The fourth and the sixth choose different classes for what the app asks.
SEEDS = {"1.0.0": 1, "2.0.0": 2, "3.0.0": 3, "4.0.0": 4, "5.0.0": 5, "6.0.0": 10}


def weights(version: str) -> bytes:
    """What of a version must lie on no disk."""
    return bytes(np.random.default_rng(SEEDS[version]).standard_normal((16, 4)).astype(np.float32).tobytes()[:64])


def answer(version: str) -> Any:
    return onnxruntime.InferenceSession(onnx_models.linear(SEEDS[version])).run(None, {"x": X})[0]


class Site:
    """A folder as a web server's files, as they are at each request."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get(self, path: str) -> bytes | None:
        file = self.folder / path
        return file.read_bytes() if file.is_file() else None

    def __getitem__(self, path: str) -> bytes:
        return (self.folder / path).read_bytes()


class Device(RealAgent):
    """With temporary files in a folder of its own, and mirrors to fetch from."""

    def __init__(self, fleet: Fleet, mirror: Mirror) -> None:
        super().__init__(fleet)
        self.state, self.temporary = self.folder / "state", self.folder / "tmp"
        self.temporary.mkdir()
        self._environment["TMPDIR"] = str(self.temporary)
        config = self.folder / "etc" / "config.toml"
        config.write_text(
            config.read_text()
            + f"[delivery]\nmirrors = {json.dumps([mirror.base])}\nca_file = {json.dumps(mirror.ca)}\nblocks = false\n"
            + '[clock]\ntrust = "always"\n[selection]\nmin_rounds = 4\nmax_rounds = 4\nprepare = false\n'
            + "[probation]\nrequests = 50\nmax_latency_ratio = 100.0\n"
        )

    def client(self) -> Client:
        return Client(str(self.folder / "run" / "infer.sock"), timeout=60)

    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.edge_agent("status", "--json"))
        return found


class Background:
    """Something that goes on in a thread until it is told to stop; what goes wrong in it is raised then."""

    def __init__(self) -> None:
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.problem: BaseException | None = None

    def _run(self) -> None:
        try:
            while not self._stopped.is_set():
                self.turn()
        except BaseException as error:
            self.problem = error

    def turn(self) -> None:
        raise NotImplementedError

    def __enter__(self) -> Any:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join(60)
        if self.problem is not None:
            raise self.problem


class Watcher(Background):
    """Reads all that lies in these folders, over and over."""

    def __init__(self, *folders: Path) -> None:
        super().__init__()
        self._folders = folders
        self._secrets = {version: weights(version) for version in SEEDS}
        self.looks = self.files = 0
        self.found: set[tuple[str, str]] = set()

    def turn(self) -> None:
        for folder in self._folders:
            for path in folder.rglob("*"):
                try:
                    data = path.read_bytes() if path.is_file() else b""
                except OSError:  # gone meanwhile
                    continue
                self.files += 1
                self.found |= {(version, str(path)) for version, secret in self._secrets.items() if secret in data}
        self.looks += 1


class App(Background):
    """Asks all the time, and notes which version answered."""

    def __init__(self, device: Device) -> None:
        super().__init__()
        self._client = device.client()
        self.answers: list[str] = []
        self.failures: list[str] = []
        self._expected = {version: answer(version) for version in SEEDS}

    def turn(self) -> None:
        try:
            found = self._client.infer(NAME, {"x": X})
        except AgentError as error:
            self.failures.append(str(error))
            return
        version = str(found.model_version)
        np.testing.assert_allclose(found["y"], self._expected[version], rtol=1e-4)
        if not self.answers or self.answers[-1] != version:
            self.answers.append(version)
        time.sleep(0.002)

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        self._client.close()


class Story:
    """The operator, and what is asked of the device."""

    def __init__(self, fleet: Fleet, device: Device) -> None:
        self.fleet, self.device = fleet, device
        self.site = fleet.folder / "repository" / "public"

    def publish(self, version: str, *, golden: str = "") -> None:
        """A version; with ``golden`` the answers that belong to it are those of another one."""
        data = onnx_models.linear(SEEDS[version])
        path = self.fleet.scratch / f"{version}.edgemodel"
        judge = onnx_models.linear(SEEDS[golden or version])
        self.fleet.ok("publish", str(bundle(path, {"fp32": ("fp32", data)}, golden_from=judge, version=version)))

    def install(self, version: str, *more: str) -> dict[str, Any]:
        """What the device says of the job at its end."""
        words = ("model.install", f"model={NAME}", f"version={version}", "-d", DEVICE, "--wait", "--timeout", "120s")
        done = self.fleet.run("job", *words, *more, "--json")
        assert done.out, done.err
        (row,) = done.json["devices"]
        assert row["said"] is not None, (row, self.device.log.read_text())
        return dict(row["said"])

    def installed(self, version: str) -> dict[str, Any]:
        said = self.install(version)
        assert said["state"] == "succeeded", (said, self.device.log.read_text())
        return dict(said["result"])

    def refused(self, version: str, *more: str) -> str:
        said = self.install(version, *more)
        assert said["state"] == "failed", said
        return str(said["error"]["text"])

    def versions(self) -> dict[str, bool]:
        """Versions on the device, and whether each is the active one."""
        rows = json.loads(self.device.edge_agent("models", "list", "--json"))["models"]
        return {row["version"]: row["active"] for row in rows}

    def info(self) -> dict[str, Any]:
        """What the device last said of itself."""
        return dict(self.fleet.ok("devices", "show", DEVICE)["info"] or {})

    def kept(self) -> list[str]:
        """What lies in the store's folders for downloads, which is to be nothing."""
        incoming = self.device.state / "store" / "incoming"
        return [str(path) for path in incoming.rglob("*")] if incoming.exists() else []


@pytest.fixture
def story(fleet: Fleet) -> Iterator[Story]:
    """A device that has joined, with its mirror."""
    fleet.ok("repository", "init", "--no-password")
    with Mirror({}, fleet.scratch / "mirror") as mirror:
        device = Device(fleet, mirror)
        made = Story(fleet, device)
        mirror.files = Site(made.site)  # type: ignore[assignment]
        fleet.claims.start()
        device.start()
        try:
            until(lambda: fleet.ok("approve")["announced"], f"it asks to be enrolled\n{device.log.read_text()}")
            (asking,) = fleet.ok("approve")["announced"]
            fleet.ok("approve", DEVICE, "--keyid", asking["keyid"], "--yes", "--wait", "60s")
            until(lambda: made.info().get("grant"), "it says to whom to seal", 60)
            yield made
        finally:
            device.stop()
        assert "Traceback" not in device.log.read_text()


def steal_one_targets_key(story: Story, to: Path) -> None:
    """The site as somebody makes it who has one of the two keys of targets, and those of snapshot and timestamp."""
    shutil.copytree(story.site, to)
    edition, keys = load(to), RoleKeys(Folder(story.fleet.folder))
    edition.targets.signed.targets.clear()
    for role, count in (("targets", 1), ("snapshot", None), ("timestamp", None)):
        metadata: Metadata[Any] = edition.of(role)  # type: ignore[arg-type]
        metadata.signed.version += 1
        if role == "snapshot":
            data = data_of(edition.targets)
            edition.snapshot.signed.meta["targets.json"] = MetaFile.from_data(
                edition.targets.signed.version, data, ["sha256"]
            )
        elif role == "timestamp":
            data = data_of(edition.snapshot)
            edition.timestamp.signed.snapshot_meta = MetaFile.from_data(
                edition.snapshot.signed.version, data, ["sha256"]
            )
        metadata.signatures.clear()
        for keyid in edition.rule(role).keyids[:count]:  # type: ignore[arg-type]
            metadata.sign(keys.signer(keyid, Passwords()), append=True)
        write_metadata(to, role, metadata)  # type: ignore[arg-type]


@pytest.mark.slow
def test_from_publish_to_an_answer_and_back(story: Story) -> None:
    fleet, device = story.fleet, story.device
    with Watcher(device.state, device.temporary, device.folder / "run") as watcher:
        # The watcher sees what it is there to see.
        planted = device.temporary / "planted"
        planted.write_bytes(b"..." + weights("5.0.0") + b"...")
        until(lambda: watcher.found, "the watcher finds what was planted")
        planted.unlink()
        watcher.found.clear()

        # The first version answers; nobody put it there by hand.
        story.publish("1.0.0")
        result = story.installed("1.0.0")
        assert (result["version"], result["fetched"]) == ("1.0.0", ["fp32"])
        assert story.versions() == {"1.0.0": True}

        with App(device) as app:
            until(lambda: app.answers == ["1.0.0"], "the app is answered")

            # The second takes its place without one failed request.
            story.publish("2.0.0")
            story.installed("2.0.0")
            until(lambda: app.answers == ["1.0.0", "2.0.0"], "the app is answered by the second version")

            # A poisoned one does not answer as its golden set says: it never gets to answer anybody.
            story.publish("3.0.0", golden="4.0.0")
            assert "no variant passed its trial" in story.refused("3.0.0")
            assert story.versions() == {"1.0.0": False, "2.0.0": True} and story.kept() == []

            # One stolen key of targets, with those of snapshot and timestamp, achieves nothing.
            story.publish("4.0.0")
            good, hostile = fleet.folder / "repository" / "public", fleet.scratch / "hostile"
            steal_one_targets_key(story, hostile)
            os.rename(good, fleet.scratch / "good")
            os.rename(hostile, good)
            assert "bad_signature" in story.refused("4.0.0")
            shutil.rmtree(good)
            os.rename(fleet.scratch / "good", good)
            assert story.versions() == {"1.0.0": False, "2.0.0": True} and story.kept() == []

            # New keys for the root and for targets: the device follows by itself.
            fleet.ok("keys", "rotate", "root", "--no-password")
            fleet.ok("keys", "rotate", "targets", "--no-password")
            story.installed("4.0.0")
            until(lambda: app.answers[-1] == "4.0.0", "the app is answered by the fourth version")
            assert story.versions() == {"2.0.0": False, "4.0.0": True}

            # One that passes its trial and answers otherwise than the one before is taken back by the device itself.
            shadow = ("probation.shadow=1.0", "probation.min_agreement=0.99", "probation.requests=100000")
            fleet.ok("desired", "set", *shadow, "probation.seconds=120", "-d", DEVICE)
            until(lambda: fleet.ok("desired", "show")["devices"][0]["there"], "the device compares versions", 60)
            story.publish("6.0.0")
            assert "worse than 4.0.0 here: it agrees by" in story.refused("6.0.0")
            until(lambda: app.answers[-2:] == ["6.0.0", "4.0.0"], "the app is answered by the fourth version again")
            assert story.versions() == {"2.0.0": False, "4.0.0": True} and story.kept() == []
            fleet.ok("desired", "set", "probation.shadow=0.0", "probation.requests=50", "-d", DEVICE)

            # Who may command the fleet comes by the repository, too.
            fleet.ok("keys", "add", "bob", "--classes", "observe", "--no-password")
            fleet.ok("keys", "publish")
            refused = fleet.run("rpc", "ping", "-d", DEVICE, "--sign", "bob")
            assert refused.status == 1
            fleet.ok("job", "maintenance.plan", "run=repository", "-d", DEVICE, "--wait", "--timeout", "60s")
            until(
                lambda: fleet.ok("devices", "show", DEVICE)["info"].get("keys_version") == 1,
                "it obeys the new keys",
                60,
            )
            assert fleet.ok("rpc", "ping", "-d", DEVICE, "--sign", "bob")["result"] is not None

            # A revoked device gets no key of the next version, and those that it had do not open it.
            story.publish("5.0.0")
            fleet.ok("devices", "revoke", DEVICE, "--yes")
            words = ("job", "model.install", f"model={NAME}", "version=5.0.0", "-d", DEVICE)
            assert "revoked" in fleet.run(*words).err
            old = granted(fleet, "4.0.0")
            assert "not_for_this" in story.refused("5.0.0", "--args", json.dumps({"grants": old}))
            assert story.versions() == {"2.0.0": False, "4.0.0": True} and story.kept() == []

        assert app.failures == []
        assert app.answers == ["1.0.0", "2.0.0", "4.0.0", "6.0.0", "4.0.0"]
        looks = watcher.looks
        until(lambda: watcher.looks > looks + 1, "the watcher looks once more")
    assert watcher.found == set()
    assert watcher.looks > 10


def granted(fleet: Fleet, version: str) -> Any:
    """The grants that the last job for a version brought."""
    with fleet.books() as books:
        for outcome in books.documents.of_device(DEVICE, 20):
            if outcome.document.args.get("version") == version:
                return outcome.document.args["grants"]
    raise AssertionError(f"no job for {version}")
