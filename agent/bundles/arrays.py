"""``.npz`` files read within bounds: golden sets and calibration data.

Invariants: never unpickles; no array is reserved before the file is known to hold all its bytes; all arrays together
stay within a limit, however well they compress. numpy is imported at first use.
Source: numpy.lib.format, "NPY format, versions 1.0 to 3.0"; an ``.npz`` is a ZIP of them.
"""

from __future__ import annotations

import io
import math
import os
import re
import sys
import zipfile
import zlib
from collections.abc import Mapping
from typing import IO, TYPE_CHECKING, Any

from agent.base.errors import PeerError, TooLargeError

if TYPE_CHECKING:
    from numpy.typing import NDArray

MAX_ARRAYS = 1024
MAX_BYTES = 512 << 20
_HEADER_BYTES = 10_000
#: How a file starts, and the bytes of the header's length that follow.
_HEADER_LENGTHS = {b"\x93NUMPY\x01\x00": 2, b"\x93NUMPY\x02\x00": 4}
#: A header is a Python dictionary. Numbers, truth values and texts only: no objects, records, dates.
_NUMBER = r"-?(?:0|[1-9][0-9]{0,17})"
_FIELD = (
    r"(?:'descr'[ \n]*:[ \n]*'([<>|=]?(?:b1|[iuf][1248]|[SU][0-9]{1,9}))'"
    r"|'fortran_order'[ \n]*:[ \n]*(True|False)"
    rf"|'shape'[ \n]*:[ \n]*(\((?:{_NUMBER},(?: ?{_NUMBER},)*(?: ?{_NUMBER})?)?\)))"
)
_HEADER = re.compile(rf"\{{[ \n]*(?:{_FIELD}[ \n]*,[ \n]*)*(?:{_FIELD}[ \n]*)?\}}[ \n]*")
#: What a ZIP file may hold before its arrays: directory and headers.
_COMPRESSIONS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)


def load_arrays(source: int | bytes, *, limit: int = MAX_BYTES) -> dict[str, NDArray[Any]]:
    """The arrays of an ``.npz`` by name, from a descriptor (position not kept) or its bytes. PeerError, TooLargeError.

    Texts and byte strings come as object arrays of ``bytes``, as the BYTES datatype has them.
    """
    try:
        with _open(source) as stream, zipfile.ZipFile(stream) as archive:
            return _load(archive, limit)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
        # NotImplementedError, RuntimeError: what zipfile says of unknown features and of members with a password.
        raise PeerError(
            f"cannot read arrays: {error}", hint="the file must be an .npz as numpy.savez writes it"
        ) from error


def dump_arrays(arrays: Mapping[str, NDArray[Any]]) -> bytes:
    """An ``.npz`` of ``arrays``; equal arrays give equal bytes (entries sorted, dated 1980, deflated)."""
    import numpy as np  # noqa: PLC0415

    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in sorted(arrays):
            member = io.BytesIO()
            np.lib.format.write_array(member, _storable(arrays[name]), allow_pickle=False)
            info = zipfile.ZipInfo(f"{name}.npy", (1980, 1, 1, 0, 0, 0))
            archive.writestr(info, member.getvalue(), zipfile.ZIP_DEFLATED)
    return out.getvalue()


def _open(source: int | bytes) -> IO[bytes]:
    if isinstance(source, bytes):
        return io.BytesIO(source)
    stream = os.fdopen(os.dup(source), "rb")
    stream.seek(0)
    return stream


def _load(archive: zipfile.ZipFile, limit: int) -> dict[str, NDArray[Any]]:
    entries = archive.infolist()
    if len(entries) > MAX_ARRAYS:
        raise TooLargeError(f"cannot read arrays: {len(entries)} of them, {MAX_ARRAYS} fit")
    total = sum(entry.file_size for entry in entries)
    if total > limit:
        raise TooLargeError(f"cannot read arrays: {total} bytes, {limit} fit")
    arrays: dict[str, NDArray[Any]] = {}
    for entry in entries:
        name = entry.filename.removesuffix(".npy")
        if name in arrays or entry.compress_type not in _COMPRESSIONS:
            raise PeerError(f"cannot read arrays: {name!r} is there twice or oddly compressed")
        with archive.open(entry) as member:
            arrays[name] = _read_array(member, entry.file_size, name)
    return arrays


