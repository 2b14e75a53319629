"""Errors quote what strangers sent, and are read on terminals and in logs."""

from __future__ import annotations

import pytest

from agent.base.errors import MAX_TEXT, PeerError


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("cannot read 'größe': no such field", "cannot read 'größe': no such field"),
        ("a\x1b[2Jb\x9b1m", "a\\x1b[2Jb\\x9b1m"),
        ("first\nsecond\r\u2028", "first\\nsecond\\r\\u2028"),
        ("half \ud800 of a pair", "half \\ud800 of a pair"),
    ],
)
def test_a_text_is_one_printable_line(given: str, shown: str) -> None:
    error = PeerError(given, hint=given)
    assert (str(error), error.hint) == (shown, shown)
    assert str(error).encode()


def test_a_text_is_bounded() -> None:
    for text in ("x" * 100_000, "\x00" * 100_000, "é" * MAX_TEXT + "tail"):
        assert len(str(PeerError(text))) == MAX_TEXT
    assert str(PeerError("x" * MAX_TEXT)) == "x" * MAX_TEXT
