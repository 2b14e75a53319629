"""The page on publishing, typed from its first line to its last."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.core.conftest import ROOT
from tests.docs.examples import Reader

PAGE = ROOT / "docs" / "how-to" / "publish.md"


@pytest.mark.slow
def test_the_page_on_publishing_works(short_dir: Path) -> None:
    reader = Reader(short_dir)
    (reader.clone / "tests").symlink_to(ROOT / "tests")
    os.makedirs(short_dir / ".config", exist_ok=True)
    reader.read(PAGE)
