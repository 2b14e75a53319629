"""What a hostile broker can make of messages: each case with the topic, the bytes, and the code that must refuse it."""

from __future__ import annotations

import base64
import json
import random
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from agent.trust.envelope import MAX_ENVELOPE_BYTES, Signer, pae
from agent.wire.messages import Desired, JobDocument, RpcRequest
from tests.core.desk import Desk

KINDS = {"dn/job": JobDocument, "dn/desired": Desired, "dn/rpc/ping": RpcRequest}


class Case(NamedTuple):
    """``code`` "" where any will do: bytes are wrong in many ways at once."""

    name: str
    topic: str
    data: bytes
    code: str = ""


def good(desk: Desk, topic: str) -> bytes:
    """A message that is right: the next one on the topic."""
    if topic == "dn/job":
        return desk.sealed(desk.document(desk.job("ping")))
    if topic == "dn/desired":
        return desk.sealed(desk.desired_message({"log": {"level": "debug"}}))
    return desk.sealed(desk.question("ping"))


def mutated(data: bytes, positions: Sequence[int] | None = None, values: Sequence[int] = ()) -> Iterator[bytes]:
    """Each byte (at the positions) with one bit flipped, or made each of the values; and left out, and given twice."""
    for at in range(len(data)) if positions is None else positions:
        for value in values or (data[at] ^ 1 << bit for bit in range(8)):
            if value != data[at]:
                yield data[:at] + bytes((value,)) + data[at + 1 :]
        yield data[:at] + data[at + 1 :]
        if data[at : at + 1] * 2 != data[at : at + 2]:
            yield data[:at] + data[at : at + 1] + data[at:]


def sampled(data: bytes, count: int, seed: int) -> list[bytes]:
    """Some of the mutations."""
    chance = random.Random(seed)
    found = list(mutated(data, sorted(chance.sample(range(len(data)), min(count, len(data))))))
    return chance.sample(found, min(count, len(found)))


def truncated(data: bytes) -> Iterator[bytes]:
    """All its beginnings, the empty one too."""
    return (data[:length] for length in range(len(data)))


def with_signatures(data: bytes, *signatures: tuple[str, bytes]) -> bytes:
    """The payload of an envelope under these signatures."""
    document = json.loads(data)
    document["signatures"] = [{"keyid": keyid, "sig": base64.b64encode(sig).decode()} for keyid, sig in signatures]
    return json.dumps(document).encode()


def unsigned_and_wrongly_signed(desk: Desk, topic: str) -> list[Case]:
    """Nobody who may say so says so."""
    keys, data = desk.keys, good(desk, topic)
    message = pae(KINDS[topic].KIND, base64.b64decode(json.loads(data)["payload"]))
    admin, stranger = keys.admin, keys.stranger
    rows = {
        "no signature": ([], "malformed"),
        "a stranger's": ([(stranger.keyid, stranger.sign(message))], "unknown_key"),
        "a stranger's in the admin's name": ([(admin.keyid, stranger.sign(message))], "bad_signature"),
        "the admin's in a stranger's name": ([(stranger.keyid, admin.sign(message))], "unknown_key"),
        "of other bytes": ([(admin.keyid, admin.sign(message + b" "))], "bad_signature"),
        "of another type": ([(admin.keyid, admin.sign(pae("x", message)))], "bad_signature"),
        "of no bytes": ([(admin.keyid, b"")], "bad_signature"),
        "zeros": ([(admin.keyid, bytes(64))], "bad_signature"),
        "a good one and a bad one": (
            [(admin.keyid, admin.sign(message)), (keys.second.keyid, bytes(64))], "bad_signature"
        ),
        "nine": ([(stranger.keyid, bytes(64))] * 9, "malformed"),
        "the device's own": ([("0" * 32, bytes(64))], "unknown_key"),
    }  # fmt: skip
    return [Case(name, topic, with_signatures(data, *row), code) for name, (row, code) in rows.items()]


def misaddressed(desk: Desk) -> list[Case]:
    """Signed by whoever may, for somebody else or another time."""
    cases = []
    for field, values, codes in (
        ("tenant", ("zeta", "Acme"), ("wrong_tenant", "wrong_tenant")),
        ("device", ("cam-2", "CAM-1", "claim"), ("wrong_device",) * 3),
        ("epoch", (desk.epoch - 1, desk.epoch + 1), ("old_epoch", "future_epoch")),
    ):
        for value, code in zip(values, codes, strict=True):
            for topic, message in (
                ("dn/job", desk.document(desk.job("ping"))),
                ("dn/desired", desk.desired_message({})),
                ("dn/rpc/ping", desk.question("ping")),
            ):
                if value:  # no enrolment has number 0
                    data = desk.sealed(message.model_copy(update={field: value}))
                    cases.append(Case(f"{field} {value}", topic, data, code))
    return cases


