"""Long tensors that become text or must be sorted: done in a thread, since the loop belongs to all callers."""

from __future__ import annotations

import json
import socket
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agent.base.errors import TooLargeError
from agent.infer.tensors import Tensor
from agent.serve.oip import classify
from tests.serve.running import answer, ask, connect, get, post, serving


def echo(count: int, **output: Any) -> bytes:
    """A request to ``echo`` with ``count`` random floats as binary data."""
    x = np.random.default_rng(1).random(count, dtype=np.float32).tobytes()
    document = {
        "inputs": [{"name": "x", "datatype": "FP32", "shape": [count], "parameters": {"binary_data_size": len(x)}}],
        "outputs": [{"name": "x", "parameters": output}],
    }
    head = json.dumps(document).encode()
    return post("/v2/models/echo/infer", head + x, f"Inference-Header-Content-Length: {len(head)}")


def as_json(count: int) -> bytes:
    inputs = [{"name": "x", "datatype": "FP32", "shape": [count], "data": [1.5] * count}]
    return post("/v2/models/echo/infer", json.dumps({"inputs": inputs}).encode())


@pytest.mark.parametrize("output", [{"classification": 5}, {"classification": 20_000}, {}])
def test_others_are_answered_while_a_long_tensor_is_sorted_or_written(tmp_path: Path, output: dict[str, Any]) -> None:
    path = tmp_path / "s"
    with serving(path)[0]:
        for _ in range(5):  # on a busy machine it may be over before anybody else has his turn
            with connect(path) as long:
                long.sendall(echo(4_000_000 if output else 400_000, **output))
                if asked_during(path, long) >= 3:
                    return
    pytest.fail("nobody was answered meanwhile")


def asked_during(path: Path, long: socket.socket) -> int:
    """How many others were answered before ``long`` was."""
    over = threading.Event()
    said: list[int] = []

    def wait() -> None:
        said.append(answer(long)[0])
        over.set()

    waiting = threading.Thread(target=wait)
    waiting.start()
    during = 0
    while not over.is_set():
        assert ask(path, get("/v2/health/live"))[0] == 200
        during += not over.is_set()
    waiting.join()
    assert said == [200]
    return during


def test_a_long_json_body_says_the_same_as_a_short_one(tmp_path: Path) -> None:
    with serving(tmp_path / "s")[0]:
        for count in (3, 30_000):
            status, body, _ = ask(tmp_path / "s", as_json(count))
            assert status == 200
            assert json.loads(body)["outputs"][0]["data"] == [1.5] * count
        broken = as_json(30_000).replace(b"1.5, 1.5]", b"1.5, tru]")
        assert ask(tmp_path / "s", broken)[0] == 400


def test_the_best_of_a_long_axis_are_those_that_sorting_finds() -> None:
    scores = np.random.default_rng(2).random((2, 200_000)).astype("<f4")
    best = classify(Tensor("y", "FP32", scores), 7, []).array
    wanted = np.argsort(-scores, axis=-1)[:, :7]
    assert [[int(text.split(b":")[1]) for text in row] for row in best.tolist()] == wanted.tolist()


def test_more_classes_than_an_answer_may_hold_are_refused() -> None:
    with pytest.raises(TooLargeError, match="classification would give more than 1000"):
        classify(Tensor("y", "FP32", np.zeros((11, 100), "<f4")), 100, [], 1000)
