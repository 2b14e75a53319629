"""The trial child: confines itself, then loads, checks and times one candidate at its parent's word.

Started by exec with two or three inherited descriptors: a control socket, the model, the golden set (or none). It
speaks JSON lines over the control socket: one request, one answer. It holds no key, no path to a file of the store,
and nothing that it says is trusted beyond being numbers.
"""

from __future__ import annotations

import json
import math
import os
import socket
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agent.base.errors import AgentError, DamagedError, PeerError, TryLaterError
from agent.infer.sandbox import Limits, confine, interpreter_folders

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from agent.infer.runtimes.base import Runtime, Session

Operation = Callable[[Mapping[str, Any]], dict[str, Any]]

#: Timed runs take these in turn: enough to vary the input, few enough to hold.
_MOST_EXAMPLES = 16


@dataclass(slots=True)
class Bench:
    """A loaded candidate with the inputs that it is timed on."""

    session: Session
    examples: list[Mapping[str, NDArray[Any]]]
    made_up: bool
    cursor: int = 0

    def run_next(self) -> tuple[float, float]:
        """One run on the next example: when it began (``perf_counter``, the same clock in all processes), seconds."""
        example = self.examples[self.cursor % len(self.examples)]
        self.cursor += 1
        names = [spec.name for spec in self.session.outputs]
        start = time.perf_counter()
        self.session.run(example, names)
        return start, time.perf_counter() - start


def alike(left: NDArray[Any], right: NDArray[Any], tolerance: float) -> bool:
    """Whether two answers are one, but for rounding: numbers may differ by that share of the largest of them."""
    import numpy as np  # noqa: PLC0415 - imported inside the confinement

    if left.shape != right.shape or left.dtype != right.dtype:
        return False
    if left.dtype.kind != "f":
        return bool(np.array_equal(left, right))
    size = float(np.max(np.abs(right[np.isfinite(right)]), initial=0.0))
    return bool(np.allclose(left, right, rtol=tolerance, atol=tolerance * size, equal_nan=True))


