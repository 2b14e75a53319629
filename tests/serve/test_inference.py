"""Each route of ``infer.sock`` as an outsider sees it, with the protocol's statuses; and who may see which model."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from agent.serve.access import ModelRule, ModelRules, Peer
from agent.serve.inference import Inference
from agent.serve.limits import Limits
from agent.serve.routes import RouteTable
from agent.serve.server import Server
from tests.serve.running import Running, ask, get, post
from tests.serve.toy import NAMES, ToyModels

Served = tuple[Running, ToyModels]

REQUEST = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [1, 2, 3, 4]}]}


def said(path: Path, data: bytes) -> tuple[int, Any]:
    """Status and JSON of an answer."""
    status, body, _ = ask(path, data)
    return status, json.loads(body) if body else None


def infer(path: Path, model: str = "double", document: Any = REQUEST, version: str = "") -> tuple[int, Any]:
    """Status and JSON of an inference."""
    rest = f"/versions/{version}" if version else ""
    return said(path, post(f"/v2/models/{model}{rest}/infer", json.dumps(document).encode()))


def test_server_metadata_and_health(served: Served) -> None:
    running, models = served
    assert said(running.path, get("/v2"))[1]["extensions"] == ["binary_tensor_data"]
    assert said(running.path, get("/v2/health/live")) == (200, None)
    assert said(running.path, get("/v2/health/ready")) == (200, None)
    models.is_ready = False
    assert said(running.path, get("/v2/health/live"))[0] == 200
    assert said(running.path, get("/v2/health/ready"))[0] == 400  # the protocol: 4xx means no


@pytest.mark.parametrize("version", ["", "/versions/1.0.0"])
def test_model_metadata_readiness_and_statistics(served: Served, version: str) -> None:
    path = served[0].path
    status, metadata = said(path, get(f"/v2/models/double{version}"))
    assert (status, metadata["name"], metadata["inputs"][0]["shape"]) == (200, "double", [-1, 4])
    assert said(path, get(f"/v2/models/double{version}/ready")) == (200, {"name": "double", "ready": True})
    assert said(path, get(f"/v2/models/loading{version}/ready")) == (400, {"name": "loading", "ready": False})
    status, statistics = said(path, get(f"/v2/models/double{version}/stats"))
    assert (status, statistics["model_stats"][0]["inference_count"]) == (200, 0)


def test_the_repository_index(served: Served) -> None:
    path = served[0].path
    status, entries = said(path, post("/v2/repository/index", b""))
    assert status == 200
    assert {entry["name"] for entry in entries} == set(NAMES)
    assert set(entries[0]) == {"name", "version", "state", "reason"}
    _, ready = said(path, post("/v2/repository/index", b'{"ready":true}'))
    assert {entry["name"] for entry in entries} - {entry["name"] for entry in ready} == {"loading"}
    assert said(path, post("/v2/repository/index", b'{"ready":1}'))[0] == 400
    assert said(path, post("/v2/repository/index", b"[1]"))[0] == 400
    without_length = b"POST /v2/repository/index HTTP/1.1\r\nHost: x\r\n\r\n"  # as curl -X POST sends it
    assert said(path, without_length)[0] == 200


def test_inference_says_what_ran(served: Served) -> None:
    status, document = infer(served[0].path, document=REQUEST | {"id": "abc"})
    assert status == 200
    assert (document["model_name"], document["model_version"], document["id"]) == ("double", "1.0.0", "abc")
    assert document["parameters"]["variant"] == "fp32"
    assert document["parameters"]["degraded"] is False
    assert document["outputs"][0] == {"name": "y", "datatype": "FP32", "shape": [1, 4], "data": [2, 4, 6, 8]}
    assert infer(served[0].path, version="1.0.0")[0] == 200


@pytest.mark.parametrize(
    ("model", "status"),
    [("nope", 404), ("full", 429), ("late", 504), ("damaged", 503), ("broken", 500), ("double/versions/9", 404)],
)
def test_what_a_model_raises_has_its_status(served: Served, model: str, status: int) -> None:
    got, document = infer(served[0].path, model)
    assert got == status
    assert isinstance(document["error"], str)


def test_the_mend_comes_along(served: Served) -> None:
    assert infer(served[0].path, "damaged")[1]["hint"] == "edge-agent store verify"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"inputs": []}, "inputs"),
        ({"inputs": [REQUEST["inputs"][0] | {"shape": [4, 4]}]}, "input 'x'"),
        ({"inputs": [REQUEST["inputs"][0] | {"name": "z"}]}, "input 'x'"),
        ({"inputs": [REQUEST["inputs"][0] | {"datatype": "FP31"}]}, "input 'x'"),
        ({"outputs": [{"name": "q"}]}, "output 'q'"),
        ({"parameters": {"timeout": -1}}, "timeout"),
        ({"parameters": {"timeout": 1.5}}, "timeout"),
        ({"parameters": {"priority": "high"}}, "priority"),
    ],
)
def test_a_wrong_request_is_told_the_field(served: Served, change: dict[str, Any], words: str) -> None:
    status, document = infer(served[0].path, document=REQUEST | change)
    assert status == 400
    assert words in document["error"]


@pytest.mark.parametrize("length", ["-1", "+1", "1e3", "", "0", "99999999999999999999"])
def test_a_wrong_header_length_is_refused(served: Served, length: str) -> None:
    body = json.dumps(REQUEST).encode()
    request = post("/v2/models/double/infer", body, f"Inference-Header-Content-Length: {length}")
    status, document = said(served[0].path, request)
    assert status == 400
    assert "inference-header-content-length" in document["error"].lower()


def test_classification_over_the_socket(served: Served) -> None:
    wanted = REQUEST | {"outputs": [{"name": "y", "parameters": {"classification": 2}}]}
    output = infer(served[0].path, "soft", wanted)[1]["outputs"][0]
    assert (output["datatype"], output["shape"]) == ("BYTES", [1, 2])
    assert output["data"] == ["0.700000:1", "0.200000:2"]


def test_statistics_count_and_time(served: Served) -> None:
    path = served[0].path
    for _ in range(3):
        infer(path)
    infer(path, document={})
    infer(path, "nope")
    _, everything = said(path, get("/v2/models/stats"))
    by_name = {entry["name"]: entry for entry in everything["model_stats"]}
    assert set(by_name) == set(NAMES)
    double = by_name["double"]
    assert double["inference_count"] == 3
    assert double["inference_stats"]["success"]["count"] == 3
    assert double["inference_stats"]["queue"] == {"count": 3, "ns": 9000}
    assert double["inference_stats"]["compute_infer"] == {"count": 3, "ns": 15000}
    assert double["last_inference"] > 1_600_000_000_000
    _, metrics, _ = ask(path, get("/metrics"))
    text = metrics.decode()
    assert 'edge_agent_infer_requests_total{model="double",version="1.0.0",status="200"} 3' in text
    assert re.search(r'edge_agent_infer_requests_total\{model="double",version="[^"]*",status="400"\} 1\n', text)
    assert 'duration_seconds_count{model="double",version="1.0.0"} 3' in text
    assert "nope" not in text
    for line in text.splitlines():  # each line is one that a scraper can read
        assert re.fullmatch(r'# TYPE \w+ (counter|gauge|histogram)|\w+(\{(\w+="[^"]*",?)*\})? [0-9.e+-]+', line), line


# Who may see what.

CAMERA = Peer(1000, 1000, frozenset((1000,)), 1)
VISION = Peer(1001, 1001, frozenset((1001, 500)), 2)
ROOT = Peer(0, 0, frozenset((0,)), 3)
RULES = ModelRules({"double": ModelRule(uids=frozenset((1000,)), gids=frozenset((500,))), "echo": ModelRule()})


def as_peer(short_dir: Path, peer: Peer, rules: ModelRules) -> Running:
    """A server that takes everybody for ``peer``."""
    limits = Limits()
    table = RouteTable(Inference(ToyModels(), limits=limits, rules=rules).routes())
    return Running(lambda: Server(table, limits, peer=lambda _sock: peer), short_dir / "s")


@pytest.mark.parametrize(
    ("peer", "double", "echo", "soft"), [(CAMERA, 200, 403, 200), (VISION, 200, 403, 200), (ROOT, 200, 200, 200)]
)
def test_rules_by_user_and_group(short_dir: Path, peer: Peer, double: int, echo: int, soft: int) -> None:
    with as_peer(short_dir, peer, RULES) as running:
        assert [infer(running.path, name)[0] for name in ("double", "echo", "soft")] == [double, echo, soft]


def test_a_closed_name_and_an_unknown_one_look_the_same(short_dir: Path) -> None:
    with as_peer(short_dir, CAMERA, RULES) as running:
        for kind in ("", "/ready", "/stats", "/versions/1.0.0", "/versions/9"):
            closed = ask(running.path, get(f"/v2/models/echo{kind}"))
            unknown = ask(running.path, get(f"/v2/models/nope{kind}"))
            assert closed[0] == unknown[0] == 403
            assert closed[1].replace(b"echo", b"nope") == unknown[1]
        assert infer(running.path, "echo")[0] == infer(running.path, "nope")[0] == 403
    with as_peer(short_dir, ROOT, RULES) as running:
        assert infer(running.path, "nope")[0] == 404


def test_lists_show_only_what_is_open(short_dir: Path) -> None:
    deny = ModelRules({"double": ModelRule(uids=frozenset((1000,)))}, default=ModelRule())
    with as_peer(short_dir, ROOT, deny) as running:
        infer(running.path, "echo")
        assert len(said(running.path, post("/v2/repository/index", b""))[1]) == len(NAMES)
    with as_peer(short_dir, CAMERA, deny) as running:
        infer(running.path, "double")
        infer(running.path, "echo")
        assert [entry["name"] for entry in said(running.path, post("/v2/repository/index", b""))[1]] == ["double"]
        assert [entry["name"] for entry in said(running.path, get("/v2/models/stats"))[1]["model_stats"]] == ["double"]
        assert b"echo" not in ask(running.path, get("/metrics"))[1]


def test_a_body_is_not_taken_from_who_may_not_use_the_model(short_dir: Path) -> None:
    head = b"POST /v2/models/echo/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 50000000\r\n\r\n"
    with as_peer(short_dir, CAMERA, RULES) as running:
        status, _, closed = ask(running.path, head)
        assert (status, closed) == (403, True)


# Cost.


def test_a_daemon_that_only_answers_questions_loads_no_numpy() -> None:
    code = """
