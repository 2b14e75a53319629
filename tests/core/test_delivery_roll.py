"""The demo model rolls to three devices at once: two versions, and one that is poisoned.

``test_delivery_story.py`` tells what can happen to one device; here it is that one command reaches all of them, that no
app of any of them notices, and that each decides for itself.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from agent.base.errors import AgentError
from agent.bundles.archive import BundleReader, write
from agent.bundles.manifest import Manifest
from tests.core.test_delivery_story import Background, Device, Site
from tests.fleet.conftest import ROOT, Fleet, fleet
from tests.fleet.waiting import until
from tests.link.mirror_server import Mirror

__all__ = ["fleet"]

DEMO = ROOT / "deploy" / "demo"
DEVICES = ("door-1", "door-2", "door-3")
HELD_OUT = dict(np.load(DEMO / "digits-heldout.npz"))


class App(Background):
    """Asks for digits all the time: versions in the order in which they answered, how many were right, what failed."""

    def __init__(self, device: Device) -> None:
        super().__init__()
        self._client = device.client()
        self.versions: list[str] = []
        self.failures: list[str] = []
        self.asked = self.right = 0

    def turn(self) -> None:
        number = self.asked % len(HELD_OUT["image"])
        self.asked += 1
        try:
            found = self._client.infer("digits", {"image": HELD_OUT["image"][number : number + 1]})
        except AgentError as error:
            self.failures.append(str(error))
            return
        self.right += int(found["scores"].argmax() == HELD_OUT["label"][number])
        if not self.versions or self.versions[-1] != found.model_version:
            self.versions.append(str(found.model_version))
        time.sleep(0.01)

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        self._client.close()


def contents(path: Path) -> tuple[Manifest, dict[str, bytes]]:
    """What a bundle holds."""
    with path.open("rb") as stream:
        reader = BundleReader(stream)
        manifest = reader.read_manifest()
        return manifest, {ref.name: b"".join(bytes(chunk) for chunk in chunks) for ref, chunks in reader.files()}


def poisoned(path: Path, version: str) -> Path:
    """The bundle with every variant an fp32 model whose classes are shifted by one; the golden set is as it was."""
    manifest, files = contents(path)
    model = onnx.load_model_from_string(files[manifest.variants[0].file.name])
    for tensor in model.graph.initializer:
        if tensor.name in ("score_weight", "score_bias"):
            tensor.CopyFrom(numpy_helper.from_array(np.roll(numpy_helper.to_array(tensor), 1, axis=0), tensor.name))
    data = model.SerializeToString()
    assert data != files[manifest.variants[0].file.name]
    document = manifest.model_dump(mode="json", exclude_none=True)
    (row,) = [row for row in document["variants"] if row["id"] == "fp32"]
    row["file"] |= {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
    document |= {"version": version, "variants": [row]}
    changed = Manifest.model_validate(document)
    kept = {ref.name: files[ref.name] for ref in changed.files()} | {row["file"]["name"]: data}
    out = path.with_name(f"poisoned-{version}.edgemodel")
    with out.open("wb") as stream:
        write(changed, kept, stream)
    return out


def renamed(path: Path, version: str) -> Path:
    """The bundle as another version."""
    manifest, files = contents(path)
    out = path.with_name(f"digits-{version}.edgemodel")
    with out.open("wb") as stream:
        write(manifest.model_copy(update={"version": version}), files, stream)
    return out


@pytest.fixture
def devices(fleet: Fleet) -> Iterator[dict[str, Device]]:
    """Three that have joined, with one mirror."""
    fleet.ok("repository", "init", "--no-password")
    fleet.claims.start()
    with ExitStack() as held:
        mirror = held.enter_context(Mirror({}, fleet.scratch / "mirror"))
        mirror.files = Site(fleet.folder / "repository" / "public")  # type: ignore[assignment]
        made: dict[str, Device] = {}
        for name in DEVICES:
            place: Any = SimpleNamespace(folder=fleet.folder, scratch=fleet.scratch / name)
            place.scratch.mkdir()
            device = made[name] = Device(place, mirror)
            held.callback(device.stop)
            device.start()
            (asking,) = until(lambda: fleet.ok("approve")["announced"], f"{name} asks to be enrolled")
            fleet.ok("approve", name, "--keyid", asking["keyid"], "--yes", "--wait", "60s")
            until(
                lambda: (fleet.ok("devices", "show", name)["info"] or {}).get("grant"),  # noqa: B023
                f"{name} says to whom to seal",
                60,
            )
        yield made
    for device in made.values():
        assert "Traceback" not in device.log.read_text()


def install(fleet: Fleet, version: str) -> dict[str, Any]:
    """One command for all devices; what each said at its end."""
    words = [
        "model.install",
        "model=digits",
        f"version={version}",
        *(word for name in DEVICES for word in ("-d", name)),
    ]
    done = fleet.run("job", *words, "--wait", "--timeout", "180s", "--json")
    assert done.out, done.err
    return {row["device"]: row["said"] for row in done.json["devices"]}


@pytest.mark.slow
def test_the_demo_model_rolls_to_three_devices(fleet: Fleet, devices: dict[str, Device]) -> None:
    packed = fleet.scratch / "digits.edgemodel"
    fleet.ok(
        "pack", str(DEMO / "digits.onnx"), "--calibrate", str(DEMO / "digits-calibrate.npz"),
        "--golden", str(DEMO / "digits-golden.npz"), "--metric", "cosine", "--threshold", "0.99",
        "--version", "1.0.0", "-o", str(packed),
    )  # fmt: skip
    fleet.ok("publish", str(packed))
    said = install(fleet, "1.0.0")
    assert {name: one["state"] for name, one in said.items()} == dict.fromkeys(DEVICES, "succeeded"), said

    with ExitStack() as held:
        apps = {name: held.enter_context(App(device)) for name, device in devices.items()}
        for app in apps.values():
            until(lambda: app.versions == ["1.0.0"], "the first version answers")  # noqa: B023
        fleet.ok("publish", str(renamed(packed, "2.0.0")))
        said = install(fleet, "2.0.0")
        assert {name: one["state"] for name, one in said.items()} == dict.fromkeys(DEVICES, "succeeded"), said
        for app in apps.values():
            until(lambda: app.versions == ["1.0.0", "2.0.0"], "the second version answers")  # noqa: B023

        fleet.ok("publish", str(poisoned(packed, "3.0.0")))
        said = install(fleet, "3.0.0")
        for name, one in said.items():
            assert one["state"] == "failed", (name, one)
            assert "no variant passed its trial" in one["error"]["text"], one
    for name, app in apps.items():
        assert (name, app.versions, app.failures) == (name, ["1.0.0", "2.0.0"], [])
        assert app.right >= 0.97 * app.asked > 50
