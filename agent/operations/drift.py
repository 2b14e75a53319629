"""Whether a model still answers as its golden set says: the golden set run again on what serves. Blocking."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from agent.store.document import BlobRef, VersionEntry
from agent.store.memory import Plaintext

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: Examples that are run; a golden set may be large, and the device has other work.
MOST_EXAMPLES = 32


@dataclass(frozen=True, slots=True)
class Recheck:
    """``value`` of the golden set's metric now, ``before`` as the trial measured it, and whether it is good enough."""

    metric: str
    value: float
    before: float | None
    ok: bool


def recheck(
    entry: VersionEntry,
    read: Callable[[BlobRef], Plaintext],
    ask: Callable[[dict[str, NDArray[Any]]], Mapping[str, NDArray[Any]]],
) -> Recheck | None:
    """Run the first examples of the golden set through ``ask``; None for a version without one. AgentError."""
    golden = entry.manifest.golden
    if golden is None:
        return None
    from agent.bundles.agreement import agreement, join, load_golden, passes  # noqa: PLC0415 - brings numpy in

    with read(entry.blobs[golden.file.name]) as plaintext:
        reference = load_golden(plaintext.fd)
    answers = []
    for example in reference.examples(entry.manifest.inputs):
        answers.append(ask(example))
        if len(answers) >= MOST_EXAMPLES:
            break
    expected = {name: array[: len(answers)] for name, array in reference.outputs.items()}
    value = agreement(golden.metric, expected, join(answers))
    measured = entry.measurements.get(entry.chosen or "", {}).get("agreement")
    before = float(measured) if isinstance(measured, (int, float)) else None
    return Recheck(golden.metric, round(value, 6), before, passes(golden, value))
