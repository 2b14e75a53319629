"""The configuration: what an integrator writes, what the agent makes of it, what it says when it is wrong."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from agent.base.config import Config, load, parse, read_toml
from agent.base.errors import ConfigError
from agent.base.paths import Paths, resolve_paths

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ROOT / "deploy" / "config.toml"
REFERENCE = ROOT / "docs" / "reference" / "config.md"
PAGES = [REFERENCE, *(ROOT / "docs" / "how-to" / name for name in ("access-rules.md", "containers.md", "install.md"))]


def refused(text: str, tmp_path: Path) -> str:
    path = tmp_path / "config.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load(path, explicit=True)
    return str(caught.value).removeprefix(f"cannot read {path}: ")


def keys() -> Iterator[tuple[str, str, Any]]:
    """Section, key and default of everything that can be configured."""
    for section, field in Config.model_fields.items():
        model = field.annotation
        if get_origin(model) is dict:  # a table for each of many names
            model = get_args(model)[1]
        assert isinstance(model, type)
        assert issubclass(model, BaseModel)
        for key, info in model.model_fields.items():
            default = info.get_default(call_default_factory=True)
            yield section, key, list(default) if isinstance(default, tuple) else default  # TOML has lists


# -- the file ---------------------------------------------------------------------------------------------------------


def test_a_device_without_a_file_gets_the_defaults(tmp_path: Path) -> None:
    assert load(tmp_path / "config.toml", explicit=False) == Config()
    assert load(None, explicit=False) == Config()


def test_a_file_that_was_asked_for_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read .*/config.toml: No such file or directory"):
        load(tmp_path / "config.toml", explicit=True)


@pytest.mark.parametrize("explicit", [True, False])
def test_a_default_file_that_cannot_be_read_is_never_taken_for_none(tmp_path: Path, explicit: bool) -> None:
    (tmp_path / "config.toml").symlink_to(tmp_path / "gone")
    (tmp_path / "folder.toml").mkdir()
    for name in ("config.toml", "folder.toml"):
        with pytest.raises(ConfigError, match="cannot read"):
            load(tmp_path / name, explicit=explicit)


def test_a_pipe_or_an_endless_device_does_not_hold_the_start(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigError, match="it is a pipe"):
        load(tmp_path / "pipe", explicit=True)
    assert load(Path("/dev/null"), explicit=True) == Config()
    with pytest.raises(ConfigError, match="larger than"):
        load(Path("/dev/zero"), explicit=True)


def test_an_integrators_file(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text(
        """
        [server]
        deadline_s = 5          # a whole number serves where seconds are asked
        max_body_mb = 8
        [selection]
        threads = 2
        [access]
        default = "deny"
        [access.models.door-camera]
        users = ["camera"]
        gids = [2001]
        [access.models."v2.digits"]
        """
    )
    config = load(path, explicit=True)
    assert config.server.deadline_s == 5.0
    assert config.server.idle_s == Config().server.idle_s
    assert config.selection.threads == 2
    assert config.access.default == "deny"
    assert config.access.models["door-camera"].users == ("camera",)
    assert config.access.models["door-camera"].gids == (2001,)
    assert config.access.models["v2.digits"].users == ()


# -- what is said when it is wrong ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[server]\ndeadline_s = -1", "server.deadline_s: must be greater than 0"),
        ("[server]\ndeadline_s = inf", "server.deadline_s: must be a finite number"),
        ('[server]\ndeadline_s = "30"', "server.deadline_s: must be a valid number"),
        ("[server]\nmax_body_mb = 0.5", "server.max_body_mb: must be a valid integer"),
        ("[server]\nqueue_per_model = true", "server.queue_per_model: must be a valid integer"),
        ("[server]\ndeadlines = 3", "server.deadlines: unknown key (did you mean deadline_s?)"),
        ("[acess]", "acess: unknown key (did you mean access?)"),
        ("[wibble]", "wibble: unknown key"),
        ("server = 3", "server: must be a table"),
        ("[server]\nconnections_per_uid = 600", "server: connections_per_uid must not be above max_connections"),
        ("[server]\nmax_body_mb = 200", "server: max_body_mb must not be above buffered_mb_per_uid"),
        ("[selection]\nmin_rounds = 50\nmax_rounds = 40", "selection: min_rounds must not be above max_rounds"),
        ('[memory]\nbudget_mb = "much"', "memory.budget_mb: must be a valid integer or be 'auto'"),
        ('[access]\ndefault = "all"', "access.default: must be 'group' or 'deny'"),
        ('[access.models.digits]\nuids = [0, "camera"]', "access.models.digits.uids.1: must be a valid integer"),
        ("[access.models.digits]\nuid = [1]", "access.models.digits.uid: unknown key"),
        ("[models.digits]\ncache = true", "models.digits.cache: must be a table or be false"),
        ("[models.digits.cache]\nttl_s = 0", "models.digits.cache.ttl_s: must be greater than 0"),
        (
            "[models.digits]\ncache = {ttl = 3}",
            "models.digits.cache.ttl_s: Field required; models.digits.cache.ttl: unknown key",
        ),
        ("[models.digits]\ncahce = false", "models.digits.cahce: unknown key"),
        ("[models.digits]\nbatching = true", "models.digits.batching: must be a table or be false"),
        (
            "[models.digits.batching]\nmax_size = 0",
            "models.digits.batching.max_size: must be greater than or equal to 1",
        ),
        ('[log]\nlevel = "INFO"', "log.level: must be 'debug', 'info', 'warning' or 'error'"),
    ],
)
def test_the_complaint_names_field_and_requirement(text: str, complaint: str, tmp_path: Path) -> None:
    assert refused(text, tmp_path) == complaint


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[server]\n\ndeadline_s = = 3", "line 3, column"),
        ("[server]\n[server]", "line 2, column"),
        ('[log]\nformat = "tex', "end of document: "),
        ("a = " + "[" * 5000, "nested too deeply|line 1|end of document"),
    ],
)
def test_wrong_syntax_is_reported_with_its_line(text: str, complaint: str, tmp_path: Path) -> None:
    assert re.match(complaint, refused(text, tmp_path))


def test_text_that_is_not_utf8_is_reported_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_bytes(b"[log]\n# \xe4\n")
    with pytest.raises(ConfigError, match="line 2: not UTF-8 text"):
        load(path, explicit=True)


@pytest.mark.parametrize(
    "url",
    [
        "https://models.example", "https://models.example:8443/fleet/", "https://[2001:db8::1]/x", "http://localhost:8000/x",
        "http://127.0.0.1/", "http://[::1]:8000",
    ],
)  # fmt: skip
def test_a_mirror_is_where_somebody_vouches_for_the_name(url: str, tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text(f'[delivery]\nmirrors = ["{url}"]\n')
    assert load(tmp_path / "c.toml", explicit=True).delivery.mirrors == (url,)


@pytest.mark.parametrize(
    "url",
    [
        "", "models.example", "http://models.example/", "http://127.0.0.1.example/", "http://localhost.example", "ftp://x/",
        "https://", "https:///x", "https://user:word@models.example/", "https://models.example/?a", "https://x/#y",
        "https://models.example/a b", "https://models.example:0/", "https://models.example:99999/", "https://[::1/",
        "https://mod\\u00e9les.example/", "https://models.example/\\nx", "file:///etc/passwd",
    ],
)  # fmt: skip
def test_a_mirror_that_cannot_be_one_is_refused(url: str, tmp_path: Path) -> None:
    assert "delivery.mirrors" in refused(f'[delivery]\nmirrors = ["{url}"]\n', tmp_path)


def test_several_mistakes_are_told_at_once(tmp_path: Path) -> None:
    said = refused("[server]\nx = 1\n[store]\nquota_mb = 0\n[nothing]\n", tmp_path)
    assert said == "server.x: unknown key; store.quota_mb: must be greater than or equal to 1; nothing: unknown key"


@given(st.text(max_size=200) | st.from_regex(r"(\[?[a-z_.]{1,12}\]?( = ([0-9]{1,5}|\"[a-z]*\"|\[\]))?\n){1,6}"))
def test_any_text_is_a_configuration_or_a_config_error(text: str) -> None:
    path = Path("/tmp") / f"ea-config-{os.getpid()}.toml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        load(path, explicit=True)
    except ConfigError as error:
        if not str(error).startswith(f"cannot read {path}: "):
            raise
    finally:
        path.unlink()


# -- the file that is shipped, and the reference ----------------------------------------------------------------------


def uncommented() -> str:
    """The shipped file with its keys switched on. ``##`` opens prose, ``# `` an example, ``#key`` a key or section."""
    return re.sub(r"(?m)^#(?=[a-z\[])", "", SHIPPED.read_text())


