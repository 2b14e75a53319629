"""The damage zoo's second part: files that are whole, but old, doubled, at another's place or somebody else's.

The promises are those of the first part (test_damage). Which answer is right depends on the version that gives it.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

from agent.base.errors import AgentError
from tests import onnx_models
from tests.core.conftest import Agent
from tests.core.test_daemon import X, bundle, linear_file, reference
from tests.core.test_damage import GOOD, HURT, NO_FORMS, WAYS, check, hurt_device, template, told  # noqa: F401 - two are fixtures

NEWER = onnx_models.linear(5)
#: Whom the daemon runs as where files belong to others.
NOBODY = 65534


@pytest.fixture(scope="module")
def ages(tmp_path_factory):
    """State folders of one device: ``first`` has version 1.0.0, ``second`` 2.0.0 too, ``third`` has another key."""
    folder = Path(tempfile.mkdtemp(prefix="ea-", dir="/tmp"))
    device = Agent(folder)
    device.config.write_text(NO_FORMS)
    device.start()

    def keep(name):
        device.stop()
        shutil.copytree(device.state, folder / name)
        device.start()

    try:
        device.cli("models", "add", linear_file(folder, 1), "--name", "good")
        device.cli("models", "add", bundle(folder / "1.edgemodel", {"fp32": ("fp32", HURT)}, name="hurt"))
        keep("first")
        newer = bundle(folder / "2.edgemodel", {"fp32": ("fp32", NEWER)}, name="hurt", version="2.0.0")
        device.cli("models", "add", newer)
        keep("second")
        device.cli("store", "rotate-key")
        keep("third")
        device.stop()
        yield folder
    finally:
        if device.process is not None:
            device.process.kill()
            device.process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def replace(device, ages, name, taken_from):
    """The device as it was at the age ``name``, but for one part, which is of the age ``taken_from``."""
    age, part = taken_from
    shutil.copytree(ages / name, device.state)
    device.config.write_text(NO_FORMS)
    place = device.state / part
    if place.is_dir():
        shutil.rmtree(place)
        shutil.copytree(ages / age / part, place)
    else:
        shutil.copy(ages / age / part, place)


def start(device):
    """Whether it starts; if not, the error names the mend."""
    device.start(ready=False)
    try:
        device.wait_until_ready()
    except AssertionError:
        log = device.log.read_text()
        assert device.process.wait(timeout=30) == 1, log
        device.process = None
        assert "error: cannot " in log, log
        assert "hint: " in log, log
        assert "Traceback" not in log, log
        return False
    return True


def versions_that_answer(device):
    """By model, the version that answers, None where it is unavailable. Every answer is right."""
    found = {}
    with device.client() as client:
        for name in ("good", "hurt"):
            try:
                answer = client.infer(name, {"x": X})
            except AgentError:
                found[name] = None
                continue
            found[name] = answer.model_version
            data = GOOD if name == "good" else {"1.0.0": HURT, "2.0.0": NEWER}[answer.model_version]
            np.testing.assert_allclose(answer["y"], reference(data), rtol=1e-4)
    device.cli("store", "verify", status=None)
    assert "Traceback" not in device.log.read_text()
    return found


def findings(device):
    return told(device.json("doctor", status=None)["findings"])


def test_an_older_pointer_is_the_state_before_the_last_change(agent, ages):
    """As a kill leaves it that comes just before the pointer swings: one cannot be told from the other."""
    replace(agent, ages, "second", ("first", "store/CURRENT"))
    assert start(agent)
    seen = versions_that_answer(agent)
    assert seen["good"] is not None
    assert seen["hurt"] == "1.0.0"
    agent.cli("models", "add", ages / "2.edgemodel")
    assert versions_that_answer(agent)["hurt"] == "2.0.0"
    assert agent.json("store", "verify")["ok"]


def test_an_older_secret_opens_nothing(agent, ages):
    replace(agent, ages, "third", ("second", "keys/device-secret"))
    assert not start(agent)
    assert "secret" in agent.log.read_text()


def test_an_older_store_under_a_newer_secret_does_not_open(agent, ages):
    replace(agent, ages, "third", ("second", "store"))
    assert not start(agent)


def test_an_older_store_under_its_own_secret_is_a_backup(agent, ages):
    replace(agent, ages, "second", ("first", "store"))
    assert start(agent)
    assert versions_that_answer(agent)["hurt"] == "1.0.0"
    assert agent.json("store", "verify")["ok"]


@pytest.mark.parametrize("part", ["store/blobs", "store/catalog"])
def test_one_folder_of_the_store_is_older(agent, ages, part):
    replace(agent, ages, "second", ("first", part))
    if start(agent):
        seen = versions_that_answer(agent)
        assert seen["good"] is not None
        assert seen["hurt"] in (None, "1.0.0")
        if seen["hurt"] is None:
            assert findings(agent)
            agent.cli("models", "add", ages / "2.edgemodel")
            assert versions_that_answer(agent)["hurt"] == "2.0.0"


@pytest.mark.parametrize("kind", ["payload", "header"])
def test_an_older_version_in_the_place_of_the_newer(agent, ages, kind):
    """The file of 1.0.0 under the name of 2.0.0's."""

    def files(age):
        return {path.name for path in (ages / age / "store" / "blobs").iterdir()}

    new = {name.partition(".")[0] for name in files("second") - files("first")}
    assert len(new) == 1
    shutil.copytree(ages / "second", agent.state)
    agent.config.write_text(NO_FORMS)
    blobs = agent.state / "store" / "blobs"
    wanted = {path for path in blobs.iterdir() if path.name.endswith(".header") == (kind == "header")}
    newer = {path for path in wanted if path.name.partition(".")[0] in new}
    for path in newer:
        for older in wanted - newer:
            shutil.copy(older, path)
    assert start(agent)
    seen = versions_that_answer(agent)
    assert seen == {"good": seen["good"], "hurt": None}
    assert seen["good"] is not None
    assert findings(agent)
    agent.cli("models", "rollback", "hurt")
    assert versions_that_answer(agent)["hurt"] == "1.0.0"


