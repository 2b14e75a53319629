"""Gauging batches: a confined child says whether requests for a candidate may be joined, and what that saves."""

from __future__ import annotations

import contextlib

from agent.bundles.manifest import TensorSpec
from agent.infer import answers
from agent.infer.children import ChildError, ChildLimits, ChildProcess
from agent.infer.gains import Gain, not_free, sizes
from agent.infer.trial import Entrant, Surroundings, TrialPlan

#: For how long the sizes are timed side by side.
SECONDS = 1.5
#: A batch may take so much more memory than what the trial saw; the engine drops a session that takes much more.
_MOST_KB = 48 * 1024


def gauged(entrant: Entrant, plan: TrialPlan, around: Surroundings, max_size: int, seconds: float = SECONDS) -> Gain:
    """What joining up to ``max_size`` rows gains. Where the candidate fails there is no gain, with a note."""
    try:
        return _gauge(entrant, plan, around, max_size, seconds)
    except ChildError as error:
        return Gain(note=f"batches could not be tried: {error}"[:300])


def _gauge(entrant: Entrant, plan: TrialPlan, around: Surroundings, max_size: int, seconds: float) -> Gain:
    with contextlib.ExitStack() as held:
        model = held.enter_context(entrant.open_model())
        golden = held.enter_context(plan.open_golden()) if plan.open_golden else None
        child = held.enter_context(
            ChildProcess(
                {"model": model.fd, "golden": golden.fd if golden else None},
                ChildLimits(plan.memory_mb, start_s=plan.load_timeout_s),
                cpus=plan.cpus,
                devices=entrant.devices,
                module="agent.infer.batch_child",
                go_on=around.go_on,
            )
        )
        child.greet()
        key = entrant.key
        child.call("prepare", plan.load_timeout_s, runtime=key.runtime)
        loaded = child.call(
            "load",
            plan.load_timeout_s,
            runtime=key.runtime,
            provider=key.provider,
            threads=key.threads,
            parameters=dict(entrant.parameters),
            shapes=dict(plan.shapes),
        )
        inputs, outputs = (
            [TensorSpec.model_validate(row) for row in answers.tensors(loaded, name)] for name in ("inputs", "outputs")
        )
        if reason := not_free(inputs, outputs):
            return Gain(note=reason)
        if reason := _wrong(child, plan, max_size):
            return Gain(note=reason)
        wanted = sizes(max_size)
        found = child.call("times", plan.check_timeout_s, sizes=list(wanted), seconds=seconds, most_kb=_MOST_KB)
        tried = [int(rows) for rows in answers.numbers(found, "sizes", len(wanted))]
        times = answers.numbers(found, "times", len(wanted))
        pairs = tuple((rows, ms / 1e3) for rows, ms in zip(tried, times, strict=True))
        return Gain(pairs, int(answers.number(found, "row_bytes")))


def _wrong(child: ChildProcess, plan: TrialPlan, max_size: int) -> str:
    """Why requests may not be joined; empty where they may."""
    answer = child.call("together", plan.check_timeout_s, size=max_size, metric=plan.metric)
    if reason := answers.text(answer, "reason"):
        return reason
    if plan.open_golden is None or "agreement" not in answer:
        return ""
    value = answers.optional_number(answer, "agreement")
    if value is None:
        return "answers of a batch are not finite numbers"
    if plan.passes(value):
        return ""
    return (
        f"answers of a batch disagree with the golden set: {plan.metric} {value:.4g}, {plan.threshold:g} is asked for"
    )
