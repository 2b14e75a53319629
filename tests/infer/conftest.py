"""What the tests of the engine share."""

from __future__ import annotations

import pytest


@pytest.fixture
def unhurried(monkeypatch):
    """Runs stay fit for the event loop however long this machine keeps them from the CPU."""
    monkeypatch.setattr("agent.infer.answering._QUICK_US", 1e12)
    monkeypatch.setattr("agent.infer.running._LONG_US", 1e12)
