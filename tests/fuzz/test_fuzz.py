"""Every reader of untrusted bytes: its seeds, what was ever found, a short run of mutations, time, memory.

The long run is ``deploy/fuzz.sh``; both share the table of targets.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz import growth
from tests.fuzz.engine import LastInput
from tests.fuzz.mutation import KINDS, ODD_NUMBERS, Loop, apply
from tests.fuzz.table import TARGETS
from tests.fuzz.target import FindingError, Memory, Target, check, check_memory, many, no_hang, words_in

HERE = Path(__file__).parent
FOUND = sorted(path for path in (HERE / "findings").rglob("*") if path.is_file())
SHAPES = [(name, shape) for name, target in TARGETS.items() for shape in target.shapes]
each_target = pytest.mark.parametrize("name", TARGETS)
each_shape = pytest.mark.parametrize(("name", "shape"), SHAPES, ids=[f"{name}: {shape}" for name, shape in SHAPES])


@each_target
def test_the_seeds_are_read_and_some_are_good(name: str) -> None:
    target, good = TARGETS[name], 0
    for data in target.seeds():
        assert len(data) <= max(target.most_bytes, 16384)
        check_memory(target, data)
        try:
            target.read(data)
            good += 1
        except target.allowed:
            pass
    assert good


@pytest.mark.parametrize("path", FOUND, ids=[f"{path.parent.name}: {path.name}" for path in FOUND])
def test_what_was_found_stays_mended(path: Path) -> None:
    with no_hang():
        check_memory(TARGETS[path.parent.name], path.read_bytes())


def test_every_finding_belongs_to_a_target() -> None:
    assert {path.parent.name for path in FOUND} <= set(TARGETS)
    assert {path.stem for path in (HERE / "words").iterdir()} == {target.dictionary for target in TARGETS.values()}


def inputs(target: Target) -> st.SearchStrategy[bytes]:
    """Seeds after a few edits; or any bytes at all."""
    seeds = [data[: target.most_bytes] for data in target.seeds()]
    pieces = st.one_of(
        st.sampled_from([b"", *words_in(target.words_file), *ODD_NUMBERS, *seeds]), st.binary(max_size=8)
    )
    edits = st.tuples(st.sampled_from(KINDS), st.floats(0, 1), st.integers(0, 1 << 16), pieces)
    changed = st.builds(
        lambda data, by: apply(data, by, target.most_bytes), st.sampled_from(seeds), st.lists(edits, max_size=8)
    )
    return st.one_of(changed, changed, changed, st.binary(max_size=64))


@each_target
def test_a_short_run(name: str) -> None:
    target = TARGETS[name]

    @settings(max_examples=150, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(inputs(target))
    def run(data: bytes) -> None:
        with no_hang():
            check_memory(target, data)

    run()


@each_shape
def test_the_lines_of_code_run_grow_in_proportion(name: str, shape: str) -> None:
    growth.check_lines(TARGETS[name], shape)


@pytest.mark.slow
@each_shape
def test_the_time_grows_in_proportion(name: str, shape: str) -> None:
    growth.check_time(TARGETS[name], shape)


@each_shape
def test_the_memory_grows_in_proportion(name: str, shape: str) -> None:
    growth.check_shape_memory(TARGETS[name], shape)


@each_target
def test_nothing_piles_up(name: str) -> None:
    growth.check_leaks(TARGETS[name])


# The means themselves: what they are there to find, they find.

_KEPT: list[bytes] = []


def _faulty(data: bytes) -> object:
    """Reads like a parser, with one of each fault."""
    if data.startswith(b"crash"):
        raise KeyError(data[5:])
    if data.startswith(b"words"):
        raise ValueError("cannot read: " + data[5:].decode("latin-1"))
    if data.startswith(b"memory"):
        return bytearray(len(data) * 10_000)
    if data.startswith(b"hang"):
        while data:
            pass
    if data.startswith(b"square"):
        return [data[place:].find(b"#") for place in range(len(data))]
    if data.startswith(b"lines"):
        for outer in range(len(data)):
            for _ in range(outer % 256):
                pass
    if data.startswith(b"leak"):
        _KEPT.append(bytes(5000))
    return data


def _no_lies(data: bytes, value: object) -> None:
    assert not data.startswith(b"lie"), "a broken promise"
    assert value is not None


FAULTY = Target(
    "faulty", _faulty, _no_lies, (ValueError,), lambda: [b"fine", b"leak"], "http",
    {name: many(b"-", name.encode()) for name in ("square", "lines", "fine", "memory")},
    grown=1 << 13, memory=Memory(1 << 16, 8),
)  # fmt: skip


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"crash now", "KeyError"),
        (b"words\x1b[2J", "not printable"),
        (b"words" + b"x" * 5000, "5013 characters"),
        (b"lie", "a broken promise"),
        (b"memory" * 10, "bytes of memory"),
    ],
)
def test_each_kind_of_fault_is_found(data: bytes, told: str) -> None:
    with pytest.raises(FindingError, match=re.escape(told)):
        check_memory(FAULTY, data)


def test_an_allowed_error_and_a_value_are_no_findings() -> None:
    assert check(FAULTY, b"words: no") == ("ValueError", "cannot read: : no")
    assert check(FAULTY, b"fine") == b"fine"


def test_a_hang_is_found() -> None:
    with pytest.raises(FindingError, match="no end after"), no_hang(0.2):
        check(FAULTY, b"hang")


def test_growth_by_the_square_is_found() -> None:
    with pytest.raises(FindingError, match="times the lines"):
        growth.check_lines(Target(**_parts(FAULTY, grown=1 << 11)), "lines")
    with pytest.raises(FindingError, match="times the CPU time"):
        growth.check_time(Target(**_parts(FAULTY, grown=1 << 17)), "square")
    growth.check_lines(FAULTY, "fine")
    growth.check_time(FAULTY, "fine")
    with pytest.raises(FindingError, match="bytes of memory"):
        growth.check_shape_memory(FAULTY, "memory")


def test_a_leak_is_found() -> None:
    with pytest.raises(FindingError, match="bytes held"):
        growth.check_leaks(FAULTY)
    _KEPT.clear()


def _parts(target: Target, **changes: object) -> dict[str, object]:
    return {name: getattr(target, name) for name in Target.__dataclass_fields__} | changes


def test_the_loop_finds_what_is_a_few_edits_away_and_leaves_the_input(tmp_path: Path) -> None:
    target = Target(**_parts(FAULTY, seeds=lambda: [b"Crash it", b"fine"]))
    loop = Loop(target, list(target.seeds()), 1, LastInput(tmp_path / "last", target.most_bytes))
    with pytest.raises(FindingError, match="KeyError"):
        loop.run(60)
    assert LastInput.read(tmp_path / "last").startswith(b"crash")
    assert loop.result.executions > 0


@pytest.mark.parametrize("kind", KINDS)
def test_edits_of_any_place_give_bytes_within_the_limit(kind: str) -> None:
    for data in (b"", b"a", b"abc123def" * 10):
        for share in (0.0, 0.5, 1.0):
            assert len(apply(data, [(kind, share, 12345, b"piece")], 50)) <= 50


def test_the_command_runs_a_target_and_says_by_what() -> None:
    root = HERE.parents[1]
    command = [sys.executable, "-m", "tests.fuzz", "bytes-elements", "--seconds", "1", "--engine", "mutation"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("engine: mutation")
    row = re.search(r"(?m)^bytes-elements +([0-9]+) .* nothing found$", done.stdout)
    assert row is not None and int(row[1]) > 100
    wrong = subprocess.run([*command[:3], "no-such"], cwd=root, capture_output=True, text=True, check=False)
    assert wrong.returncode == 2 and "no target no-such" in wrong.stderr
