"""The runtime port: what the engine and the trial child need from an inference runtime.

A runtime loads a model from a descriptor (a sealed memfd in practice), never from bytes: ONNX Runtime copies
``bytes`` and keeps them alive. A loaded session may be run from several threads unless ``concurrent`` says otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

from agent.base.errors import UnsupportedError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from agent.bundles.manifest import TensorSpec
    from agent.infer.halting import Halt


@dataclass(frozen=True, slots=True)
class Route:
    """What a file is and what to make of it; each runtime knows routes of its own besides the plain one.

    ``kind``: ``plain``, the model as it came; ``ort``, ONNX Runtime's own format with the graph optimized already;
    ``mapped``, the same with the weights left where the file is. ``prepack``: rearrange weights for faster runs.
    """

    kind: Literal["plain", "ort", "mapped"] = "plain"
    prepack: bool = True


PLAIN = Route()


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """How to load: ONNX Runtime's provider name, or TFLite's (``cpu``); threads of one run; free options.

    ``identity``: a digest that stands for the file's bytes, where they are known to be those and no others. What was
    found sound once is not looked through again then.
    """

    provider: str
    threads: int = 1
    parameters: Mapping[str, Any] = field(default_factory=dict)
    route: Route = PLAIN
    identity: str = ""


class Session(Protocol):
    """A loaded model."""

    #: Signature as the file has it; BYTES for strings.
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    #: The provider that really runs the first node, which may not be the one that was asked for.
    provider: str
    #: Whether ``run`` may be called from several threads at once.
    concurrent: bool
    #: Whether ``run`` ends when its ``halt`` is requested. Others keep their thread until they end by themselves.
    stoppable: bool

    def run(
        self, inputs: Mapping[str, NDArray[Any]], outputs: Sequence[str], halt: Halt | None = None
    ) -> list[NDArray[Any]]:
        """One answer. PeerError for inputs that the model refuses, DeadlineError when ``halt`` ended it."""
        ...

    def close(self) -> None:
        """Free its memory; the session cannot be used afterwards. The allocator may keep it for the next one."""
        ...


class Runtime(Protocol):
    """An inference library."""

    name: str
    version: str
    providers: tuple[str, ...]

    def load(self, descriptor: int, options: LoadOptions) -> Session:
        """A session from an open file; DamagedError where the runtime cannot load the model."""
        ...

    def prepare(self, descriptor: int, target: int, options: LoadOptions) -> None:
        """Write what loads faster here into ``target``. UnsupportedError where the runtime has no such form."""
        ...

    def trim(self) -> None:
        """Give back what no session needs; the allocator's own is another matter (``return_memory``)."""
        ...


def load_runtime(name: str) -> Runtime:
    """The runtime of that name, imported now. UnsupportedError where it is not installed."""
    if name == "onnx":
        from agent.infer.runtimes.onnx import OnnxRuntime  # noqa: PLC0415 - a runtime is imported at first use

        return OnnxRuntime()
    if name == "tflite":
        from agent.infer.runtimes.tflite import TfliteRuntime  # noqa: PLC0415 - as above

        return TfliteRuntime()
    raise UnsupportedError(f"cannot load runtime '{name}': this version of the agent has no support for it")
