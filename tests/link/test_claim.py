"""From a fresh device to an enrolled one: key, request, announcement, enrolment, certificate. By the claims broker."""

from __future__ import annotations

import json
import signal
import ssl
import tempfile
from pathlib import Path

import pytest
from cryptography import x509
from hypothesis import given
from hypothesis import strategies as st

from agent.base.errors import DamagedError
from agent.link.identity import Identity, certificate_end
from tests.link.broker import TENANT, Broker, until
from tests.link.certificates import Authority
from tests.link.device import LinkProcess
from tests.link.standin import KEYID, StandIn, document


def fresh(broker: Broker, link: LinkProcess) -> StandIn:
    """A core without a fleet, which announces itself by the claims broker."""
    core = StandIn(link.folder.with_name("admin.sock"), broker.claim_port, broker.claimant(), "", state="claim")
    broker.claims.start()
    return core


def own_files(broker: Broker, core: StandIn, name: str) -> dict[str, object]:
    """Settings of the enrolled device: the certificate is the link's own now."""
    mine = {**core.settings["broker"], "port": broker.port, "cert_file": None, "key_file": None}
    return {"state": "enrolled", "device": name, "broker": mine}


def test_a_fresh_device_is_let_in(broker: Broker, link: LinkProcess) -> None:
    operator = broker.operator("claim/#", "d7/up/#")
    with fresh(broker, link) as core:
        link.start()
        csr = until(lambda: core.csrs, "the request")[0]
        core.say("up/announce", json.dumps({"csr": csr}).encode(), retain=True)
        announced = until(lambda: operator.on(f"claim/{KEYID}/up/announce"), "the announcement, over the bridge")
        # The approver reads the request and signs it under a name of his own.
        certificate = broker.devices.sign_request(document(announced[0])["csr"], "d7", TENANT).decode()

        def enrol(envelope: bytes) -> dict[str, str]:
            assert envelope == b"the enrolment"
            core.change(**own_files(broker, core, "d7"))
            return {"verdict": "accepted", "reason": "", "certificate": certificate}

        core.enrol = enrol
        operator.publish(f"claim/{KEYID}/dn/enrolment", b"the enrolment", retain=True)
        status = until(lambda: operator.on("d7/up/status"), "the device is there under its name")
        assert document(status[0])["online"] is True
        assert (link.folder / "client.key").stat().st_mode & 0o777 == 0o600
        assert link.stop() == 0
        link.start()
        core.until_state(connected=True)
        assert len(core.csrs) == 1, "an enrolled device asks for nothing"


def test_the_request_stays_the_same_and_so_does_the_key(broker: Broker, link: LinkProcess) -> None:
    with fresh(broker, link) as core:
        for count in (1, 2, 3):
            link.start()
            until(lambda count=count: len(core.csrs) == count, "the request")
            link.stop(signal.SIGKILL)
        assert len(set(core.csrs)) == 1
        key = x509.load_pem_x509_csr(core.csrs[0].encode()).public_key()
        (link.folder / "client.csr").unlink()
        link.start()
        until(lambda: len(core.csrs) == 4, "a new request")
        assert x509.load_pem_x509_csr(core.csrs[3].encode()).public_key() != key


def test_a_link_killed_before_it_has_its_certificate_gets_it_with_the_settings(
    broker: Broker, link: LinkProcess
) -> None:
    operator = broker.operator("d7/up/status")
    with fresh(broker, link) as core:
        link.start()
        csr = until(lambda: core.csrs, "the request")[0]
        link.stop(signal.SIGKILL)
        certificate = broker.devices.sign_request(csr, "d7", TENANT).decode()
        core.change(**own_files(broker, core, "d7"), certificate=certificate)
        link.start()
        until(lambda: operator.on("d7/up/status"), "the device is there under its name")


def test_a_certificate_that_is_not_ours_is_told_and_not_stored(broker: Broker, link: LinkProcess) -> None:
    stranger = broker.device("d7").certificate.read_text()
    with fresh(broker, link) as core:
        link.start()
        until(lambda: core.csrs, "the request")
        core.change(**own_files(broker, core, "d7"), certificate=stranger)
        until(lambda: "does not fit" in core.state.get("reason", ""), "it is told")
        assert not (link.folder / "client.crt").exists()


def test_no_will_and_no_status_before_enrolment(broker: Broker, link: LinkProcess) -> None:
    """A claimant may not publish them: with a Will the broker would not even take the connection."""
    operator = broker.operator("#")
    with fresh(broker, link) as core:
        link.start()
        core.until_state(connected=True)
        core.say("up/announce", b"x", retain=True)
        until(lambda: operator.heard, "the announcement")
        link.stop()
        assert {item.topic for item in operator.heard} == {f"claim/{KEYID}/up/announce"}
        assert "refuses" not in core.state["reason"]


# -- the files --------------------------------------------------------------------------------------------------------


@pytest.fixture
def identity(tmp_path: Path) -> Identity:
    return Identity(tmp_path)


@pytest.mark.parametrize("days", [-1, 30, 365 * 40])
def test_the_end_of_a_certificate_is_read_as_others_read_it(days: int, tmp_path: Path) -> None:
    certificate, _ = Authority("CA").issue(tmp_path, "c", "d1", organization="acme", host="localhost", days=days)
    known = x509.load_pem_x509_certificate(certificate.read_bytes()).not_valid_after_utc
    assert certificate_end(str(certificate)) == known.strftime("%Y-%m-%dT%H:%M:%SZ")


@given(st.binary(max_size=300), st.integers(0, 2000), st.binary(min_size=1, max_size=3))
def test_what_is_no_certificate_has_no_end(noise: bytes, place: int, change: bytes) -> None:
    with tempfile.NamedTemporaryFile() as file:
        path = Path(file.name)
        good = _PEM[: place % len(_PEM)] + change + _PEM[place % len(_PEM) + len(change) :]
        for content in (noise, good, _PEM[: place % len(_PEM)], _wrapped(noise)):
            path.write_bytes(content)
            found = certificate_end(file.name)
            assert found is None or len(found) == 20
    assert certificate_end("/nowhere") is None


_PEM = Authority("CA").pem


def _wrapped(der: bytes) -> bytes:
    return ssl.DER_cert_to_PEM_cert(der).encode()


def test_certificate_and_key_belong_together(identity: Identity, tmp_path: Path) -> None:
    authority = Authority("CA")
    assert identity.files() is None
    first = authority.sign_request(identity.request(KEYID), "d1").decode()
    identity.store(first)
    assert identity.files() == (str(tmp_path / "client.crt"), str(tmp_path / "client.key"))
    for bad in ("", "no certificate", authority.pem.decode(), first[:200]):
        with pytest.raises(DamagedError):
            identity.store(bad)
    assert (tmp_path / "client.crt").read_text() == first, "the good one stays"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["client.crt", "client.csr", "client.key"]
