"""Version conditions of a manifest, as the Python packaging rules read them."""

from __future__ import annotations

import pytest

from agent.selection.versions import satisfies


@pytest.mark.parametrize(
    ("version", "condition", "holds"),
    [
        ("1.18.0", ">=1.18", True),
        ("1.17.3", ">=1.18", False),
        ("1.9.0", ">=1.18", False),
        ("1.23.2", ">=1.18,<2", True),
        ("2.0", ">=1.18,<2", False),
        ("1.20.4", "~=1.20.1", True),
        ("1.21.0", "~=1.20.1", False),
        ("1.21.0", "~=1.20", True),
        ("1.23.7", "==1.23.*", True),
        ("1.24.0", "==1.23.*", False),
        ("1.21.0", "!=1.21.0", False),
        ("1.21.1", "!=1.21.0", True),
        ("1.22.1", ">=1.18,!=1.22.*", False),
        ("1.19.0rc1", ">=1.19", False),
        ("1.19.0rc1", "<1.19", False),
        ("1.19.0rc2", ">1.19.0rc1", True),
        ("1.23.0+cu12", "==1.23.0", True),
        ("1.23", "==1.23.0", True),
        ("1.18", "1.18", True),
        ("1.19", "1.18", True),
        ("1.19", " >= 1.18 , < 2 ", True),
    ],
)
def test_conditions(version: str, condition: str, holds: bool) -> None:
    assert satisfies(version, condition) is holds


@pytest.mark.parametrize("condition", ["", ">=", "latest", ">=1.18;<2", ">=1.*", "=>1.18", ">=1.18,"])
def test_a_condition_that_is_none_is_told(condition: str) -> None:
    with pytest.raises(ValueError, match="is not a version condition"):
        satisfies("1.18.0", condition)


def test_a_version_that_is_none_is_told() -> None:
    with pytest.raises(ValueError, match="version 'unknown' is not a number"):
        satisfies("unknown", ">=1")
