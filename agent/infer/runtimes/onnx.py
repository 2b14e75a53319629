"""ONNX Runtime behind the runtime port.

The model is opened by path (``/proc/self/fd/N`` of a memfd): ONNX Runtime then reads it once and keeps no second copy.
Threads never spin for long, since that costs half a core at ten requests a second; a few microseconds between two
operators of one run, where the release can be told how long. Off is the Python binding's own fallback to other
providers: it would open that path again when the descriptor is somebody else's, and prints what it does.

All sessions of the process share one arena for what a run needs in between. **Measured**, MobileNetV2: a session with
an arena of its own holds 10 MB more, and its first run waits for as many fresh pages (3 ms of 6). ``trim`` gives back
what of it is free. Weights are never in the arena, so that closing a session frees them.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from agent.base.datatypes import Datatype
from agent.base.errors import DamagedError, DeadlineError, PeerError, TryLaterError, UnsupportedError
from agent.bundles.manifest import TensorSpec
from agent.infer.runtimes.base import LoadOptions, Route
from agent.infer.runtimes.failures import (
    DoubtfulError,
    ProviderLostError,
    RunError,
    is_device_failure,
    is_shortage,
    one_line,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from agent.infer.halting import Halt

CPU_PROVIDER = "CPUExecutionProvider"
_DATATYPES: dict[str, Datatype] = {
    "tensor(bool)": "BOOL",
    "tensor(uint8)": "UINT8",
    "tensor(uint16)": "UINT16",
    "tensor(uint32)": "UINT32",
    "tensor(uint64)": "UINT64",
    "tensor(int8)": "INT8",
    "tensor(int16)": "INT16",
    "tensor(int32)": "INT32",
    "tensor(int64)": "INT64",
    "tensor(float16)": "FP16",
    "tensor(float)": "FP32",
    "tensor(double)": "FP64",
    "tensor(bfloat16)": "BF16",
    "tensor(string)": "BYTES",
}
#: For how long a thread looks out for more work before it sleeps, and the first release that can be told so: others
#: would spin for milliseconds, also between runs. **Measured**, two threads on two cores: MobileNetV2 and MiniLM, fp32
#: and int8, run 9 to 22 % faster for no more processor time; beside another busy process 3 to 17 % slower.
_SPIN_US, _SPIN_SINCE = 10, (1, 26)
#: The smallest model: one number that comes out as it went in.
_SMALLEST = bytes.fromhex(
    "080612003a360a100a017812017922084964656e7469747912005a0f0a0178120a0a08080112040a020801"
    "620f0a0179120a0a08080112040a02080142040a00100b"
)


class OnnxRuntime:
    """The installed onnxruntime, whoever installed it (a Jetson build is respected)."""

    name = "onnx"

    def __init__(self) -> None:
        # Newer releases would otherwise keep a device id and a database of events in the home folder.
        os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
        try:
            import onnxruntime  # noqa: PLC0415 - imported at first use: it costs 30 MB and 0.1 s
        except ImportError as error:
            raise UnsupportedError(
                f"cannot load runtime 'onnx': {error}", hint="install the extra: pip install 'edge-agent[onnx]'"
            ) from error
        # Severity 4 = nothing: errors come as exceptions, and its lines would bring a model's own words, whatever
        # characters they hold, into the log.
        onnxruntime.set_default_logger_severity(4)
        self._library = onnxruntime
        self._errors = _exceptions_of(onnxruntime)
        self.version: str = onnxruntime.__version__
        self.providers: tuple[str, ...] = tuple(onnxruntime.get_available_providers())
        self._shares_arena = _share_arena(onnxruntime, self._errors)
        self._spinning = spinning(self.version)
        self._smallest: Any = None
        self._kept: dict[tuple[int, Route], Any] = {}

    def load(self, descriptor: int, options: LoadOptions) -> OnnxSession:
        """A session on ``options.provider``; ONNX Runtime adds the CPU provider for nodes that it cannot place."""
        if options.provider not in self.providers:
            raise UnsupportedError(f"cannot load model: provider {options.provider} is not in this ONNX Runtime")
        settings = self._kept_settings(options)
        return OnnxSession(self._open(f"/proc/self/fd/{descriptor}", options, settings), self._library)

    def prepare(self, descriptor: int, target: int, options: LoadOptions) -> None:
        """Write the model with its graph optimized for this machine and release into ``target``, in ONNX Runtime's own
        format: what the routes ``ort`` and ``mapped`` load."""
        settings = self._settings(options)
        settings.graph_optimization_level = self._library.GraphOptimizationLevel.ORT_ENABLE_ALL
        settings.add_session_config_entry("session.save_model_format", "ORT")
        settings.optimized_model_filepath = f"/proc/self/fd/{target}"
        self._open(f"/proc/self/fd/{descriptor}", options, settings)

    def trim(self) -> None:
        """Give back what of the arena is free: a run that is told to do so does it at its end, whatever it runs."""
        if not self._shares_arena:
            return
        import numpy as np  # noqa: PLC0415 - loaded with the runtime

        if self._smallest is None:
            options = LoadOptions(CPU_PROVIDER)
            self._smallest = self._open(_SMALLEST, options, self._settings(options))
        how = self._library.RunOptions()
        how.log_severity_level = 4
        how.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
        with contextlib.suppress(*self._errors):  # nothing is lost but memory
            self._smallest.run(None, {"x": np.zeros(1, np.float32)}, how)

    def _kept_settings(self, options: LoadOptions) -> Any:
        """Made once, where a session leaves them as they are. **Measured**: making them is a twentieth of a load."""
        if options.provider != CPU_PROVIDER:
            return self._settings(options)
        way = (options.threads, options.route)
        if way not in self._kept:
            self._kept[way] = self._settings(options)
        return self._kept[way]

    def _settings(self, options: LoadOptions) -> Any:
        settings = self._library.SessionOptions()
        settings.intra_op_num_threads = options.threads
        settings.inter_op_num_threads = 1
        settings.log_severity_level = 4
        entries = {"session.inter_op.allow_spinning": "0", **self._spinning}
        if self._shares_arena:
            entries |= {"session.use_env_allocators": "1", "session.use_device_allocator_for_initializers": "1"}
        if options.route.kind != "plain":
            entries["session.load_model_format"] = "ORT"
        if options.route.kind == "mapped":
            entries |= {
                "session.use_memory_mapped_ort_model": "1",
                "session.use_ort_model_bytes_for_initializers": "1",
            }
        if not options.route.prepack:
            entries["session.disable_prepacking"] = "1"
        for name, value in entries.items():
            settings.add_session_config_entry(name, value)
        return settings

    def _open(self, model: str | bytes, options: LoadOptions, settings: Any) -> Any:
        try:
            session = self._library.InferenceSession(
                model, sess_options=settings, providers=[options.provider], enable_fallback=0
            )
            session.disable_fallback()  # releases before 1.24 do not know the argument
        except self._errors as error:
            if is_shortage(error):
                raise TryLaterError(f"cannot load model: out of memory: {one_line(error)}") from error
            raise DamagedError(f"cannot load model: ONNX Runtime: {one_line(error)}") from error
        return session


class OnnxSession:
    """An ``InferenceSession``; ``run`` releases the GIL and may be called from several threads."""

    concurrent = True

    def __init__(self, session: Any, library: Any) -> None:
        self._session = session
        self._options: Callable[[], Any] = library.RunOptions
        self._errors = _exceptions_of(library)
        state = library.capi.onnxruntime_pybind11_state
        self._provider_failed: type[Exception] = state.EPFail
        self._input_refused: type[Exception] = state.InvalidArgument
        self.inputs = tuple(_spec(node) for node in session.get_inputs()) + tuple(
            _spec(node, optional=True) for node in session.get_overridable_initializers()
        )
        self.outputs = tuple(_spec(node) for node in session.get_outputs())
        self.provider: str = session.get_providers()[0]
        # A run ends between two operators; other providers may make one of the whole model.
        self.stoppable = self.provider == CPU_PROVIDER
        self._strings = frozenset(spec.name for spec in self.inputs if spec.datatype == "BYTES")
        self._string_outputs = frozenset(spec.name for spec in self.outputs if spec.datatype == "BYTES")

    def run(
        self, inputs: Mapping[str, NDArray[Any]], outputs: Sequence[str], halt: Halt | None = None
    ) -> list[NDArray[Any]]:
        """One answer; strings go in and come out as ``bytes``.

        RunError with the runtime's reason, DoubtfulError where a provider may be the cause; TryLaterError when memory
        fails, ProviderLostError when the provider does; DeadlineError when ``halt`` ended it between two operators.
        """
        options = None
        if halt is not None:
            options = self._options()
            options.log_severity_level = 4
            halt.bind(partial(setattr, options, "terminate", True))
        if self._strings:
            inputs = {name: _text(name, a) if name in self._strings else a for name, a in inputs.items()}
        try:
            answers: list[NDArray[Any]] = self._session.run(list(outputs), inputs, options)
        except self._errors as error:
            if halt is not None and halt.requested:
                raise DeadlineError("cannot run model: it was told to end") from error
            if is_shortage(error):
                raise TryLaterError(f"cannot run model: out of memory: {one_line(error)}") from error
            elsewhere = self.provider != CPU_PROVIDER
            if isinstance(error, self._provider_failed) or (elsewhere and is_device_failure(str(error))):
                raise ProviderLostError(f"cannot run model: {self.provider} failed: {one_line(error)}") from error
            if elsewhere and not isinstance(error, self._input_refused):
                raise DoubtfulError(f"cannot run model: {self.provider}: {one_line(error)}") from error
            raise RunError(f"cannot run model: ONNX Runtime: {one_line(error)}") from error
        if self._string_outputs:
            return [
                _octets(answer) if name in self._string_outputs else answer
                for name, answer in zip(outputs, answers, strict=True)
            ]
        return answers

    def close(self) -> None:
        self._session = None


def spinning(version: str) -> dict[str, str]:
    """How long threads look out for more work, as entries of a session's configuration, for that release."""
    found = re.match(r"(\d+)\.(\d+)", version)
    if found is None or tuple(map(int, found.groups())) < _SPIN_SINCE:
        return {"session.intra_op.allow_spinning": "0"}
    return {"session.intra_op.allow_spinning": "1", "session.intra_op.spin_duration_us": str(_SPIN_US)}


