"""How a device gets its fleet, at the door of core: announced, enrolled, enrolled again, and by whom not."""

from __future__ import annotations

import base64
import secrets
import signal
import stat

import pytest

from agent.trust.envelope import PublicKey, Signer, open_envelope, peek_payload, seal
from agent.wire.messages import Announcement, Enrolment, Info, Job, JobDocument, SigningKey, decode
from tests.core.conftest import Agent
from tests.core.desk import Keys, public
from tests.core.fleet_device import PATIENCE_S
from tests.link.broker import until

CSR = "-----BEGIN CERTIFICATE REQUEST-----\nthe link's\n-----END CERTIFICATE REQUEST-----\n"
CERTIFICATE = "-----BEGIN CERTIFICATE-----\nthe fleet's\n-----END CERTIFICATE-----\n"


class Waiting(Agent):
    """A device that waits to be enrolled, seen as link sees it: everything goes over ``admin.sock``."""

    def __init__(self, folder):
        super().__init__(folder)
        self.enroller, self.keys = Signer(secrets.token_bytes(32)), Keys()
        self.config.write_text('[link]\nhost = "broker.example"\nclaim_port = 8884\n')
        self.write_trust(self.enroller)

    def write_trust(self, enroller, tenant="acme"):
        (self.folder / "trust.toml").write_text(f'tenant = "{tenant}"\n[enrolment]\npublic = "{public(enroller)}"\n')

    def call(self, method, path, body=None):
        with self.admin() as admin:
            return admin.call(method, f"/v1/link/{path}", body)

    def settings(self):
        return self.call("GET", "settings")

    def said(self, topic):
        """The latest on a topic, waited for; its payload."""

        def found():
            messages = self.call("GET", "outgoing?wait_s=1")["messages"]
            return [message for message in messages if message["topic"] == topic]

        return base64.b64decode(until(found, f"{topic} is said", PATIENCE_S)[-1]["payload"])

    def announced(self) -> Announcement:
        self.call("POST", "csr", {"csr": CSR})
        payload = self.said("up/announce")
        message = decode(peek_payload(payload)[1], Announcement)
        identity = PublicKey(base64.b64decode(message.identity))
        open_envelope(payload, Announcement.KIND, {identity.keyid: identity})  # it is what it says it is
        return message

    def enrolment(self, epoch=1, **fields) -> Enrolment:
        status = self.json("status")
        known = {
            "tenant": "acme", "device": "cam-7", "epoch": epoch, "identity": status["fleet"]["identity"],
            "certificate": CERTIFICATE,
            "keys": [SigningKey(name=name, public=key, classes=list(kinds)) for name, key, kinds in self.keys.rows()],
        }  # fmt: skip
        return Enrolment(**{**known, **fields})

    def enrol(self, message, *signers):
        """The answer to an enrolment."""
        return self.call("POST", "enrolment", seal(message.KIND, message.encode(), signers or (self.enroller,)))

    def give(self, number, *, device="cam-7", epoch=1):
        job = Job(job_id=f"e{epoch}j{number}", seq=number, op="ping", kind="observe")
        message = JobDocument(tenant="acme", device=device, epoch=epoch, generation=number, job=job)
        return self.call("POST", "received?topic=dn/job", seal(message.KIND, message.encode(), [self.keys.watcher]))


@pytest.fixture
def device(short_dir):
    """A running core that waits to be enrolled."""
    waiting = Waiting(short_dir)
    waiting.start()
    yield waiting
    if waiting.process is not None:
        assert waiting.stop() == 0
        assert "Traceback" not in waiting.log.read_text()


