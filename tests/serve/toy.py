"""A numpy-only model server for the tests of serving: real computing, no runtime.

``double`` FP32[-1, 4] -> y = 2x; ``echo`` gives every input back under its name; ``slow`` waits for ``release``;
``full`` has a full queue; ``broken`` raises what nobody expects; ``nan`` answers NaN and Infinity.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Mapping
from typing import Any

import numpy as np

from agent.base.errors import DamagedError, DeadlineError, NotFoundError, PeerError, TryLaterError
from agent.infer.tensors import InferRequest, InferResponse, Tensor

NAMES = ("double", "echo", "slow", "full", "broken", "nan", "late", "damaged", "loading", "big", "soft")


class ToyModels:
    """Satisfies ``agent.serve.inference.ModelServer``."""

    def __init__(self) -> None:
        self.release = asyncio.Event()
        self.is_ready = True
        self.seen: list[InferRequest] = []
        self.cancelled = 0
        self.deadlines: list[float] = []
        self.loads: list[tuple[str, dict[str, Any]]] = []
        self.unloads: list[str] = []

    def server_metadata(self) -> dict[str, Any]:
        return {"name": "toy", "version": "1", "extensions": ["binary_tensor_data"]}

    def ready(self) -> bool:
        return self.is_ready

    def index(self) -> list[dict[str, Any]]:
        return [
            {"name": name, "version": "1.0.0", "state": "UNAVAILABLE" if name == "loading" else "READY", "reason": ""}
            for name in NAMES
        ]

    def model_metadata(self, name: str, version: str | None) -> dict[str, Any]:
        self._find(name, version)
        tensor = {"name": "x", "datatype": "FP32", "shape": [-1, 4]}
        return {"name": name, "versions": ["1.0.0"], "platform": "toy", "inputs": [tensor], "outputs": [tensor]}

    def model_ready(self, name: str, version: str | None) -> bool:
        self._find(name, version)
        return name != "loading"

    def _find(self, name: str, version: str | None) -> None:
        if name not in NAMES or version not in (None, "1.0.0"):
            raise NotFoundError(f"cannot find model '{name}'" + (f" version {version}" if version else ""))

    async def load(self, name: str, parameters: Mapping[str, Any], deadline: float) -> None:
        self._find(name, None)
        if name == "full":
            raise TryLaterError("cannot load model 'full': pinned models leave it no room")
        self.loads.append((name, dict(parameters)))

    def unload(self, name: str) -> int:
        self._find(name, None)
        self.unloads.append(name)
        return 1

    def infer(
        self, name: str, version: str | None, request: InferRequest, deadline: float
    ) -> InferResponse | Awaitable[InferResponse]:
        self._find(name, version)
        self.seen.append(request)
        self.deadlines.append(deadline)
        if name == "slow":
            return self._slowly(request)
        if name in ("full", "loading"):
            raise TryLaterError(f"cannot run '{name}': queue full")
        if name == "late":
            raise DeadlineError("cannot run 'late': deadline passed in the queue")
        if name == "damaged":
            raise DamagedError("cannot run 'damaged': blob damaged", hint="edge-agent store verify")
        if name == "broken":
            raise ZeroDivisionError("a bug")
        return self._answer(name, request)

    def _answer(self, name: str, request: InferRequest) -> InferResponse:
        if name == "echo":
            outputs = request.inputs
        elif name == "nan":
            outputs = (Tensor("y", "FP32", np.array([1.5, np.nan, np.inf], "<f4")),)
        elif name == "big":
            count = int(request.inputs[0].array.ravel()[0])
            outputs = (Tensor("y", "FP32", np.arange(count, dtype="<f4")),)
        elif name == "soft":
            outputs = (Tensor("y", "FP32", np.array([[0.1, 0.7, 0.2]], "<f4")),)
        else:
            x = next((tensor for tensor in request.inputs if tensor.name == "x"), None)
            if x is None:
                raise PeerError("input 'x': missing")
            outputs = (Tensor("y", "FP32", x.array * np.float32(2)),)
        if request.outputs:
            wanted = {output.name for output in request.outputs}
            unknown = wanted - {tensor.name for tensor in outputs}
            if unknown:
                raise PeerError(f"output '{unknown.pop()}': no such output")
            outputs = tuple(tensor for tensor in outputs if tensor.name in wanted)
        parameters = {"variant": "fp32", "backend": "toy", "degraded": False, "queue_us": 3, "compute_us": 5}
        return InferResponse(name, "1.0.0", outputs, request.id, parameters)

    async def _slowly(self, request: InferRequest) -> InferResponse:
        try:
            await self.release.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return self._answer("echo", request)
