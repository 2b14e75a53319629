"""The cascade at work: the first variant answers, the unsure examples go to the next, and what that saved is counted.

Under pressure of the governor nothing goes on: the first answer stands, degraded. What is saved is told against the
larger variant alone: what it took for an example so far, times the examples, less what was really spent.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any

from agent.base.errors import DamagedError
from agent.infer import cascade as stages
from agent.infer.answering import Key, as_asked
from agent.infer.cascade import Cascade
from agent.infer.picking import of_variant
from agent.infer.shelf import Option, Served
from agent.infer.tensors import InferRequest, InferResponse
from agent.infer.wishes import Wishes

#: (served, request, deadline, wishes, options) -> the answer of one of the options.
Ask = Callable[[Served, InferRequest, float, Wishes, Sequence[Option]], Awaitable[InferResponse]]


class Cascading:
    """``hurried`` says why nothing shall go on to the larger variant of that version now; empty where it may."""

    def __init__(self, ask: Ask, hurried: Callable[[Served], str]) -> None:
        self._ask = ask
        self._hurried = hurried
        self._took_us: dict[Key, float] = {}

    async def answer(
        self, served: Served, cascade: Cascade, request: InferRequest, deadline: float, wishes: Wishes
    ) -> InferResponse:
        """The answer, and in its parameters which stage gave it."""
        firsts, thens = of_variant(served, cascade.first), of_variant(served, cascade.then)
        asked = stages.with_output(request, cascade.output)
        try:
            first = await self._ask(served, asked, deadline, wishes, firsts)
        except DamagedError as error:  # it cannot be had: the other one answers alone, and says why
            return as_asked(await self._ask(served, request, deadline, wishes, thens), firsts[0], str(error))
        scores = next(tensor.array for tensor in first.outputs if tensor.name == cascade.output)
        sure = stages.confidences(scores, cascade.measure)
        count = stages.rows_of(request) if cascade.by_row else None
        unsure = (sure < cascade.threshold).nonzero()[0]
        rows = count if count is not None and count == len(sure) else 1
        if not len(unsure):
            return self._told(served, thens[0], request, first, None, rows, 0)
        if why := self._hurried(served):
            held = {**first.parameters, "degraded": True, "degraded_because": why}
            return self._told(served, thens[0], request, replace(first, parameters=held), None, rows, 0)
        if rows > 1 and len(unsure) < rows:
            then = await self._ask(served, stages.part(asked, unsure), deadline, wishes, thens)
            outputs = stages.joined(first, then, unsure)
            if outputs is not None:
                then = replace(then, outputs=outputs)
                return self._told(served, thens[0], request, first, then, rows, len(unsure))
        then = await self._ask(served, request, deadline, wishes, thens)
        return self._told(served, thens[0], request, first, then, rows, rows)

    def _told(
        self,
        served: Served,
        large: Option,
        request: InferRequest,
        first: InferResponse,
        then: InferResponse | None,
        rows: int,
        escalated: int,
    ) -> InferResponse:
        """One answer out of both, without what only the cascade asked for."""
        last = then or first
        spent = _microseconds(first) + (_microseconds(then) if then is not None else 0)
        alone = self._alone_us(served, large, then, escalated) * rows
        said: dict[str, Any] = {
            **last.parameters,
            "compute_us": spent,
            "queue_us": int(first.parameters.get("queue_us", 0)) + (int(then.parameters["queue_us"]) if then else 0),
            "cascade": "first" if not escalated else "then" if escalated == rows else "both",
            "cascade_rows": rows,
            "cascade_escalated": escalated,
            "cascade_saved_us": int(alone - spent),
        }
        if first.parameters["degraded"] and not said["degraded"]:
            said |= {"degraded": True, "degraded_because": first.parameters.get("degraded_because", "")}
        names = {output.name for output in request.outputs}
        outputs = tuple(tensor for tensor in last.outputs if not names or tensor.name in names)
        return replace(last, outputs=outputs, id=request.id, parameters=said)

    def _alone_us(self, served: Served, large: Option, then: InferResponse | None, rows: int) -> float:
        """What the larger variant takes for one example: as it was measured, corrected by what it took since."""
        key = (served.model, served.version)
        known = self._took_us.get(key, 1000.0 * (large.p50_ms or large.p95_ms or 0.0))
        if then is not None and rows:
            took = _microseconds(then) / rows
            known = self._took_us[key] = known + (took - known) / 8 if known else took
        return known


def _microseconds(response: InferResponse) -> int:
    return int(response.parameters.get("compute_us", 0))
