"""Variants made elsewhere that join those made here: TFLite files, or ONNX files of other tools.

What such a file is comes from its bytes; it must take and give what the model does. It is measured like the others, by
the runtime that it is for; where that is not installed the caller leaves it out with the reason.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agent.base.errors import DamagedError, PeerError, TryLaterError
from agent.bundles.manifest import Runtime, Technique, Variant
from agent.bundles.tflite_signature import TfliteSignature
from agent.fleet import quantize
from agent.fleet.pack import file_ref, signature_of
from agent.infer.runtimes.base import LoadOptions, load_runtime
from agent.selection.inventory import CPU_PROVIDER

if TYPE_CHECKING:
    from numpy.typing import NDArray

_REDUCED = ("fp16", "bf16", "int8", "int4")


@dataclass(frozen=True, slots=True)
class Added:
    """A file to take in, and the variant's id; empty for one that is made of what the file is: ``tflite-int8``."""

    path: Path
    id: str = ""


def describe(added: Added) -> Variant:
    """The file as a variant. PeerError, UnsupportedError for what is no model, OSError."""
    if not added.path.is_file():
        raise PeerError(f"cannot pack {added.path}: no such file")
    signature = signature_of(added.path)
    runtime: Runtime = "tflite" if isinstance(signature, TfliteSignature) else "onnx"
    name = added.id or f"{runtime}-{signature.precision}"
    reduced = signature.precision in _REDUCED
    technique = (Technique(name="quantized", parameters={"to": signature.precision}),) if reduced else ()
    return Variant(
        id=name,
        runtime=runtime,
        precision=signature.precision,
        technique=technique,
        file=file_ref(added.path, f"{name}.{runtime}"),
    )


def answers(
    runtime: Runtime, model: Path, feeds: Sequence[Mapping[str, NDArray[Any]]], progress: Callable[[int, int], None]
) -> list[dict[str, NDArray[Any]]]:
    """What the model answers to each of ``feeds`` on this machine's CPU. PeerError when it does not load or run,
    UnsupportedError where its runtime is not installed."""
    if runtime == "onnx":
        return quantize.run_all(model, feeds, progress)
    library = load_runtime(runtime)
    descriptor = os.open(model, os.O_RDONLY | os.O_CLOEXEC)
    try:
        session = library.load(descriptor, LoadOptions(CPU_PROVIDER[runtime]))
    except (DamagedError, TryLaterError) as error:
        raise PeerError(f"cannot run {model.name}: {error}") from error
    finally:
        os.close(descriptor)
    names = [spec.name for spec in session.outputs]
    found: list[dict[str, NDArray[Any]]] = []
    try:
        for index, feed in enumerate(feeds):
            progress(index, len(feeds))
            found.append(dict(zip(names, session.run(feed, names), strict=True)))
    except TryLaterError as error:
        raise PeerError(f"cannot run {model.name}: {error}") from error
    finally:
        session.close()
    return found
