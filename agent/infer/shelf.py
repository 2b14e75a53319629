"""What is installed, as the engine sees it: versions with their options in order of choice. Pure.

The shelf is replaced as a whole whenever the catalog changes; nothing in it is ever changed in place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from agent.base.errors import NotFoundError

if TYPE_CHECKING:
    from agent.bundles.manifest import TensorSpec
    from agent.infer.trial import OpenModel


@dataclass(frozen=True, slots=True)
class Option:
    """One way to answer: a variant on a provider. ``need_mb`` is its measured or estimated footprint."""

    candidate: str
    variant: str
    runtime: str
    provider: str
    threads: int
    need_mb: float
    open_model: Callable[[], OpenModel]
    #: 95th percentile of a run in ms as the trial measured it; None where it was never measured.
    p95_ms: float | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    #: The blob's identity: a session made from other bytes is another session.
    digest: str = ""


@dataclass(frozen=True, slots=True)
class Served:
    """A version of a model with its options, best first; empty with ``reason`` where none can answer."""

    model: str
    version: str
    inputs: Sequence[TensorSpec]
    outputs: Sequence[TensorSpec]
    options: tuple[Option, ...]
    reason: str = ""
    labels: tuple[str, ...] = ()
    task: str = ""


@dataclass(frozen=True, slots=True)
class Shelf:
    """All models: versions by (model, version), and the active version by model."""

    versions: Mapping[tuple[str, str], Served] = field(default_factory=dict)
    active: Mapping[str, str] = field(default_factory=dict)

    def find(self, model: str, version: str | None = None) -> Served:
        """The version asked for, or the active one. NotFoundError names what is missing."""
        wanted = version if version is not None else self.active.get(model)
        if wanted is not None and (served := self.versions.get((model, wanted))) is not None:
            return served
        if not any(name == model for name, _ in self.versions):
            raise NotFoundError(f"model '{model}': no such model")
        if wanted is None:
            raise NotFoundError(f"model '{model}': no version is active")
        raise NotFoundError(f"model '{model}': no version '{wanted}'")
