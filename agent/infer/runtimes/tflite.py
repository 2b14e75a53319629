"""TFLite behind the runtime port: ai-edge-litert, or tflite-runtime where that is the only wheel (armv7, Python 3.11).

The model is opened by path (``/proc/self/fd/N`` of a sealed memfd) and mapped: its weights are in memory once, until
the session is closed. One interpreter runs one request at a time, so a session is not ``concurrent``. XNNPACK is used
as the packages have it by default; no weight cache is written, since that would be plaintext weights in a file.

Loading holds the GIL while XNNPACK repacks the weights (**measured**, 94 ms for 64 MB): it belongs into the trial child
or the engine's loader, and other threads wait that long. A run releases it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any

from agent.base.datatypes import Datatype
from agent.base.errors import DamagedError, PeerError, TryLaterError, UnsupportedError
from agent.bundles.manifest import TensorSpec
from agent.bundles.tflite_signature import chosen_key, public_names, read_signature
from agent.infer.runtimes.base import LoadOptions
from agent.infer.runtimes.failures import RunError, is_shortage, one_line

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from agent.infer.halting import Halt

#: Distribution -> its module, in the order of preference.
PACKAGES: Mapping[str, str] = {"ai-edge-litert": "ai_edge_litert", "tflite-runtime": "tflite_runtime"}
PROVIDER = "cpu"

#: By numpy's name of the type; byte strings stand for TFLite's strings.
_DATATYPES: Mapping[str, Datatype] = {
    "bool": "BOOL", "uint8": "UINT8", "uint16": "UINT16", "uint32": "UINT32", "uint64": "UINT64", "int8": "INT8",
    "int16": "INT16", "int32": "INT32", "int64": "INT64", "float16": "FP16", "float32": "FP32", "float64": "FP64",
    "bfloat16": "BF16", "bytes": "BYTES",
}  # fmt: skip
#: What the bindings raise; SystemError where tflite-runtime meets a numpy that it was not built for.
_ERRORS = (RuntimeError, ValueError, TypeError, SystemError, MemoryError)
#: The smallest model: one number that comes out as it went in.
_SMALLEST = bytes.fromhex(
    "1800000054464c330e001400040008000c0000001000000010000000030000000c0000000c0000008c00000000000000"
    "01000000140000000c001400040008000c00100000000000100000001000000050000000540000005800000001000000"
    "2000000016000e0004000c000000080000000000000000000d000000000000001c0000000c0000001000000000010000"
    "010000000100000001000000780000000100000000000000010000000000000000000000010000000800000004000400"
    "04000000"
)


class TfliteRuntime:
    """The installed package, whichever there is. ``version`` names it, since the two count differently."""

    name = "tflite"
    providers: tuple[str, ...] = (PROVIDER,)

    def __init__(self) -> None:
        with contextlib.suppress(ImportError):  # LiteRT brings it; numpy has bfloat16 once it is imported
            import_module("ml_dtypes")
        self.package, self._interpreter = _working_package()
        self.version = f"{metadata.version(self.package)} ({self.package})"
        self._sound: set[str] = set()

    def load(self, descriptor: int, options: LoadOptions) -> TfliteSession:
        """A session on the CPU. DamagedError, TryLaterError, UnsupportedError."""
        if options.provider != PROVIDER:
            raise UnsupportedError(f"cannot load model: provider {options.provider} is not in this TFLite")
        if options.identity not in self._sound:
            _check_file(descriptor)
            if options.identity:
                self._sound.add(options.identity)
        try:
            return TfliteSession(self._interpreter, descriptor, max(1, options.threads))
        except _ERRORS as error:
            raise _load_error(error) from error

    def prepare(self, descriptor: int, target: int, options: LoadOptions) -> None:
        """There is nothing yet that would load faster."""
        raise UnsupportedError("cannot prepare model: TFLite has no other form of it")

    def trim(self) -> None:
        """Nothing is shared between sessions."""


@dataclass(frozen=True, slots=True)
class _Tensor:
    """An input or output: its name in the file, its place in the graph, numpy's type of it."""

    own: str
    index: int
    kind: Any
    spec: TensorSpec