def test_announced_enrolled_and_at_work(device: Waiting) -> None:
    settings = device.settings()
    assert (settings["state"], settings["device"], settings["epoch"]) == ("claim", "", 0)
    assert (settings["broker"]["host"], settings["broker"]["port"]) == ("broker.example", 8884)
    announced = device.announced()
    assert (announced.tenant, announced.csr) == ("acme", CSR)
    assert PublicKey(base64.b64decode(announced.identity)).keyid == settings["keyid"]
    assert device.give(1) == {"verdict": "refused", "reason": "not_enrolled"}
    answer = device.enrol(device.enrolment())
    assert answer == {"verdict": "accepted", "reason": "", "certificate": CERTIFICATE}
    after = device.settings()
    assert (after["state"], after["device"], after["epoch"]) == ("enrolled", "cam-7", 1)
    assert (after["certificate"], after["broker"]["port"]) == (CERTIFICATE, 8883)
    assert after["version"] != settings["version"]
    info = decode(peek_payload(device.said("up/info"))[1], Info)
    assert (info.device, info.identity) == ("cam-7", announced.identity)
    assert device.give(1)["verdict"] == "accepted"
    topics = [message["topic"] for message in device.call("GET", "outgoing")["messages"]]
    assert "up/announce" not in topics


def test_an_enrolment_outlives_a_kill_and_the_identity_never_changes(device: Waiting) -> None:
    announced = device.announced()
    device.enrol(device.enrolment())
    device.give(5)
    device.restart(signal.SIGKILL)
    assert (device.settings()["state"], device.settings()["certificate"]) == ("enrolled", CERTIFICATE)
    assert device.json("status")["fleet"]["identity"] == announced.identity
    assert device.give(4) == {"verdict": "refused", "reason": "old_generation"}
    assert device.give(6)["verdict"] == "accepted"


REFUSED = {
    "signed by a stranger": (lambda d: (d.enrolment(), Signer(bytes(32))), "unknown_key"),
    "signed by the device itself": (lambda d: (d.enrolment(), d.keys.admin), "unknown_key"),
    "for another identity": (lambda d: (d.enrolment(identity=public(Signer(bytes(32)))),), "wrong_device"),
    "of another tenant": (lambda d: (d.enrolment(tenant="zeta"),), "wrong_tenant"),
    "a name that is none": (lambda d: (d.enrolment(device="claim"),), "bad_message"),
    "one key twice": (lambda d: (d.enrolment(keys=d.enrolment().keys * 2),), "bad_message"),
}


@pytest.mark.parametrize("why", REFUSED)
def test_who_may_not_enrol_it_does_not(device: Waiting, why: str) -> None:
    make, code = REFUSED[why]
    assert device.enrol(*make(device)) == {"verdict": "refused", "reason": code, "certificate": ""}
    assert device.settings()["state"] == "claim"
    assert device.enrol(device.enrolment())["verdict"] == "accepted"


def test_bytes_that_are_no_enrolment_are_refused(device: Waiting) -> None:
    good = seal(Enrolment.KIND, device.enrolment().encode(), [device.enroller])
    other = seal(JobDocument.KIND, device.enrolment().encode(), [device.enroller])
    for data, code in (
        (b"", "malformed"), (good[:-1], "malformed"), (good + b"}", "malformed"), (other, "wrong_type"),
        (good.replace(b"sig", b"gis"), "malformed"), (b"x" * 65536, "malformed"),
    ):  # fmt: skip
        assert device.call("POST", "enrolment", data)["reason"] == code
    assert device.settings()["state"] == "claim"


def test_the_number_of_an_enrolment_only_rises(device: Waiting) -> None:
    first, second = device.enrolment(epoch=3), device.enrolment(epoch=4)
    assert device.enrol(first)["verdict"] == "accepted"
    assert device.enrol(first) == {"verdict": "accepted", "reason": "", "certificate": CERTIFICATE}  # said twice
    for epoch in (1, 2, 3):
        assert device.enrol(device.enrolment(epoch=epoch, certificate=""))["reason"] == "old_epoch"
    device.give(9, epoch=3)
    assert device.enrol(second)["verdict"] == "accepted"
    assert device.enrol(first)["reason"] == "old_epoch"
    assert device.give(10, epoch=3)["reason"] == "old_epoch"
    assert device.give(1, epoch=5)["reason"] == "future_epoch"
    assert device.give(1, epoch=4)["verdict"] == "accepted"  # its counters begin anew
    device.restart(signal.SIGKILL)
    assert device.settings()["epoch"] == 4


