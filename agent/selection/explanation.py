"""The choice as a document for machines and as a table for people.

The document holds every candidate with all that is known of it: what the rules said, the prior beside what was
measured, and why it won or lost. The table is made from the document alone, so both say the same.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from agent.bundles.manifest import Manifest, Policy
from agent.hardware.facts import Facts
from agent.hardware.profiles import Profile
from agent.selection.choice import Decision, Row
from agent.selection.criteria import Gap
from agent.selection.inventory import CPU_PROVIDER
from agent.selection.measurements import Measurement
from agent.selection.prior import Prior
from agent.selection.rules import Verdict

FORMAT = "edge-explain/1"
WIDTH = 96

_OUTCOMES = {
    "winner": "chosen",
    "lost": "runs, not chosen",
    "excluded": "outside the policy",
    "rejected": "rejected by the trial",
    "untried": "not tried",
    "refused": "cannot run here",
}


def explain(
    manifest: Manifest,
    verdicts: Sequence[Verdict],
    priors: Sequence[Prior],
    decision: Decision | None,
    facts: Facts,
    profile: Profile,
) -> dict[str, Any]:
    """The whole story as a plain JSON object; ``decision`` is None when nothing was measured (``models check``).

    ``candidates`` come in the order: winner, runs, outside the policy, rejected, not tried, cannot run.
    """
    rows = {row.candidate_id: row for row in decision.rows} if decision else {}
    ranked = {prior.candidate.id: (rank, prior) for rank, prior in enumerate(priors, start=1)}
    entries = [_entry(verdict, ranked, rows, decision) for verdict in verdicts]
    order = list(_OUTCOMES)
    entries.sort(key=lambda entry: (order.index(entry["outcome"]), _cost(entry)))
    return {
        "format": FORMAT,
        "model": manifest.name,
        "version": manifest.version,
        "policy": _policy(manifest.policy),
        "device": {"board": facts.board or facts.cpu_model, "profile": profile.id, "arch": facts.arch},
        "winner": decision.winner if decision else None,
        "decided_by": decision.decided_by if decision else None,
        "ties": list(decision.ties) if decision else [],
        "reasons": list(decision.reasons) if decision else [],
        "candidates": entries,
    }


def _entry(
    verdict: Verdict, ranked: Mapping[str, tuple[int, Prior]], rows: Mapping[str, Row], decision: Decision | None
) -> dict[str, Any]:
    candidate = verdict.candidate
    row = rows.get(candidate.id)
    outcome = "refused" if not verdict.accepted else row.status if row else "untried"
    rank, prior = ranked.get(candidate.id, (None, None))
    measurement = row.measurement if row else None
    return {
        "id": candidate.id,
        "variant": candidate.variant_id,
        "runtime": candidate.runtime,
        "provider": candidate.provider,
        "precision": candidate.precision,
        "scheme": candidate.scheme,
        "file_mb": round(candidate.size / (1 << 20), 2),
        "outcome": outcome,
        "why": _why(verdict, row, decision),
        "notes": [*verdict.notes, *(measurement.notes if measurement else ())],
        "need_mb": verdict.need_mb,
        "prior": {"rank": rank, "speed": round(prior.score, 2), "why": prior.why} if prior else None,
        "declared": {"metric": candidate.declared.metric, "value": candidate.declared.value}
        if candidate.declared
        else None,
        "measured": _measured(measurement, row) if measurement else None,
        "steps": [_step(gap) for gap in row.gaps] if row else [],
    }


def _measured(measurement: Measurement, row: Row | None) -> dict[str, Any]:
    """The numbers, and the measured speed relative to the winner's beside the prior's."""
    quality, versus = (row.quality, row.vs_winner) if row else (None, None)
    return {
        "p50_ms": measurement.p50_ms,
        "p95_ms": measurement.p95_ms,
        "load_ms": measurement.load_ms,
        "peak_mb": measurement.peak_mb,
        "agreement": measurement.agreement,
        "agreement_metric": measurement.agreement_metric,
        "joules": measurement.joules,
        "energy_source": measurement.energy_source,
        "quality": {"metric": quality.metric, "value": quality.value, "source": quality.source} if quality else None,
        "rounds": measurement.rounds,
        "vs_winner": {"ratio": versus.ratio, "noise": _finite(versus.noise)} if versus else None,
        "measured_at": measurement.measured_at,
        "key": measurement.key.to_json(),
    }


def _step(gap: Gap) -> dict[str, Any]:
    return {
        "criterion": gap.criterion,
        "best": gap.best,
        "worse_by": gap.worse_by,
        "noise": _finite(gap.noise),
        "tie": gap.tie,
        "rounds": gap.rounds,
    }


def _finite(value: float) -> float | None:
    """JSON has no infinity: one round has unbounded noise, which is told as null."""
    return value if math.isfinite(value) else None


def _policy(policy: Policy) -> dict[str, Any]:
    return {
        "prefer": policy.prefer,
        "min_quality": policy.min_quality,
        "max_latency_ms": policy.max_latency_ms,
    }


def _cost(entry: Mapping[str, Any]) -> tuple[float, int, str]:
    measured, prior = entry["measured"] or {}, entry["prior"] or {}
    return measured.get("p50_ms") or math.inf, prior.get("rank") or 1 << 20, str(entry["id"])


# -- why, in words ----------------------------------------------------------------------------------------------------


def _why(verdict: Verdict, row: Row | None, decision: Decision | None) -> list[str]:
    """Why this candidate ended as it did, one sentence an item."""
    if not verdict.accepted:
        return list(verdict.reasons)
    if row is None or decision is None:
        return []
    if row.status == "winner":
        return [*decision.reasons, *_beside_winner(row, decision)]
    if row.reasons:
        return list(row.reasons)
    return [_why_lost(row, decision)]


def _beside_winner(row: Row, decision: Decision) -> list[str]:
    """Who came closest: the ties, or else the next one by the criterion that decided."""
    if not row.gaps:
        return []
    if decision.ties:
        return [f"alike in {row.gaps[0].criterion}: {', '.join(decision.ties)}"]
    others = [other for other in decision.rows if other.gaps and other.candidate_id != decision.winner]
    if not others:
        return []
    second = min(others, key=lambda other: (other.gaps[0].worse_by, other.candidate_id))
    return [f"next is {second.candidate_id}, {_worse(second.gaps[0], '')}"]


def _why_lost(row: Row, decision: Decision) -> str:
    """The step at which it fell, with the ties before it."""
    ties = [gap for gap in row.gaps if gap.tie]
    fell = next((gap for gap in row.gaps if not gap.tie), None)
    alike = f"alike in {_list(f'{gap.criterion} (within ±{_percent(gap.noise)})' for gap in ties)}"
    if fell is None:
        return f"{alike}; the prior puts {decision.winner} first"
    text = _worse(fell, "the winner" if fell.best == decision.winner else fell.best)
    return f"{alike}; {text}" if ties else text


def _worse(gap: Gap, than: str) -> str:
    """``2.1x slower than the winner (noise ±3.4 %)``; without the middle part when ``than`` is empty."""
    words = {"latency": "slower", "accuracy": "less accurate", "memory": "more memory", "energy": "more energy"}
    amount = _percent(gap.worse_by) if gap.criterion == "accuracy" else _amount(gap.worse_by)
    noise = f" (noise ±{_percent(gap.noise)})" if gap.criterion in ("latency", "energy") else ""
    return f"{amount} {words[gap.criterion]}{f' than {than}' if than else ''}{noise}"


def _amount(worse_by: float) -> str:
    """``8 %`` for little, ``2.1x`` for much."""
    return f"{1 + worse_by:.1f}x" if worse_by >= 0.5 else _percent(worse_by)


def _percent(share: float) -> str:
    if not math.isfinite(share):
        return "∞"
    percent = share * 100
    return f"{percent:.0f} %" if percent >= 10 else f"{percent:.1f} %" if percent >= 0.1 else f"{percent:.2f} %"


def _list(parts: Iterable[str]) -> str:
    named = list(parts)
    return " and ".join([", ".join(named[:-1]), named[-1]] if len(named) > 1 else named)


# -- the table --------------------------------------------------------------------------------------------------------


def explain_text(document: Mapping[str, Any], width: int = WIDTH) -> str:
    """The document as text for a terminal of ``width`` columns, without a newline at its end."""
    entries = document["candidates"]
    common = _common_notes(entries)
    columns = _columns(document)
    short = _shortener(entries)
    lines = [*map(short, _heading(document)), ""]
    lines.append("  ".join(title.rjust(size) if right else title.ljust(size) for title, size, right, _ in columns))
    for entry in entries:
        cells = [_fit(cell(entry), size) for _, size, _, cell in columns]
        lines.append("  ".join(_aligned(cells, columns)))
        lines += [line for text in _remarks(entry, common) for line in _wrapped("     ", short(text), width)]
    tail = [] if document["winner"] else list(document["reasons"])
    tail += [f"note: {note}" for note in common]
    lines += ["", *(line for text in tail for line in _wrapped("", short(text), width))] if tail else []
    return "\n".join(line.rstrip() for line in lines)


def _aligned(cells: Sequence[str], columns: Sequence[_Column]) -> list[str]:
    return [
        cell.rjust(size) if right else cell.ljust(size)
        for cell, (_, size, right, _) in zip(cells, columns, strict=True)
    ]


def _common_notes(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    """Notes that are true of every candidate: told once, below the table."""
    if len(entries) < 2:
        return []
    return [note for note in entries[0]["notes"] if all(note in entry["notes"] for entry in entries)]


def _shortener(entries: Sequence[Mapping[str, Any]]) -> Callable[[str], str]:
    """Names candidates by the variant alone where there is one provider, else with the provider's first word."""
    providers = {str(entry["provider"]): _provider(entry) for entry in entries}

    def short(text: str) -> str:
        for provider, word in providers.items():
            text = text.replace(f"@{provider}", "" if len(providers) == 1 else f"@{word}")
        return text

    return short


