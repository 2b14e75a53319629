"""Several requests in one run: their inputs put one behind the other, the answers parted again along the first axis."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from agent.infer.answering import Resident, respond, response_of, run
from agent.infer.halting import Halt
from agent.infer.tensors import InferRequest, InferResponse

if TYPE_CHECKING:
    from numpy.typing import NDArray


class NotJoinableError(Exception):
    """The model's answers to a batch cannot be parted."""


class Kind(NamedTuple):
    """What members of a batch have in common: names and other axes of the inputs, outputs, parameters."""

    inputs: tuple[tuple[str, tuple[int, ...]], ...]
    outputs: tuple[str, ...]
    parameters: frozenset[tuple[str, type, Any]]


@dataclass(slots=True, eq=False)
class Joining:
    """A request that is to be joined. ``future``: its answer, or None when it is to be answered alone."""

    request: InferRequest
    arrays: dict[str, NDArray[Any]]
    names: tuple[str, ...]
    rows: int
    arrived: float
    deadline: float
    release: Callable[[], None]
    future: asyncio.Future[InferResponse | None]


def alone(resident: Resident, joining: Joining, halt: Halt) -> InferResponse:
    """One run for one request."""
    response = respond(resident, joining.request, joining.arrived, halt)
    figures = {"batch": joining.rows, "batch_requests": 1}
    return replace(response, parameters={**response.parameters, **figures})


def together(resident: Resident, members: list[Joining], halt: Halt) -> list[tuple[Joining, InferResponse]]:
    """One run for all. NotJoinableError where its answers cannot be parted."""
    import numpy as np  # noqa: PLC0415 - loaded with the runtime

    start = time.perf_counter()
    first = members[0]
    arrays = {name: np.concatenate([joining.arrays[name] for joining in members]) for name in first.arrays}
    answers = run(resident, arrays, first.names, halt)
    spent_us = int((time.perf_counter() - start) * 1e6)
    rows = sum(joining.rows for joining in members)
    for name, answer in zip(first.names, answers, strict=True):
        if not answer.shape or answer.shape[0] != rows:
            raise NotJoinableError(f"output '{name}' of {rows} rows has the shape {list(answer.shape)}")
    found = []
    begin = 0
    for joining in members:
        end = begin + joining.rows
        figures = {
            "queue_us": int((start - joining.arrived) * 1e6),
            "compute_us": spent_us,
            "batch": rows,
            "batch_requests": len(members),
        }
        # A kept answer must not keep the whole batch in memory.
        parts = [answer[begin:end].copy() if resident.served.cache else answer[begin:end] for answer in answers]
        found.append((joining, response_of(resident, joining.request, first.names, parts, figures)))
        begin = end
    return found


def size_of(array: NDArray[Any]) -> int:
    """Bytes of what it holds, texts included."""
    return array.nbytes if array.dtype.kind != "O" else sum(map(len, array.ravel().tolist()))
