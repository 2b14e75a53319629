"""The request zoo against a real daemon: each bad request gets its status, the next good one its answer."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import struct
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from tests import onnx_models
from tests.core.conftest import Agent
from tests.core.test_daemon import X, linear_file, reference

GOOD = reference(onnx_models.linear())


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """One daemon for all: nothing that a request does may make it worse for the next."""
    folder = Path(tempfile.mkdtemp(prefix="ea-", dir="/tmp"))
    device = Agent(folder)
    device.config.write_text("[server]\ndeadline_s = 2\nmax_body_mb = 8\nconnections_per_uid = 64\n")
    device.start()
    try:
        device.cli("models", "add", linear_file(folder), "--name", "m")
        yield device
        assert device.stop() == 0
        assert "Traceback" not in device.log.read_text()
    finally:
        if device.process is not None:
            device.process.kill()
            device.process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def connect(device, timeout=20):
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(timeout)
    sock.connect(str(device.run / "infer.sock"))
    return sock


def exchange(device, data):
    """Status and body of the answer to raw bytes; (0, b"") when the daemon just closes."""
    with connect(device) as sock:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            sock.sendall(data)
        answer = b""
        with contextlib.suppress(ConnectionResetError):
            while part := sock.recv(65536):
                answer += part
                head, mark, body = answer.partition(b"\r\n\r\n")
                if mark and f"content-length: {len(body)}".encode() in head.lower():
                    break
    if not answer:
        return 0, b""
    return int(answer.split(b" ", 2)[1]), answer.partition(b"\r\n\r\n")[2]


def infer(document, *headers, path="/v2/models/m/infer", tail=b""):
    body = (document if isinstance(document, bytes) else json.dumps(document).encode()) + tail
    lines = [f"POST {path} HTTP/1.1", "Host: x", f"Content-Length: {len(body)}", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


def tensor(**changes):
    return {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 16], "data": X[0].tolist(), **changes}]}


def binary(size, shape=(1, 16), length=None, data=b""):
    document = {
        "inputs": [{"name": "x", "datatype": "FP32", "shape": list(shape), "parameters": {"binary_data_size": size}}]
    }
    head = json.dumps(document).encode()
    return infer(head, f"Inference-Header-Content-Length: {len(head) if length is None else length}", tail=data)


def chunked(data):
    return b"POST /v2/models/m/infer HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n" + data


def check_good(device):
    status, body = exchange(device, infer(tensor()))
    assert status == 200, body
    np.testing.assert_allclose(json.loads(body)["outputs"][0]["data"], GOOD[0], rtol=1e-4)


ZOO = {
    "wrong shape": (infer(tensor(shape=[2, 8])), 400, "shape"),
    "wrong rank": (infer(tensor(shape=[16])), 400, "shape"),
    "too few numbers": (infer(tensor(data=[1, 2])), 400, "x"),
    "negative axis": (infer(tensor(shape=[-1, 16])), 400, "shape"),
    "huge axis": (infer(tensor(shape=[1 << 62, 16])), 400, "shape"),
    "axes that overflow": (infer(tensor(shape=[1 << 32, 1 << 32])), 400, "shape"),
    "shape is no list": (infer(tensor(shape="big")), 400, "shape"),
    "wrong datatype": (infer(tensor(datatype="INT64", data=[1] * 16)), 400, "datatype"),
    "unknown datatype": (infer(tensor(datatype="FP12")), 400, "datatype"),
    "wrong name": (infer(tensor(name="z")), 400, "z"),
    "no name": (infer({"inputs": [{"datatype": "FP32", "shape": [1], "data": [1]}]}), 400, "name"),
    "no inputs": (infer({"inputs": []}), 400, "input"),
    "one too many": (infer({"inputs": [*tensor()["inputs"], *tensor(name="extra")["inputs"]]}), 400, "extra"),
    "given twice": (infer({"inputs": tensor()["inputs"] * 2}), 400, "x"),
    "inputs is no list": (infer({"inputs": 7}), 400, "inputs"),
    "text for a number": (infer(tensor(data=["one"] * 16)), 400, "x"),
    "NaN": (infer(json.dumps(tensor(data=[float("nan")] * 16)).encode()), 400, "NaN"),
    "Infinity": (infer(json.dumps(tensor(data=[float("inf")] * 16)).encode()), 400, "Infinity"),
    "unknown output": (infer({**tensor(), "outputs": [{"name": "nope"}]}), 400, "nope"),
    "not JSON": (infer(b"hello"), 400, "JSON"),
    "not UTF-8": (infer(b'{"id": "\xff"}'), 400, "UTF-8"),
    "nested 100,000 deep": (infer(b"[" * 100_000), 400, "nested"),
    "objects nested 100,000 deep": (infer(b'{"a":' * 100_000), 400, "nested"),
    "data nested 100,000 deep": (
        infer(json.dumps(tensor(data="?")).encode().partition(b'"?"')[0] + b"[" * 100_000), 400, "nested",
    ),
    "1e400": (infer(json.dumps(tensor()).replace("15.0", "1e400").encode()), 400, ""),
    "empty body": (infer(b""), 400, ""),
    "a number of 5,000 digits": (infer(b'{"inputs": [{"data": [' + b"9" * 5000 + b"]}]}"), 400, ""),
    "binary size lies high": (binary(1 << 40, data=X.tobytes()), 400, "binary_data_size"),
    "binary size negative": (binary(-64, data=X.tobytes()), 400, "binary_data_size"),
    "binary size too small": (binary(60, data=X.tobytes()), 400, "x"),
    "bytes left over": (binary(64, data=X.tobytes() + b"more"), 400, "left over"),
    "header length beyond the body": (binary(64, length=1 << 30, data=X.tobytes()), 400, "ength"),
    "header length is no number": (infer(tensor(), "Inference-Header-Content-Length: many"), 400, "ength"),
    "negative timeout": (infer({**tensor(), "parameters": {"timeout": -1}}), 400, "timeout"),
    "unknown model": (infer(tensor(), path="/v2/models/other/infer"), 404, "other"),
    "unknown version": (infer(tensor(), path="/v2/models/m/versions/9/infer"), 404, "9"),
    "unknown path": (b"GET /nope HTTP/1.1\r\nHost: x\r\n\r\n", 404, ""),
    "wrong method": (b"DELETE /v2/models/m HTTP/1.1\r\nHost: x\r\n\r\n", 405, ""),
    "negative content length": (b"POST /v2/models/m/infer HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n", 400, ""),
    "content length of 40 digits": (
        b"POST /v2/models/m/infer HTTP/1.1\r\nHost: x\r\nContent-Length: " + b"9" * 40 + b"\r\n\r\n", 413, "",
    ),
    "two content lengths": (infer(tensor(), "Content-Length: 3"), 400, ""),
    "chunked with a length": (infer(tensor(), "Transfer-Encoding: chunked"), 400, ""),
    "bad chunk": (chunked(b"zz\r\n"), 400, "chunk"),
    "negative chunk": (chunked(b"-4\r\nWiki\r\n"), 400, "chunk"),
    "huge chunk": (chunked(b"FFFFFFFFFFFFFFFFFF\r\n"), 413, ""),
    "chunk that is longer than it says": (chunked(b"4\r\nWikipedia\r\n"), 400, "chunk"),
    "chunk without an end": (chunked(b"4;" + b"x" * 100_000), 400, "chunk"),
    "chunks beyond the limit": (chunked((b"100000\r\n" + b" " * (1 << 20) + b"\r\n") * 9), 413, ""),
    "chunks of a byte": (chunked(b"1\r\n{\r\n" * 200_000), 400, "chunks"),
    "1 GB announced": (b"POST /v2/models/m/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 1073741824\r\n\r\n", 413, ""),
    "10 MB of headers": (b"GET /v2 HTTP/1.1\r\nHost: x\r\n" + b"A: " + b"b" * 10_000_000 + b"\r\n\r\n", 431, ""),
    "thousands of headers": (b"GET /v2 HTTP/1.1\r\nHost: x\r\n" + b"A: b\r\n" * 2_000 + b"\r\n", 431, ""),
    "no HTTP": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400, ""),
    "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505, ""),
    "no length": (b"POST /v2/models/m/infer HTTP/1.1\r\nHost: x\r\n\r\n", 411, "length"),
}  # fmt: skip


@pytest.mark.parametrize("name", ZOO)
def test_each_bad_request_gets_its_status_and_the_next_good_one_its_answer(served, name):
    data, status, text = ZOO[name]
    got, body = exchange(served, data)
    assert got == status, body[:500]
    document = json.loads(body)
    assert text.lower() in document["error"].lower(), document
    check_good(served)


@pytest.mark.parametrize(
    ("first", "slowly"),
    [
        (b"", b"POST /v2/models/m/infer HTTP/1.1\r\n"),
        (b"POST /v2/models/m/infer HTTP/1.1\r\nHost: x\r\n", b"Accept: application/json, text/plain"),
        (infer(b"")[:-5] + b"900\r\n\r\n", b'{"inputs": [{"name": "x", "datatype": "FP32"'),
        (chunked(b""), b"2d;a-long-extension-of-a-chunk=and-its-value"),
        (chunked(b"400\r\n"), b'{"inputs": [{"name": "x", "datatype": "FP32"'),
    ],
    ids=["request line", "headers", "body", "chunk's head", "chunk"],
)
def test_one_byte_a_second_is_cut_at_the_deadline(served, first, slowly):
    with connect(served) as sock:
        start = time.monotonic()
        answer = b""
        sock.sendall(first)
        for byte in slowly:
            with contextlib.suppress(OSError):
                sock.sendall(bytes([byte]))
            sock.settimeout(0.3)
            with contextlib.suppress(TimeoutError):
                answer = sock.recv(4096)
                break
        assert b" 408 " in answer
        assert time.monotonic() - start < 10
    check_good(served)


def test_a_body_that_stops_half_way_is_cut_and_others_are_served_meanwhile(served):
    with connect(served) as sock:
        sock.sendall(infer(tensor())[:-20])
        check_good(served)
        assert b" 408 " in sock.recv(4096)
    check_good(served)


def test_two_thousand_connections_of_one_user_do_not_starve_the_daemon(served):
    held = []
    try:
        for _ in range(2000):
            sock = socket.socket(socket.AF_UNIX)
            sock.settimeout(5)
            try:
                sock.connect(str(served.run / "infer.sock"))
            except OSError:
                sock.close()
                break
            held.append(sock)
        status, _ = exchange(served, infer(tensor()))
        assert status in (0, 503)  # this user has had its share
    finally:
        for sock in held:
            sock.close()
    deadline = time.monotonic() + 10
    while exchange(served, b"GET /v2/health/ready HTTP/1.1\r\nHost: x\r\n\r\n")[0] != 200:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    check_good(served)


def test_a_peer_that_never_reads_its_answers_is_cut_and_memory_stays_flat(served):
    process = psutil.Process(served.process.pid)
    before = process.memory_info().rss
    request = infer(tensor())
    socks = [connect(served, timeout=1) for _ in range(20)]
    for sock in socks:
        with contextlib.suppress(OSError):
            for _ in range(2000):
                sock.sendall(request)
    check_good(served)
    for sock in socks:
        sock.close()
    assert process.memory_info().rss - before < 40 << 20


def test_memory_stays_flat_over_the_whole_zoo(served):
    process = psutil.Process(served.process.pid)
    for _ in range(3):
        for data, _, _ in ZOO.values():
            exchange(served, data)
    before = process.memory_info().rss
    for _ in range(10):
        for data, _, _ in ZOO.values():
            exchange(served, data)
    assert process.memory_info().rss - before < 8 << 20


def test_hang_ups_at_every_point_of_a_request_do_no_harm(served):
    request = infer(tensor())
    for cut in range(0, len(request), 7):
        with connect(served) as sock:
            sock.sendall(request[:cut])
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    check_good(served)


def test_many_clients_get_their_own_answers(served):
    wrong = []

    def ask(seed):
        generator = np.random.default_rng(seed)
        with served.client() as client:
            for _ in range(50):
                x = generator.standard_normal((int(generator.integers(1, 9)), 16)).astype(np.float32)
                expected = reference(onnx_models.linear(), x)
                if not np.allclose(client.infer("m", {"x": x})["y"], expected, rtol=1e-4, atol=1e-5):
                    wrong.append(seed)

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