def next_number(path):
    return path.with_name(f"{int(path.stem) + 1:012d}.age")


def test_files_that_are_there_twice_change_nothing(hurt_device):  # noqa: F811 - the fixture
    store = hurt_device.state / "store"
    newest = max((store / "catalog").glob("*.age"))
    shutil.copy(newest, next_number(newest))
    for path in list((store / "blobs").iterdir()):
        shutil.copy(path, path.with_name("f" * 16 + path.name[16:]))
    shutil.copy(store / "CURRENT", store / "CURRENT.bak")
    shutil.copy(hurt_device.state / "keys" / "device-secret", hurt_device.state / "keys" / "device-secret.bak")
    assert check(hurt_device, sound=("good", "hurt")) is not None
    hurt_device.cli("models", "add", linear_file(hurt_device.folder, 7), "--name", "more")
    hurt_device.restart()
    names = [row["name"] for row in hurt_device.json("models", "list")["models"]]
    assert names == ["good", "hurt", "more"]


def test_the_generations_have_changed_places(hurt_device):  # noqa: F811 - the fixture
    older, newest = sorted((hurt_device.state / "store" / "catalog").glob("*.age"))[-2:]
    data = older.read_bytes(), newest.read_bytes()
    newest.write_bytes(data[0])
    older.write_bytes(data[1])
    found = check(hurt_device, may_lack=("hurt",))
    assert found is None or told(found)


def test_a_payload_and_its_header_have_changed_places(hurt_device):  # noqa: F811 - the fixture
    for header in (hurt_device.state / "store" / "blobs").glob("*.header"):
        payload = header.with_name(header.name.partition(".")[0])
        data = header.read_bytes(), payload.read_bytes()
        payload.write_bytes(data[0])
        header.write_bytes(data[1])
    assert told(check(hurt_device, sound=()))


@pytest.mark.parametrize("name", ["store/lock", "store/CURRENT", "store/blobs", "store/catalog", "store", "keys"])
@pytest.mark.parametrize("way", ["gone", "a file", "a link"])
def test_something_else_is_in_the_place_of_a_part(hurt_device, name, way):  # noqa: F811 - the fixture
    place = hurt_device.state / name
    elsewhere = hurt_device.folder / "elsewhere"
    place.rename(elsewhere)
    if way == "a file":
        place.mkdir() if elsewhere.is_file() else place.write_text("hello")
    elif way == "a link":
        place.symlink_to(elsewhere)
    found = check(hurt_device, sound=())
    if name == "store" and way == "gone":  # a new store, or the word that its models are gone: never a crash
        return
    assert found is None or told(found) or versions_that_answer(hurt_device)["good"] is not None


@pytest.mark.parametrize("way", WAYS)
def test_the_results_of_maintenance_are_hurt(hurt_device, way):  # noqa: F811 - the fixture
    hurt_device.start()
    hurt_device.cli("maintenance", "--run", "disk", "sweep", status=None)
    hurt_device.stop()
    WAYS[way](hurt_device.state / "maintenance.json")
    assert check(hurt_device, sound=("good", "hurt")) is not None
    ran = hurt_device.cli("maintenance", "--run", "sweep", "--json", status=None)
    if way == "a folder":
        assert ran.stderr.startswith("error: cannot keep what came of maintenance")
    else:
        assert next(row for row in json.loads(ran.stdout)["tasks"] if row["task"] == "sweep")["ok"] is True


