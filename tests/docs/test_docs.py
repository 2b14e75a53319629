"""What the pages tell a reader to type works, in their order, against a real daemon, and prints what they say."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.core.conftest import ROOT
from tests.docs.examples import Reader, blocks, commands, essence, missing_tools, runnable

DOCS = ROOT / "docs"
#: The other pages' own examples are tried by the tests of what they are about.
PAGES = [ROOT / "README.md", DOCS / "reference" / "metrics.md"]
#: Those that quantize a model, which takes a while.
LONG_PAGES = [DOCS / "reference" / "cli.md", *sorted((DOCS / "tutorial").glob("*.md"))]


@pytest.fixture
def reader(short_dir: Path):
    """A fresh device; its daemon does not outlive the test."""
    person = Reader(short_dir)
    yield person
    if person.process is not None:
        person.process.kill()
        person.process.wait()


def try_out(person: Reader, page: Path) -> None:
    if missing := missing_tools(page):
        pytest.skip(f"no {', '.join(missing)} here")
    assert runnable(page), f"{page.name} has nothing to try"
    person.read(page)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_a_page_says_works(reader: Reader, page: Path) -> None:
    try_out(reader, page)


@pytest.mark.slow
@pytest.mark.parametrize("page", LONG_PAGES, ids=lambda page: page.stem)
def test_a_long_page_works_from_its_first_line_to_its_last(reader: Reader, page: Path) -> None:
    try_out(reader, page)


def test_every_page_with_a_marked_example_is_tried() -> None:
    marked = {page for page in [*DOCS.rglob("*.md"), *ROOT.glob("*.md")] if runnable(page)}
    assert marked <= {*PAGES, *LONG_PAGES, DOCS / "how-to" / "publish.md"}


def test_an_example_that_is_wrong_is_found(reader: Reader, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    for wrong in ("$ edge-agent config check\nall fine", "$ edge-agent nonsense", "$ true\nerror: cannot be"):
        page.write_text(f"```console run\n{wrong}\n```\n")
        with pytest.raises(AssertionError, match=r"page\.md:1"):
            reader.read(page)
    page.write_text("```sh run\nfalse\n```\n")
    with pytest.raises(AssertionError, match=r"page\.md:1"):
        reader.read(page)


def test_blocks_and_commands_are_taken_apart_rightly(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "text\n\n```console run varies\n$ one \\\n  more\nout 1.5\n\n$ two\n```\n1. x\n\n   ```sh\n   a\n   ```\n"
    )
    first, second = blocks(page)
    assert first.words == ("run", "varies") and first.line == 3
    assert commands(first) == [("one \\\n  more", ["out 1.5"]), ("two", [])]
    assert second.text == "a\n" and runnable(page) == [first]
    assert essence("packed  0.0.0-sha-0123456789ab  2.6 MB") == essence("packed 0.0.0-sha-ab9876543210 31 MB")
