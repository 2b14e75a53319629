"""The device as core sees it: facts, profile, and the numbers that follow from them and the configuration."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from agent.base.config import Config, Paths
from agent.hardware.facts import Facts
from agent.hardware.probe import probe
from agent.hardware.profiles import Profile, choose_profile, load_profiles, shipped_profiles_dir
from agent.infer.runtimes.probe import Runtimes
from agent.selection.inventory import InstalledRuntime, RuntimeInventory

#: Threads of one run where neither configuration nor profile says: more rarely pay on small devices.
_MOST_THREADS = 4
_LEAST_BUDGET_MB = 32


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
    def workers(self) -> int:
        """How many runs may go on at once without fighting for cores."""
        return max(1, len(self.cpus) // self.threads)


def look_at_device(paths: Paths, config: Config, root: Path | None = None) -> Device:
    """Detect, choose the profile, derive threads, cores and memory. Never fails: what is unknown gets a safe value."""
    facts = probe(root)
    profiles, problems = load_profiles([shipped_profiles_dir(), paths.user_profiles])
    profile = choose_profile(facts, profiles)
    usable = facts.usable_cpus or facts.online_cpus or (0,)
    big = tuple(cpu for cpu in usable if cpu in (facts.big_cores or ())) or usable
    return Device(
        facts=facts,
        profile=profile,
        problems=tuple(problems),
        threads=_threads(config, profile, facts, len(big)),
        cpus=big,
        budget_mb=_budget_mb(config, profile, facts),
    )


def inventory_of(runtimes: Runtimes) -> RuntimeInventory:
    """The runtimes of this installation as selection sees them."""
    states = runtimes.states().values()
    return RuntimeInventory(
        {state.name: InstalledRuntime(state.version, state.providers) for state in states if state.usable},
        {state.name: state.reason for state in states if not state.usable},
    )


def _threads(config: Config, profile: Profile, facts: Facts, cores: int) -> int:
    if config.selection.threads != "auto":
        return config.selection.threads
    cores = min(cores, max(1, int(facts.cpu_limit))) if facts.cpu_limit is not None else cores
    wanted = profile.threads or min(_MOST_THREADS, cores - 1)  # one core is left to the apps and the loop
    return max(1, min(wanted, cores))


def _budget_mb(config: Config, profile: Profile, facts: Facts) -> float:
    if config.memory.budget_mb != "auto":
        return float(config.memory.budget_mb)
    return max(_LEAST_BUDGET_MB, profile.memory_share * (facts.mem_limit_mb or 0))