@pytest.mark.parametrize("mode", [0o755, 0o777])
@pytest.mark.parametrize("name", ["", "store", "store/blobs", "store/catalog", "keys"])
def test_a_folder_is_open_to_others(hurt_device, name, mode):  # noqa: F811 - the fixture
    place = hurt_device.state / name
    place.chmod(mode)
    found = check(hurt_device, sound=("good", "hurt"))
    if mode & 0o022 and name in ("", "keys"):  # whoever may write there may put a secret of his own in its place
        assert found is None
        assert f"chmod go-w {place}" in hurt_device.log.read_text()
    else:
        assert f"chmod go-rwx {place}" in [row["mend"] for row in told(found)]


#: Runs a program as an ordinary user who can read the interpreter, wherever it lies: a folder that is closed to him
#: is covered, for this program alone, by an empty one with the interpreter in it.
_AS_NOBODY = """\
#!/bin/sh
exec unshare --mount sh -ec '
  if [ -n "$2" ]; then
    mount --bind "$1" "$3"
    mount -t tmpfs -o mode=755 tmpfs "$2"
    mkdir -p "$1"
    mount --move "$3" "$1"
  fi
  shift 3
  exec setpriv --reuid {user} --regid {user} --clear-groups --inh-caps=-all --bounding-set=-all "$@"
' sh {base} {closed} {spare} {python} "$@"
"""


@pytest.fixture
def as_nobody(hurt_device):  # noqa: F811 - the fixture
    """The device, run by an ordinary user whose files all are."""
    if os.geteuid() != 0:
        pytest.skip("needs root to become somebody else")
    base, spare = Path(sys.base_prefix), hurt_device.folder / "spare"
    spare.mkdir()
    closed = next((str(path) for path in reversed(base.parents) if not path.stat().st_mode & 0o001), "")
    wrapper = hurt_device.folder / "python"
    words = {"base": base, "closed": closed, "spare": spare, "python": sys.executable}
    wrapper.write_text(_AS_NOBODY.format(user=NOBODY, **{key: shlex.quote(str(word)) for key, word in words.items()}))
    wrapper.chmod(0o755)
    hurt_device.python = str(wrapper)
    for path in (hurt_device.folder, *hurt_device.folder.rglob("*")):
        os.chown(path, NOBODY, NOBODY, follow_symlinks=False)
    tried = subprocess.run(
        [str(wrapper), "-c", "import agent.cli.device, onnxruntime"],
        env=hurt_device.environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if tried.returncode != 0:
        pytest.skip(f"no ordinary user can run this Python: {tried.stderr.strip()[-200:]}")
    return hurt_device


PARTS = {
    "a payload": "store/blobs/" + "[0-9a-f]" * 64,
    "a header": "store/blobs/*.header",
    "the newest catalog": "store/catalog/*.age",
    "the pointer": "store/CURRENT",
    "the lock": "store/lock",
    "the secret": "keys/device-secret",
    "the blobs' folder": "store/blobs",
    "the catalog's folder": "store/catalog",
    "the store": "store",
    "the keys' folder": "keys",
}


def test_an_ordinary_user_runs_it(as_nobody):
    assert start(as_nobody)
    assert None not in versions_that_answer(as_nobody).values()
    as_nobody.cli("models", "add", linear_file(as_nobody.folder, 7), "--name", "more")


@pytest.mark.parametrize("mode", [None, 0o000, 0o444])
@pytest.mark.parametrize("part", PARTS)
def test_a_part_cannot_be_read_or_written(as_nobody, part, mode):
    """Somebody else's, as after a command that was run as root; or the user's own with a mode that forbids it."""
    place = max(as_nobody.state.glob(PARTS[part]))
    if mode is None:
        os.chown(place, 0, 0)
        place.chmod(0o700 if place.is_dir() else 0o600)
    else:
        place.chmod(mode | (0o111 if mode and place.is_dir() else 0))
    if not start(as_nobody):
        return
    seen = versions_that_answer(as_nobody)
    found = findings(as_nobody)
    assert None not in seen.values() or found, (seen, as_nobody.log.read_text())
    added = as_nobody.cli("models", "add", linear_file(as_nobody.folder, 7), "--name", "more", status=None)
    assert added.returncode == 0 or added.stderr.startswith("error: cannot "), added.stderr
    assert "Traceback" not in as_nobody.log.read_text()
