"""The pages hold together: every link leads somewhere, and the index knows every page."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = [*sorted(DOCS.rglob("*.md")), *sorted(ROOT.glob("*.md"))]
PARTS = ("tutorial", "how-to", "reference", "explanation", "spec")


def links(page: Path) -> list[str]:
    """The relative links of a page, without their anchors; code is not prose."""
    text = re.sub(r"(?s)```.*?```|`[^`\n]*`", "", page.read_text())
    found = [target.split("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", text)]
    return [target for target in found if target and "://" not in target and not target.startswith("mailto:")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page: Path) -> None:
    broken = [target for target in links(page) if not (page.parent / target).exists()]
    assert broken == []


def test_the_index_knows_every_page() -> None:
    listed = {(DOCS / target).resolve() for target in links(DOCS / "README.md")}
    pages = {path.resolve() for part in PARTS for path in (DOCS / part).rglob("*.md")}
    assert sorted(str(page.relative_to(DOCS)) for page in pages - listed) == [], "add them to docs/README.md"
