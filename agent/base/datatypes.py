"""Tensor datatypes in the words of the Open Inference Protocol v2, and the BYTES element coding.

Shared by manifest, runtimes, server and client, so that there is one table. Imports no numpy.
Source: Open Inference Protocol, "Tensor Data Types" and the binary tensor data extension.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import Literal, get_args

Datatype = Literal[
    "BOOL", "UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64",
    "FP16", "FP32", "FP64", "BF16", "BYTES",
]  # fmt: skip
DATATYPES: tuple[Datatype, ...] = get_args(Datatype)

#: numpy dtype string (little-endian on the wire) by datatype. BF16 has no numpy dtype: it travels as its 16 bits.
NUMPY_NAME: dict[str, str] = {
    "BOOL": "?", "UINT8": "<u1", "UINT16": "<u2", "UINT32": "<u4", "UINT64": "<u8",
    "INT8": "<i1", "INT16": "<i2", "INT32": "<i4", "INT64": "<i8",
    "FP16": "<f2", "FP32": "<f4", "FP64": "<f8", "BF16": "<u2", "BYTES": "O",
}  # fmt: skip

#: Bytes per element on the wire; BYTES elements have a length of their own.
ITEM_SIZE: dict[str, int] = {
    "BOOL": 1, "UINT8": 1, "UINT16": 2, "UINT32": 4, "UINT64": 8, "INT8": 1, "INT16": 2, "INT32": 4, "INT64": 8,
    "FP16": 2, "FP32": 4, "FP64": 8, "BF16": 2,
}  # fmt: skip

_LENGTH = struct.Struct("<I")


def encode_bytes_elements(elements: Iterable[bytes]) -> bytes:
    """BYTES elements as the wire has them: each a 4-byte little-endian length, then its bytes."""
    parts: list[bytes] = []
    for element in elements:
        parts.append(_LENGTH.pack(len(element)))
        parts.append(element)
    return b"".join(parts)


def decode_bytes_elements(data: bytes | memoryview, count: int) -> list[bytes]:
    """Exactly ``count`` BYTES elements from ``data``, all of it. Raises ValueError with the offset that is wrong."""
    view = memoryview(data)
    elements: list[bytes] = []
    offset = 0
    # Each element needs at least its length: a lying count is found before anything is reserved for it.
    if count * _LENGTH.size > len(view):
        raise ValueError(f"{count} BYTES elements need at least {count * _LENGTH.size} bytes, got {len(view)}")
    for index in range(count):
        if offset + _LENGTH.size > len(view):
            raise ValueError(f"BYTES element {index}: length missing at byte {offset}")
        (length,) = _LENGTH.unpack_from(view, offset)
        offset += _LENGTH.size
        if offset + length > len(view):
            raise ValueError(f"BYTES element {index}: {length} bytes announced, {len(view) - offset} left")
        elements.append(bytes(view[offset : offset + length]))
        offset += length
    if offset != len(view):
        raise ValueError(f"{len(view) - offset} bytes left over after {count} BYTES elements")
    return elements
