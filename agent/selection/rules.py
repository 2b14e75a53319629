"""Candidates, and what the rules say of each before anything runs."""

from __future__ import annotations

from dataclasses import dataclass

from agent.bundles.manifest import Precision, Quality, Runtime, Variant


@dataclass(frozen=True, slots=True)
class Candidate:
    """A variant on one execution provider of its runtime: the thing that is tried, measured and chosen.

    ``scheme`` is how it was quantized where the manifest says so (``qdq``, ``dynamic``, ``qoperator``), else empty.
    ``declared`` is the packer's own quality figure.
    """

    variant_id: str
    runtime: Runtime
    provider: str
    precision: Precision
    scheme: str = ""
    digest: str = ""
    size: int = 0
    declared: Quality | None = None

    @property
    def id(self) -> str:
        """Stable name, ``int8-static@CPUExecutionProvider``: what measurements and quarantine are kept under."""
        return f"{self.variant_id}@{self.provider}"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the rules say of a candidate. ``reasons`` is empty exactly when it is accepted; ``notes`` never reject."""

    candidate: Candidate
    accepted: bool
    reasons: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def candidate_of(variant: Variant, provider: str) -> Candidate:
    """The candidate for ``variant`` on ``provider``."""
    return Candidate(
        variant_id=variant.id,
        runtime=variant.runtime,
        provider=provider,
        precision=variant.precision,
        scheme=quantization_scheme(variant),
        digest=variant.file.sha256,
        size=variant.file.size,
        declared=variant.quality,
    )


def quantization_scheme(variant: Variant) -> str:
    """``qdq``, ``dynamic`` or ``qoperator`` from the technique ``quantized``'s parameters; empty when they do not tell.

    Understood: ``format: QDQ|QOperator`` and ``mode: static|dynamic``, in any case. Anything else is not an error:
    a technique's parameters are free.
    """
    for technique in variant.technique:
        said = {str(value).lower() for value in technique.parameters.values() if isinstance(value, str)}
        if "dynamic" in said:
            return "dynamic"
        if "qoperator" in said:
            return "qoperator"
        if said & {"qdq", "static"}:
            return "qdq"
    return ""
