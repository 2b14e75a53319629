"""Counts and times of inference per model version: Triton's statistics document and Prometheus text.

Pure. Only models that exist are counted, so that callers cannot make the tables grow. Durations are in nanoseconds.
Sources: Triton's statistics extension; the Prometheus text exposition format 0.0.4.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

#: Upper bounds of the latency histogram in seconds: 100 us to 10 s.
BOUNDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)
_BOUNDS_NS = tuple(int(bound * 1e9) for bound in BOUNDS)


@dataclass(slots=True)
class _Counts:
    """One version of one model."""

    success: int = 0
    success_ns: int = 0
    fail: int = 0
    fail_ns: int = 0
    queue_ns: int = 0
    compute_ns: int = 0
    cache_hits: int = 0
    #: Runs of joined requests by their rows, and their nanoseconds. Each request brings its share of the run.
    joined: int = 0
    runs: dict[int, float] = field(default_factory=dict)
    runs_ns: dict[int, float] = field(default_factory=dict)
    last_ms: int = 0
    #: A cascade: examples that the first variant, and the one after it, answered; time saved, which may be below 0.
    first_rows: int = 0
    then_rows: int = 0
    saved_ns: int = 0
    statuses: dict[int, int] = field(default_factory=dict)
    buckets: list[int] = field(default_factory=lambda: [0] * (len(BOUNDS) + 1))


class Statistics:
    """Counters by model and version."""

    def __init__(self, now: Callable[[], float] = time.time) -> None:
        self._now = now
        self._counts: dict[tuple[str, str], _Counts] = {}

    def _of(self, model: str, version: str) -> _Counts:
        counts = self._counts.get((model, version))
        if counts is None:
            counts = self._counts[model, version] = _Counts()
        return counts

    def succeeded(
        self,
        model: str,
        version: str,
        total_ns: int,
        queue_ns: int = 0,
        compute_ns: int = 0,
        *,
        cached: bool = False,
        batch: tuple[int, int] = (0, 0),
    ) -> None:
        """One request was answered. ``batch``: rows and requests of its run, where requests are joined."""
        counts = self._of(model, version)
        counts.success += 1
        counts.success_ns += total_ns
        counts.queue_ns += queue_ns
        counts.compute_ns += compute_ns
        counts.cache_hits += cached
        if batch[1] and not cached:
            rows, requests = batch
            counts.joined += 1
            counts.runs[rows] = counts.runs.get(rows, 0.0) + 1 / requests
            counts.runs_ns[rows] = counts.runs_ns.get(rows, 0.0) + compute_ns / requests
        counts.last_ms = int(self._now() * 1000)
        counts.buckets[bisect_left(_BOUNDS_NS, total_ns)] += 1

    def cascaded(self, model: str, version: str, rows: int, escalated: int, saved_ns: int) -> None:
        """An answer of a cascade: of so many examples so many went on to the second variant."""
        counts = self._of(model, version)
        counts.first_rows += rows - escalated
        counts.then_rows += escalated
        counts.saved_ns += saved_ns

    def failed(self, model: str, version: str, total_ns: int, status: int) -> None:
        """One request got an error."""
        counts = self._of(model, version)
        counts.fail += 1
        counts.fail_ns += total_ns
        counts.statuses[status] = counts.statuses.get(status, 0) + 1

    def computed(self, model: str, version: str) -> tuple[int, float]:
        """Answers that were computed, and the mean time that computing took, in ms."""
        counts = self._counts.get((model, version)) or _Counts()
        computed = counts.success - counts.cache_hits
        return computed, counts.compute_ns / computed / 1e6 if computed else 0.0

    def forget(self, model: str) -> None:
        """The model was removed."""
        for key in [key for key in self._counts if key[0] == model]:
            del self._counts[key]

    def document(self, known: Iterable[tuple[str, str]]) -> dict[str, Any]:
        """Triton's ``model_stats`` for the given models and versions, those never asked with zeros."""
        return {"model_stats": [_triton(*key, self._counts.get(key) or _Counts()) for key in known]}

    def prometheus(self, visible: Callable[[str], bool]) -> list[str]:
        """Lines for the models that ``visible`` lets through."""
        rows = [
            (f'model="{_escape(model)}",version="{_escape(version)}"', counts)
            for (model, version), counts in sorted(self._counts.items())
            if visible(model)
        ]
        lines = ["# TYPE edge_agent_infer_requests_total counter"]
        for labels, counts in rows:
            lines.append(f'edge_agent_infer_requests_total{{{labels},status="200"}} {counts.success}')
            lines.extend(
                f'edge_agent_infer_requests_total{{{labels},status="{status}"}} {number}'
                for status, number in sorted(counts.statuses.items())
            )
        for name in ("queue", "compute"):
            lines.append(f"# TYPE edge_agent_infer_{name}_seconds_total counter")
            lines.extend(
                f"edge_agent_infer_{name}_seconds_total{{{labels}}} {getattr(counts, name + '_ns') / 1e9:.9g}"
                for labels, counts in rows
            )
        lines += _batches([(labels, counts) for labels, counts in rows if counts.joined])
        lines.extend(_cascades([(labels, counts) for labels, counts in rows if counts.first_rows or counts.then_rows]))
        lines.append("# TYPE edge_agent_infer_duration_seconds histogram")
        for labels, counts in rows:
            lines.extend(_histogram(labels, counts))
        return lines