def _share_arena(library: Any, errors: tuple[type[Exception], ...]) -> bool:
    """Have one arena for all sessions that ask for it; whether there is one. It grows by what is asked for, no more."""
    try:
        where = library.OrtMemoryInfo(
            "Cpu", library.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, library.OrtMemType.DEFAULT
        )
        library.create_and_register_allocator(where, library.OrtArenaCfg(0, 1, -1, -1))
    except AttributeError:
        return False
    except errors as error:
        return "already been registered" in str(error)
    return True


def _exceptions_of(library: Any) -> tuple[type[Exception], ...]:
    """What ONNX Runtime raises: its own classes, which share no base but Exception, and the binding's."""
    state = library.capi.onnxruntime_pybind11_state
    own = [kind for kind in vars(state).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    return (*own, RuntimeError, ValueError, TypeError)


def _spec(node: Any, *, optional: bool = False) -> TensorSpec:
    datatype = _DATATYPES.get(node.type)
    if datatype is None:
        raise UnsupportedError(f"cannot serve model: '{node.name}' is a {node.type}, only tensors are served")
    shape = tuple(axis if isinstance(axis, int) and axis >= 0 else -1 for axis in node.shape or ())
    return TensorSpec(name=node.name, datatype=datatype, shape=shape, optional=optional)


def _text(name: str, array: NDArray[Any]) -> NDArray[Any]:
    """ONNX strings are UTF-8: an object array of ``str``, the only form that the binding converts rightly."""
    import numpy as np  # noqa: PLC0415 - loaded long before the first run

    texts = np.empty(array.shape, dtype=object)
    flat = texts.reshape(-1)
    for index, element in enumerate(array.reshape(-1)):
        try:
            flat[index] = element.decode() if isinstance(element, bytes) else str(element)
        except UnicodeDecodeError as error:
            raise PeerError(f"input '{name}': element {index} is not UTF-8") from error
    return texts


def _octets(array: NDArray[Any]) -> NDArray[Any]:
    import numpy as np  # noqa: PLC0415 - loaded long before the first run

    octets = np.empty(array.shape, dtype=object)
    flat = octets.reshape(-1)
    for index, element in enumerate(array.reshape(-1)):
        flat[index] = element if isinstance(element, bytes) else str(element).encode()
    return octets