import sys
from agent.client import AdminClient, AsyncClient, Client
from agent.serve.admin import admin_server
from agent.serve.inference import Inference
from agent.serve.server import Server
assert "numpy" not in sys.modules and "pydantic" not in sys.modules, sorted(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_every_row_is_reachable_and_has_the_right_of_its_socket() -> None:
    table = RouteTable(Inference(ToyModels(), limits=Limits()).routes())
    for route in table.routes:
        target = route.pattern.replace("{model}", "double").replace("{version}", "1.0.0")
        assert table.match(route.method, target).route is route
        assert route.right == "infer"


# The repository: models are loaded and let go of by name, and never come with a request.


def test_loading_and_unloading_by_the_repository(served: Served) -> None:
    running, models = served
    path = running.path
    body = b'{"parameters":{"pin":true,"keep_alive":60}}'
    assert said(path, post("/v2/repository/models/double/load", body))[0] == 200
    assert models.loads == [("double", {"pin": True, "keep_alive": 60})]
    assert said(path, post("/v2/repository/models/double/load", b""))[0] == 200
    body = b'{"parameters":{"unload_dependents":false}}'
    assert said(path, post("/v2/repository/models/double/unload", body))[0] == 200
    assert models.unloads == ["double"]
    assert said(path, post("/v2/repository/models/nope/load", b""))[0] == 404
    assert said(path, post("/v2/repository/models/nope/unload", b""))[0] == 404
    assert said(path, post("/v2/repository/models/full/load", b""))[0] == 503
    assert said(path, post("/v2/repository/models/double/load", b'{"parameters":[]}'))[0] == 400


@pytest.mark.parametrize("name", ["config", "file:1/model.onnx", "file:"])
def test_no_file_comes_with_a_load(served: Served, name: str) -> None:
    running, models = served
    body = json.dumps({"parameters": {name: "AAAA"}}).encode()
    status, answer = said(running.path, post("/v2/repository/models/double/load", body))
    assert status == 403
    assert "files do not come with a request" in answer["error"]
    assert not models.loads


def test_nobody_loads_or_unloads_what_is_closed_to_him(short_dir: Path) -> None:
    with as_peer(short_dir, CAMERA, RULES) as running:
        for what in ("load", "unload"):
            assert said(running.path, post(f"/v2/repository/models/echo/{what}", b""))[0] == 403
            assert said(running.path, post(f"/v2/repository/models/nope/{what}", b""))[0] == 403
