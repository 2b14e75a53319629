"""One served socket per event loop for tests that need no limits of their own."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.serve.running import Running, serving
from tests.serve.toy import ToyModels


@pytest.fixture(params=["asyncio", "uvloop"])
def uvloop(request: pytest.FixtureRequest) -> bool:
    """Both event loops that a device may have."""
    wanted: bool = request.param == "uvloop"
    if wanted and importlib.util.find_spec("uvloop") is None:
        pytest.skip("uvloop is not installed")
    return wanted


@pytest.fixture
def served(short_dir: Path, uvloop: bool) -> Iterator[tuple[Running, ToyModels]]:
    """The toy models on ``infer.sock`` with the default limits."""
    running, models = serving(short_dir / "infer.sock", uvloop=uvloop)
    with running:
        yield running, models[0]
