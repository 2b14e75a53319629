"""The daemon of the tests of core, for the pages."""

from __future__ import annotations

from tests.core.conftest import agent, running

__all__ = ["agent", "running"]
