"""Makes ``tests/vectors/link/link.json``, what other implementations may check themselves against.

    python -m tests.wire.vectors

Nothing in it is random: a change shows what of the contract has changed.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

from agent.trust.envelope import Signer, pae, seal
from agent.wire import messages as wire

PATH = Path(__file__).parents[1] / "vectors" / "link" / "link.json"
ADDRESS = {"tenant": "acme", "device": "cam-1", "epoch": 7}
SEEDS = {"admin": bytes([1]) * 32, "second": bytes([2]) * 32, "device": bytes([3]) * 32, "stranger": bytes([4]) * 32}
SIGNERS = {name: Signer(seed) for name, seed in SEEDS.items()}
AT = "2026-11-22T12:00:00Z"


def _public(name: str) -> str:
    return base64.b64encode(SIGNERS[name].public.raw).decode()


def _messages() -> dict[str, tuple[Any, tuple[str, ...]]]:
    window = wire.Window(cron="0 3 * * 1-5", duration_s=7200, tz="Europe/Berlin")
    install = wire.Job(
        job_id="install-1", seq=11, op="model.install", kind="change", args={"model": "m", "version": "1.2.0"},
        priority=7, not_after="2026-12-31T23:59:59Z", step_timeout_s=600.0, total_timeout_s=3600.0, window=window,
    )  # fmt: skip
    remove = wire.Job(
        job_id="remove-1", seq=12, op="model.remove", kind="destroy", args={"model": "m"}, boot_nonce="ab" * 16
    )
    failure = wire.Failure(code="undone", text="cannot keep configuration: the link did not come back", hint="")
    return {
        "job": (wire.JobDocument(**ADDRESS, generation=21, job=install, cancel=["old-1"]), ("admin",)),
        "job that destroys": (wire.JobDocument(**ADDRESS, generation=22, job=remove), ("admin", "second")),
        "cancel alone": (wire.JobDocument(**ADDRESS, generation=23, cancel=["install-1"]), ("admin",)),
        "desired": (wire.Desired(**ADDRESS, version=3, config={"telemetry": {"heat_s": 30.0}}), ("admin",)),
        "question": (
            wire.RpcRequest(**ADDRESS, rpc_id="r1", n=1, boot_nonce="ab" * 16, op="logs.tail", args={"lines": 10}),
            ("admin",),
        ),
        "state": (
            wire.JobState(**ADDRESS, job_id="install-1", seq=11, op="model.install", rev=4, state="failed", attempt=2,
                          at=AT, clock_trusted=True, error=failure),
            ("device",),
        ),
        "answer": (
            wire.RpcAnswer(**ADDRESS, rpc_id="r1", op="logs.tail", boot_nonce="ab" * 16, result={"lines": ["zwöi"]}),
            ("device",),
        ),
        "enrolment": (
            wire.Enrolment(**ADDRESS, identity=_public("device"), certificate="", keys=[
                wire.SigningKey(name="admin", public=_public("admin"), classes=["observe", "change", "destroy"]),
                wire.SigningKey(name="second", public=_public("second"), classes=["destroy"]),
            ]),
            ("admin",),
        ),
    }  # fmt: skip


def _refused() -> list[dict[str, str]]:
    """Envelopes that a device with the keys ``admin`` and ``second`` refuses, and why."""
    kind = wire.JobDocument.KIND
    message, _ = _messages()["cancel alone"]
    payload = message.encode()
    good = seal(kind, payload, [SIGNERS["admin"]]).decode()
    known = json.loads(good)
    signature = known["signatures"][0]

    def changed(**fields: Any) -> str:
        return json.dumps({**known, **fields}, separators=(",", ":"))

    def spare_bits(text: str) -> str:
        letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
        bare = text.rstrip("=")
        return bare[:-1] + letters[letters.index(bare[-1]) + 1] + text[len(bare) :]

    other = base64.b64encode(SIGNERS["admin"].sign(payload)).decode()
    rows = {
        "cut": (good[:-1], "malformed"),
        "a field twice": (good.replace('"payload":', '"payload":"","payload":', 1), "malformed"),
        "a field more": (changed(note=""), "malformed"),
        "no signature": (changed(signatures=[]), "malformed"),
        "nine signatures": (changed(signatures=[signature] * 9), "malformed"),
        "bits beyond the end of base64": (changed(signatures=[{**signature, "sig": spare_bits(signature["sig"])}]),
                                          "malformed"),
        "base64 without padding": (changed(signatures=[{**signature, "sig": signature["sig"].rstrip("=")}]),
                                   "malformed"),
        "another type": (changed(payloadType=wire.Desired.KIND), "wrong_type"),
        "a stranger": (seal(kind, payload, [SIGNERS["stranger"]]).decode(), "unknown_key"),
        "signed without the encoding of DSSE": (changed(signatures=[{**signature, "sig": other}]), "bad_signature"),
        "one good and one bad": (
            changed(signatures=[signature, {"keyid": SIGNERS["second"].keyid, "sig": signature["sig"]}]),
            "bad_signature",
        ),
        "64 KiB and one byte": ("", "too_large"),
    }  # fmt: skip
    found = [{"name": name, "envelope": text, "code": code} for name, (text, code) in rows.items()]
    found[-1]["envelope"] = good
    found[-1]["append_blanks"] = str((64 << 10) + 1 - len(good))
    return found


def document() -> dict[str, Any]:
    """All vectors."""
    accepted = []
    for name, (message, signers) in _messages().items():
        data = seal(message.KIND, message.encode(), [SIGNERS[signer] for signer in signers])
        accepted.append(
            {
                "name": name,
                "type": message.KIND,
                "signers": list(signers),
                "payload": message.encode().decode(),
                "signed": pae(message.KIND, message.encode()).hex(),
                "envelope": data.decode(),
            }
        )
    return {
        "spec": "docs/spec/link.md",
        "keys": {
            name: {"seed": SEEDS[name].hex(), "public": _public(name), "keyid": signer.keyid}
            for name, signer in SIGNERS.items()
        },
        "accepted": accepted,
        "refused": _refused(),
        "topics": {
            "of a device": ["eda/1/acme/cam-1/up/status", "eda/1/acme/c/up/job/j.1", "eda/1/a/b-c_d/dn/rpc/logs.tail"],
            "of a claim": [f"eda/1/acme/claim/{SIGNERS['device'].keyid}/up/announce"],
            "none": ["eda/1/acme/cam-1", "eda/2/acme/cam-1/up/info", "eda/1/acme/+/up/info", "eda/1/acme/cam 1/up/info",
                     "eda/1/acme/cam-1/in/info", "eda/1/acme/claim/up/announce", "eda/1/acme/cam-1/up/"],
        },
    }  # fmt: skip


def text() -> str:
    """As it stands in the file."""
    return json.dumps(document(), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    PATH.write_text(text())