class Child:
    """State of the child between requests."""

    def __init__(self, model: int, golden: int | None) -> None:
        self._model = model
        self._golden_descriptor = golden
        self._bench: Bench | None = None
        self._rss_before_load = 0
        self._runtime_now: Runtime | None = None

    def operations(self) -> dict[str, Operation]:
        """What it can be asked."""
        return {
            "prepare": self.prepare,
            "load": self.load,
            "check": self.check,
            "round": self.round,
            "memory": self.memory,
        }

    def prepare(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Import the runtime, so that its memory is not counted as the model's."""
        runtime = self.runtime(request["runtime"])
        if self._golden_descriptor is not None:
            self._golden()
        return {"version": runtime.version, "providers": list(runtime.providers)}

    def load(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Load the model once; answers its signature, the provider that runs it and the time taken."""
        from agent.infer.runtimes.base import LoadOptions  # noqa: PLC0415 - as above

        options = LoadOptions(request["provider"], request["threads"], request.get("parameters", {}))
        self.require_whole(request["runtime"])
        runtime = self.runtime(request["runtime"])
        self._rss_before_load = status_kb("VmRSS")
        start = time.perf_counter()
        session = runtime.load(self._model, options)
        load_s = time.perf_counter() - start
        examples, made_up = self._examples(session, request.get("shapes", {}))
        self._bench = Bench(session, examples, made_up)
        return {
            "load_ms": load_s * 1e3,
            "provider": session.provider,
            "inputs": [spec.model_dump() for spec in session.inputs],
            "outputs": [spec.model_dump() for spec in session.outputs],
        }

    def require_whole(self, runtime: str) -> None:
        """DamagedError for an ONNX model that is none, or keeps tensors elsewhere.

        **Measured**: ONNX Runtime up to 1.22 takes such a "file" to be any file of the process, any descriptor that it
        holds, and any address of its memory. Here that is harmless; in the daemon it would be another model, or a key.
        """
        if runtime == "onnx":
            from agent.bundles.onnx_signature import read_signature  # noqa: PLC0415 - only for ONNX

            try:
                read_signature(self._model, os.fstat(self._model).st_size)
            except PeerError as error:
                text = str(error).replace("cannot read model file", "cannot load model")
                raise DamagedError(text.replace("cannot use model file", "cannot load model")) from error

    def check(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Agreement with the golden outputs, or for made-up inputs only whether the model answers."""
        bench = self._loaded()
        if self._golden_descriptor is None:
            try:
                bench.run_next()
            except PeerError as error:  # made-up inputs may be nonsense to this model: that is a note, no verdict
                return {"agreement": None, "note": str(error)}
            return {"agreement": None}
        return self.judge(bench.session, request["metric"])

    def judge(self, session: Session, metric: Any) -> dict[str, Any]:
        """Agreement with the golden outputs."""
        from agent.bundles.agreement import DisagreementError, agreement, join  # noqa: PLC0415 - imports numpy

        golden, names = self._golden(), list(self._golden().outputs)
        answers = [
            dict(zip(names, session.run(example, names), strict=True)) for example in golden.examples(session.inputs)
        ]
        try:
            value = agreement(metric, golden.outputs, join(answers))
        except DisagreementError as error:
            return {"agreement": None, "disagrees": str(error)}
        return {"agreement": value if math.isfinite(value) else None, "examples": golden.count}

    def round(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Timed runs for about ``seconds``, at least ``least`` of them: every time in ms, and when each began."""
        bench = self._loaded()
        end = time.perf_counter() + request["seconds"]
        times: list[float] = []
        began: list[float] = []
        try:
            while len(times) < request["least"] or (time.perf_counter() < end and len(times) < request["most"]):
                at, took = bench.run_next()
                began.append(at)
                times.append(took * 1e3)
        except PeerError as error:
            if not bench.made_up:
                raise
            return {"times": [], "began": [], "note": str(error)}
        return {"times": times, "began": began}

    def memory(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Peak resident memory since just before the load, in MB: weights, arenas and outputs."""
        peak = status_kb("VmHWM")
        return {"peak_mb": max(0.0, (peak - self._rss_before_load) / 1024)}

    def runtime(self, name: str) -> Runtime:
        """That runtime; one for the life of this process."""
        from agent.infer.runtimes.base import load_runtime  # noqa: PLC0415 - imported inside the confinement

        if self._runtime_now is None:
            self._runtime_now = load_runtime(name)
        return self._runtime_now

    def _loaded(self) -> Bench:
        if self._bench is None:
            raise PeerError("cannot run: nothing is loaded")
        return self._bench

    def _golden(self) -> Any:
        from agent.bundles.agreement import load_golden  # noqa: PLC0415 - as above

        assert self._golden_descriptor is not None
        if not hasattr(self, "_golden_set"):
            self._golden_set = load_golden(self._golden_descriptor)
        return self._golden_set

    def _examples(
        self, session: Session, shapes: Mapping[str, list[int]]
    ) -> tuple[list[Mapping[str, NDArray[Any]]], bool]:
        if self._golden_descriptor is None:
            return [made_up_inputs(session, shapes)], True
        return list(islice(self._golden().examples(session.inputs), _MOST_EXAMPLES)), False


def made_up_inputs(session: Session, shapes: Mapping[str, list[int]]) -> dict[str, NDArray[Any]]:
    """Inputs of the right datatype and shape with small deterministic values; free axes are 1 but for ``shapes``."""
    import numpy as np  # noqa: PLC0415 - imported inside the confinement

    from agent.base.datatypes import NUMPY_NAME  # noqa: PLC0415 - kept beside its only use

    generator = np.random.default_rng(1)
    made: dict[str, NDArray[Any]] = {}
    for spec in session.inputs:
        if spec.optional:
            continue
        shape = tuple(shapes.get(spec.name, [max(1, axis) if axis != 0 else 0 for axis in spec.shape]))
        try:
            if spec.datatype == "BYTES":
                made[spec.name] = np.full(shape, b"0", dtype=object)
            elif spec.datatype == "BOOL":
                made[spec.name] = np.ones(shape, dtype=bool)
            elif spec.datatype.startswith(("INT", "UINT")):
                made[spec.name] = np.ones(shape, dtype=NUMPY_NAME[spec.datatype])
            else:
                made[spec.name] = generator.random(shape, dtype=np.float32).astype(NUMPY_NAME[spec.datatype])
        except (ValueError, MemoryError) as error:  # more elements than there are numbers for, or than memory
            raise PeerError(f"cannot make up input '{spec.name}' of shape {list(shape)}: {error}") from error
    return made


def status_kb(field: str) -> int:
    """A size of this process by its name in proc_pid_status(5)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    return 0


def serve(control: socket.socket, operations: Mapping[str, Operation]) -> None:
    """Answer requests until the parent hangs up. An expected error is an answer; anything else ends the child."""
    with control.makefile("rwb") as stream:
        for line in stream:
            request = json.loads(line)
            try:
                answer = operations[request["op"]](request)
            except (TryLaterError, MemoryError) as error:
                answer = {"error": str(error) or "out of memory", "memory": True}
            except AgentError as error:
                answer = {"error": str(error), "hint": error.hint}
            stream.write(json.dumps(answer).encode() + b"\n")
            stream.flush()


def main() -> None:
    """Entry: ``argv[1]`` is the JSON of the start parameters (descriptors and limits)."""
    confined(lambda start: Child(start["model"], start["golden"]).operations())


def confined(make: Callable[[Mapping[str, Any]], Mapping[str, Operation]]) -> None:
    """Put on the confinement that the start parameters ask for, then answer with what ``make`` can do."""
    start = json.loads(sys.argv[1])
    if start["cpus"]:
        os.sched_setaffinity(0, start["cpus"])
    control = socket.socket(fileno=start["control"])
    limits = Limits(start["data_bytes"], start["cpu_seconds"], start["file_bytes"])
    confinement = confine(interpreter_folders(), [Path(name) for name in start["devices"]], limits)
    hello = {"landlock_abi": confinement.landlock_abi, "pid": os.getpid()}
    control.sendall(json.dumps(hello).encode() + b"\n")
    serve(control, make(start))