class TfliteSession:
    """An interpreter. Inputs of another shape than before are laid out anew; outputs are copies.

    The descriptor is kept: after a failed allocation an interpreter is fit for nothing (**measured**: tflite-runtime
    crashes at the next shape), so a new one takes its place.
    """

    concurrent = False
    stoppable = False
    provider = PROVIDER

    def __init__(self, interpreter: Any, descriptor: int, threads: int) -> None:
        self._make = interpreter
        self._threads = threads
        self._descriptor = os.dup(descriptor)
        try:
            self._open()
            self._inputs, self._outputs = self._signature()
        except BaseException:
            os.close(self._descriptor)
            raise
        self.inputs = tuple(tensor.spec for tensor in self._inputs.values())
        self.outputs = tuple(tensor.spec for tensor in self._outputs.values())
        self._has_bf16 = any(spec.datatype == "BF16" for spec in (*self.inputs, *self.outputs))

    def run(
        self, inputs: Mapping[str, NDArray[Any]], outputs: Sequence[str], halt: Halt | None = None
    ) -> list[NDArray[Any]]:
        """One answer; strings go in and come out as ``bytes``. RunError with the runtime's reason, TryLaterError.

        Nothing ends a run from outside: ``halt`` is not heeded.
        """
        try:
            if self._interpreter is None:
                self._open()
            given = {name: self._native(name, array) for name, array in inputs.items()} if self._has_bf16 else inputs
            answers = self._signed(given, outputs) if self._runner is not None else self._plain(given, outputs)
            return [_bits(answer) for answer in answers] if self._has_bf16 else answers
        except _ERRORS as error:
            if is_shortage(error):
                self._drop()
                raise TryLaterError(f"cannot run model: out of memory: {one_line(error)}") from error
            raise RunError(f"cannot run model: TFLite: {one_line(error)}") from error

    def close(self) -> None:
        self._drop()
        os.close(self._descriptor)

    def _open(self) -> None:
        """A fresh interpreter."""
        interpreter = self._make(model_path=f"/proc/self/fd/{self._descriptor}", num_threads=self._threads)
        # Before there is a runner, which would count as a view of the tensors; what cannot be laid out shall fail the
        # load; and a runner alone leaves XNNPACK out (**measured**, tflite-runtime: 40 ms in place of 11).
        interpreter.allocate_tensors()
        key = chosen_key(interpreter.get_signature_list())
        self._runner: Any = interpreter.get_signature_runner(key) if key else None
        self._interpreter: Any = interpreter

    def _drop(self) -> None:
        self._runner = self._interpreter = None

    def _signature(self) -> tuple[dict[str, _Tensor], dict[str, _Tensor]]:
        """What goes in and out by the names for clients: of the signature that is served, else of the first graph."""
        if self._runner is not None:
            inputs, outputs = self._runner.get_input_details(), self._runner.get_output_details()
            return _tensors(list(inputs.items()), "input"), _tensors(list(outputs.items()), "output")
        inputs, outputs = self._interpreter.get_input_details(), self._interpreter.get_output_details()
        return _tensors([(d["name"], d) for d in inputs], "input"), _tensors(
            [(d["name"], d) for d in outputs], "output"
        )

    def _signed(self, inputs: Mapping[str, NDArray[Any]], outputs: Sequence[str]) -> list[NDArray[Any]]:
        answers = self._runner(**{self._inputs[name].own: array for name, array in inputs.items()})
        return [answers[self._outputs[name].own] for name in outputs]

    def _plain(self, inputs: Mapping[str, NDArray[Any]], outputs: Sequence[str]) -> list[NDArray[Any]]:
        interpreter = self._interpreter
        for name, array in inputs.items():
            interpreter.resize_tensor_input(self._inputs[name].index, array.shape)
        interpreter.allocate_tensors()  # nothing is done where no shape has changed
        for name, array in inputs.items():
            interpreter.set_tensor(self._inputs[name].index, array)
        interpreter.invoke()
        return [interpreter.get_tensor(self._outputs[name].index) for name in outputs]

    def _native(self, name: str, array: NDArray[Any]) -> NDArray[Any]:
        """BF16 travels as its 16 bits, which the interpreter would take for whole numbers."""
        tensor = self._inputs[name]
        return array.copy().view(tensor.kind) if tensor.spec.datatype == "BF16" else array


