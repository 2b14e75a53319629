"""Numpy arrays to infer requests and back: the Open Inference Protocol with binary tensors, as a client speaks it.

numpy is imported at first use. Large inputs are sent from the caller's memory, outputs are views of the answer's.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from agent.base.datatypes import NUMPY_NAME, decode_bytes_elements, encode_bytes_elements
from agent.base.errors import AgentError, PeerError
from agent.client.exchange import LENGTH_FIELD, SMALL_BYTES, Answer, Part, request

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray


#: Outputs by name, or names with the parameters of each.
Wanted = Sequence[str] | Mapping[str, Mapping[str, Any]]


class Result(Mapping[str, "NDArray[Any]"]):
    """Outputs by name, and what the server says of the run in ``parameters`` (variant, backend, degraded, times)."""

    def __init__(self, outputs: Mapping[str, NDArray[Any]], document: Mapping[str, Any]) -> None:
        self._outputs = dict(outputs)
        self.model_name: str = document.get("model_name", "")
        self.model_version: str = document.get("model_version", "")
        self.id: str = document.get("id", "")
        self.parameters: Mapping[str, Any] = document.get("parameters", {})

    def __getitem__(self, name: str) -> NDArray[Any]:
        return self._outputs[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._outputs)

    def __len__(self) -> int:
        return len(self._outputs)

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name}: {value.dtype}{list(value.shape)}" for name, value in self._outputs.items())
        return f"Result({self.model_name} {self.model_version}: {shapes})"


def infer_request(
    target: str,
    inputs: Mapping[str, ArrayLike],
    outputs: Wanted | None,
    request_id: str | None,
    parameters: Mapping[str, Any] | None,
    datatypes: Mapping[str, str] | None,
) -> list[Part]:
    """An infer request that asks for binary outputs. Raises PeerError for arrays that cannot be sent."""
    entries, tails = [], []
    for name, value in inputs.items():
        datatype, shape, data = _to_wire(name, value, (datatypes or {}).get(name))
        entries.append(
            {"name": name, "datatype": datatype, "shape": shape, "parameters": {"binary_data_size": len(data)}}
        )
        tails.append(data)
    document: dict[str, Any] = {
        "inputs": entries,
        "parameters": {**(parameters or {}), "binary_data_output": True},
    }
    if outputs is not None:
        chosen = outputs if isinstance(outputs, Mapping) else {name: {} for name in outputs}
        document["outputs"] = [{"name": name, "parameters": dict(chosen[name])} for name in chosen]
    if request_id is not None:
        document["id"] = request_id
    head = json.dumps(document, separators=(",", ":")).encode("ascii")
    return request("POST", target, [head, *tails], {"Inference-Header-Content-Length": str(len(head))})


def _to_wire(name: str, value: ArrayLike, datatype: str | None) -> tuple[str, list[int], Part]:
    """Datatype, shape and row-major little-endian bytes of an array; large ones are not copied."""
    import numpy as np  # noqa: PLC0415 - at first use

    given = np.asarray(value)
    datatype = datatype or _datatype(name, given.dtype)
    shape = list(given.shape)
    if datatype == "BYTES":
        elements = (item if isinstance(item, bytes) else str(item).encode() for item in given.ravel().tolist())
        return datatype, shape, encode_bytes_elements(elements)
    if datatype not in NUMPY_NAME:
        raise PeerError(f"input '{name}': unknown datatype {datatype}")
    if datatype == "BF16":
        given = _bf16_bits(given)
    plain = np.ascontiguousarray(given, dtype=NUMPY_NAME[datatype])
    return datatype, shape, plain.reshape(-1).view("u1").data if plain.nbytes > SMALL_BYTES else plain.tobytes()


def _datatype(name: str, dtype: Any) -> str:
    if dtype.kind in "OSU":
        return "BYTES"
    if dtype.name == "bfloat16":
        return "BF16"
    word = {"b": "BOOL", "u": f"UINT{dtype.itemsize * 8}", "i": f"INT{dtype.itemsize * 8}"}.get(dtype.kind)
    word = word or (f"FP{dtype.itemsize * 8}" if dtype.kind == "f" else dtype.name)
    if word not in NUMPY_NAME:
        raise PeerError(f"input '{name}': arrays of {dtype} cannot be sent")
    return word


def _bf16_bits(given: NDArray[Any]) -> NDArray[Any]:
    """BF16 as its 16 bits: as they are, or float values rounded to nearest, ties to even."""
    import numpy as np  # noqa: PLC0415

    if given.dtype.itemsize == 2 and given.dtype.kind != "f":  # uint16 bits, or ml_dtypes' bfloat16
        return given.view("<u2")
    bits = np.ascontiguousarray(given, dtype="<f4").view("<u4").reshape(given.shape)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")
    quiet: NDArray[Any] = np.where(np.isnan(given), np.uint16(0x7FC0), rounded)
    return quiet


def infer_result(answer: Answer) -> Result:
    """Arrays out of the answer to an infer request. Raises what its status stands for."""
    document = answer.document()
    try:
        offset = int(answer.fields.get(LENGTH_FIELD, len(answer.body)))  # digits, as document() has found
        outputs: dict[str, NDArray[Any]] = {}
        for entry in document["outputs"]:
            size = entry["parameters"]["binary_data_size"]
            outputs[entry["name"]] = _from_wire(entry["datatype"], entry["shape"], answer.body[offset : offset + size])
            offset += size
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise AgentError(f"cannot read the agent's answer: {error!r}") from error
    return Result(outputs, document)


def _from_wire(datatype: str, shape: list[int], data: memoryview) -> NDArray[Any]:
    """An array over the answer's memory where alignment allows. BF16 is widened to float32, BYTES are ``bytes``."""
    import numpy as np  # noqa: PLC0415

    if datatype == "BYTES":
        elements = decode_bytes_elements(data, int(np.prod(shape, dtype=np.int64)))
        objects = np.empty(len(elements), dtype=object)
        objects[:] = elements
        return objects.reshape(shape)
    if not len(data):
        flat: NDArray[Any] = np.empty(0, NUMPY_NAME[datatype])
    else:
        flat = np.frombuffer(data, NUMPY_NAME[datatype])
    if not flat.flags.aligned:
        flat = flat.copy()
    if datatype == "BF16":
        flat = (flat.astype("<u4") << 16).view("<f4")
    return flat.reshape(shape)