def _heading(document: Mapping[str, Any]) -> list[str]:
    policy, device, winner = document["policy"], document["device"], document["winner"]
    limits = [f"quality at least {policy['min_quality']:g}"] if policy["min_quality"] is not None else []
    limits += [f"p95 at most {policy['max_latency_ms']:g} ms"] if policy["max_latency_ms"] is not None else []
    wish = ", ".join([f"policy {policy['prefer']}", *limits])
    board = device["board"] or f"unknown board ({device['arch'] or 'unknown architecture'})"
    name = f"{document['model']} {document['version']}"
    outcomes = [entry["outcome"] for entry in document["candidates"]]
    if winner:
        first = f"{name} runs as {winner}"
    elif document["decided_by"] is not None:
        first = f"{name}: no variant was chosen"
    else:
        first = f"{name}: {len(outcomes) - outcomes.count('refused')} of {len(outcomes)} candidates can run"
    return [first, f"{board} · profile {device['profile']} · {wish}"]


#: Title, width, whether it stands to the right, the cell of a candidate.
_Column = tuple[str, int, bool, Callable[[Mapping[str, Any]], str]]


def _columns(document: Mapping[str, Any]) -> list[_Column]:
    """The columns; those about which nothing is known are left out."""
    entries = document["candidates"]
    name = min(28, max([9, *(len(entry["variant"]) for entry in entries)]))
    where = max([2, *(len(_provider(entry)) for entry in entries)])
    measured = any(entry["measured"] for entry in entries)
    columns: list[_Column] = [
        (" ", 1, False, lambda entry: "*" if entry["outcome"] == "winner" else " "),
        ("candidate", name, False, lambda entry: entry["variant"]),
        ("on", where, False, _provider),
        ("prior", 5, True, lambda entry: f"{entry['prior']['speed']:.1f}x" if entry["prior"] else "-"),
    ]
    if not measured:
        columns.append(("needs", 7, True, lambda entry: _size(entry["need_mb"])))
        columns.append(("file", 8, True, lambda entry: _size(entry["file_mb"])))
        columns.append(("answer", 15, False, lambda entry: "no" if entry["outcome"] == "refused" else "can run"))
        return columns
    columns += [
        ("p50 ms", 8, True, lambda entry: _number(entry, "p50_ms")),
        ("p95 ms", 8, True, lambda entry: _number(entry, "p95_ms")),
        ("load ms", 7, True, lambda entry: _number(entry, "load_ms")),
        ("peak MB", 7, True, lambda entry: _number(entry, "peak_mb")),
    ]
    metric = next((m["quality"]["metric"] for entry in entries if (m := entry["measured"]) and m["quality"]), None)
    if metric:
        columns.append((metric[:10], max(7, len(metric[:10])), True, _quality))
    if any((entry["measured"] or {}).get("joules") for entry in entries):
        columns.append(("mJ", 7, True, _millijoules))
    return columns


