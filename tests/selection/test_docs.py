"""The example in the explanation runs, and its tables are the code's."""

from __future__ import annotations

import re
from pathlib import Path

from agent.selection.criteria import CHAINS

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "explanation" / "selection.md").read_text()


def test_the_example_holds() -> None:
    (example,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    exec(compile(example, "selection.md", "exec"), {})


def test_the_chains_are_those_of_the_code() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \| (\w+) \| (\w+) \| prior \|$", PAGE, re.MULTILINE)
    assert {row[0]: row for row in rows} == CHAINS
