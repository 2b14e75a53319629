"""Core and link killed while a version is on its way, over the real path: the job ends once, and well."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from onnx import helper

from agent.store.age import Recipient
from tests import onnx_models
from tests.core.fleet_device import PATIENCE_S, FleetDevice, connected
from tests.core.test_daemon import X
from tests.core.test_delivery_story import Site
from tests.link.broker import until
from tests.link.mirror_server import Mirror
from tests.operations.deliveries import NAME, Operator

HIDDEN = 100_000


def wide(seed: int) -> bytes:
    """x[n, 16] -> y[n, 4] by way of many values: 8 MB of weights."""
    generator = np.random.default_rng(seed)
    first = generator.standard_normal((16, HIDDEN)).astype(np.float32)
    second = generator.standard_normal((HIDDEN, 4)).astype(np.float32) / HIDDEN
    return onnx_models.model(
        [helper.make_node("MatMul", ["x", "a"], ["h"]), helper.make_node("MatMul", ["h", "b"], ["y"])],
        [onnx_models.tensor("x", ["n", 16])],
        [onnx_models.tensor("y", ["n", 4])],
        [onnx_models.constant("a", first), onnx_models.constant("b", second)],
    )


class Delivered:
    """A device, its operator's repository, and a mirror of it."""

    def __init__(self, device: FleetDevice, operator: Operator, mirror: Mirror) -> None:
        self.device, self.operator, self.mirror = device, operator, mirror

    def give(self, version: str) -> str:
        (recipient, *_) = self.device.fleet.info["grant"]
        grants = self.operator.grants(version, Recipient.parse(recipient).public, name=self.device.name, epoch=1)
        return self.device.fleet.give("model.install", {"model": NAME, "version": version, "grants": grants})

    def fetched(self) -> int:
        """Bytes that lie in the folders of downloads."""
        folder = self.device.state / "store" / "incoming"
        return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder.exists() else 0

    def require_answer(self, version: str, model: bytes) -> None:
        with self.device.client() as client:
            answer = client.infer(NAME, {"x": X})
        assert answer.model_version == version
        expected = onnxruntime.InferenceSession(model).run(None, {"x": X})[0]
        np.testing.assert_allclose(answer["y"], expected, rtol=1e-2, atol=1e-4)

    def left_behind(self) -> list[str]:
        store = self.device.state / "store"
        incoming = [str(path) for path in (store / "incoming").rglob("*")] if (store / "incoming").exists() else []
        return incoming + [str(path) for path in store.rglob(".tmp-*")]


@pytest.fixture
def delivered(short_dir: Path, tmp_path: Path) -> Iterator[Delivered]:
    operator = Operator(tmp_path)
    with Mirror({}, tmp_path / "mirror") as mirror:
        mirror.files = Site(operator.site)  # type: ignore[assignment]
        config = (
            "[selection]\nmin_rounds = 4\nmax_rounds = 4\nprepare = false\n[probation]\nseconds = 1\n"
            f'[delivery]\nmirrors = ["{mirror.base}"]\nca_file = "{mirror.ca}"\nblocks = false\nrate_kib_s = 4096\n'
        )
        root = operator.folder.shipped_root.read_bytes()
        (short_dir / "root.json").write_bytes(root)
        with connected(short_dir, config=config) as device:
            yield Delivered(device, operator, mirror)
            assert device.stop() == 0
            assert "Traceback" not in device.logs()


def install_with_kills(delivered: Delivered, version: str, model: bytes) -> None:
    """Core is killed while it fetches and while it tries, and told to stop in between; link is killed, too."""
    device, fleet, mirror = delivered.device, delivered.device.fleet, delivered.mirror
    length = len(model)
    delivered.operator.publish(version, {"fp32": ("fp32", model)}, golden_from=model)
    mirror.asked.clear()
    job = delivered.give(version)
    for least, number in ((length // 5, signal.SIGKILL), (length // 2, signal.SIGTERM)):
        until(lambda least=least: delivered.fetched() > least, "some of it is there", PATIENCE_S)
        device.stop(number)
        device.start()
    until(lambda: delivered.fetched() > length * 0.7, "more of it is there", PATIENCE_S)
    device.restart_link(signal.SIGKILL)
    fleet.running(job, "trying")
    device.stop(signal.SIGKILL)
    device.start()
    ended = fleet.ended(job, 2 * PATIENCE_S)
    assert (ended["state"], ended["result"]["version"]) == ("succeeded", version), (ended, device.logs())
    assert ended["attempt"] == 4
    assert [state["state"] for state in fleet.states(job)].count("succeeded") == 1
    # Each time it was asked for from where it was: what lay on the disk at a kill was not fetched again.
    begins = [
        int(fields.get("range", "bytes=0-").removeprefix("bytes=").rstrip("-"))
        for path, fields in mirror.asked
        if path.endswith("fp32.onnx")
    ]
    assert begins == sorted(begins) and len(begins) >= 4, begins
    assert any(begin >= length // 2 for begin in begins[1:3]) and begins[-1] >= length * 0.7, begins


@pytest.mark.slow
def test_killed_on_the_way_it_ends_once_and_goes_on_where_it_was(delivered: Delivered) -> None:
    for number in (1, 2):
        model = wide(number)
        install_with_kills(delivered, f"{number}.0.0", model)
        delivered.require_answer(f"{number}.0.0", model)
        assert delivered.left_behind() == []
    known: Any = delivered.device.admin_get("/v1/store")
    assert known["damaged"] == 0 and known["unreached_bytes"] == 0


@pytest.mark.slow
def test_cancelled_on_the_way_nothing_stays(delivered: Delivered) -> None:
    device, fleet = delivered.device, delivered.device.fleet
    model = wide(1)
    delivered.operator.publish("1.0.0", {"fp32": ("fp32", model)})
    job = delivered.give("1.0.0")
    until(lambda: delivered.fetched() > 0.1 * len(model), "some of it is there", PATIENCE_S)
    fleet.cancel(job)
    assert fleet.ended(job)["state"] == "cancelled"
    assert delivered.left_behind() == []
    known: Any = device.admin_get("/v1/store")
    assert (known["reserved_bytes"], known["unreached_bytes"], known["versions"]) == (0, 0, 0)
