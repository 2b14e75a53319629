"""The child that prepares a model: writes the optimized file, then loads each route of it side by side and compares.

A trial child that may write one memory file. It says how long loads and runs took and whether the answers agree; the
parent seals the file before it is loaded, so that what was judged here is what will be kept.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from agent.base.errors import DamagedError, PeerError, UnsupportedError
from agent.infer.child import Child, Operation, alike, confined, made_up_inputs, status_kb
from agent.infer.runtimes.base import LoadOptions, Route, Runtime, Session
from agent.infer.runtimes.failures import return_memory

#: Steady runs in a round: at least, and for so long.
_LEAST_RUNS, _RUNS_S = 3, 0.005
#: Times are found when so many rounds did not better any of them by this.
_LAST, _BETTER = 4, 1.03
#: Answers to made-up inputs may differ by so much of their size: another order of additions, not another model.
_TOLERANCE = 1e-3


class PreparingChild(Child):
    """As in a trial, with one more file."""

    def __init__(self, model: int, golden: int | None, prepared: int) -> None:
        super().__init__(model, golden)
        self._prepared = prepared
        self._options: dict[str, Any] = {}
        self._fixed = False

    def operations(self) -> dict[str, Operation]:
        return {"prepare": self.prepare, "write": self.write, "compare": self.compare, "agree": self.agree}

    def write(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Write the prepared file. The options and shapes hold for everything that follows."""
        self._options = dict(request)
        self.require_whole(request["runtime"])
        self._runtime().prepare(self._model, self._prepared, self._load_options(Route(), request["threads"]))
        return {}

    def compare(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Load and run each way in turn, in rounds, until the best times are found, for about ``seconds`` at most.

        A way is a route and a number of threads. Times in ms, memory in KB; one that does not load has an ``error`` in
        place of figures. ``fixed``: each input has the same shape in all requests.
        """
        ways = [(Route(kind, prepack), threads) for kind, prepack, threads in request["ways"]]
        found: list[dict[str, Any]] = [{"load": [], "first": [], "run": []} for _ in ways]
        end = time.perf_counter() + request["seconds"]
        for turn in range(request["most"]):
            if turn >= request["least"] and (time.perf_counter() > end or _found(found)):
                break
            for (route, threads), figures in zip(ways, found, strict=True):
                if "error" not in figures:
                    self._measure(route, threads, figures, first=turn == 0)
        return {"ways": found, "fixed": self._fixed}

    def agree(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Whether a route's answers are right: agreement with the golden set, else with the plain model's answers."""
        session = self._open(Route(*request["route"]), request["threads"])
        if self._golden_descriptor is not None:
            return self.judge(session, request["metric"])
        return {"same": self._same(session, self._open(Route(), self._options["threads"]))}

    def _measure(self, route: Route, threads: int, figures: dict[str, Any], *, first: bool) -> None:
        """One load and some runs. Memory is taken in the first round: what a session holds without its arena."""
        if first:
            self._give_back()
            own, shared = status_kb("RssAnon"), status_kb("RssShmem")
        try:
            begun = time.perf_counter()
            session = self._open(route, threads)
            loaded = time.perf_counter()
            example = self._example(session)
            names = [spec.name for spec in session.outputs]
            asked = time.perf_counter()
            session.run(example, names)
            answered = time.perf_counter()
        except (PeerError, DamagedError, UnsupportedError) as error:
            figures["error"] = str(error)
            return
        self._fixed = all(axis >= 0 for spec in session.inputs for axis in spec.shape)
        runs: list[float] = []
        while len(runs) < _LEAST_RUNS or time.perf_counter() - answered < _RUNS_S:
            before = time.perf_counter()
            session.run(example, names)
            runs.append(time.perf_counter() - before)
        figures["load"].append((loaded - begun) * 1e3)
        figures["first"].append((answered - asked) * 1e3)
        figures["run"].append(min(runs) * 1e3)
        if first:
            self._give_back()
            figures["own_kb"] = max(0, status_kb("RssAnon") - own)
            figures["shared_kb"] = max(0, status_kb("RssShmem") - shared)
        session.close()

    def _same(self, one: Session, other: Session) -> bool:
        names = [spec.name for spec in other.outputs]
        answers: list[Sequence[Any]] = []
        for session in (one, other):
            try:
                answers.append(session.run(self._example(session), names))
            except PeerError:  # made-up inputs may be nonsense to this model; then they must be so in each form
                answers.append([])
        if len(answers[0]) != len(answers[1]):
            return False
        return all(alike(left, right, _TOLERANCE) for left, right in zip(*answers, strict=True))

    def _example(self, session: Session) -> Mapping[str, Any]:
        if self._golden_descriptor is None:
            return made_up_inputs(session, self._options.get("shapes", {}))
        example: Mapping[str, Any] = next(iter(self._golden().examples(session.inputs)))
        return example

    def _open(self, route: Route, threads: int) -> Session:
        descriptor = self._model if route.kind == "plain" else self._prepared
        return self._runtime().load(descriptor, self._load_options(route, threads))

    def _give_back(self) -> None:
        self._runtime().trim()
        return_memory()

    def _load_options(self, route: Route, threads: int) -> LoadOptions:
        given = self._options
        return LoadOptions(given["provider"], threads, given.get("parameters", {}), route)

    def _runtime(self) -> Runtime:
        return self.runtime(self._options["runtime"])


def _found(ways: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the last rounds brought no better times: on a busy device the true ones take longer to show."""
    samples = [way[name] for way in ways if "error" not in way for name in ("load", "first", "run")]
    return all(min(times[:-_LAST]) <= _BETTER * min(times) for times in samples)


def main() -> None:
    """Entry, as of a trial child."""
    confined(lambda start: PreparingChild(start["model"], start["golden"], start["prepared"]).operations())
