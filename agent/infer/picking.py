"""Which options of a version answer a request that asks for a variant, a speed or a quality. Pure.

A wish is strict: what nobody meets is the caller's error, and the error names what there is. Figures are those of the
trial on this device; an option that was never measured meets no wish for a figure.
"""

from __future__ import annotations

from agent.base.errors import PeerError
from agent.infer.shelf import Option, Served
from agent.infer.wishes import Wishes


def pick(served: Served, wishes: Wishes) -> tuple[Option, ...]:
    """The options that meet the wishes, in the order of the choice. PeerError names the wish that none meets."""
    left = served.options
    if wishes.variant is not None:
        left = of_variant(served, wishes.variant)
        if not left:
            raise PeerError(f"parameters.variant: model '{served.model}' has {_named(served.options)} to answer with")
    if wishes.max_latency_ms is not None:
        most = wishes.max_latency_ms
        left = _require(
            [option for option in left if option.p95_ms is not None and option.p95_ms <= most],
            f"max_latency_ms: {most:g} is less than model '{served.model}' takes here",
            left,
        )
    if wishes.min_quality is not None:
        least = wishes.min_quality
        left = _require(
            [option for option in left if option.quality is not None and option.quality >= least],
            f"min_quality: {least:g} is more than model '{served.model}' has",
            left,
        )
    return left


def of_variant(served: Served, variant: str) -> tuple[Option, ...]:
    """The options that run that variant, on whatever provider."""
    return tuple(option for option in served.options if option.variant == variant)


def _require(met: list[Option], problem: str, options: tuple[Option, ...]) -> tuple[Option, ...]:
    if not met:
        raise PeerError(f"parameters.{problem}: {_named(options)}")
    return tuple(met)


def _named(options: tuple[Option, ...]) -> str:
    return ", ".join(_figures(option) for option in options) or "no variant"


def _figures(option: Option) -> str:
    said = [f"p95 {option.p95_ms:.3g} ms" if option.p95_ms is not None else "never timed"]
    if option.quality is not None:
        said.append(f"quality {option.quality:.4g}")
    return f"{option.candidate} ({', '.join(said)})"
