"""The OpenAPI document of the admin API: valid, complete, and what a real daemon answers is what it says."""

from __future__ import annotations

import json
import os
import socket
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator
from openapi_spec_validator import validate

from agent.client.blocking import Lines
from agent.client.exchange import Answer, request
from agent.core.admin_api import AdminApi, Documents
from agent.core.cache_api import CacheApi
from tests import onnx_models
from tests.core.conftest import ROOT, Agent

DOCUMENT: dict[str, Any] = yaml.safe_load((ROOT / "docs" / "reference" / "admin-api.yaml").read_text(encoding="utf-8"))
JSON = "application/json"


def whole(part: Any) -> Any:
    """A part of the document with every reference replaced by what it refers to; there are no circles."""
    if isinstance(part, list):
        return [whole(item) for item in part]
    if not isinstance(part, dict):
        return part
    if "$ref" in part:
        target: Any = DOCUMENT
        for word in part["$ref"].removeprefix("#/").split("/"):
            target = target[word]
        return whole(target)
    return {key: whole(value) for key, value in part.items()}


OPERATIONS: dict[tuple[str, str], dict[str, Any]] = {
    (method.upper(), path): whole(operation)
    for path, item in DOCUMENT["paths"].items()
    for method, operation in item.items()
    if method != "parameters"
}


def test_the_document_is_valid() -> None:
    validate(DOCUMENT)


def test_the_document_has_each_row_of_the_table_with_its_right() -> None:
    nothing: Any = None  # the table is made without calling anything
    table = {
        (row.method, row.pattern): row.right
        for row in [
            *AdminApi(*[nothing] * 4, Documents(nothing, nothing, nothing, nothing), nothing, nothing).routes(),
            *CacheApi(*[nothing] * 4).routes(),
        ]
    }
    assert {key: operation["x-right"] for key, operation in OPERATIONS.items()} == table


class Caller:
    """Asks a daemon, and holds each request and each answer against the document."""

    def __init__(self, agent: Agent) -> None:
        self._lines = Lines(agent.run / "admin.sock", 120)
        self.asked: set[tuple[str, str]] = set()

    def ask(self, method: str, path: str, body: Any = None, *, files: tuple[int, ...] = (), **params: str) -> Any:
        """The document of the answer. ``path`` is the row's, with ``{name}`` filled from ``params``."""
        row, _, query = path.partition("?")
        operation = OPERATIONS[method, row]
        if body is not None:
            Draft202012Validator(operation["requestBody"]["content"][JSON]["schema"]).validate(body)
        target = row.format(**params) + (f"?{query}" if query else "")
        answer = self.send(method, target, body, files)
        schema = operation["responses"][str(answer.status)]["content"][JSON]["schema"]
        document = json.loads(bytes(answer.body))
        Draft202012Validator(schema, format_checker=Draft202012Validator.FORMAT_CHECKER).validate(document)
        self.asked.add((method, row))
        return document

    def send(self, method: str, target: str, body: Any = None, files: tuple[int, ...] = ()) -> Answer:
        parts = [] if body is None else [json.dumps(body).encode()]
        return self._lines.call(request(method, target, parts, {"Content-Type": JSON}), descriptors=files)

    def close(self) -> None:
        self._lines.close()


@pytest.fixture
def caller(running: Agent):
    person = Caller(running)
    yield person
    person.close()


@pytest.fixture
def model_file(short_dir):
    """An open model file."""
    path = short_dir / "linear.onnx"
    path.write_bytes(onnx_models.linear())
    descriptor = os.open(path, os.O_RDONLY)
    yield descriptor
    os.close(descriptor)


def test_a_daemon_answers_what_the_document_says(caller: Caller, model_file: int) -> None:
    ask = caller.ask
    ask("GET", "/v1/status")
    added = ask("POST", "/v1/models", {"file_name": "linear.onnx", "shapes": {"x": [1, 16]}}, files=(model_file,))
    name, version = added["model"], added["version"]
    assert ask("POST", "/v1/models", {"file_name": "linear.onnx"}, files=(model_file,))["unchanged"]
    assert [row["name"] for row in ask("GET", "/v1/models")["models"]] == [name]
    assert version in ask("GET", "/v1/models/{name}", name=name)["versions"]
    ask("POST", "/v1/models/{name}/activate", {"version": version}, name=name)
    assert "no previous version" in ask("POST", "/v1/models/{name}/rollback", name=name)["error"]
    ask("POST", "/v1/models/{name}/try", {}, name=name)
    ask("POST", "/v1/models/{name}/verify", name=name)
    assert ask("GET", "/v1/cache") == {"caches": []}
    assert ask("POST", "/v1/cache/clear", {}) == {"cleared": 0}
    ask("GET", "/v1/store")
    assert ask("POST", "/v1/store/verify")["ok"]
    ask("POST", "/v1/store/gc")
    ask("POST", "/v1/store/rotate-key", {"to_file": True})
    assert ask("GET", "/v1/jobs") == {"jobs": []}
    assert "no fleet" in ask("GET", "/v1/jobs/{id}", id="x")["error"]
    assert "no fleet" in ask("POST", "/v1/jobs/reset")["error"]
    assert [row["ok"] for row in ask("POST", "/v1/maintenance", {"run": ["disk"]})["tasks"]] == [True]
    assert {row["task"] for row in ask("GET", "/v1/maintenance")["tasks"]} > {"scrub", "disk"}
    assert {row["level"] for row in ask("GET", "/v1/doctor")["findings"]} <= {"ok", "note", "warning"}
    assert ask("GET", "/v1/status")["loaded"]
    assert "no version" in ask("DELETE", "/v1/models/{name}?version=9", name=name)["error"]
    assert ask("DELETE", "/v1/models/{name}", name=name)["freed_bytes"] > 0
    assert "no such model" in ask("GET", "/v1/models/{name}", name=name)["error"]
    assert caller.asked == set(OPERATIONS), "each operation is asked at least once"


def test_what_the_document_forbids_is_refused(caller: Caller, model_file: int) -> None:
    for body in ({"colour": 1}, {"name": 1}, {"shapes": {"x": "1,16"}}, {"shapes": {"x": [-1]}}):
        schema = OPERATIONS["POST", "/v1/models"]["requestBody"]["content"][JSON]["schema"]
        assert not Draft202012Validator(schema).is_valid(body)
        assert caller.send("POST", "/v1/models", body, (model_file,)).status == 400, body
    assert "1 descriptors wanted, 0 came" in caller.ask("POST", "/v1/models", {})["error"]
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert "neither a file nor a pipe" in caller.ask("POST", "/v1/models", {}, files=(ours.fileno(),))["error"]