def by_too_few(desk: Desk) -> list[Case]:
    """Signed by keys that have not the right to it."""
    keys = desk.keys

    def job(op: str, *signers: Signer, **fields: object) -> bytes:
        return desk.sealed(desk.document(desk.job(op, {"model": "m"}, **fields)), *signers)

    change = job("store.gc", keys.watcher)
    destroy = {"boot_nonce": desk.nonce}
    return [
        Case("a change by who may look", "dn/job", change, "key_not_allowed"),
        Case("a change by who may destroy", "dn/job", job("store.gc", keys.second), "key_not_allowed"),
        Case("a change that calls itself a look", "dn/job", job("store.gc", keys.watcher, kind="observe"),
             "key_not_allowed"),
        Case("destroyed by one", "dn/job", job("model.remove", keys.admin, **destroy), "too_few_signatures"),
        Case("destroyed by one, twice", "dn/job", job("model.remove", keys.admin, keys.admin, **destroy),
             "too_few_signatures"),
        Case("destroyed by one and a stranger", "dn/job", job("model.remove", keys.admin, keys.stranger, **destroy),
             "too_few_signatures"),
        Case("destroyed by one and a watcher", "dn/job", job("model.remove", keys.admin, keys.watcher, **destroy),
             "too_few_signatures"),
        Case("destroyed as a change", "dn/job", job("model.remove", keys.admin, kind="change", **destroy),
             "too_few_signatures"),
        Case("no such operation, by who may look", "dn/job", job("no.such", keys.watcher), "key_not_allowed"),
        Case("cancelled by who may look", "dn/job", desk.sealed(desk.document(cancel=["j1"]), keys.watcher),
             "key_not_allowed"),
        Case("cancelled beside a look", "dn/job",
             desk.sealed(desk.document(desk.job("ping"), cancel=["j1"]), keys.watcher), "key_not_allowed"),
        Case("nothing, by who may look", "dn/job", desk.sealed(desk.document(), keys.watcher), "key_not_allowed"),
        Case("desired by who may look", "dn/desired", desk.sealed(desk.desired_message({}), keys.watcher),
             "key_not_allowed"),
        Case("asked by who may only destroy", "dn/rpc/ping", desk.sealed(desk.question("ping"), keys.second),
             "key_not_allowed"),
    ]  # fmt: skip


def misplaced(desk: Desk) -> list[Case]:
    """A message of one kind where another belongs, and under its name."""
    cases = []
    for topic, kind in KINDS.items():
        for other in KINDS:
            if other != topic:
                cases.append(Case(f"what belongs on {other}", topic, good(desk, other), "wrong_type"))
                payload = base64.b64decode(json.loads(good(desk, other))["payload"])
                cases.append(
                    Case(f"what belongs on {other}, renamed", topic, desk.sealed_raw(kind.KIND, payload), "bad_message")
                )
    return [
        *cases,
        Case("another question", "dn/rpc/status", desk.sealed(desk.question("ping")), "wrong_topic"),
        Case("a job asked", "dn/rpc/store.gc", desk.sealed(desk.question("store.gc")), "unknown_op"),
        Case("no question", "dn/rpc/no.such", desk.sealed(desk.question("no.such")), "unknown_op"),
        Case("a block", "dn/blk/x", good(desk, "dn/job"), "wrong_topic"),
    ]


