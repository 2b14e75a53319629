"""Version specifiers of ``requires.runtime_version``: ``>=1.18``, ``>=1.18,<2``, ``~=1.20``, ``==1.23.*``.

The part of the Python packaging rules (version specifiers, formerly PEP 440) that a runtime's releases need: numbers,
pre-releases (``1.19.0rc1`` comes before ``1.19.0``) and local parts (``1.23.0+cu12`` counts as ``1.23.0``). A bare
``1.18`` means at least that one.
"""

from __future__ import annotations

import re
from itertools import zip_longest

_CLAUSE = re.compile(
    r"(>=|<=|==|!=|~=|>|<|)\s*v?(\d+(?:\.\d+)*)(\.\*)?(?:[-._]?(a|b|rc|alpha|beta|dev|pre)[-._]?(\d*))?\Z"
)
_VERSION = re.compile(r"v?(\d+(?:\.\d+)*)(?:[-._]?(a|b|rc|alpha|beta|dev|pre)[-._]?(\d*))?")
_STAGES = {"dev": -4, "a": -3, "alpha": -3, "b": -2, "beta": -2, "rc": -1, "pre": -1}

#: Release numbers, then where the release stands (0 = final), then the number of a pre-release.
_Parsed = tuple[tuple[int, ...], int, int]


def satisfies(version: str, specifier: str) -> bool:
    """Whether ``version`` fulfils each clause of ``specifier``. ValueError, naming the part, when one is unreadable."""
    match = _VERSION.match(version)
    if match is None:
        raise ValueError(f"version '{version}' is not a number")
    have = _parsed(match[1], match[2], match[3])
    # Every clause is read before the answer, so that a bad one is told whatever the others say.
    held = [_holds(have, clause.strip()) for clause in specifier.split(",")]
    return all(held)


def _holds(have: _Parsed, clause: str) -> bool:
    match = _CLAUSE.match(clause)
    if match is None or (match[3] and match[1] not in ("==", "!=")):
        raise ValueError(f"'{clause}' is not a version condition such as '>=1.18'")
    operator, numbers = match[1] or ">=", _numbers(match[2])
    if match[3]:
        return _starts_with(have, numbers) == (operator == "==")
    wanted = _parsed(match[2], match[4], match[5])
    order = _compare(have, wanted)
    return {
        ">=": order >= 0,
        "<=": order <= 0,
        ">": order > 0,
        # 1.19.0rc1 is no answer to "before 1.19": whoever writes that wants none of 1.19.
        "<": order < 0 and (wanted[1] < 0 or not _starts_with(have, numbers)),
        "==": order == 0,
        "!=": order != 0,
        "~=": order >= 0 and _starts_with(have, numbers[:-1]),
    }[operator]


def _starts_with(have: _Parsed, prefix: tuple[int, ...]) -> bool:
    return (have[0] + (0,) * len(prefix))[: len(prefix)] == prefix


def _parsed(numbers: str, stage: str | None, count: str | None) -> _Parsed:
    return _numbers(numbers), _STAGES.get(stage or "", 0), int(count or 0)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("."))


def _padded(numbers: tuple[int, ...], other: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(a for a, _ in zip_longest(numbers, other, fillvalue=0))


def _compare(a: _Parsed, b: _Parsed) -> int:
    left, right = (_padded(a[0], b[0]), *a[1:]), (_padded(b[0], a[0]), *b[1:])
    return (left > right) - (left < right)
