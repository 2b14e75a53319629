"""What docs/spec/link.md says, pinned by a file that other implementations can read."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest

from agent.trust.envelope import EnvelopeError, PublicKey, Signer, open_envelope, pae, seal
from agent.wire import messages as wire
from agent.wire.messages import decode
from agent.wire.topics import parse_topic
from tests.wire import vectors

VECTORS: dict[str, Any] = json.loads(vectors.PATH.read_text())
KINDS = {
    kind.KIND: kind
    for kind in (wire.JobDocument, wire.Desired, wire.RpcRequest, wire.JobState, wire.RpcAnswer, wire.Enrolment)
}


def keys(*names: str) -> dict[str, PublicKey]:
    rows = [VECTORS["keys"][name] for name in names]
    return {row["keyid"]: PublicKey(base64.b64decode(row["public"])) for row in rows}


def test_the_file_is_what_this_release_would_write() -> None:
    """When it is not, the contract has changed, or a release no longer says the same in the same bytes."""
    assert vectors.PATH.read_text() == vectors.text()


@pytest.mark.parametrize("row", VECTORS["accepted"], ids=lambda row: row["name"])
def test_accepted(row: dict[str, Any]) -> None:
    payload = row["payload"].encode()
    opened = open_envelope(row["envelope"].encode(), row["type"], keys(*row["signers"]))
    assert opened.payload == payload
    assert opened.keyids == keys(*row["signers"]).keys()
    assert bytes.fromhex(row["signed"]) == pae(row["type"], payload)
    signers = [Signer(bytes.fromhex(VECTORS["keys"][name]["seed"])) for name in row["signers"]]
    assert seal(row["type"], payload, signers).decode() == row["envelope"]
    message = decode(payload, KINDS[row["type"]])
    assert message.encode() == payload


@pytest.mark.parametrize("row", VECTORS["refused"], ids=lambda row: row["name"])
def test_refused(row: dict[str, str]) -> None:
    data = row["envelope"].encode() + b" " * int(row.get("append_blanks", "0"))
    with pytest.raises(EnvelopeError) as refused:
        open_envelope(data, wire.JobDocument.KIND, keys("admin", "second"))
    assert refused.value.code == row["code"]


def test_topics() -> None:
    topics = VECTORS["topics"]
    for text in topics["of a device"]:
        found = parse_topic(text)
        assert found is not None and not found.device.startswith("claim/")
    for text in topics["of a claim"]:
        found = parse_topic(text)
        assert found is not None and found.device.startswith("claim/")
    assert [parse_topic(text) for text in topics["none"]] == [None] * len(topics["none"])
