"""Bare ONNX files of many kinds through the whole daemon: datatypes, opsets, optional inputs, odd shapes."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from agent.base.errors import PeerError
from tests import onnx_models
from tests.core.conftest import Agent

KINDS = {
    "BOOL": (TensorProto.BOOL, np.array([[True, False]])),
    "UINT8": (TensorProto.UINT8, np.array([[0, 255]], np.uint8)),
    "UINT16": (TensorProto.UINT16, np.array([[0, 65535]], np.uint16)),
    "UINT32": (TensorProto.UINT32, np.array([[0, 2**32 - 1]], np.uint32)),
    "UINT64": (TensorProto.UINT64, np.array([[0, 2**64 - 1]], np.uint64)),
    "INT8": (TensorProto.INT8, np.array([[-128, 127]], np.int8)),
    "INT16": (TensorProto.INT16, np.array([[-32768, 32767]], np.int16)),
    "INT32": (TensorProto.INT32, np.array([[-(2**31), 2**31 - 1]], np.int32)),
    "INT64": (TensorProto.INT64, np.array([[-(2**63), 2**63 - 1]], np.int64)),
    "FP16": (TensorProto.FLOAT16, np.array([[0.5, -65504]], np.float16)),
    "FP32": (TensorProto.FLOAT, np.array([[0.1, -3e38]], np.float32)),
    "FP64": (TensorProto.DOUBLE, np.array([[0.1, -1e300]], np.float64)),
    "BYTES": (TensorProto.STRING, np.array([[b"", "ü".encode()]], dtype=object)),
}


@pytest.fixture(scope="module")
def device():
    folder = Path(tempfile.mkdtemp(prefix="ea-", dir="/tmp"))
    made = Agent(folder)
    made.config.write_text("[selection]\nmin_rounds = 4\nmax_rounds = 4\n")  # nothing is compared here
    made.start()
    yield made
    status = made.stop()
    shutil.rmtree(folder, ignore_errors=True)
    assert status == 0


def add(device, name, data):
    path = device.folder / f"{name}.onnx"
    path.write_bytes(data)
    device.cli("models", "add", path, "--name", name)


@pytest.mark.parametrize("datatype", KINDS)
def test_every_datatype_goes_in_and_comes_out_unchanged(device, datatype):
    kind, array = KINDS[datatype]
    name = f"kind-{datatype.lower()}"
    add(device, name, onnx_models.identity(kind))
    with device.client() as client:
        assert client.metadata(name)["inputs"][0]["datatype"] == datatype
        seen = client.infer(name, {"x": array})["y"]
        assert seen.dtype == array.dtype
        np.testing.assert_array_equal(seen, array)
        empty = array[:, :0]
        assert client.infer(name, {"x": empty})["y"].shape == (1, 0)


@pytest.mark.parametrize("opset", [7, 9, 11, 13, 15, 18, 21])
def test_old_and_new_opsets_are_served(device, opset):
    assert opset <= onnx.defs.onnx_opset_version()
    add(device, f"opset{opset}", onnx_models.identity(TensorProto.FLOAT, opset))
    with device.client() as client:
        x = np.ones((2, 2), np.float32)
        np.testing.assert_array_equal(client.infer(f"opset{opset}", {"x": x})["y"], x)


def test_an_optional_input_may_be_given_or_left_out(device):
    add(device, "shifted", onnx_models.with_default())
    x = np.zeros((2, 3), np.float32)
    with device.client() as client:
        np.testing.assert_array_equal(client.infer("shifted", {"x": x})["y"], [[1, 2, 3]] * 2)
        given = {"x": x, "shift": np.array([5, 5, 5], np.float32)}
        np.testing.assert_array_equal(client.infer("shifted", given)["y"], [[5, 5, 5]] * 2)
        with pytest.raises(PeerError, match="input 'x': missing"):
            client.infer("shifted", {"shift": given["shift"]})


def test_a_scalar_has_an_empty_shape(device):
    add(device, "scalar", onnx_models.scalar())
    with device.client() as client:
        assert client.infer("scalar", {"a": np.array(21, np.float32)})["b"] == np.float32(42)


def test_a_model_that_refuses_made_up_inputs_is_served_all_the_same(device):
    add(device, "picky", onnx_models.picky())
    with device.client() as client:
        np.testing.assert_array_equal(client.infer("picky", {"x": np.array([1, 2], np.float32)})["y"], [1, 1])
        with pytest.raises(PeerError, match="indices element out of data bounds"):
            client.infer("picky", {"x": np.array([9], np.float32)})
