"""A loaded session that answers: one run, from a request's tensors to a response that says what really ran.

A model whose measured p95 is below ``INLINE_P95_MS`` runs on the event loop itself, for a thread would cost more than
that: with inputs of shapes that were quick in a thread before, and only where the run can be ended when the values make
it long. A session that is not ``concurrent`` runs one request at a time.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from agent.base.errors import DamagedError, PeerError, TryLaterError
from agent.infer.halting import Halt
from agent.infer.runtimes.base import Session
from agent.infer.shelf import Form, Option, Served, SessionName
from agent.infer.tensors import InferRequest, InferResponse, Tensor, check_inputs

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from agent.bundles.manifest import TensorSpec
    from agent.infer.joining import Joint

INLINE_P95_MS = 0.3
#: A run in a thread that was shorter proves its shapes fit for the loop; the first one after a load is slower.
_QUICK_US = 3000
#: Shapes that are remembered for each session.
_MOST_SHAPES = 64

Key = tuple[str, str]
Shapes = tuple[tuple[int, ...], ...]


@dataclass(slots=True)
class Resident:
    """A session that can answer, and what the engine knows of it. ``retired``: it will be closed once it is idle.

    ``asked_for``: requests pick its option, whichever stands for the version.
    """

    name: SessionName
    served: Served
    option: Option
    form: Form
    session: Session
    degraded_because: str = ""
    retired: bool = False
    asked_for: bool = False
    #: Runs in a row that it refused and another option did not.
    doubts: int = 0
    output_names: tuple[str, ...] = ()
    outputs: dict[str, TensorSpec] = field(default_factory=dict)
    #: Held by the request that runs, where the session takes only one at a time.
    turn: asyncio.Lock | None = None
    #: Whether the model is fast enough for the event loop, and its runs can be ended.
    fast: bool = False
    #: Shapes of inputs that ran quickly in a thread.
    quick: set[Shapes] = field(default_factory=set)
    outgrown: bool = False
    #: Seconds that runs took longer than those of the form that would take over.
    wasted_s: float = 0.0
    #: Where its requests are joined to batches, as the shelf ``joint_for`` wants it; None: each runs alone.
    joint: Joint | None = None
    joint_for: Served | None = None

    @property
    def key(self) -> Key:
        """Model and version."""
        return (self.name.model, self.name.version)

    def fits_the_loop(self, request: InferRequest) -> bool:
        """Whether this request may run on the event loop now: it will be quick, and nobody is at the session."""
        return self.fast and shapes_of(request) in self.quick and (self.turn is None or not self.turn.locked())

    def ran(self, request: InferRequest, compute_us: int) -> None:
        """A run in a thread has ended well: its shapes may be fit for the loop."""
        if self.fast and compute_us < _QUICK_US and len(self.quick) < _MOST_SHAPES:
            self.quick.add(shapes_of(request))


def make_resident(
    name: SessionName, served: Served, option: Option, form: Form, session: Session, *, loop_fit: bool
) -> Resident:
    """A resident for a session that was just loaded."""
    quick = option.p95_ms is not None and option.p95_ms < INLINE_P95_MS
    return Resident(
        name,
        served,
        option,
        form,
        session,
        output_names=tuple(spec.name for spec in served.outputs),
        outputs={spec.name: spec for spec in session.outputs},
        turn=None if session.concurrent else asyncio.Lock(),
        fast=quick and session.stoppable and loop_fit,
    )


def shapes_of(request: InferRequest) -> Shapes:
    """The shapes of the inputs, in the request's order."""
    return tuple([tensor.array.shape for tensor in request.inputs])


def require_options(served: Served) -> None:
    """DamagedError where nothing can answer."""
    if not served.options:
        raise DamagedError(f"model '{served.model}': {served.reason or 'no variant can answer'}")


def respond(resident: Resident, request: InferRequest, arrived: float, halt: Halt) -> InferResponse:
    """One run in the calling thread. DeadlineError when ``halt`` ended it. ``arrived``: ``perf_counter``, 0 for now."""
    start = time.perf_counter()
    arrays = check_inputs(resident.served.inputs, request.inputs)
    names = wanted(resident, request)
    answers = run(resident, arrays, names, halt)
    spent_us = int((time.perf_counter() - start) * 1e6)
    queue_us = int((start - arrived) * 1e6) if arrived else 0
    return response_of(resident, request, names, answers, {"queue_us": queue_us, "compute_us": spent_us})


def run(
    resident: Resident, arrays: Mapping[str, NDArray[Any]], names: tuple[str, ...], halt: Halt
) -> list[NDArray[Any]]:
    """The session's answers in the calling thread. DeadlineError when ``halt`` ended it."""
    try:
        return resident.session.run(arrays, names, halt)
    except MemoryError as error:
        raise TryLaterError("cannot run model: out of memory") from error


def response_of(
    resident: Resident,
    request: InferRequest,
    names: tuple[str, ...],
    answers: Sequence[NDArray[Any]],
    figures: Mapping[str, Any],
) -> InferResponse:
    """The response that says what really ran. ``figures`` are those of the run."""
    option = resident.option
    best = resident.served.options[0] if resident.served.options else option
    because = {"degraded_because": resident.degraded_because} if resident.degraded_because else {}
    return InferResponse(
        model_name=resident.name.model,
        model_version=resident.name.version,
        id=request.id,
        outputs=tuple(
            Tensor(name, resident.outputs[name].datatype, answer) for name, answer in zip(names, answers, strict=True)
        ),
        parameters={
            "variant": option.variant,
            "backend": resident.session.provider,
            "requested_variant": best.variant,
            "requested_backend": best.provider,
            "degraded": bool(resident.degraded_because),
            **because,
            "cache": "off",
            **figures,
        },
    )


def as_asked(response: InferResponse, wanted: Option, because: str) -> InferResponse:
    """The answer to a request that picked an option itself: ``wanted``, or another for that reason."""
    said = {**response.parameters, "requested_variant": wanted.variant, "requested_backend": wanted.provider}
    said.pop("degraded_because", None)
    said["degraded"] = bool(because)
    if because:
        said["degraded_because"] = because
    return replace(response, parameters=said)


def wanted(resident: Resident, request: InferRequest) -> tuple[str, ...]:
    """Names of the outputs that are asked for. PeerError for one that the model does not have."""
    if not request.outputs:
        return resident.output_names
    names = tuple(output.name for output in request.outputs)
    for name in names:
        if name not in resident.outputs:
            raise PeerError(f"output '{name}': no such output; the model has {', '.join(resident.output_names)}")
    return names


def described(resident: Resident) -> dict[str, Any]:
    """For ``status``."""
    best = resident.served.options[0]
    return {
        "model": resident.name.model,
        "version": resident.name.version,
        "requested_variant": best.variant,
        "requested_backend": best.provider,
        "variant": resident.option.variant,
        "backend": resident.session.provider,
        "form": resident.form.name,
        "threads": resident.option.threads,
        "mb": round((resident.form.session + (resident.form.size if resident.form.shares else 0)) / (1 << 20), 1),
        "degraded": bool(resident.degraded_because),
        "reason": resident.degraded_because,
        "batching": None if resident.joint is None else resident.joint.describe(),
    }
