"""Reading what is handed in: pipes that say nothing, names that are none."""

from __future__ import annotations

import io
import os
import threading

import pytest

from agent.base.errors import PeerError, TryLaterError
from agent.bundles.archive import write
from agent.operations.incoming import contents, opened
from tests import onnx_models
from tests.store.conftest import manifest


@pytest.fixture
def pipe():
    reading, writing = os.pipe()
    held = {"reading": reading, "writing": writing}
    yield held
    for descriptor in held.values():
        if descriptor is not None:
            os.close(descriptor)


def going_on():
    """Nothing speaks against going on."""


def bundle() -> bytes:
    files = {"a.onnx": onnx_models.linear()}
    stream = io.BytesIO()
    write(manifest("m", "1.0.0", files), files, stream)
    return stream.getvalue()


def write_and_close(pipe, *parts):
    """In a thread: a pipe holds 64 KiB."""
    descriptor, pipe["writing"] = pipe["writing"], None

    def work():
        with os.fdopen(descriptor, "wb", buffering=0) as stream:
            for part in parts:
                stream.write(part)

    thread = threading.Thread(target=work)
    thread.start()
    return thread


def test_a_bundle_comes_through_a_pipe_in_pieces(pipe):
    data = bundle()
    thread = write_and_close(pipe, data[:700], data[700:])
    with opened(pipe["reading"], going_on) as stream:
        described, files = contents(stream)
        assert described.name == "m"
        assert [(ref.name, b"".join(chunks)) for ref, chunks in files] == [("a.onnx", onnx_models.linear())]
    thread.join()
    os.fstat(pipe["reading"])  # still the caller's own


def test_a_pipe_that_gives_nothing_is_given_up(pipe):
    with (
        opened(pipe["reading"], going_on, idle_s=0.3) as stream,
        pytest.raises(PeerError, match=r"nothing came .* 0\.3 s"),
    ):
        contents(stream)


def test_waiting_for_a_pipe_ends_when_there_is_no_going_on(pipe):
    def stopping():
        raise TryLaterError("the agent is stopping")

    os.write(pipe["writing"], bundle()[:512])
    with opened(pipe["reading"], stopping) as stream, pytest.raises(TryLaterError):
        contents(stream)


def test_a_pipe_that_ends_too_early_is_a_cut_bundle(pipe):
    write_and_close(pipe, bundle()[:900]).join()
    with opened(pipe["reading"], going_on) as stream, pytest.raises(PeerError):
        contents(stream)


@pytest.mark.parametrize("name", ["Big", "", "a b", "../up", "x" * 65])
def test_a_name_that_is_none_is_the_callers_error(tmp_path, name):
    path = tmp_path / "m.edgemodel"
    path.write_bytes(bundle())
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with opened(descriptor, going_on) as stream, pytest.raises(PeerError, match="cannot be its name"):
            contents(stream, name=name)
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("flags", [os.O_WRONLY, os.O_PATH])
def test_a_descriptor_that_cannot_be_read_is_the_callers_error(tmp_path, flags):
    path = tmp_path / "m.onnx"
    path.write_bytes(onnx_models.linear())
    descriptor = os.open(path, flags)
    try:
        with pytest.raises(PeerError, match="not open for reading"):
            opened(descriptor, going_on)
    finally:
        os.close(descriptor)


def test_a_file_system_that_fails_is_the_callers_error():
    descriptor = os.open("/proc/self/mem", os.O_RDONLY)  # reading address 0 is EIO
    try:
        with opened(descriptor, going_on) as stream, pytest.raises(PeerError, match="Input/output error"):
            contents(stream)
    finally:
        os.close(descriptor)
