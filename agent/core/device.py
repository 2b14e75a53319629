"""The device as core sees it: facts, profile, and the numbers that follow from them and the configuration."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from agent.base.config import Config
from agent.base.paths import Paths
from agent.hardware.facts import Facts
from agent.hardware.probe import probe
from agent.hardware.profiles import (
    Profile,
    choose_profile,
    load_profiles,
    memory_budget_mb,
    serving_cpus,
    shipped_profiles_dir,
    thread_count,
)
from agent.infer.runtimes.probe import Runtimes
from agent.selection.inventory import InstalledRuntime, RuntimeInventory

#: Where nothing is known of the memory.
_LEAST_BUDGET_MB = 128


@dataclass(frozen=True, slots=True)
class Device:
    """What was found, and how much of it models may use."""

    facts: Facts
    profile: Profile
    problems: tuple[str, ...]
    threads: int
    cpus: tuple[int, ...]
    budget_mb: float

    @property
    def places(self) -> int:
        """How many threads runs may have at once without fighting for cores."""
        return max(1, len(self.cpus) // self.threads) * self.threads


def look_at_device(paths: Paths, config: Config, root: Path | None = None) -> Device:
    """Detect, choose the profile, derive threads, cores and memory. Never fails: what is unknown gets a safe value."""
    facts = probe(root)
    profiles, problems = load_profiles([shipped_profiles_dir(), paths.user_profiles])
    profile = choose_profile(facts, profiles)
    threads, budget = config.selection.threads, config.memory.budget_mb
    return Device(
        facts=facts,
        profile=profile,
        problems=tuple(problems),
        threads=thread_count(facts, profile) if threads == "auto" else threads,
        cpus=serving_cpus(facts, profile) or (0,),
        budget_mb=float(memory_budget_mb(facts, profile) or _LEAST_BUDGET_MB) if budget == "auto" else float(budget),
    )


def inventory_of(runtimes: Runtimes) -> RuntimeInventory:
    """The runtimes of this installation as selection sees them."""
    states = runtimes.states().values()
    return RuntimeInventory(
        {state.name: InstalledRuntime(state.version, state.providers) for state in states if state.usable},
        absent={state.name: state.reason if state.installed else "" for state in states if not state.usable},
        broken=[state.name for state in states if state.installed and not state.usable],
    )
