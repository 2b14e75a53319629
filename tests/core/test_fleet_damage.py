"""A job journal that is damaged, missing, or not ours: the device serves on, says what mends it, and is mended."""

from __future__ import annotations

import contextlib
import random
import shutil
import signal
import sqlite3
import tempfile
from pathlib import Path

import numpy as np
import pytest

from agent.work.records import order_of
from tests.core.conftest import Agent
from tests.core.fleet_device import PATIENCE_S, FleetDevice, connected
from tests.core.test_daemon import X, linear_file, reference
from tests.link.broker import until


def require_serving(device: Agent) -> None:
    with device.client() as client:
        np.testing.assert_allclose(
            client.infer("m", {"x": X})["y"], reference((device.folder / "linear.onnx").read_bytes()), rtol=1e-5
        )


@pytest.fixture(scope="module")
def template():
    """A stopped device with a model, ten jobs that have ended and one that waits for its window."""
    folder = Path(tempfile.mkdtemp(prefix="ea-", dir="/tmp"))
    try:
        with connected(folder) as device:
            device.cli("models", "add", linear_file(folder), "--name", "m")
            for _ in range(10):
                device.fleet.done("store.gc")
            far = {"cron": "0 0 1 1 *", "duration_s": 60}
            device.fleet.running(device.fleet.give("store.scrub", window=far), "waiting_window")
            assert device.stop() == 0
            assert device.stop_link() == 0
            yield device
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def hurt(template, agent):
    """A copy of it, not started; without link."""
    shutil.copytree(template.state, agent.state)
    for name in ("trust.toml", "config.toml", "linear.onnx"):
        shutil.copy(template.folder / name, agent.folder)
    return agent


def flip(path: Path, chance: random.Random) -> None:
    data = bytearray(path.read_bytes())
    for _ in range(20):
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    path.write_bytes(data)


