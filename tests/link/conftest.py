"""Fixtures of the tests of the link: a real broker, a stand-in for core, the link as a process."""

from tests.link.broker import broker
from tests.link.device import link

__all__ = ["broker", "link"]