def _working_package() -> tuple[str, Any]:
    """The first package whose interpreter works, and its class. UnsupportedError with the reason of each."""
    reasons: list[str] = []
    hint = ""
    for package, module in PACKAGES.items():
        try:
            interpreter = import_module(f"{module}.interpreter").Interpreter
            interpreter(model_content=_SMALLEST).allocate_tensors()
        except ModuleNotFoundError as error:
            if error.name != module:  # numpy, say: the package is there, what it needs is not
                reasons.append(f"{package}: {one_line(error)}")
        except (ImportError, AttributeError, *_ERRORS) as error:
            reason, mend = _broken(error)
            reasons.append(f"{package}: {reason}")
            hint = hint or mend
        else:
            return package, interpreter
    if reasons:
        raise UnsupportedError(f"cannot load runtime 'tflite': {'; '.join(reasons)}", hint=hint)
    raise UnsupportedError(
        "cannot load runtime 'tflite': neither ai-edge-litert nor tflite-runtime is installed",
        hint="install the extra: pip install 'edge-agent[litert]'",
    )


def _broken(error: Exception) -> tuple[str, str]:
    """Why an interpreter cannot be had, and the mend. Those built for numpy 1 can be imported beside numpy 2, and raise
    SystemError when they are made."""
    import numpy as np  # noqa: PLC0415 - loaded with the package

    if isinstance(error, SystemError) and not np.__version__.startswith("1."):
        return f"it was built for numpy 1, numpy {np.__version__} is installed", "pip install 'numpy<2'"
    return one_line(error), ""


def _check_file(descriptor: int) -> None:
    """DamagedError unless the file is sound all through: **measured**, tflite-runtime 2.14 and ai-edge-litert before
    2.3 do not look, and crash on a file that is cut short. It takes longer than the load itself (MobileNetV2: 4 ms of
    8, with the GIL held)."""
    try:
        read_signature(descriptor, os.fstat(descriptor).st_size)
    except PeerError as error:
        raise DamagedError(str(error).replace("cannot read model file", "cannot load model")) from error


def _load_error(error: Exception) -> DamagedError | TryLaterError | UnsupportedError:
    text = one_line(error)
    if is_shortage(error):
        return TryLaterError(f"cannot load model: out of memory: {text}")
    if "data-type" in text or "Unsupported data type" in text:
        return UnsupportedError(f"cannot load model: a datatype that Python cannot be handed (bfloat16, int4): {text}")
    return DamagedError(f"cannot load model: TFLite: {text}")


def _bits(answer: NDArray[Any]) -> NDArray[Any]:
    return answer.view("<u2") if answer.dtype.name == "bfloat16" else answer


def _tensors(edges: Sequence[tuple[str, Mapping[str, Any]]], what: str) -> dict[str, _Tensor]:
    """Tensors by the name that clients use. UnsupportedError for a datatype that the protocol lacks."""
    names = public_names([own for own, _ in edges], what)
    return {name: _tensor(name, own, details) for name, (own, details) in zip(names, edges, strict=True)}


def _tensor(name: str, own: str, details: Mapping[str, Any]) -> _Tensor:
    import numpy as np  # noqa: PLC0415 - loaded with the package

    kind = np.dtype(details["dtype"])
    datatype = _DATATYPES.get(kind.name)
    if datatype is None:
        raise UnsupportedError(f"cannot serve model: '{name}' is {kind.name}, which the protocol has no word for")
    shape, free = details["shape"], details["shape_signature"]
    axes = free if len(free) == len(shape) else shape  # the same with -1 where an axis is free
    spec = TensorSpec(name=name, datatype=datatype, shape=tuple(max(int(axis), -1) for axis in axes))
    return _Tensor(own, int(details["index"]), kind, spec)
