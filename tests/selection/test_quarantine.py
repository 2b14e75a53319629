"""Three deaths under one key, and a candidate is left alone until something changes."""

from __future__ import annotations

import json

import pytest

from agent.base.errors import DamagedError
from agent.selection.quarantine import LIMIT, QuarantineState

from .simulation import key

KEY = key()


def test_a_candidate_that_keeps_dying_is_quarantined_with_the_reason() -> None:
    state = QuarantineState()
    for death in ("crash", "hang"):
        state = state.after("m/int8", KEY, death)  # type: ignore[arg-type]
        assert state.reason("m/int8", KEY) is None
    state = state.after("m/int8", KEY, "crash")
    assert state.reason("m/int8", KEY) == "crashed twice, hung once"
    assert state.reason("m/fp32", KEY) is None


def test_another_runtime_is_another_chance() -> None:
    state = QuarantineState()
    for _ in range(LIMIT):
        state = state.after("m/int8", KEY, "memory")
    newer = key(runtime_version="1.33.0")
    assert state.reason("m/int8", newer) is None
    assert state.after("m/int8", newer, "crash").reason("m/int8", newer) is None
    # Back on the old runtime the old deaths are gone too: what died under the new one is not known to be worse.
    assert state.after("m/int8", newer, "crash").reason("m/int8", KEY) is None


def test_states_are_values_and_stay_small() -> None:
    first = QuarantineState()
    second = first
    for _ in range(500):
        second = second.after("m/int8", KEY, "crash")
    assert first.records == {}
    assert len(second.records["m/int8"].deaths) == 100
    assert second.without("m/int8").reason("m/int8", KEY) is None


def test_it_survives_a_restart() -> None:
    state = QuarantineState().after("m/int8", KEY, "crash").after("m/fp16", KEY, "hang")
    assert QuarantineState.from_json(json.loads(json.dumps(state.to_json()))) == state


@pytest.mark.parametrize("document", [[], {"a": 1}, {"a": {"key": {}, "deaths": []}}, {"a": {"deaths": ["bored"]}}])
def test_damage_is_told(document: object) -> None:
    with pytest.raises(DamagedError, match="cannot read"):
        QuarantineState.from_json(document)
