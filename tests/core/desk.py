"""Keys and messages of a fleet, for tests: what a device of it obeys."""

from __future__ import annotations

import base64
import json
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from agent.trust.envelope import Signer, seal
from agent.wire.messages import Desired, Job, JobDocument, RpcRequest
from agent.wire.ops import OPS
from tests.link.broker import TENANT


def public(signer: Signer) -> str:
    """As it stands in files and messages."""
    return base64.b64encode(signer.public.raw).decode()


class Keys:
    """Who may tell the device what: ``admin`` everything, ``second`` is for destroying, ``watcher`` only looks."""

    def __init__(self) -> None:
        self.admin, self.second, self.watcher, self.stranger = (Signer(secrets.token_bytes(32)) for _ in range(4))

    def rows(self) -> list[tuple[str, str, tuple[str, ...]]]:
        """Name, public key and classes."""
        return [
            ("admin", public(self.admin), ("observe", "change", "destroy")),
            ("second", public(self.second), ("destroy",)),
            ("watcher", public(self.watcher), ("observe",)),
        ]

    def trust(self, device: str, epoch: int = 1, tenant: str = TENANT) -> str:
        """``trust.toml`` of a device that obeys them."""
        lines = [f'tenant = "{tenant}"', f'device = "{device}"', f"epoch = {epoch}"]
        for name, key, classes in self.rows():
            lines += ["[[keys]]", f'name = "{name}"', f'public = "{key}"', f"classes = {json.dumps(classes)}"]
        return "\n".join(lines) + "\n"


class Desk:
    """Makes the messages to one device, each with the next number. ``nonce`` gives that of its present start."""

    def __init__(self, keys: Keys, device: str, epoch: int, nonce: Callable[[], str]) -> None:
        self.keys, self.device, self.epoch = keys, device, epoch
        self._nonce = nonce
        self.generation = self.seq = self.version = self.number = 0

    @property
    def nonce(self) -> str:
        return self._nonce()

    def address(self, **other: Any) -> dict[str, Any]:
        """Tenant, device and enrolment of every message."""
        return {"tenant": TENANT, "device": self.device, "epoch": self.epoch, **other}

    def job(self, op: str, args: Mapping[str, Any] | None = None, **fields: Any) -> Job:
        """The next job."""
        self.seq += 1
        kind = OPS[op].kind if op in OPS else "change"
        known = {"job_id": f"j{self.seq}", "seq": self.seq, "op": op, "kind": kind, "args": dict(args or {})}
        return Job(**{**known, **fields})

    def document(self, job: Job | None = None, cancel: Sequence[str] = (), **fields: Any) -> JobDocument:
        """The next document."""
        self.generation += 1
        return JobDocument(
            **{**self.address(), "generation": self.generation, "job": job, "cancel": list(cancel), **fields}
        )

    def sealed(self, message: Any, *signers: Signer) -> bytes:
        """Signed by the admin, unless told otherwise."""
        return seal(message.KIND, message.encode(), signers or (self.keys.admin,))

    def sealed_raw(self, kind: str, payload: bytes) -> bytes:
        """Signed whatever it is."""
        return seal(kind, payload, [self.keys.admin])

    def desired_message(self, config: Mapping[str, Any]) -> Desired:
        """The next desired state, unsigned."""
        self.version += 1
        return Desired(**self.address(), version=self.version, config=dict(config))

    def question(self, op: str, args: Mapping[str, Any] | None = None, **fields: Any) -> RpcRequest:
        """The next question."""
        self.number += 1
        known = {"rpc_id": f"r{self.number}", "n": self.number, "boot_nonce": self.nonce, "op": op}
        return RpcRequest(**{**self.address(), **known, "args": dict(args or {}), **fields})
