"""What makes two requests equal: the name under which an answer is kept. Pure.

Invariant: two requests that could be answered differently have different names. Everything that matters goes into a
256-bit digest: what answers (model, version, variant, the bytes of its file, backend), and of the request the inputs
with name, datatype, shape and every byte, the outputs that are wanted, and all parameters but those that only say when
and how it is served. The encoding has one reading only: first the length of the description, then the description (a
Python literal, which tells 1, 1.0, True and "1" apart) with the length of each input's data, then the data.
"""

from __future__ import annotations

import functools
import hashlib
from typing import TYPE_CHECKING, Any, NamedTuple

from agent.base.datatypes import encode_bytes_elements

if TYPE_CHECKING:
    from agent.infer.tensors import InferRequest, Tensor

#: Of 256 bits: nobody finds two inputs of one digest, not even who may choose both.
DIGEST_BYTES = 32
#: What a request may say that changes nothing of its answer.
INDIFFERENT = frozenset(("keep_alive", "pin", "priority", "timeout", "cache"))
#: Data up to this size is copied to be hashed in one go; what is larger is hashed where it lies.
_SMALL_BYTES = 4096
#: An element of a BYTES tensor counts for so many bytes: it is an object of its own.
_ELEMENT_BYTES = 64
_PLAIN = frozenset((str, int, float, bool, type(None)))


class Source(NamedTuple):
    """What answers: a variant of a version, by the digest of its file, on the backend that really runs it."""

    model: str
    version: str
    variant: str
    digest: str
    backend: str


def request_digest(request: InferRequest) -> bytes | None:
    """The digest of all that matters in a request, whoever answers it. None for one that cannot be told from others."""
    if not _PLAIN.issuperset(map(type, request.parameters.values())):
        return None
    described, data = [], []
    for tensor in request.inputs:
        found = _data_of(tensor)
        if found is None:
            return None
        described.append((tensor.name, tensor.datatype, tensor.array.dtype.str, tensor.array.shape, len(found)))
        data.append(found)
    outputs = [output.name for output in request.outputs]
    parameters = sorted((name, value) for name, value in request.parameters.items() if name not in INDIFFERENT)
    head = ascii((described, outputs, parameters)).encode("ascii")
    digest = hashlib.blake2b(len(head).to_bytes(8, "little") + head, digest_size=DIGEST_BYTES)
    for part in data:
        digest.update(part)
    return digest.digest()


def answer_key(source: Source, digest: bytes) -> bytes:
    """The name of the answer that ``source`` gives to the request of that digest."""
    begun = _begun(source).copy()
    begun.update(digest)
    key: bytes = begun.digest()
    return key


@functools.lru_cache(maxsize=256)
def _begun(source: Source) -> Any:
    text = ascii(tuple(source)).encode("ascii")
    return hashlib.blake2b(len(text).to_bytes(8, "little") + text, digest_size=DIGEST_BYTES)


def tensors_bytes(tensors: tuple[Tensor, ...]) -> int:
    """Bytes of their arrays, roughly where they hold strings, without looking at each."""
    return sum(
        tensor.array.nbytes if tensor.datatype != "BYTES" else tensor.array.size * _ELEMENT_BYTES for tensor in tensors
    )


def held_bytes(tensors: tuple[Tensor, ...]) -> int:
    """Bytes that keeping them takes."""
    size = tensors_bytes(tensors)
    for tensor in tensors:
        if tensor.datatype == "BYTES":
            size += sum(len(element) for element in tensor.array.ravel().tolist())
    return size


def _data_of(tensor: Tensor) -> bytes | memoryview | None:
    array = tensor.array
    if tensor.datatype == "BYTES":
        elements = array.ravel().tolist()
        return encode_bytes_elements(elements) if set(map(type, elements)) <= {bytes} else None
    if array.dtype.hasobject:
        return None
    if array.nbytes <= _SMALL_BYTES:
        return array.tobytes()
    whole = array if array.flags.c_contiguous else array.copy(order="C")
    return whole.reshape(-1).view("u1").data
