"""Releases of the agent: what an operator ships, what is read out of its wheels, and what is refused."""

from __future__ import annotations

import json
import shutil
import tarfile
from pathlib import Path

import pytest

from agent.trust.releases import this_kind
from tests.operations.deliveries import Operator
from tests.updater.grounds import wheelhouse


@pytest.fixture(scope="module")
def operator(tmp_path_factory: pytest.TempPathFactory) -> Operator:
    return Operator(tmp_path_factory.mktemp("fleet"))


def test_a_wheelhouse_becomes_a_target_that_any_tar_reads(operator: Operator, tmp_path: Path) -> None:
    wheels = wheelhouse(tmp_path / "wheels", "1.2.3", state=2, reads=1)
    done = operator.ok("publish-release", str(wheels), "--to", str(tmp_path / "site"), "--json").json
    kind = this_kind()
    assert done["target"] == f"releases/1.2.3/{kind.arch}-cp{kind.python.replace('.', '')}.tar"
    assert {name: done[name] for name in ("version", "arch", "python", "state", "reads", "again", "wheels")} == {
        "version": "1.2.3", "arch": kind.arch, "python": kind.python, "state": 2, "reads": 1, "again": False,
        "wheels": 2,
    }  # fmt: skip
    (tar,) = (tmp_path / "site/targets/releases/1.2.3").iterdir()
    with tarfile.open(tar) as read:
        assert read.getnames() == sorted(path.name for path in wheels.iterdir())
    assert operator.ok("publish-release", str(wheels), "--json").json["again"]
    assert operator.ok("verify", "--json").json["problems"] == []
    tar = next((operator.site / "targets/releases/1.2.3").iterdir())
    data = bytearray(tar.read_bytes())
    data[700] ^= 1
    tar.write_bytes(data)
    assert "is not what is listed" in operator.run("verify", "--json").json["problems"][0]
    data[700] ^= 1
    tar.write_bytes(data)


def test_a_version_stays_what_it_is(operator: Operator, tmp_path: Path) -> None:
    operator.ok("publish-release", str(wheelhouse(tmp_path / "one", "1.3.0")))
    done = operator.run("publish-release", str(wheelhouse(tmp_path / "two", "1.3.0")))
    assert done.status == 1 and "was published with another content" in done.err


def test_withdrawn_it_is_gone(operator: Operator, tmp_path: Path) -> None:
    operator.ok("publish-release", str(wheelhouse(tmp_path / "wheels", "1.4.0")))
    done = operator.ok("withdraw-release", "1.4.0", "--yes", "--json").json
    assert len(done["withdrawn"]) == 1
    assert not (operator.site / "targets/releases/1.4.0").exists()
    again = operator.run("withdraw-release", "1.4.0", "--yes")
    assert again.status == 1 and "it is not published" in again.err


def test_what_is_no_release_is_named(operator: Operator, tmp_path: Path) -> None:
    kind = this_kind()
    good = wheelhouse(tmp_path / "good", "2.0.0")
    agent = "edge_agent-2.0.0-py3-none-any.whl"
    tag = f"cp{kind.python.replace('.', '')}"

    def refused(said: str, *arguments: str) -> None:
        done = operator.run("publish-release", str(tmp_path / "wheels"), *arguments)
        assert done.status == 1 and said in done.err, done.err
        shutil.rmtree(tmp_path / "wheels")
        shutil.copytree(good, tmp_path / "wheels")

    shutil.copytree(good, tmp_path / "wheels")
    (tmp_path / "wheels/notes.txt").touch()
    refused("notes.txt is no wheel")
    (tmp_path / "wheels/x.whl").symlink_to("/etc/passwd")
    refused("x.whl is no wheel")
    (tmp_path / "wheels" / agent).unlink()
    refused("must be in it once, 0 are")
    shutil.copy(good / agent, tmp_path / "wheels/edge_agent-1.0.0-py3-none-any.whl")
    refused("must be in it once, 2 are")
    (tmp_path / "wheels" / agent).write_bytes(b"PK")
    refused("no wheel of an agent that updates itself")
    (tmp_path / "wheels" / agent).rename(tmp_path / "wheels/edge_agent-2.0-py3-none-any.whl")
    refused("is not like 1.2.3")
    other = "aarch64" if kind.arch == "x86_64" else "x86_64"
    (tmp_path / f"wheels/more-1.0-{tag}-{tag}-manylinux2014_{other}.whl").touch()
    refused("for several processors")
    (tmp_path / f"wheels/more-1.0-cp38-cp38-manylinux2014_{kind.arch}.whl").touch()
    refused("for several versions of Python")
    (tmp_path / "wheels/more-1.0-cp39-abi3-win_amd64.whl").touch()
    refused("not for one kind of Linux machine")
    refused("1.9.0 is no later version than 2.0.0", "--instead-of", "1.9.0")


def test_only_the_keys_of_targets_ship(operator: Operator, tmp_path: Path) -> None:
    wheels = wheelhouse(tmp_path / "wheels", "3.0.0")
    away = tmp_path / "safe"
    away.mkdir()
    for path in operator.folder.role_keys.glob("targets-*.key"):
        path.rename(away / path.name)
    try:
        done = operator.run("publish-release", str(wheels))
        assert done.status == 1 and "cannot sign targets" in done.err
        listed = json.loads(max((operator.site / "metadata").glob("*.targets.json")).read_text())["signed"]["targets"]
        assert not any("3.0.0" in path for path in listed)
        operator.ok("publish-release", str(wheels), "--keys", str(away))
    finally:
        for path in away.iterdir():
            path.rename(operator.folder.role_keys / path.name)
