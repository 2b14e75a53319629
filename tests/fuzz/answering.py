"""Targets of what other processes answer: a trial child (which runs models that nobody vouches for), and the server."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from typing import Any

from agent.base.errors import AgentError
from agent.client import exchange
from agent.client.tensors import infer_result
from agent.infer import answers
from agent.infer.children import ChildError
from agent.infer.tensors import InferRequest, InferResponse
from agent.serve.exchange import response_head
from agent.serve.oip import Decoded, encode_response
from tests.fuzz import protocol
from tests.fuzz.target import Memory, Target, many

# A trial child's answers.


def read_answer(data: bytes) -> Mapping[str, Any]:
    """One line of a child, as every question reads it. What is no JSON object has ended before."""
    try:
        answer = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    if not isinstance(answer, dict):
        return {}
    found: dict[str, Any] = {}
    for name in ("peak_mb", "load_ms"):
        found[name] = _asked(answers.number, answer, name)
    found["agreement"] = _asked(answers.optional_number, answer, "agreement")
    found["times"] = _asked(answers.numbers, answer, "times", 200)
    for name in ("note", "provider", "disagrees"):
        found[name] = _asked(answers.text, answer, name)
    for name in ("inputs", "outputs"):
        found[name] = _asked(answers.tensors, answer, name)
    return found


def _asked(question: Any, *arguments: Any) -> Any:
    """The answer to a question, or None where it was nonsense."""
    try:
        return question(*arguments)
    except ChildError as error:
        if error.kind != "crashed" or len(str(error)) > 500:
            raise AssertionError(f"nonsense is told as {error.kind}: {error}") from error
        return None


def holds_answer(_data: bytes, found: Mapping[str, Any]) -> None:
    """Numbers that can be reckoned with, texts that can be shown."""
    for name in ("peak_mb", "load_ms"):
        assert found.get(name) is None or 0 <= found[name] < 1e14
    assert found.get("agreement") is None or abs(found["agreement"]) < float("inf")
    assert all(0 < value < 1e14 for value in found.get("times") or ())
    for name in ("note", "provider", "disagrees"):
        text = found.get(name)
        assert text is None or (text.isprintable() and len(text) <= 300)
    json.dumps(found, allow_nan=False)


ANSWER_SEEDS = (
    b'{"ok":true,"load_ms":12.5,"provider":"CPUExecutionProvider",'
    b'"inputs":[{"name":"x","datatype":"FP32","shape":[-1,4]}],'
    b'"outputs":[{"name":"y","datatype":"INT64","shape":[1],"optional":true}]}',
    b'{"agreement":0.99,"note":"n","disagrees":null}',
    b'{"times":[0.1,2e-3]}',
    b'{"peak_mb":5}',
    b'{"error":"no","memory":true}',
)

# The server's answers, as the client reads them.

_OK = b"HTTP/1.1 200 OK\r\n"


def read_reply(data: bytes) -> exchange.Answer:
    """The whole of ``data`` as what comes after a request, in reads of up to 4096 bytes."""
    lines: list[bytes] = []
    steps = exchange.exchange(exchange.request("GET", "/"), lines.append)
    place = 0
    try:
        what, argument = next(steps)
        while True:
            count = 0
            if what == "receive":
                part = data[place : place + min(len(argument), 4096)]
                argument[: len(part)] = part
                count, place = len(part), place + len(part)
            what, argument = steps.send(count)
    except StopIteration as stop:
        answer: exchange.Answer = stop.value
        return answer


def holds_reply(_data: bytes, answer: exchange.Answer) -> None:
    """Its document and its arrays: given, or refused in words."""
    for read in (exchange.Answer.document, infer_result, exchange.is_ready):
        with contextlib.suppress(AgentError):
            read(answer)


def reply_seeds() -> list[bytes]:
    """What the server answers to the requests that are its own seeds; an error; chunks."""
    decoded = [protocol.read_binary_request(data) for data in protocol.binary_seeds()]
    decoded += [protocol.read_json_request(data) for data in protocol.json_seeds()[-3:]]
    seeds = []
    for request in decoded:
        plain = Decoded(InferRequest(request.request.inputs), binary=True)
        answer = encode_response(InferResponse("m", "1", request.request.inputs), plain, 1 << 20)
        head = response_head(answer, keep_alive=True, minor=1)
        seeds.append(b"".join([head, *(bytes(part) for part in answer.parts)]))
    error = b'{"error":"no","hint":"look"}'
    seeds.append(b"HTTP/1.1 404 Not Found\r\nContent-Length: 28\r\nConnection: close\r\n\r\n" + error)
    seeds.append(_OK + b'Transfer-Encoding: chunked\r\n\r\n5\r\n{"a":\r\n3\r\n1}\n\r\n0\r\n\r\n')
    return seeds


ANSWER_SHAPES = {
    "times": many(b"1,", b'{"times":[', b"1]}"),
    "depth": many(b"[", b'{"a":'),
    "tensors": many(b"{},", b'{"inputs":[', b"{}]}"),
    "text": many(b"\\n", b'{"note":"', b'"}'),
}

REPLY_SHAPES = {
    "chunks": many(b"2\r\na\n\r\n", _OK + b"Transfer-Encoding: chunked\r\n\r\n", b"0\r\n\r\n"),
    "fields": many(b"a: b\r\n", _OK, b"\r\n"),
    "body": lambda size: _OK + b"Content-Length: %d\r\n\r\n" % size + bytes(size),
}
TARGETS = (
    Target(
        "trial-answer", read_answer, holds_answer, (), lambda: ANSWER_SEEDS, "trial-answer", ANSWER_SHAPES,
        memory=Memory(1 << 20, 200),
    ),
    Target(
        "client-reply", read_reply, holds_reply, (AgentError, exchange.NotTaken), reply_seeds, "client-reply",
        REPLY_SHAPES, memory=Memory(exchange.MAX_ANSWER_BYTES + (4 << 20), 64),
    ),
)  # fmt: skip
