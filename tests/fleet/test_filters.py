"""Filters pick the devices that are meant, and never one of which nothing is known."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.base.errors import NotFoundError, PeerError
from agent.fleet.filters import parse_filters

VIEW: dict[str, Any] = {
    "device": "cam-1",
    "epoch": 2,
    "info": {
        "profile": "raspberry-pi-4",
        "agent_version": "0.1.0",
        "facts": {
            "board": "Raspberry Pi 4 Model B",
            "mem_total_mb": 3792,
            "arch": "aarch64",
            "compatible": ["a", "b,c"],
        },
        "inventory": {"runtimes": {"onnx": {"version": "1.23.2"}}},
    },
    "reported": {"health": "healthy", "config": {"log": {"level": "debug"}}, "jobs": {}},
    "status": {"online": True},
}
SILENT: dict[str, Any] = {"device": "cam-2", "epoch": 1, "info": None, "reported": None, "status": None}


def matches(text: str, view: dict[str, Any] = VIEW) -> bool:
    return all(each.matches(view) for each in parse_filters([text]))


@pytest.mark.parametrize(
    "text",
    [
        "board=raspberry pi 4*", "board = Raspberry*", "device=cam-1", "device=cam-?", "board=Jetson*|Raspberry*",
        "board!=Jetson*", "memory>=3792", "memory<4000", "memory>1", "epoch=2", "epoch<=2", "online=true",
        "health=healthy", "facts.compatible=b,c", "inventory.runtimes.onnx.version=1.23*", "config.log.level=debug",
        "arch!=x86_64", "facts.mem_total_mb>3.5e3",
    ],
)  # fmt: skip
def test_what_matches(text: str) -> None:
    assert matches(text)


@pytest.mark.parametrize(
    "text",
    ["board=Raspberry", "device!=cam-1", "memory>=4000", "online=false", "board>5", "facts.compatible!=a", "epoch>2"],
)
def test_what_does_not(text: str) -> None:
    assert not matches(text)


@pytest.mark.parametrize(
    "text", ["board=*", "board!=x", "memory>0", "memory<9", "online!=true", "facts.none.deeper=x", "jobs.x!=y"]
)
def test_what_nobody_has_said_matches_nothing(text: str) -> None:
    assert not matches(text, SILENT)
    assert text.startswith(("board", "memory", "online")) or not matches(text)


@pytest.mark.parametrize(
    "text", ["", "board", "=x", "colour=red", "facts=1", "memory>lots", "a b=c", "info.facts.board=x"]
)
def test_what_is_no_filter(text: str) -> None:
    with pytest.raises(PeerError, match="cannot read filter"):
        parse_filters([text])


def test_groups_stand_for_their_filters() -> None:
    groups = {"pis": ["board=Raspberry*", "memory>1000"], "odd": ["nonsense"], "nested": ["group=pis"]}
    assert all(each.matches(VIEW) for each in parse_filters(["group=pis"], groups))
    with pytest.raises(NotFoundError, match="there are nested, odd, pis"):
        parse_filters(["group=none"], groups)
    with pytest.raises(PeerError, match="only asked for with ="):
        parse_filters(["group!=pis"], groups)
    for name in ("odd", "nested"):
        with pytest.raises(PeerError):
            parse_filters([f"group={name}"], groups)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
)


@given(st.text(max_size=60), JSON)
def test_no_text_and_no_device_breaks_a_filter(text: str, said: Any) -> None:
    try:
        filters = parse_filters([text, f"board={text}", f"facts.{text}>1"])
    except PeerError:
        return
    for each in filters:
        assert each.matches({"device": "x", "info": said, "reported": said, "status": said}) in (True, False)
