"""A device with a fleet, for tests: core and link as processes, a real broker between them and an operator who signs.

    with FleetDevice(folder, broker) as device: device.fleet.give("ping"); ...

Everything that the device says is checked against its signature before a test sees it.
"""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from agent.trust.envelope import PublicKey, Signer, open_envelope, peek_payload
from agent.wire.messages import Info, JobState, Reported, RpcAnswer, decode
from tests.core.conftest import Agent
from tests.core.desk import Desk, Keys
from tests.link.broker import Broker, Operator, until
from tests.link.device import LinkProcess

ENDED = ("succeeded", "failed", "rejected", "cancelled")
#: What a test may wait for on a busy machine.
PATIENCE_S = 60.0
_SIGNED = {"up/info": Info, "up/reported": Reported, "up/rpc": RpcAnswer}


class Fleet(Desk):
    """The operator of one device: gives jobs and questions, and hears what the device says."""

    def __init__(self, operator: Operator, keys: Keys, device: str, epoch: int = 1) -> None:
        super().__init__(keys, device, epoch, lambda: str(self.info["boot_nonce"]))
        self.operator = operator
        self._identity: PublicKey | None = None
        self._read: dict[bytes, dict[str, Any]] = {}

    # -- saying -------------------------------------------------------------------------------------------------------

    def say(self, rest: str, payload: bytes, *, retain: bool = False) -> None:
        """Let the broker have it."""
        assert self.operator.publish(f"{self.device}/{rest}", payload, retain=retain) == 0

    def give(
        self, op: str, args: Mapping[str, Any] | None = None, *, signers: Sequence[Signer] = (), **fields: Any
    ) -> str:
        """Give the next job; its id."""
        job = self.job(op, args, **fields)
        self.say("dn/job", self.sealed(self.document(job), *signers), retain=True)
        return job.job_id

    def destroy(self, op: str, args: Mapping[str, Any]) -> str:
        """Give a job that needs two signatures and the present start."""
        return self.give(op, args, signers=(self.keys.admin, self.keys.second), boot_nonce=self.nonce)

    def cancel(self, *job_ids: str) -> None:
        """Cancel, with no job of its own."""
        self.say("dn/job", self.sealed(self.document(cancel=job_ids)), retain=True)

    def desire(self, config: Mapping[str, Any], *signers: Signer) -> int:
        """The next desired state; its version."""
        self.say("dn/desired", self.sealed(self.desired_message(config), *signers), retain=True)
        return self.version

    def ask(self, op: str, args: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Ask, and wait for the answer."""
        request = self.question(op, args)
        self.say(f"dn/rpc/{op}", self.sealed(request))
        answer: dict[str, Any] = until(lambda: self.answer(request.rpc_id), f"an answer to {op}", PATIENCE_S)
        return answer

    # -- hearing ------------------------------------------------------------------------------------------------------

    def heard(self, rest: str) -> list[dict[str, Any]]:
        """Everything on a topic, oldest first, each signature checked."""
        return [self._opened(rest, payload) for payload in self.operator.on(f"{self.device}/{rest}") if payload]

    def _opened(self, rest: str, payload: bytes) -> dict[str, Any]:
        kind = _SIGNED.get(rest) or (JobState if rest.startswith("up/job/") else None)
        if kind is None:
            found: dict[str, Any] = json.loads(payload)
            return found
        if payload not in self._read:
            identity = self._know_identity()
            opened = open_envelope(payload, kind.KIND, {identity.keyid: identity})
            self._read[payload] = decode(opened.payload, kind).model_dump(mode="json")
        return self._read[payload]

    def _know_identity(self) -> PublicKey:
        """The first that it names, as an operator would note it at enrolment."""
        if self._identity is None:
            (first, *_) = until(lambda: self.operator.on(f"{self.device}/up/info"), "the device says who it is")
            self._identity = PublicKey(base64.b64decode(json.loads(peek_payload(first)[1])["identity"]))
        return self._identity

    def answer(self, rpc_id: str) -> dict[str, Any] | None:
        """The answer to a question, if it came."""
        return next((found for found in self.heard("up/rpc") if found["rpc_id"] == rpc_id), None)

    def states(self, job_id: str) -> list[dict[str, Any]]:
        """What was heard of a job."""
        return self.heard(f"up/job/{job_id}")

    def state(self, job_id: str) -> str:
        """The last state of a job; "" before the first."""
        states = self.states(job_id)
        return str(states[-1]["state"]) if states else ""

    def ended(self, job_id: str, patience_s: float = PATIENCE_S) -> dict[str, Any]:
        """The state that ends a job, waited for."""
        until(lambda: self.state(job_id) in ENDED, f"{job_id} ends; {self.states(job_id)}", patience_s)
        return self.states(job_id)[-1]

    def done(self, op: str, args: Mapping[str, Any] | None = None, **fields: Any) -> dict[str, Any]:
        """Give a job that is to succeed, and wait for its result."""
        ended = self.ended(self.give(op, args, **fields))
        assert ended["state"] == "succeeded", ended
        return dict(ended["result"] or {})

    def destroy_done(self, op: str, args: Mapping[str, Any]) -> dict[str, Any]:
        """As ``done``, for what needs two signatures."""
        ended = self.ended(self.destroy(op, args))
        assert ended["state"] == "succeeded", ended
        return dict(ended["result"] or {})

    def running(self, job_id: str, phase: str | None = None) -> None:
        """Wait until a job runs (in that phase)."""
        until(
            lambda: any(
                state["state"] == "running" and phase in (None, state["phase"]) for state in self.states(job_id)
            ),
            f"{job_id} runs; {self.states(job_id)}",
            PATIENCE_S,
        )

    def last(self, rest: str) -> dict[str, Any]:
        """The latest on a topic."""
        until(lambda: self.heard(rest), f"something on {rest}", PATIENCE_S)
        return self.heard(rest)[-1]

    def close(self) -> None:
        """Hear no more."""
        self.operator.close()

    @property
    def info(self) -> dict[str, Any]:
        return self.last("up/info")

    @property
    def reported(self) -> dict[str, Any]:
        return self.last("up/reported")

    def reports(self, what: str, holds: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
        """Wait until ``up/reported`` is so."""
        deadline = time.monotonic() + PATIENCE_S
        while not holds(reported := self.reported):
            assert time.monotonic() < deadline, f"it is not reported that {what}: {reported}"
            time.sleep(0.02)
        return reported


class FleetDevice(Agent):
    """Core and link on folders of their own. ``longest_pause_s``: between attempts to connect, None as in earnest."""

    def __init__(
        self,
        folder: Path,
        broker: Broker,
        name: str = "cam-1",
        *,
        config: str = "",
        port: int = 0,
        longest_pause_s: float | None = None,
    ) -> None:
        super().__init__(folder)
        self.name = name
        self.keys = Keys()
        self.broker = broker
        self._credentials = broker.device(name)
        self._port = port or broker.port
        self.link_log = folder / "link.log"
        self._link: subprocess.Popen[bytes] | None = None
        self._capped = longest_pause_s and LinkProcess(self.run / "admin.sock", self.state / "link", longest_pause_s)
        self._fleet: Fleet | None = None
        self.configure(config)
        self.trust(self.keys.trust(name))

    @property
    def trust_file(self) -> Path:
        return self.folder / "trust.toml"

    def trust(self, text: str) -> None:
        """Write ``trust.toml``; it holds from the next start or reload on."""
        self.trust_file.write_text(text)

    def configure(self, more: str = "", **link: Any) -> None:
        """Write the configuration file: where the broker is, and ``more``."""
        ca, certificate, key = map(str, self._credentials)
        known = {
            "host": "localhost", "port": self._port, "ca_file": ca, "cert_file": certificate, "key_file": key,
            "splay_s": 0.0, "keepalive_s": 5, **link,
        }  # fmt: skip
        lines = [f"{name} = {json.dumps(value)}" for name, value in known.items()]
        self.config.write_text("\n".join(["[link]", *lines, "[clock]", 'trust = "always"', more, ""]))

    @property
    def fleet(self) -> Fleet:
        """The operator; made when first asked for."""
        if self._fleet is None:
            self._fleet = Fleet(self.broker.operator(f"{self.name}/up/#"), self.keys, self.name)
        return self._fleet

    # -- processes ----------------------------------------------------------------------------------------------------

    def start_link(self) -> None:
        if self._capped:
            self._link = self._capped.start().process
            return
        with self.link_log.open("ab") as log:
            self._link = subprocess.Popen(
                [sys.executable, "-m", "agent.cli.device", "link"], env=self.environment, stderr=log, cwd=self.folder
            )

    def stop_link(self, number: int = signal.SIGTERM) -> int:
        assert self._link is not None
        self._link.send_signal(number)
        status = self._link.wait(timeout=60)
        self._link = None
        return status

    def restart_link(self, number: int = signal.SIGTERM) -> None:
        self.stop_link(number)
        self.start_link()

    @property
    def link_pid(self) -> int:
        assert self._link is not None
        return self._link.pid

    def connect(self) -> None:
        """Start both, wait until the fleet knows of this start."""
        assert self.fleet.generation == 0  # it listens from the beginning
        self.start()
        self.start_link()
        self.wait_until_known()

    def wait_until_known(self) -> None:
        """The fleet has heard of this start of core."""
        nonce = self.status()["boot_nonce"]
        until(
            lambda: [info for info in self.fleet.heard("up/info") if info["boot_nonce"] == nonce],
            f"the device says that it is there\n{self.logs()}",
            PATIENCE_S,
        )

    def wait_until_back(self) -> None:
        """Core ends of its own accord, as a job told it to, and is started again, as a service manager does."""
        assert self.process is not None
        assert self.process.wait(PATIENCE_S) == 0, self.log.read_text()
        self.start()
        self.wait_until_known()

    def admin_get(self, path: str) -> dict[str, Any]:
        """What the admin socket answers."""
        with self.admin() as admin:
            found: dict[str, Any] = admin.call("GET", path)
        return found

    def status(self) -> dict[str, Any]:
        """``edge-agent status``."""
        return self.admin_get("/v1/status")

    def logs(self) -> str:
        log = self._capped.log if self._capped else self.link_log
        return self.log.read_text() + (log.read_text() if log.exists() else "")

    def kill(self) -> None:
        """End whatever still runs."""
        if self._fleet is not None:
            self._fleet.close()
            self._fleet = None
        for process in (self._link, self.process):
            if process is not None and process.poll() is None:
                process.kill()
                process.wait()
        self._link = self.process = None

    def __enter__(self) -> FleetDevice:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()


@contextmanager
def connected(
    folder: Path, name: str = "cam-1", *, broker: Broker | None = None, **options: Any
) -> Iterator[FleetDevice]:
    """A device that is connected, with a broker of its own in the same folder."""
    if broker is None:
        (folder / "broker").mkdir(parents=True)
        broker = Broker(folder / "broker")
    with broker, FleetDevice(folder, broker, name, **options) as device:
        os.chmod(folder, 0o755)
        device.connect()
        yield device