def test_the_shipped_file_changes_nothing() -> None:
    assert load(SHIPPED, explicit=True) == Config()


def test_the_shipped_file_has_every_key_with_its_default(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text(uncommented())
    document = read_toml(path)
    assert parse(document, "uncommented") == Config()
    for section, key, default in keys():
        if default != {} and section != "models":  # which has no section of its own, only one for each model
            assert document[section][key] == default, f"{section}.{key}"


def test_the_shipped_files_example_is_valid() -> None:
    example = "\n".join(re.findall(r"(?m)^# (\[access.*|\[models.*|[a-z]+ = [\[{].*)$", SHIPPED.read_text()))
    config = parse(_toml(example), "example")
    (wanted,) = config.models.values()
    assert wanted.cache
    assert wanted.batching
    (rule,) = config.access.models.values()
    assert all((rule.users, rule.groups, rule.uids, rule.gids))


def test_the_reference_has_every_key_with_its_default_and_no_other() -> None:
    documented = {}
    section = ""
    for line in REFERENCE.read_text().splitlines():
        if heading := re.fullmatch(r"## `\[(\w+)(?:\.NAME)?\]`", line):
            section = heading[1]
        elif row := re.match(r"\| `(\w+)` \| (.*?) \|", line):
            documented[section, row[1]] = row[2]
    wanted = {
        (section, key): "as in the manifest"
        if section == "models" and default is None
        else "none"
        if default in ({}, None)
        else f'`"{default}"`'
        if isinstance(default, str)
        else f"`{str(default).lower() if isinstance(default, bool) else default}`"
        for section, key, default in keys()
    }
    assert documented == wanted


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_examples_of_the_pages_are_valid(page: Path) -> None:
    for block in re.findall(r"(?s)```toml\n(.*?)```", page.read_text()):
        parse(_toml(block), page.name)


def test_the_reference_shows_the_complaint_as_it_is(tmp_path: Path) -> None:
    said = refused("[server]\ndeadline_s = 0", tmp_path)
    assert f"error: cannot read broken.toml: {said}\n" in REFERENCE.read_text()


def _toml(text: str) -> dict[str, Any]:
    path = Path("/tmp") / f"ea-example-{os.getpid()}.toml"
    path.write_text(text)
    try:
        return read_toml(path)
    finally:
        path.unlink()


# -- paths ------------------------------------------------------------------------------------------------------------


def test_flag_before_environment_before_default() -> None:
    environment = {"EDGE_AGENT_STATE_DIR": "/srv/state", "EDGE_AGENT_RUN_DIR": "/srv/run", "EDGE_AGENT_CONFIG": ""}
    paths = resolve_paths(environment, run_dir="/tmp/run")
    assert paths == Paths(state_dir=Path("/srv/state"), run_dir=Path("/tmp/run"))
    assert not paths.config_explicit, "an empty variable is one that is not set"
    assert paths.infer_socket == Path("/tmp/run/infer.sock")
    assert paths.admin_socket == Path("/tmp/run/admin.sock")
    assert paths.device_secret == Path("/srv/state/keys/device-secret")


def test_own_profiles_lie_beside_the_configuration() -> None:
    assert resolve_paths({}).user_profiles == Path("/etc/edge-agent/hw_profiles")
    named = resolve_paths({"EDGE_AGENT_CONFIG": "/srv/agent.toml"})
    assert named.user_profiles == Path("/srv/hw_profiles")
    assert named.config_explicit


def test_an_ordinary_users_relative_folders_stay_where_they_were_meant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    paths = resolve_paths({}, state_dir="state", config="./x/../agent.toml")
    monkeypatch.chdir("/")
    assert paths.state_dir == tmp_path / "state"
    assert paths.config == tmp_path / "agent.toml"


def test_a_folder_too_deep_for_a_socket_is_told_before_the_kernel_is_asked() -> None:
    fits = resolve_paths({}, run_dir="/" + "r" * (107 - len("/") - len("/infer.sock")))
    assert len(str(fits.infer_socket)) == 107
    deep = resolve_paths({}, run_dir=str(fits.run_dir) + "r")
    with pytest.raises(ConfigError, match="108 bytes, the kernel takes 107") as caught:
        _ = deep.infer_socket
    assert "--run-dir" in caught.value.hint


# -- cost -------------------------------------------------------------------------------------------------------------


def test_reading_the_configuration_brings_in_nothing_heavy() -> None:
    heavy = ("numpy", "onnxruntime", "asyncio", "cryptography", "ssl")
    script = f"import sys, agent.base.config, agent.base.systemd; print([m for m in {heavy} if m in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT)
    assert loaded.stdout.strip() == "[]"
