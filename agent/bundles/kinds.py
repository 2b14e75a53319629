"""What kind of file a model file is, by its first bytes. Pure."""

from __future__ import annotations

from typing import Literal

Kind = Literal["edgemodel", "tflite", "ort", "pointer", "onnx"]

#: Bytes that ``kind_of`` wants to see: the first tar header.
HEAD_BYTES = 512


def kind_of(head: bytes) -> Kind:
    """The kind by content, never by file name. What shows no other mark is taken for ONNX, which has none.

    ``tflite`` and ``ort`` are FlatBuffers with an identifier at offset 4; ``pointer`` is a Git LFS stand-in.
    """
    if head[257:262] == b"ustar":
        return "edgemodel"
    if head[4:8] == b"TFL3":
        return "tflite"
    if head[4:8] == b"ORTM":
        return "ort"
    if head.startswith(b"version https://git-lfs"):
        return "pointer"
    return "onnx"