def test_what_was_to_be_said_for_one_enrolment_is_not_said_in_the_next(device: Waiting) -> None:
    device.enrol(device.enrolment())
    device.give(1)
    device.said("up/job/e1j1")
    device.enrol(device.enrolment(epoch=2, device="cam-8"))
    device.give(1, device="cam-8", epoch=2)
    device.said("up/job/e2j1")
    topics = {message["topic"] for message in device.call("GET", "outgoing")["messages"]}
    assert "up/job/e1j1" not in topics


def test_a_fleet_that_took_over_cannot_go_back_in_numbers(device: Waiting) -> None:
    """Another enroller, by root's hand: the old one counts no more, and the counters of jobs only rise."""
    device.enrol(device.enrolment(epoch=5))
    other = Signer(secrets.token_bytes(32))
    device.write_trust(other)
    device.process.send_signal(signal.SIGHUP)
    until(lambda: device.settings()["state"] == "claim", "it waits anew", PATIENCE_S)
    assert device.enrol(device.enrolment(epoch=6))["reason"] == "unknown_key"
    assert device.enrol(device.enrolment(epoch=5, device="other"), other)["reason"] == "old_epoch"
    assert device.settings()["state"] == "claim"
    assert device.enrol(device.enrolment(epoch=6), other)["verdict"] == "accepted"
    assert device.give(1, epoch=6)["verdict"] == "accepted"


def test_a_device_that_is_named_in_its_file_takes_no_enrolment(device: Waiting) -> None:
    message = device.enrolment(epoch=9)
    (device.folder / "trust.toml").write_text(device.keys.trust("cam-7"))
    device.process.send_signal(signal.SIGHUP)
    until(lambda: device.settings()["state"] == "enrolled", "the file says so", PATIENCE_S)
    assert device.enrol(message)["reason"] == "wrong_topic"
    assert device.settings()["epoch"] == 1


def test_a_trust_file_that_others_could_write_gives_no_fleet_and_the_device_serves(device: Waiting) -> None:
    device.enrol(device.enrolment())
    path = device.folder / "trust.toml"
    path.chmod(path.stat().st_mode | stat.S_IWOTH)
    device.restart()
    assert device.settings()["state"] == "off"
    (finding,) = [row for row in device.json("doctor", status=1)["findings"] if row["check"] == "trust"]
    assert "others than root could" in finding["text"]
    assert device.give(1)["reason"] == "not_enrolled"
    path.chmod(0o644)
    device.process.send_signal(signal.SIGHUP)
    until(lambda: device.settings()["state"] == "enrolled", "it is mended", PATIENCE_S)
    assert device.give(1)["verdict"] == "accepted"


def test_a_trust_file_that_comes_and_goes(agent: Agent) -> None:
    """Given to a running device, it has a fleet at once; taken away, it has none."""
    keys = Keys()
    agent.config.write_text('[link]\nhost = "broker.example"\n')
    agent.start()

    def state():
        with agent.admin() as admin:
            return admin.call("GET", "/v1/link/settings")["state"]

    assert state() == "off"
    assert agent.json("status")["fleet"] is None
    (agent.folder / "trust.toml").write_text(keys.trust("cam-1"))
    agent.process.send_signal(signal.SIGHUP)
    until(lambda: state() == "enrolled", "it has a fleet", PATIENCE_S)
    assert agent.json("jobs", "list") == {"jobs": []}
    (agent.folder / "trust.toml").unlink()
    agent.process.send_signal(signal.SIGHUP)
    until(lambda: state() == "off", "it has none", PATIENCE_S)
    assert agent.stop() == 0
    assert "Traceback" not in agent.log.read_text()
