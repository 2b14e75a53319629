"""A stick: what a device needs of the repository, and no more; and blocks by the command that gives them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest

from agent.fleet.broker import Broker, Received
from agent.fleet.folder import BrokerSettings, Folder
from agent.trust.wants import manifest_target, payload_target
from agent.wire.blocks import Question, parse_block
from tests.fleet.conftest import TENANT, Fleet
from tests.fleet.test_repository import BUNDLE, NAME, VERSION, Office, files, office
from tests.fleet.waiting import until

__all__ = ["office"]


def test_a_stick_holds_what_a_device_needs(office: Office, tmp_path: Path) -> None:
    office.ok("publish", str(BUNDLE))
    stick = tmp_path / "stick"
    assert office.ok("export", str(stick), "--model", NAME, "--version", VERSION)["job"] is None
    office.site = stick
    device = office.device(tmp_path / "device")
    manifest = json.loads(device.read(manifest_target(NAME, VERSION), 1 << 20))
    named = [variant["file"]["name"] for variant in manifest["variants"]]
    for part in named:
        target = device.find(payload_target(NAME, VERSION, part))
        assert (stick / target.file).stat().st_size == target.length
    assert not [name for name in files(stick) if "/header/" in name], "the operator's own stay at home"
    assert office.ok("export", str(stick))["copied"] == 0, "what is there is not copied again"


def test_another_model_takes_its_place(office: Office, tmp_path: Path) -> None:
    office.ok("publish", str(BUNDLE))
    stick = tmp_path / "stick"
    office.ok("export", str(stick))
    (stick / "job.json").write_text("put there by hand")
    told = office.run("export", str(stick), "--model", "another")
    assert told.status == 0 and "job.json stays as it is" in told.err
    assert not [name for name in files(stick) if name.startswith("targets/models/")]
    assert (stick / "job.json").read_text() == "put there by hand"
    assert (stick / "metadata" / "timestamp.json").exists()


def test_a_folder_of_another_kind_is_left_alone(office: Office, tmp_path: Path) -> None:
    (tmp_path / "metadata").mkdir()
    (tmp_path / "metadata" / "x").write_text("mine")
    assert office.run("export", str(tmp_path)).status == 1
    assert files(tmp_path / "metadata") == {"x"}


def test_without_a_job_for_the_device_nothing_is_copied(office: Office, tmp_path: Path) -> None:
    done = office.run("export", str(tmp_path / "stick"), "--device", "cam-1")
    assert done.status == 1 and "none waits for it" in done.err and not (tmp_path / "stick").exists()


def test_the_job_that_waits_goes_along(fleet: Fleet, tmp_path: Path) -> None:
    fleet.enrolled("cam-1")
    assert fleet.run("repository", "init", "--no-password").status == 0
    made = fleet.run("job", "store.gc", "--device", "cam-1", "--id", "my-job", "--offline")
    if made.status != 0:
        made = fleet.run("job", "store.gc", "--device", "cam-1", "--id", "my-job")
    assert made.status == 0, made.err
    assert fleet.ok("export", str(tmp_path / "stick"), "--device", "cam-1")["job"] == "my-job"
    with fleet.books() as books:
        document = books.documents.current("cam-1")
    assert document is not None and (tmp_path / "stick" / "job.json").read_bytes() == document.envelope


def test_the_command_gives_blocks_until_it_is_ended(fleet: Fleet, tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    (repository / "metadata").mkdir(parents=True)
    (repository / "targets").mkdir()
    data = os.urandom(100_000)
    (repository / "targets" / "x").write_bytes(data)
    device = fleet.enrolled("cam-1")
    ca, certificate, key = device.files  # type: ignore[attr-defined]
    settings = BrokerSettings(
        host="localhost", port=fleet.device_port, ca_file=str(ca), cert_file=str(certificate), key_file=str(key)
    )
    server = fleet.start("serve-blocks", str(repository), stderr=subprocess.PIPE)
    try:
        assert server.stderr is not None and "serving" in server.stderr.readline()
        with Broker(Folder(fleet.folder), settings, f"{TENANT}/cam-1") as broker:
            broker.subscribe({f"eda/1/{TENANT}/cam-1/dn/blk/+": 0})
            topic, heard = f"eda/1/{TENANT}/cam-1/up/blk", list[Received]()
            assert broker.send(topic, b"nonsense")
            assert broker.send(topic, Question("x1", "targets/x", 0, 8).encode())
            until(lambda: heard.extend(broker.receive(0.1)) or len(heard) >= 3, "three blocks")
        assert b"".join(parse_block(message.payload).data for message in heard) == data
        server.send_signal(signal.SIGTERM)
        assert server.wait(30) == 0
    finally:
        server.kill()
        server.wait()
        server.stderr.close()


@pytest.mark.parametrize(("rate", "status"), [("x", 2), ("-1", 2), ("5", 1)])
def test_wrong_use_is_told(office: Office, tmp_path: Path, rate: str, status: int) -> None:
    assert office.run("serve-blocks", str(tmp_path), "--rate-kib-s", rate).status == status
