"""Preparing a model: the file that loads fastest here is made in a confined child, judged there, handed back sealed.

The child writes into a memory file that only it and we hold; then the file is sealed, so that neither can change what
was judged, and each route of it is loaded side by side with the plain model. A form counts when its answers agree with
the golden set as the variant's have to, or, where there is none, with the plain model's own. What is to answer in the
long run is then run with fewer threads beside all.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from agent.infer import answers
from agent.infer.children import ChildError, ChildLimits, ChildProcess
from agent.infer.forms import ROUTES, Figures, choose_forms, choose_threads, needs_file
from agent.infer.gains import sizes
from agent.infer.runtimes.base import PLAIN, Route
from agent.infer.trial import Entrant, Surroundings, TrialPlan

_F_ADD_SEALS, _SEALS = 1033, 0x1 | 0x2 | 0x4 | 0x8  # linux/fcntl.h: SEAL, SHRINK, GROW, WRITE
_MFD_CLOEXEC, _MFD_ALLOW_SEALING, _MFD_NOEXEC_SEAL = 0x1, 0x2, 0x8
#: An optimized file is about as large as the model; constants that were folded may make it larger.
_LARGEST, _LARGEST_BYTES = 3, 64 << 20
#: Rounds of loads: at least and at most.
_LEAST, _MOST = 6, 80
#: For how long loads are compared where the best times do not show before: on a busy device.
SECONDS = 10.0
#: And the numbers of threads, for so much of that.
_THREADS_SHARE = 0.25

#: A route, and with how many threads.
_Way = tuple[Route, int]


@dataclass(frozen=True, slots=True)
class Prepared:
    """What was found: ``forms`` to open the model in, ``plain`` beside them, and the file that they need, if any.

    ``descriptor`` is sealed and valid until the context ends; ``note`` says why there is nothing better than plain.
    ``threads``: as many as a session is to have, None where that was not found out.
    """

    forms: tuple[Figures, ...] = ()
    plain: Figures | None = None
    descriptor: int | None = None
    note: str = ""
    threads: int | None = None


@contextlib.contextmanager
def prepared(entrant: Entrant, plan: TrialPlan, around: Surroundings, seconds: float = SECONDS) -> Iterator[Prepared]:
    """Prepare a candidate and choose its forms. Never raises for the candidate's fault: it stays plain, with a note."""
    with contextlib.ExitStack() as held:
        try:
            found = _prepare(entrant, plan, around, held, seconds)
        except ChildError as error:
            found = Prepared(note=f"cannot be prepared: {error}"[:300])
        yield found


