"""A bare model file as a bundle of one variant.

Its name comes from the file's name, its version from the digest, its signature from the bytes.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from pathlib import PurePath

from pydantic import JsonValue, ValidationError

from agent.base.errors import PeerError, TooLargeError, UnsupportedError
from agent.bundles.kinds import HEAD_BYTES, Kind, kind_of
from agent.bundles.manifest import MAX_FILE_BYTES, FileRef, Manifest, Runtime, Technique, Variant
from agent.bundles.onnx_signature import Signature
from agent.bundles.onnx_signature import read_signature as read_onnx
from agent.bundles.tflite_signature import TfliteSignature
from agent.bundles.tflite_signature import read_signature as read_tflite

_BLOCK = 1 << 20


def describe(descriptor: int, *, file_name: str = "", name: str | None = None) -> Manifest:
    """The manifest for the bare model in ``descriptor`` (a regular file or memfd; its position is not moved).

    ``name`` as given, else made from ``file_name``. The digest in it is that of the bytes read here: whoever stores the
    file compares again. PeerError: no model, damaged, in several files. UnsupportedError: what cannot be served.
    """
    signature = signature_of(descriptor)
    size = os.fstat(descriptor).st_size
    digest = _sha256(descriptor, size)
    model = name if name is not None else name_from(file_name)
    return _manifest(model, signature, digest, size)


def signature_of(descriptor: int) -> Signature | TfliteSignature:
    """The signature of the ONNX or TFLite file in ``descriptor``. Errors as those of ``describe``."""
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        raise PeerError("cannot read model file: not a regular file")
    if not status.st_size:
        raise PeerError("cannot read model file: it is empty")
    if status.st_size > MAX_FILE_BYTES:
        raise TooLargeError(f"cannot read model file: {status.st_size} bytes, {MAX_FILE_BYTES} fit")
    kind = kind_of(os.pread(descriptor, HEAD_BYTES, 0))
    _refuse(kind)
    return (read_tflite if kind == "tflite" else read_onnx)(descriptor, status.st_size)


def name_from(file_name: str) -> str:
    """A model name out of a file name: ``My Model (v2).onnx`` becomes ``my-model-v2``."""
    stem = PurePath(file_name).name
    stem = re.sub(r"\.(onnx|tflite)$", "", stem, flags=re.IGNORECASE)
    name = re.sub(r"[^a-z0-9._]+", "-", stem.lower()).strip("-._")
    return name[:64].rstrip("-._") or "model"


def version_from(sha256: str) -> str:
    """A version out of a digest. A pre-release, so that any published version of the model is newer.

    No build metadata ("+"): versions go into MQTT topics and URLs, where "+" means something else.
    """
    return f"0.0.0-sha-{sha256[:12]}"


def _manifest(name: str, signature: Signature | TfliteSignature, sha256: str, size: int) -> Manifest:
    technique = (Technique(name="quantized"),) if signature.precision in ("int8", "int4") else ()
    runtime: Runtime = "tflite" if isinstance(signature, TfliteSignature) else "onnx"
    variant = Variant(
        id=signature.precision,
        runtime=runtime,
        precision=signature.precision,
        technique=technique,
        file=FileRef(name=f"model.{runtime}", sha256=sha256, size=size),
        parameters=_parameters(signature),
    )
    try:
        return Manifest(
            format="edge-model/1",
            name=name,
            version=version_from(sha256),
            inputs=signature.inputs,
            outputs=signature.outputs,
            variants=(variant,),
        )
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        field = ".".join(str(part) for part in problem["loc"]) or "signature"
        hint = "a name has lower-case letters, digits, '.', '_' and '-', at most 64" if field == "name" else ""
        raise PeerError(f"cannot describe model file as {name!r}: {field}: {problem['msg']}", hint=hint) from error


def _parameters(signature: Signature | TfliteSignature) -> dict[str, JsonValue]:
    """What the file says besides its signature; how inputs and outputs are quantized is for whoever fills them."""
    if isinstance(signature, Signature):
        return {"opset": signature.opset, "ir_version": signature.ir_version, "producer": signature.producer}
    found: dict[str, JsonValue] = {"producer": signature.producer}
    if signature.key:
        found["signature"] = signature.key
    if signature.quantization:
        found["quantization"] = {
            name: {"scale": scale, "zero_point": zero} for name, (scale, zero) in signature.quantization.items()
        }
    return found


def _refuse(kind: Kind) -> None:
    """PeerError or UnsupportedError that names what a file is that is no bare model."""
    if kind == "ort":
        raise UnsupportedError(
            "cannot use model file: ORT format carries no readable signature",
            hint="add the .onnx file that it was made from; the agent prepares its own form",
        )
    if kind == "pointer":
        raise PeerError("cannot read model file: a Git LFS pointer, not the model", hint="run: git lfs pull")
    if kind == "edgemodel":
        raise PeerError("cannot read model file: a bundle, not a bare model")


def _sha256(descriptor: int, size: int) -> str:
    digest = hashlib.sha256()
    position = 0
    while position < size:
        block = os.pread(descriptor, min(_BLOCK, size - position), position)
        if not block:
            raise PeerError("cannot read model file: it was cut short while being read")
        digest.update(block)
        position += len(block)
    return digest.hexdigest()
