"""Killed at every step, killed at any moment, and power lost at every flush, rename and deletion."""

from __future__ import annotations

import hashlib
import itertools
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from agent.store.keys import FILE_NEXT
from agent.store.store import Store
from tests.store.conftest import install, without_model
from tests.store.powerloss import VARIANTS, Disk
from tests.store.workload import State, listed, opened, operations, require_sound, states

SIZE = 150_000


def in_child(task: Callable[[Callable[[], None]], None], *, kill_after: float | None = None) -> tuple[int, int]:
    """Run ``task`` in a forked process; returns its wait status and how many operations it reported as done."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            task(lambda: (os.write(writer, b"."), None)[1])
            status = 0
        finally:
            os._exit(status)
    os.close(writer)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    with os.fdopen(reader, "rb") as pipe:
        return status, len(pipe.read())


def run_all(folder: Path, report: Callable[[], None], step: Callable[[str], None]) -> None:
    with opened(folder, step) as store:
        for operation in operations(SIZE):
            operation(store)
            report()


def test_killed_at_every_step(memory_path: Path) -> None:
    """SIGKILL at the first step, at the second …, until a run comes through: each time the folder is sound."""
    history = states(SIZE)
    seen: set[str] = set()
    for number in itertools.count(1):
        folder = memory_path / str(number)
        folder.mkdir()

        def task(report: Callable[[], None], folder: Path = folder, number: int = number) -> None:
            count = 0

            def step(name: str) -> None:
                nonlocal count
                count += 1
                if count == number:
                    os.kill(os.getpid(), signal.SIGKILL)
                seen.add(name)

            run_all(folder, report, step)

        status, done = in_child(task)
        require_sound(folder, history[done : done + 2], f"step {number}, {done} done")
        shutil.rmtree(folder)
        if os.WIFEXITED(status):
            assert (os.WEXITSTATUS(status), done) == (0, len(history) - 1)
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
    assert number > 60, "the steps of the workload are gone"


def test_killed_again_while_a_rotation_is_resumed(memory_path: Path) -> None:
    """Killed at the n-th step, and again at the n-th step of the resumption, and again …: it ends, nothing is lost."""
    for number in range(2, 12):
        folder = memory_path / str(number)
        folder.mkdir()
        with opened(folder) as store:
            for name in "abc":
                install(store, name, "1.0.0", {"m.onnx": name.encode() * 1000})
            before, key = listed(store.document), store.secret.key_id

        def task(report: Callable[[], None], folder: Path = folder, number: int = number) -> None:
            steps = itertools.count(1)

            def step(name: str) -> None:
                if next(steps) == number:
                    os.kill(os.getpid(), signal.SIGKILL)

            with opened(folder, step) as store:
                store.rotate_key()
                report()

        in_child(task)
        for _ in range(3):
            in_child(task)
        require_sound(folder, [before], f"step {number}")
        with opened(folder) as store:
            assert store.secret.key_id != key  # whoever had begun has finished it


def fingerprint(folder: Path) -> str:
    """The same for two folders of the same names and contents."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        digest.update(str(path.relative_to(folder)).encode() + b"\0")
        digest.update(hashlib.sha256(path.read_bytes()).digest() if path.is_file() else b"folder")
    return digest.hexdigest()


def test_power_lost_at_every_flush(memory_path: Path) -> None:
    history = states(SIZE)
    root = memory_path / "disk"
    root.mkdir()
    done = 0
    failures: list[str] = []
    numbers = itertools.count()

    def event(what: str) -> None:
        number = next(numbers)
        for variant in VARIANTS:
            image = memory_path / f"image-{number}-{variant.replace(' ', '-')}"
            disk.image(image, variant)
            print_of_it = fingerprint(image)
            if (print_of_it, done) not in known:
                paused.append((image, done, f"event {number} ({what}), {variant}"))
            known.add((print_of_it, done))

    known: set[tuple[str, int]] = set()
    paused: list[tuple[Path, int, str]] = []
    disk = Disk(root, event)
    with disk.watched(), opened(root) as store:
        for operation in operations(SIZE):
            operation(store)
            done += 1
    assert len(paused) > 90, "the events of the workload are gone"
    for image, reported, where in paused:
        try:
            # After the first rotation was reported and before the second begins, the old secret is gone for good.
            assert reported not in (3, 4, 5) or not (image / "keys" / FILE_NEXT).exists(), "rotation is not durable"
            require_sound(image, history[reported : reported + 2], where)
        except Exception as error:
            failures.append(f"{where}: {error!r}")
        shutil.rmtree(image)
    assert failures == []


def one_of_four(store: Store, number: int, size: int) -> None:
    """The operations in turn: add and activate, rotate, commit, remove and collect."""
    kind = number % 4
    if kind == 0:
        install(store, "digits", f"1.0.{number}", {"m.onnx": filling(number, size)})
    elif kind == 1:
        store.rotate_key()
    elif kind == 2:
        store.commit(lambda document: document)
    else:
        store.commit(without_model("digits"))
        store.gc()


def filling(number: int, size: int) -> bytes:
    return bytes([number % 256]) * size


def expected(before: State, number: int, size: int) -> State:
    """The state after that operation."""
    if number % 4 == 0:
        return {**before, ("digits", f"1.0.{number}", "m.onnx"): hashlib.sha256(filling(number, size)).hexdigest()}
    return {} if number % 4 == 3 else before


def killed_at_any_moment(folder: Path, kills: int, size: int, seed: int) -> None:
    """Kills drawn evenly over the duration of each operation, opening included, on one store that lives on."""
    chance = random.Random(seed)
    durations: list[float] = []
    for number in range(4):
        began = time.monotonic()
        assert in_child(partial(open_and_do, folder, number, size))[1] == 1
        durations.append(time.monotonic() - began)
    killed = 0
    for number in range(4, 4 + 10 * kills):
        with opened(folder) as store:
            before = listed(store.document)
        task = partial(open_and_do, folder, number, size)
        status, done = in_child(task, kill_after=chance.uniform(0, durations[number % 4]))
        killed += os.WIFSIGNALED(status)
        if not os.WIFSIGNALED(status):  # the machine has become quieter than it was when the duration was taken
            durations[number % 4] *= 0.7
        after = expected(before, number, size)
        require_sound(folder, [after] if done else [before, after], f"operation {number}")
        if killed == kills:
            return
    raise AssertionError(f"only {killed} of the kills came in time")


def open_and_do(folder: Path, number: int, size: int, report: Callable[[], None]) -> None:
    with opened(folder) as store:
        one_of_four(store, number, size)
        report()


def test_killed_at_any_moment(memory_path: Path) -> None:
    killed_at_any_moment(memory_path, kills=20, size=300_000, seed=1)


@pytest.mark.slow
def test_killed_two_hundred_times(memory_path: Path) -> None:
    killed_at_any_moment(memory_path, kills=200, size=5_000_000, seed=2)