def with_caches(document: dict[str, Any], caches: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The statistics document with ``cache`` beside each version whose answers are kept."""
    rows = {(cache["model"], cache["version"]): cache for cache in caches}
    for row in document["model_stats"]:
        if (cache := rows.get((row["name"], row["version"]))) is not None:
            row["cache"] = {name: value for name, value in cache.items() if name not in ("model", "version")}
    return document


def with_feedback(document: dict[str, Any], judged: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The statistics document with ``feedback_stats`` beside each version whose answers were judged."""
    rows = {(row["model"], row["version"]): {"correct": row["correct"], "wrong": row["wrong"]} for row in judged}
    for row in document["model_stats"]:
        if (counts := rows.get((row["name"], row["version"]))) is not None:
            row["feedback_stats"] = counts
    return document


def cache_metrics(caches: Iterable[Mapping[str, Any]]) -> list[str]:
    """Lines for the models whose answers are kept."""
    rows = [(f'model="{_escape(cache["model"])}"', cache) for cache in caches]
    if not rows:
        return []
    lines = ["# TYPE edge_agent_cache_requests_total counter"]
    for labels, cache in rows:
        lines.extend(
            f'edge_agent_cache_requests_total{{{labels},result="{result}"}} {cache[name]}'
            for result, name in (("hit", "hits"), ("joined", "joined"), ("miss", "misses"), ("bypass", "bypassed"))
        )
    for name, kind, of in (
        ("removed_total", "counter", ("evicted", "expired")),
        ("rewarmed_total", "counter", ("rewarmed",)),
        ("entries", "gauge", ("entries",)),
        ("bytes", "gauge", ("bytes",)),
    ):
        lines.append(f"# TYPE edge_agent_cache_{name} {kind}")
        for labels, cache in rows:
            lines.extend(
                f"edge_agent_cache_{name}{{{labels}{reason}}} {cache[key]}"
                for key in of
                for reason in ([f',reason="{key}"'] if len(of) > 1 else [""])
            )
    lines.append("# TYPE edge_agent_cache_saved_seconds_total counter")
    lines.extend(
        f"edge_agent_cache_saved_seconds_total{{{labels}}} {cache['saved_us'] / 1e6:.9g}" for labels, cache in rows
    )
    return lines


def _cascades(rows: Sequence[tuple[str, _Counts]]) -> Iterator[str]:
    if rows:
        yield "# TYPE edge_agent_cascade_rows_total counter"
        yield "# TYPE edge_agent_cascade_saved_seconds gauge"
    for labels, counts in rows:
        yield f'edge_agent_cascade_rows_total{{{labels},stage="first"}} {counts.first_rows}'
        yield f'edge_agent_cascade_rows_total{{{labels},stage="then"}} {counts.then_rows}'
        yield f"edge_agent_cascade_saved_seconds{{{labels}}} {counts.saved_ns / 1e9:.9g}"


def _histogram(labels: str, counts: _Counts) -> list[str]:
    lines, running = [], 0
    for bound, number in zip((*map(str, BOUNDS), "+Inf"), counts.buckets, strict=True):
        running += number
        lines.append(f'edge_agent_infer_duration_seconds_bucket{{{labels},le="{bound}"}} {running}')
    lines.append(f"edge_agent_infer_duration_seconds_sum{{{labels}}} {counts.success_ns / 1e9:.9g}")
    lines.append(f"edge_agent_infer_duration_seconds_count{{{labels}}} {running}")
    return lines


def _batches(rows: list[tuple[str, _Counts]]) -> list[str]:
    """Only of models whose requests are joined."""
    lines: list[str] = []
    if rows:
        lines.append("# TYPE edge_agent_infer_joined_runs_total counter")
        lines.extend(
            f"edge_agent_infer_joined_runs_total{{{labels}}} {round(sum(counts.runs.values()))}"
            for labels, counts in rows
        )
        lines.append("# TYPE edge_agent_infer_joined_requests_total counter")
        lines.extend(f"edge_agent_infer_joined_requests_total{{{labels}}} {counts.joined}" for labels, counts in rows)
    return lines


def _escape(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _triton(model: str, version: str, counts: _Counts) -> dict[str, Any]:
    """Field names of Triton's statistics extension; what is not measured apart here is left out."""

    def duration(count: int, ns: int) -> dict[str, int]:
        return {"count": count, "ns": ns}

    cascade = {"first": counts.first_rows, "then": counts.then_rows, "saved_ns": counts.saved_ns}
    return {
        "name": model,
        "version": version,
        **({"cascade_stats": cascade} if counts.first_rows or counts.then_rows else {}),
        "last_inference": counts.last_ms,
        "inference_count": counts.success,
        "execution_count": counts.success - counts.cache_hits - counts.joined + round(sum(counts.runs.values())),
        "inference_stats": {
            "success": duration(counts.success, counts.success_ns),
            "fail": duration(counts.fail, counts.fail_ns),
            "queue": duration(counts.success, counts.queue_ns),
            "compute_infer": duration(counts.success - counts.cache_hits, counts.compute_ns),
            "cache_hit": duration(counts.cache_hits, 0),
        },
        "batch_stats": [
            {"batch_size": rows, "compute_infer": duration(round(runs), round(counts.runs_ns[rows]))}
            for rows, runs in sorted(counts.runs.items())
        ],
    }