def _read_array(member: IO[bytes], size: int, name: str) -> NDArray[Any]:
    import numpy as np  # noqa: PLC0415

    kind, fortran_order, shape = _read_header(member, name)
    try:
        dtype = np.dtype(kind)
    except TypeError as error:
        raise PeerError(f"cannot read arrays: {name!r} holds {kind}, which is no datatype of tensors") from error
    need = math.prod(shape) * dtype.itemsize
    if min(shape, default=0) < 0 or len(shape) > 32 or need > size:
        raise PeerError(f"cannot read arrays: {name!r} announces {list(shape)}, the file holds {size} bytes for it")
    data = member.read(need)
    if len(data) != need or member.read(1):
        raise PeerError(f"cannot read arrays: {name!r} announces {need} bytes and holds another number")
    if dtype.kind == "U" and np.frombuffer(data, f"{dtype.str[0]}u4").max(initial=0) > sys.maxunicode:
        raise PeerError(f"cannot read arrays: {name!r} holds a text that is not Unicode")
    array = np.frombuffer(data, dtype=dtype).reshape(shape, order="F" if fortran_order else "C")
    return _as_bytes_elements(array) if dtype.kind in "SU" else array


def _read_header(member: IO[bytes], name: str) -> tuple[str, bool, tuple[int, ...]]:
    """Datatype, order and shape. numpy's own reader would hand the text, a Python literal, to Python's compiler."""
    start = member.read(8)
    width = _HEADER_LENGTHS.get(start)
    if width is None:
        raise PeerError(f"cannot read arrays: {name!r} is no .npy of version 1.0 or 2.0")
    length = int.from_bytes(member.read(width), "little")
    if length > _HEADER_BYTES:
        raise PeerError(f"cannot read arrays: {name!r} has a header of {length} bytes, {_HEADER_BYTES} fit")
    text = member.read(length).decode("latin-1")
    if len(text) != length:
        raise PeerError(f"cannot read arrays: {name!r} ends inside its header")
    # A field given twice counts once, its last value, as in Python.
    kind = order = shape = ""
    for found in re.findall(_FIELD, text) if _HEADER.fullmatch(text) else ():
        kind, order, shape = (new or old for new, old in zip(found, (kind, order, shape), strict=True))
    if not (kind and order and shape):
        raise PeerError(f"cannot read arrays: {name!r} holds Python objects or records, or its header is malformed")
    return kind, order == "True", tuple(int(axis) for axis in re.findall(_NUMBER, shape))


def _as_bytes_elements(array: NDArray[Any]) -> NDArray[Any]:
    import numpy as np  # noqa: PLC0415

    elements = [value.encode() if isinstance(value, str) else value for value in array.ravel().tolist()]
    out = np.empty(len(elements), dtype=object)
    out[:] = elements
    return out.reshape(array.shape)


def _storable(array: NDArray[Any]) -> NDArray[Any]:
    import numpy as np  # noqa: PLC0415

    if array.dtype != object:
        return np.asarray(array, dtype=array.dtype.newbyteorder("<"))
    raw = [value.encode() if isinstance(value, str) else bytes(value) for value in array.ravel().tolist()]
    # numpy pads byte strings with NULs and cannot tell them from NULs of the value.
    if any(value.endswith(b"\0") for value in raw):
        raise PeerError("cannot write arrays: a byte string ends in NUL")
    return np.array(raw, dtype=f"S{max(1, *(len(value) for value in raw), 1)}").reshape(array.shape)