def payloads_that_are_none(desk: Desk) -> list[Case]:
    """Signed by who may, and not the message that the type promises."""
    text = desk.document(desk.job("ping")).encode().decode()
    nested = '{"x":' + "[" * 50 + "]" * 50 + "}"
    rows = {
        "empty": "",
        "not JSON": "hello",
        "a list": f"[{text}]",
        "cut": text[:-1],
        "two": text + text,
        "an unknown field": text.replace("{", '{"urgent":true,', 1),
        "an unknown field in the job": text.replace('"args":{}', '"args":{},"sudo":true'),
        "a number as text": text.replace('"seq":', '"seq":"').replace(',"op"', '","op"'),
        "a fraction": text.replace('"generation":', '"generation":0.5e1,"was":'),
        "no tenant": text.replace('"tenant"', '"tenent"'),
        "a negative number": text.replace('"epoch":1', '"epoch":-1'),
        "a huge number": text.replace('"epoch":1', '"epoch":' + "9" * 4000),
        "not a number": text.replace('"args":{}', '"args":{"x":NaN}'),
        "infinite": text.replace('"args":{}', '"args":{"x":1e999}'),
        "half a character": text.replace('"args":{}', '"args":{"x":"\\ud800"}'),
        "nested deeply": text.replace('"args":{}', f'"args":{nested}'),
        "nested very deeply": "[" * 9000,
        "a path as id": text.replace('"job_id":"j', '"job_id":"../j'),
        "a wildcard as id": text.replace('"job_id":"j', '"job_id":"+j'),
        "priority 10": text.replace('"priority":5', '"priority":10'),
        "no such lane": text.replace('"lane":"normal"', '"lane":"fast"'),
        "no such day": text.replace('"lane"', '"not_after":"tomorrow","lane"'),
    }
    cases = [
        Case(name, "dn/job", desk.sealed_raw(JobDocument.KIND, row.encode()), "bad_message")
        for name, row in rows.items()
    ]
    assert all(row != text for row in rows.values())
    not_text = desk.sealed_raw(JobDocument.KIND, b"\xff" + text.encode())
    return [*cases, Case("not UTF-8", "dn/job", not_text, "bad_message")]


def envelopes_that_are_none(desk: Desk) -> list[Case]:
    """A good message in a wrong envelope."""
    data = good(desk, "dn/job")
    document = json.loads(data)
    payload, signature = document["payload"], document["signatures"][0]

    def changed(**fields: object) -> bytes:
        return json.dumps({**document, **fields}).encode()

    rows = {
        "empty": b"",
        "null": b"null",
        "a list": b"[" + data + b"]",
        "two": data + data,
        "a byte order mark": b"\xef\xbb\xbf" + data,
        "UTF-16": data.decode().encode("utf-16"),
        "a NUL at the end": data + b"\0",
        "a field more": changed(note="x"),
        "a field twice": data[:-1] + b',"payload":"' + payload.encode() + b'"}',
        "the type twice": b'{"payloadType":"x",' + data[1:],
        "a field in other letters": data.replace(b'"payload"', b'"Payload"'),
        "payload is no text": changed(payload=1),
        "payload in URL letters": changed(payload=payload.replace("=", "").replace("+", "-").replace("/", "_") + "-"),
        "payload without its padding": changed(payload=payload.rstrip("=") + "=" * (payload.count("=") == 0)),
        "payload in lines": changed(payload=payload[:40] + "\n" + payload[40:]),
        "payload with blanks around": changed(payload=f" {payload}"),
        "signatures is no list": changed(signatures={"0": signature}),
        "a signature is no object": changed(signatures=["x"]),
        "a signature has a field more": changed(signatures=[{**signature, "cert": "x"}]),
        "a signature without keyid": changed(signatures=[{"sig": signature["sig"]}]),
        "keyid is no text": changed(signatures=[{**signature, "keyid": 1}]),
        "many brackets": b"[" * 60_000,
    }
    cases = [Case(name, "dn/job", row, "malformed") for name, row in rows.items()]
    return [
        *cases,
        Case("a type with an end of line", "dn/job", changed(payloadType=JobDocument.KIND + "\n"), "malformed"),
        Case("no type", "dn/job", changed(payloadType=""), "wrong_type"),
        Case("another type", "dn/job", changed(payloadType=Desired.KIND), "wrong_type"),
        Case("64 KiB and one byte", "dn/job", data + b" " * (MAX_ENVELOPE_BYTES + 1 - len(data)), "too_large"),
        Case("keyid in capitals", "dn/job", changed(signatures=[{**signature, "keyid": signature["keyid"].upper()}]),
             "unknown_key"),
    ]  # fmt: skip


def every_case(desk: Desk) -> list[Case]:
    """All of them, each made for the next number, so that only what is wrong with it refuses it."""
    return [
        *(case for topic in KINDS for case in unsigned_and_wrongly_signed(desk, topic)),
        *misaddressed(desk),
        *by_too_few(desk),
        *misplaced(desk),
        *payloads_that_are_none(desk),
        *envelopes_that_are_none(desk),
    ]
