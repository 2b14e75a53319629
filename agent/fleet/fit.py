"""Which enrolled devices can run a bundle, and why not: the rules that devices go by, on what they said of themselves.

Pure. ``Info.facts`` is the document of detection (``agent.hardware.document.document``), ``Info.inventory`` that of the
runtimes (``agent.selection.inventory.inventory_document``). Both come from devices: signed, but not to be believed in
their form, so they are read strictly.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from agent.base.errors import PeerError
from agent.bundles.manifest import Manifest
from agent.hardware.facts import Facts
from agent.hardware.profiles import FALLBACK, Profile, memory_budget_mb
from agent.selection.explanation import explain
from agent.selection.inventory import InstalledRuntime, RuntimeInventory
from agent.selection.prior import rank_by_prior
from agent.selection.rules import accepted, candidates, memory_headroom_mb

_T = TypeVar("_T")
#: What of a profile the document of detection tells, in ``plan``.
_FROM_PLAN = ("providers", "cpu_precisions", "gpu_precisions", "int8_gain", "fp16_cpu_penalty")


class _Inventory(BaseModel):
    """What is read of an inventory; what a newer agent adds is passed over."""

    model_config = ConfigDict(extra="ignore", strict=True)

    runtimes: dict[str, InstalledRuntime]
    absent: dict[str, str] = Field(default_factory=dict)
    broken: list[str] = Field(default_factory=list)
    assumed: bool = False


_FACTS = TypeAdapter(Facts)
_PROFILE = TypeAdapter(Profile)
_INVENTORY = TypeAdapter(_Inventory)


@dataclass(frozen=True, slots=True)
class Fit:
    """One device and a bundle. ``explanation`` is that of ``edge-agent models check``; ``problem`` tells why there is
    none."""

    device: str
    runs: bool
    explanation: Mapping[str, Any] | None
    problem: str = ""

    @property
    def best(self) -> str:
        """The candidate that would be tried first, "" for none."""
        if self.explanation is None:
            return ""
        usable = [each for each in self.explanation["candidates"] if each["prior"] is not None]
        return str(min(usable, key=lambda each: each["prior"]["rank"])["id"]) if usable else ""

    def reasons(self) -> list[str]:
        """Why not: each reason once, with the variants that it holds for."""
        if self.explanation is None:
            return [self.problem]
        by_reason: dict[str, list[str]] = {}
        for entry in self.explanation["candidates"]:
            if entry["outcome"] == "refused":
                by_reason.setdefault(str(entry["why"]), []).append(str(entry["id"]))
        return [f"{', '.join(names)}: {reason}" for reason, names in by_reason.items()]


def fit(manifest: Manifest, device: str, info: Mapping[str, Any] | None) -> Fit:
    """Whether a device with that ``Info`` payload could run the bundle."""
    if info is None:
        return Fit(device, runs=False, explanation=None, problem="it has not said yet what it is")
    try:
        facts = facts_from_document(info["facts"])
        profile = profile_from_document(info["facts"], facts)
        inventory = inventory_from_document(info["inventory"])
    except PeerError as error:
        return Fit(device, runs=False, explanation=None, problem=str(error))
    headroom = memory_headroom_mb(facts, profile)
    verdicts = candidates(manifest, facts, profile.providers, inventory, headroom)
    usable = accepted(verdicts)
    document = explain(manifest, verdicts, rank_by_prior(usable, facts, profile), None, facts, profile)
    return Fit(device, runs=bool(usable), explanation=document)


def usable_variants(manifest: Manifest, info: Mapping[str, Any]) -> frozenset[str] | None:
    """The variants that a device could run, whatever memory is free at the moment; None where that cannot be told."""
    try:
        facts = facts_from_document(info["facts"])
        profile = profile_from_document(info["facts"], facts)
        inventory = inventory_from_document(info["inventory"])
    except (PeerError, KeyError):
        return None
    verdicts = candidates(manifest, facts, profile.providers, inventory, memory_budget_mb(facts, profile))
    return frozenset(each.variant_id for each in accepted(verdicts))


def facts_from_document(document: Mapping[str, Any]) -> Facts:
    """The facts that ``agent.hardware.document.document`` was made of, as far as it tells them. PeerError."""
    known = {field.name for field in fields(Facts)}
    return _read(_FACTS, {name: value for name, value in document.items() if name in known}, "facts")


def profile_from_document(document: Mapping[str, Any], facts: Facts) -> Profile:
    """The device's profile as far as it matters here: it may be one that only the device has. PeerError."""
    plan = document.get("plan")
    if not isinstance(plan, dict):
        raise PeerError("cannot read facts: there is no plan")
    told = {name: plan[name] for name in _FROM_PLAN if plan.get(name) is not None}
    name = document.get("profile")
    return _read(
        _PROFILE,
        {"id": name if isinstance(name, str) else FALLBACK.id, "title": "", **told, **_memory_share(plan, facts)},
        "facts.plan",
    )


def _memory_share(plan: Mapping[str, Any], facts: Facts) -> dict[str, float]:
    """The share that leads to the same budget again, which is rounded down."""
    budget, limit = plan.get("memory_budget_mb"), facts.mem_limit_mb
    if not isinstance(budget, int) or not limit:
        return {}
    return {"memory_share": (budget + 0.5) / limit}


def inventory_from_document(document: Mapping[str, Any]) -> RuntimeInventory:
    """The runtimes of ``inventory_document``. PeerError."""
    found = _read(_INVENTORY, document, "inventory")
    return RuntimeInventory(found.runtimes, found.absent, found.broken, assumed=found.assumed)


def _read(reader: TypeAdapter[_T], document: Mapping[str, Any], what: str) -> _T:
    """A frozen value from JSON values: strict, but lists become tuples."""
    try:
        return reader.validate_json(json.dumps(document), strict=True)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(map(str, (what, *problem["loc"])))
        raise PeerError(f"cannot read what the device said: {where}: {problem['msg']}") from error