def _prepare(
    entrant: Entrant, plan: TrialPlan, around: Surroundings, held: contextlib.ExitStack, seconds: float
) -> Prepared:
    model = held.enter_context(entrant.open_model())
    golden = held.enter_context(plan.open_golden()) if plan.open_golden else None
    target = _memory_file(held)
    size = os.fstat(model.fd).st_size
    most = _LARGEST * size + _LARGEST_BYTES
    child = held.enter_context(
        ChildProcess(
            {"model": model.fd, "golden": golden.fd if golden else None, "prepared": target},
            ChildLimits(plan.memory_mb + most // (1 << 20), start_s=plan.load_timeout_s),
            cpus=plan.cpus,
            module="agent.infer.preparing_child",
            file_bytes=most,
            go_on=around.go_on,
        )
    )
    child.greet()
    key = entrant.key
    child.call("prepare", plan.load_timeout_s, runtime=key.runtime)
    child.call(
        "write",
        plan.load_timeout_s,
        runtime=key.runtime,
        provider=key.provider,
        threads=key.threads,
        parameters=dict(entrant.parameters),
        shapes=dict(plan.shapes),
    )
    if not os.fstat(target).st_size:
        raise ChildError("crashed", "wrote nothing")
    _seal(target)
    all_threads, prepared_size = entrant.key.threads, os.fstat(target).st_size
    found, _ = _compare(child, plan, seconds, [(route, all_threads) for route in ROUTES])
    measured = [
        _figures(route, answer, size if route == PLAIN else prepared_size) for (route, _), answer in found.items()
    ]
    chosen = _chosen(measured, target, lambda route: _agrees(child, plan, (route, all_threads)))
    try:
        return replace(chosen, threads=_threads(child, plan, seconds, chosen.forms, all_threads))
    except ChildError as error:  # the forms were judged before, and their file is sealed
        return replace(chosen, note=chosen.note or f"its threads could not be compared: {error}"[:300])


def _compare(
    child: ChildProcess, plan: TrialPlan, seconds: float, ways: Sequence[_Way]
) -> tuple[dict[_Way, Mapping[str, Any]], bool]:
    """What was measured of every way that loads; whether each input has the same shape in all requests."""
    answer = child.call(
        "compare",
        plan.check_timeout_s,
        ways=[[route.kind, route.prepack, threads] for route, threads in ways],
        seconds=seconds,
        least=_LEAST,
        most=_MOST,
    )
    found = answer.get("ways")
    if not isinstance(found, list) or len(found) != len(ways) or not all(isinstance(one, dict) for one in found):
        raise ChildError("crashed", "answered with nonsense for 'ways'")
    return {way: one for way, one in zip(ways, found, strict=True) if "error" not in one}, answer.get("fixed") is True


def _threads(child: ChildProcess, plan: TrialPlan, seconds: float, forms: Sequence[Figures], most: int) -> int | None:
    """How many threads a session is to have, by the form for the long run.

    None where requests may be larger than what was measured, so that they may gain where the measured ones did not.
    """
    if not forms or most < 2:
        return None
    counts = sizes(most)
    found, fixed = _compare(child, plan, seconds * _THREADS_SHARE, [(forms[-1].route, count) for count in counts])
    if not fixed or len(found) != len(counts):
        return None
    runs = {count: _shortest(answer, "run") for (_, count), answer in found.items()}
    threads = choose_threads(runs)
    agree = threads == most or not any(_agrees(child, plan, (form.route, threads)) for form in forms)
    return threads if agree else None


def _shortest(answer: Mapping[str, Any], name: str) -> float:
    """In seconds, of several: whatever else the device does makes them longer, never shorter."""
    return min(answers.numbers(answer, name, _MOST)) / 1e3


def _figures(route: Route, answer: Mapping[str, Any], size: int) -> Figures:
    shared = answers.number(answer, "shared_kb") * 1024
    return Figures(
        route,
        _shortest(answer, "load"),
        _shortest(answer, "first"),
        _shortest(answer, "run"),
        own=int(answers.number(answer, "own_kb") * 1024),
        size=size,
        shares=shared >= size / 2,
    )


def _chosen(figures: Sequence[Figures], descriptor: int, agrees: Callable[[Route], str]) -> Prepared:
    """The best forms whose answers are right. One that is wrong is taken out, and the others are chosen from again."""
    left = list(figures)
    note = ""
    while True:
        plain = next((one for one in left if one.route == PLAIN), None)
        if plain is None:
            return Prepared(note="cannot be prepared: the plain model did not load beside its other forms")
        forms = choose_forms(left)
        if not needs_file(forms):
            return Prepared(forms, plain, note=note or "nothing answers sooner than the plain model")
        wrong = next(((one, why) for one in forms if one.route != PLAIN and (why := agrees(one.route))), None)
        if wrong is None:
            return Prepared(forms, plain, descriptor, note)
        note = f"form {wrong[0].name} is not used: {wrong[1]}"[:300]
        left = [one for one in left if one.route != wrong[0].route]


def _agrees(child: ChildProcess, plan: TrialPlan, way: _Way) -> str:
    """Empty where its answers are right, else what is wrong with them."""
    route, threads = way
    asked = [route.kind, route.prepack]
    answer = child.call("agree", plan.check_timeout_s, route=asked, threads=threads, metric=plan.metric)
    if plan.open_golden is None:
        return "" if answer.get("same") is True else "its answers are not the plain model's"
    value = answers.optional_number(answer, "agreement")
    if value is None:
        return answers.text(answer, "disagrees") or "its answers are not finite numbers"
    return "" if plan.passes(value) else f"{plan.metric} {value:.4g}, {plan.threshold:g} is asked for"


def _memory_file(held: contextlib.ExitStack) -> int:
    flags = _MFD_CLOEXEC | _MFD_ALLOW_SEALING
    try:
        descriptor = os.memfd_create("edge-agent", flags | _MFD_NOEXEC_SEAL)
    except OSError:  # before kernel 6.3
        try:
            descriptor = os.memfd_create("edge-agent", flags)
        except OSError as error:
            raise ChildError("refused", f"no memory file: {error.strerror}") from error
    held.callback(os.close, descriptor)
    return descriptor


def _seal(descriptor: int) -> None:
    try:
        fcntl.fcntl(descriptor, _F_ADD_SEALS, _SEALS)
    except OSError as error:  # a child that keeps it mapped could change it afterwards
        raise ChildError("refused", f"the file that was written cannot be sealed: {error.strerror}") from error
