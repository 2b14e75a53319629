"""The power goes at random moments of whatever changes the store: what was reported as done is there after the boot.

The disk forgets what was not flushed (``disk.py``): in half of the cuts all of it, in the others an arbitrary half. A
change under way may have happened or not, and nothing else; the next one finishes what it left behind.
"""

from __future__ import annotations

import hashlib
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest

from agent.bundles.bare import version_from
from tests import tflite_models
from tests.vm.artefacts import MODELS
from tests.vm.conftest import CUTS, SEED, UPDATE_CUTS
from tests.vm.machine import Machine
from tests.vm.test_vm import Count, right

pytestmark = [pytest.mark.long, pytest.mark.main_only]

STORE_CUTS = CUTS - UPDATE_CUTS
SEED_OF = {version_from(hashlib.sha256(tflite_models.linear(seed)).hexdigest()): seed for seed in range(MODELS)}
VERSION_OF = {seed: version for version, seed in SEED_OF.items()}


@dataclass(frozen=True, slots=True)
class World:
    """What the machine has said that it holds. ``key`` is None where only the machine can know it."""

    versions: frozenset[str]
    active: str
    previous: str | None
    key: str | None


@dataclass(frozen=True, slots=True)
class Change:
    """Something to ask for, and the world once it is done."""

    call: str
    arguments: dict[str, Any]
    after: World


def installing(world: World, chance: random.Random) -> Change:
    version = chance.choice(sorted(set(SEED_OF) - world.versions))
    after = replace(switched(world, version), versions=world.versions | {version})
    return Change("add", {"file": f"{SEED_OF[version]}.tflite"}, after)


def activating(world: World, chance: random.Random) -> Change:
    version = chance.choice(sorted(world.versions - {world.active}))
    arguments = {"method": "POST", "target": "/v1/models/linear/activate", "body": {"version": version}}
    return Change("ask", arguments, switched(world, version))


def rolling_back(world: World, _: random.Random) -> Change:
    assert world.previous is not None
    arguments = {"method": "POST", "target": "/v1/models/linear/rollback", "body": {}}
    return Change("ask", arguments, switched(world, world.previous))


def rotating(world: World, _: random.Random) -> Change:
    return Change("run", {"command": ["edge-agent", "seal", "--rotate"]}, replace(world, key=None))


def switched(world: World, version: str) -> World:
    return replace(world, active=version, previous=world.active)


CHANGES: dict[str, Callable[[World, random.Random], Change]] = {
    "install": installing,
    "activate": activating,
    "rollback": rolling_back,
    "rotate-key": rotating,
}


def look(machine: Machine) -> World:
    """The world as the machine tells it now, after an answer that is right for the version that gives it."""
    answer = machine.do("infer")
    assert answer["status"] == 200, answer
    assert right(answer, SEED_OF[answer["version"]]), answer
    model = machine.do("ask", method="GET", target="/v1/models/linear")["json"]
    stats = machine.do("ask", method="GET", target="/v1/store")["json"]
    assert answer["version"] == model["active"]
    return World(frozenset(model["versions"]), model["active"], model["previous"], stats["key_id"])


def done(machine: Machine, change: Change, answer: dict[str, Any], before: World, *, unfinished: bool = False) -> World:
    """The world that an answer promises. ``unfinished``: a rotation was cut, which the next one only ends."""
    assert answer.get("status") == 200 or answer.get("rc") == 0, answer
    if change.after.key is not None:
        return change.after
    key = machine.do("ask", method="GET", target="/v1/store")["json"]["key_id"]
    assert unfinished or key != before.key
    return replace(change.after, key=key)


def test_power_cuts(running: Machine, count: Count) -> None:
    """Cut, boot, look; cut, boot, look."""
    chance, machine = random.Random(SEED), running
    world, seconds = look(machine), {}
    # Once each without a cut, to know how long they take here.
    for name in ("install", *CHANGES):
        change = CHANGES[name](world, chance)
        begin = time.monotonic()
        world = done(machine, change, machine.do(change.call, **change.arguments), world)
        seconds[name] = time.monotonic() - begin
    assert look(machine) == world

    tally: Counter[str] = Counter()
    unfinished = False
    for turn in range(STORE_CUTS):
        world = make_room(machine, world)
        name = list(CHANGES)[turn % len(CHANGES)]
        change = CHANGES[name](world, chance)
        allowed = [world, change.after]
        deadline = time.monotonic() + chance.uniform(0, 1.2) * seconds[name]
        asked = machine.tell(change.call, **change.arguments)
        if machine.came(deadline - time.monotonic()):
            world = done(machine, change, machine.result(asked), world, unfinished=unfinished)
            allowed = [world]
            time.sleep(max(deadline - time.monotonic(), 0))
        if name == "rotate-key":
            unfinished = len(allowed) > 1
        tally["after the report" if len(allowed) == 1 else f"during {name}"] += 1
        tally["blocks lost"] += machine.cut(chance, survives=chance.choice((0, 0.5)))
        machine.boot()
        first = machine.do("first_answer")
        assert first.get("status") == 200, (turn, name, first)
        found = look(machine)
        assert any(same(found, one) for one in allowed), (turn, name, found, allowed)
        tally["as it was" if same(found, allowed[0]) and len(allowed) > 1 else "done"] += 1
        verified = machine.do("ask", method="POST", target="/v1/store/verify", body={})
        assert verified["json"]["ok"], (turn, name, verified)
        world = found
    count(cuts=STORE_CUTS, lost=0, **{name.replace(" ", "_"): number for name, number in sorted(tally.items())})


def same(found: World, told: World) -> bool:
    """Whether this is that world; an unknown key may be any."""
    return replace(found, key=told.key) == told if told.key is None else found == told


def make_room(machine: Machine, world: World) -> World:
    """A version has to be left that can be installed."""
    if len(world.versions) < MODELS:
        return world
    version = min(world.versions - {world.active, world.previous})
    answer = machine.do("ask", method="DELETE", target=f"/v1/models/linear?version={version}")
    assert answer["status"] == 200, answer
    return replace(world, versions=world.versions - {version})