def _provider(entry: Mapping[str, Any]) -> str:
    """Where it runs, short; TFLite's own ``cpu`` says nothing of the runtime."""
    if (entry["runtime"], entry["provider"]) == ("tflite", CPU_PROVIDER["tflite"]):
        return "TFLite"
    return str(entry["provider"]).removesuffix("ExecutionProvider")


def _number(entry: Mapping[str, Any], name: str) -> str:
    value = (entry["measured"] or {}).get(name)
    return "-" if value is None else _three(value)


def _three(value: float) -> str:
    """Three digits that line up below each other."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _size(megabytes: float) -> str:
    return f"{megabytes / 1024:.1f} GB" if megabytes >= 1024 else f"{megabytes:.0f} MB"


def _quality(entry: Mapping[str, Any]) -> str:
    measured = entry["measured"] or {}
    value = measured["quality"]["value"] if measured.get("quality") else measured.get("agreement")
    return "-" if value is None else f"{value:.4f}" if abs(value) < 100 else f"{value:.4g}"


def _millijoules(entry: Mapping[str, Any]) -> str:
    measured = entry["measured"] or {}
    if not measured.get("joules"):
        return "-"
    return f"{'~' if measured['energy_source'] == 'estimated' else ''}{_three(measured['joules'] * 1000)}"


def _remarks(entry: Mapping[str, Any], common: Sequence[str]) -> list[str]:
    """Below a candidate's row: why, and what else is worth knowing."""
    remarks = []
    if entry["why"]:
        remarks.append(f"{_OUTCOMES[entry['outcome']]}: {'; '.join(entry['why'])}")
    elif entry["prior"]:
        remarks.append(entry["prior"]["why"])
    return remarks + [f"note: {note}" for note in entry["notes"] if note not in common]


def _wrapped(indent: str, text: str, width: int) -> list[str]:
    return textwrap.wrap(
        text, width, initial_indent=indent, subsequent_indent=indent and indent + "  ", break_on_hyphens=False
    )


def _fit(text: str, size: int) -> str:
    return text if len(text) <= size else f"{text[: size - 1]}…"