def zero_page(path: Path, chance: random.Random) -> None:
    data = bytearray(path.read_bytes())
    at = chance.randrange(len(data) // 4096) * 4096
    data[at : at + 4096] = bytes(4096)
    path.write_bytes(data)


def cut(path: Path, chance: random.Random) -> None:
    path.write_bytes(path.read_bytes()[: chance.randrange(path.stat().st_size)])


def as_folder(path: Path, chance: random.Random) -> None:
    path.unlink()
    path.mkdir()


def as_link(path: Path, chance: random.Random) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


HURTS = {
    "garbage": lambda path, chance: path.write_bytes(chance.randbytes(20_000)),
    "empty": lambda path, chance: path.write_bytes(b""),
    "open to others": lambda path, chance: path.chmod(0o644),
    "a folder": as_folder,
    "a link": as_link,
    "cut": cut,
}


@pytest.mark.parametrize("hurt_by", HURTS)
def test_the_device_serves_on_and_says_what_mends_it(hurt: Agent, hurt_by: str) -> None:
    journal = hurt.state / "journal.db"
    HURTS[hurt_by](journal, random.Random(1))
    hurt.start()
    require_serving(hurt)
    (finding,) = [row for row in hurt.json("doctor", status=1)["findings"] if row["check"] == "journal"]
    assert finding["level"] == "error"
    assert "edge-agent jobs reset" in finding["mend"]
    with hurt.admin() as admin:
        assert admin.call("GET", "/v1/status")["health"] == "failing"
        assert admin.call("GET", "/v1/jobs") == {"jobs": []}
    done = hurt.json("jobs", "reset")
    assert Path(done["moved_to"]).name.startswith("journal.db.damaged-")
    assert [row for row in hurt.json("doctor")["findings"] if row["check"] == "journal"] == []
    require_serving(hurt)
    hurt.restart()
    require_serving(hurt)
    assert [row for row in hurt.json("doctor")["findings"] if row["check"] == "journal"] == []


@pytest.mark.parametrize("seed", [0, 5, 10])
@pytest.mark.parametrize("damage", [flip, zero_page])
def test_wherever_the_damage_is_the_daemon_starts_and_serves(hurt: Agent, damage, seed: int) -> None:
    """It may go unnoticed where it means nothing, or be told; it may not keep the device down or make it loop."""
    damage(hurt.state / "journal.db", random.Random(seed))
    hurt.start()
    require_serving(hurt)
    hurt.cli("jobs", "list")
    hurt.cli("doctor", status=None)
    require_serving(hurt)
    assert hurt.stop() == 0
    assert "Traceback" not in hurt.log.read_text()


def test_a_journal_that_is_whole_is_not_reset(hurt: Agent) -> None:
    hurt.start()
    assert "it is whole" in hurt.cli("jobs", "reset", status=1).stderr
    assert len(hurt.json("jobs", "list")["jobs"]) == 11


def test_with_its_counters_the_fleet_goes_on_without_them_it_enrols_anew(short_dir) -> None:
    with connected(short_dir) as device:
        fleet = device.fleet
        fleet.done("store.gc")
        # Jobs that make no sense, counters that do.
        device.stop()
        _sql(device, "UPDATE jobs SET state = 'queued', args = 'no JSON'")
        device.start()
        assert device.json("jobs", "reset")["counters_kept"] is True
        device.wait_until_known()
        assert fleet.done("store.gc") is not None
        # Nothing that can be read.
        device.stop()
        (device.state / "journal.db").write_bytes(b"x" * 9000)
        device.start()
        device.wait_until_known()
        assert fleet.ask("ping")["result"] == {"pong": True}  # questions need no journal
        assert fleet.info["ops"] == ["diagnostics.collect", "jobs.list", "logs.tail", "ping", "status"]
        assert "journal" in fleet.ask("status")["result"]["alerts"]
        assert device.json("jobs", "reset")["counters_kept"] is False
        refused = fleet.give("store.gc")
        fleet.reports("nothing is taken in this enrolment", lambda said: said["refused"].get("old_generation"))
        assert fleet.states(refused) == []
        device.trust(device.keys.trust(device.name, epoch=2))
        device.restart()
        device.wait_until_known()
        fleet.epoch, fleet.generation, fleet.seq = 2, 0, 0
        assert fleet.done("store.gc", job_id="again") is not None


def _sql(device: FleetDevice, statement: str) -> None:
    with contextlib.closing(sqlite3.connect(device.state / "journal.db")) as connection, connection:
        connection.execute(statement)


def test_the_journal_of_another_device_is_not_taken_over(hurt: Agent) -> None:
    """Another tenant's file, the same number: its counters would be wrong, and its jobs are nobody's business."""
    trust = (hurt.folder / "trust.toml").read_text()
    (hurt.folder / "trust.toml").write_text(trust.replace('"acme"', '"zeta"'))
    hurt.start()
    require_serving(hurt)
    (finding,) = [row for row in hurt.json("doctor", status=1)["findings"] if row["check"] == "journal"]
    assert "acme/cam-1" in finding["text"]
    assert "number above 1" in finding["mend"]
    (hurt.folder / "trust.toml").write_text(trust.replace('"acme"', '"zeta"').replace("epoch = 1", "epoch = 2"))
    hurt.process.send_signal(signal.SIGHUP)
    until(lambda: "journal" not in hurt.cli("doctor", status=None).stdout, "it is mended", PATIENCE_S)
    states = {row["job_id"]: row["state"] for row in hurt.json("jobs", "list")["jobs"]}
    assert states["j11"] == "cancelled"
    with hurt.admin() as admin:
        said = admin.call("GET", "/v1/link/outgoing?wait_s=2")["messages"]
    assert [message["topic"] for message in said if message["topic"].startswith("up/job/")] == []


def test_a_stored_job_that_was_changed_is_not_run(hurt: Agent) -> None:
    """Whoever has the disk can write into the journal, its digest too; what runs is what was signed."""
    with contextlib.closing(sqlite3.connect(hurt.state / "journal.db")) as connection, connection:
        connection.row_factory = sqlite3.Row
        connection.execute("UPDATE jobs SET cron = NULL, window_s = NULL, tz = NULL WHERE job_id = 'j11'")
        (row,) = connection.execute("SELECT * FROM jobs WHERE job_id = 'j11'")
        connection.execute("UPDATE jobs SET digest = ? WHERE job_id = 'j11'", (order_of(row).digest(),))
    hurt.start()
    until(lambda: hurt.json("jobs", "show", "j11")["state"] == "rejected", "it is refused", PATIENCE_S)
    assert hurt.json("jobs", "show", "j11")["error"]["code"] == "bad_signature"
    require_serving(hurt)


def test_a_key_that_counts_no_more_runs_nothing_that_it_signed(short_dir: Path) -> None:
    """A job waits behind a reboot that does not come; meanwhile root takes the right to change things from its key."""
    with connected(short_dir) as device:
        fleet = device.fleet
        fleet.running(fleet.give("device.reboot"), "rebooting")
        waiting = fleet.give("store.rotate-key")
        until(lambda: fleet.state(waiting) == "queued", "it waits", PATIENCE_S)
        key = device.admin_get("/v1/store")["key_id"]
        device.trust(device.trust_file.read_text().replace('["observe", "change", "destroy"]', '["observe"]'))
        device.restart()
        ended = fleet.ended(waiting)
        assert (ended["state"], ended["error"]["code"]) == ("rejected", "key_not_allowed")
        assert fleet.ended("j1")["state"] == "failed"
        assert device.admin_get("/v1/store")["key_id"] == key
