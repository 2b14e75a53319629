"""The cases of a conformance suite for TUF clients, by their themes, against ours behind that suite's command line.

Everything goes over real HTTP: what is asked, what the exit status is, which metadata is trusted afterwards, what lies
in the folder of targets.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import Metadata, Root, Targets

from tests.core.conftest import ROOT
from tests.trust import tuf_client
from tests.trust.repositories import Simulator

#: What is tried here is the protocol, which no interpreter changes.
pytestmark = pytest.mark.main_only

SOON = datetime.now(timezone.utc) + timedelta(days=30)


def fresh(**options: object) -> Simulator:
    """A repository whose metadata holds for the real clock."""
    made = Simulator(**options)  # type: ignore[arg-type]
    for metadata in made.md.values():
        metadata.signed.expires = SOON
    made.root.version = 1
    made.publish_root(first=True)
    made.served = {path: data for path, data in made.served.items() if "root" in path}
    made.publish()
    return made


class Suite:
    """A client's folders and the server that it talks to."""

    def __init__(self, folder: Path, repo: Simulator, port: int) -> None:
        self.metadata, self.targets = folder / "metadata", folder / "targets"
        self.repo = repo
        self.base = f"http://127.0.0.1:{port}"
        self.root = folder / "initial.json"
        self.root.write_bytes(repo.served["metadata/1.root.json"])

    def init(self) -> int:
        return tuf_client.main(["--metadata-dir", str(self.metadata), "init", str(self.root)])

    def refresh(self) -> int:
        self.repo.asked.clear()
        return tuf_client.main(
            ["--metadata-dir", str(self.metadata), "--metadata-url", f"{self.base}/metadata", "refresh"]
        )

    def download_command(self, name: str) -> list[str]:
        return [
            "--metadata-dir", str(self.metadata), "--metadata-url", f"{self.base}/metadata", "--target-name", name,
            "--target-base-url", f"{self.base}/targets", "--target-dir", str(self.targets), "download",
        ]  # fmt: skip

    def download(self, name: str) -> int:
        self.repo.asked.clear()
        return tuf_client.main(self.download_command(name))

    def version(self, role: str) -> int | None:
        path = self.metadata / f"{role}.json"
        return json.loads(path.read_bytes())["signed"]["version"] if path.exists() else None

    def downloaded(self) -> list[bytes]:
        return sorted(path.read_bytes() for path in self.targets.rglob("*") if path.is_file())


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Suite]]:
    """A suite on a repository, initialised."""
    servers = []

    def start(repo: Simulator | None = None) -> Suite:
        repo = repo or fresh()

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                path = self.path.lstrip("/")
                repo.asked.append(path)
                data = repo.answer(path)
                self.send_response(404 if data is None else 200)
                self.send_header("Content-Length", str(len(data or b"")))
                self.end_headers()
                self.wfile.write(data or b"")

            def log_message(self, *_: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        servers.append(server)
        suite = Suite(tmp_path, repo, server.server_address[1])
        assert suite.init() == 0 and repo.asked == []
        return suite

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


# -- basics -----------------------------------------------------------------------------------------------------------


def test_init_asks_nothing_and_refresh_asks_in_order(serve: Callable[..., Suite]) -> None:
    suite = serve()
    assert suite.version("root") == 1 and suite.version("timestamp") is None
    assert suite.refresh() == 0
    assert suite.repo.asked == [
        "metadata/2.root.json", "metadata/timestamp.json", "metadata/1.snapshot.json", "metadata/1.targets.json",
    ]  # fmt: skip
    assert [suite.version(role) for role in ("root", "timestamp", "snapshot", "targets")] == [1, 1, 1, 1]
    assert suite.refresh() == 0
    assert suite.repo.asked == ["metadata/2.root.json", "metadata/timestamp.json"]


def test_it_runs_as_a_program(serve: Callable[..., Suite]) -> None:
    suite = serve()
    suite.repo.put("file.txt", b"content")
    suite.repo.publish()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.trust.tuf_client"]
    good = subprocess.run([*command, *suite.download_command("file.txt")], env=environment, cwd=ROOT, check=False)
    bad = subprocess.run(
        [*command, *suite.download_command("other")], env=environment, cwd=ROOT, check=False, capture_output=True
    )
    assert (good.returncode, bad.returncode) == (0, 1) and b"not_listed" in bad.stderr
    assert suite.downloaded() == [b"content"]


def test_a_repository_without_consistent_snapshots_is_understood(serve: Callable[..., Suite]) -> None:
    repo = fresh()
    repo.root.consistent_snapshot = False
    repo.publish_root(first=True)
    repo.publish()
    suite = serve(repo)
    assert suite.refresh() == 0
    assert suite.repo.asked[1:] == ["metadata/timestamp.json", "metadata/snapshot.json", "metadata/targets.json"]


@pytest.mark.parametrize("role", ["root", "timestamp", "snapshot", "targets"])
def test_metadata_of_another_type_is_refused(serve: Callable[..., Suite], role: str) -> None:
    suite = serve()
    other = "targets" if role != "targets" else "snapshot"
    swapped = suite.repo.served[f"metadata/1.{other}.json"]
    place = {"root": "2.root", "timestamp": "timestamp"}.get(role, f"1.{role}")
    suite.repo.served[f"metadata/{place}.json"] = swapped
    assert suite.refresh() == 1 and suite.version(role) == (1 if role == "root" else None)


def test_fields_that_it_does_not_know_are_left_alone(serve: Callable[..., Suite]) -> None:
    suite = serve()
    for role in ("timestamp", "snapshot", "targets"):
        suite.repo.md[role].signed.unrecognized_fields["x-new"] = {"more": [1, 2]}
    suite.repo.root.unrecognized_fields["x-new"] = "text"
    suite.repo.publish_root(old=suite.repo.signers["root"])
    suite.repo.publish()
    assert suite.refresh() == 0 and suite.version("root") == 2


def test_a_timestamp_that_is_the_same_is_no_update(serve: Callable[..., Suite]) -> None:
    suite = serve()
    assert suite.refresh() == 0
    suite.repo.md["timestamp"].signed.snapshot_meta.version = 100
    suite.repo.publish_timestamp()
    assert suite.refresh() == 0 and suite.version("snapshot") == 1


# -- keys -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["ed25519", "ecdsa", "rsa"])
def test_keys_of_each_kind_sign(serve: Callable[..., Suite], kind: str) -> None:
    suite = serve()
    signer = getattr(CryptoSigner, f"generate_{kind}")()
    repo = suite.repo
    old = repo.replace_keys("timestamp")
    for each in repo.signers.pop("timestamp"):
        repo.root.revoke_key(each.public_key.keyid, "timestamp")
    repo.add_key("timestamp", signer)
    repo.publish_root(old=repo.signers["root"])
    repo.publish()
    assert suite.refresh() == 0 and old
    assert suite.version("timestamp") == 2


@pytest.mark.parametrize("role", ["root", "timestamp", "snapshot", "targets"])
def test_too_few_signatures_are_refused(serve: Callable[..., Suite], role: str) -> None:
    repo = fresh(thresholds={role: (3, 2)})
    suite = serve(repo)
    assert suite.refresh() == 0
    kept = repo.signers[role]
    repo.signers[role] = kept[:1]
    if role == "root":
        repo.publish_root()
    else:
        repo.md[role].signed.expires += timedelta(days=1)
        repo.publish()
    assert suite.refresh() == 1 and suite.version(role) == 1
    repo.signers[role] = [kept[0], kept[0]]  # the same signature again is no second one
    repo.sign(role)
    assert suite.refresh() == 1
    repo.signers[role] = kept[1:]
    if role == "root":
        repo.root.version = 1
        repo.publish_root()
    else:
        repo.publish()
    assert suite.refresh() == 0


def test_a_root_without_keys_for_a_role_lets_nothing_in(serve: Callable[..., Suite]) -> None:
    suite = serve()
    repo = suite.repo
    for signer in repo.signers["snapshot"]:
        repo.root.revoke_key(signer.public_key.keyid, "snapshot")
    repo.publish_root(old=repo.signers["root"])
    repo.publish()
    assert suite.refresh() == 1 and suite.version("root") == 2 and suite.version("snapshot") is None


def test_roots_are_followed_one_by_one_through_changes_of_threshold(serve: Callable[..., Suite]) -> None:
    suite = serve()
    repo = suite.repo
    for count in (2, 3, 1):
        old = list(repo.signers["root"])
        while len(repo.signers["root"]) < count:
            repo.add_key("root")
        repo.root.roles["root"].threshold = count
        repo.publish_root(old=old)
    assert suite.refresh() == 0 and suite.version("root") == 4


def test_a_root_in_the_middle_may_have_ended_the_last_may_not(serve: Callable[..., Suite]) -> None:
    suite = serve()
    repo = suite.repo
    repo.root.expires = datetime.now(timezone.utc) - timedelta(days=1)
    repo.publish_root(old=repo.signers["root"])
    assert suite.refresh() == 1 and suite.version("root") == 2
    repo.root.expires = SOON
    repo.publish_root(old=repo.signers["root"])
    assert suite.refresh() == 0 and suite.version("root") == 3


# -- rollback ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_hashes", [False, True])
def test_no_role_goes_back(serve: Callable[..., Suite], with_hashes: bool) -> None:
    repo = fresh(with_hashes=with_hashes)
    suite = serve(repo)
    for _ in range(3):
        repo.publish(bump=("targets",))
    assert suite.refresh() == 0 and suite.version("targets") == 4
    repo.md["targets"].signed.version = 1
    repo.publish(bump=("targets",))
    assert suite.refresh() == 1 and suite.version("targets") == 4
    repo.md["targets"].signed.version = 4
    repo.publish(bump=("targets",))
    assert suite.refresh() == 0 and suite.version("targets") == 5
    seen = suite.version("snapshot")
    repo.md["snapshot"].signed.version = 1
    repo.publish()
    assert suite.refresh() == 1 and suite.version("snapshot") == seen


def test_a_snapshot_that_went_on_without_its_timestamp_is_not_taken(serve: Callable[..., Suite]) -> None:
    repo = fresh(with_hashes=False)
    suite = serve(repo)
    repo.md["snapshot"].signed.version = 2
    repo.served["metadata/1.snapshot.json"] = repo.sign("snapshot")
    assert suite.refresh() == 1
    assert suite.version("timestamp") == 1 and suite.version("snapshot") in (None, 2)
    assert suite.version("targets") is None


@pytest.mark.parametrize("roles", [("timestamp",), ("timestamp", "snapshot")])
def test_versions_counted_up_are_recovered_by_new_keys(serve: Callable[..., Suite], roles: tuple[str, ...]) -> None:
    suite = serve()
    repo = suite.repo
    for role in roles:
        repo.md[role].signed.version = 99_999
    repo.publish()
    assert suite.refresh() == 0
    for role in roles:
        repo.replace_keys(role)
    repo.publish_root(old=repo.signers["root"])
    for role in roles:
        repo.md[role].signed.version = 1
    repo.publish_snapshot()
    repo.publish_timestamp()
    assert suite.refresh() == 0
    assert [suite.version(role) for role in roles] == [1] * len(roles)


def test_a_timestamp_that_ended_still_tells_what_is_older(serve: Callable[..., Suite]) -> None:
    suite = serve()
    repo = suite.repo
    repo.md["timestamp"].signed.expires = datetime.now(timezone.utc) - timedelta(days=1)
    repo.md["timestamp"].signed.version = 5
    repo.publish_timestamp()
    assert suite.refresh() == 1
    repo.md["timestamp"].signed.expires = SOON
    repo.md["timestamp"].signed.version = 7
    repo.publish_timestamp()
    assert suite.refresh() == 0
    repo.md["timestamp"].signed.version = 6
    repo.publish_timestamp()
    assert suite.refresh() == 1 and suite.version("timestamp") == 7


# -- delegations ------------------------------------------------------------------------------------------------------


def graph(repo: Simulator, edges: list[tuple[str, str, bool]]) -> None:
    for parent, child, terminating in edges:
        repo.delegate(child, ["*.txt"], parent, terminating=terminating)
        repo.md[child].signed.expires = SOON


@pytest.mark.parametrize(
    ("edges", "visited"),
    [
        ([("targets", "A", False)], ["A"]),
        ([("targets", "A", False), ("targets", "B", False)], ["A", "B"]),
        ([("targets", "A", False), ("A", "B", False), ("targets", "C", False)], ["A", "B", "C"]),
        ([("targets", "A", True), ("targets", "B", False)], ["A"]),
        ([("targets", "A", False), ("A", "B", True), ("targets", "C", False)], ["A", "B"]),
        ([("targets", "A", False), ("A", "B", False), ("B", "C", False), ("targets", "D", False)], list("ABCD")),
    ],
)
def test_delegations_are_visited_depth_first_in_their_order(
    serve: Callable[..., Suite], edges: list[tuple[str, str, bool]], visited: list[str]
) -> None:
    suite = serve()
    graph(suite.repo, edges)
    suite.repo.publish()
    assert suite.refresh() == 0
    assert suite.download("missing.txt") == 1
    asked = [path.split("/")[1] for path in suite.repo.asked if path.split(".")[1] in "ABCD"]
    assert asked == [f"1.{role}.json" for role in visited]


def test_the_first_role_that_lists_a_target_decides(serve: Callable[..., Suite]) -> None:
    suite = serve()
    graph(suite.repo, [("targets", "A", False), ("targets", "B", False)])
    for role in "BA":
        suite.repo.put("file.txt", role.encode(), role)
    suite.repo.publish()
    assert suite.download("file.txt") == 0 and suite.downloaded() == [b"A"]


@pytest.mark.parametrize("name", ["?", "#", "/role", "../role", "..", "a b", "rôle", "role/../..", "%2e%2e"])
def test_names_of_roles_stay_names_and_become_no_paths(serve: Callable[..., Suite], name: str, tmp_path: Path) -> None:
    suite = serve()
    graph(suite.repo, [("targets", name, False)])
    suite.repo.put("file.txt", b"content", name)
    suite.repo.publish()
    assert suite.download("file.txt") == 0 and suite.downloaded() == [b"content"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["initial.json", "metadata", "targets"]


def test_a_delegated_role_that_ended_or_that_others_signed_is_refused(serve: Callable[..., Suite]) -> None:
    suite = serve()
    repo = suite.repo
    graph(repo, [("targets", "A", False)])
    repo.put("file.txt", b"content", "A")
    repo.md["A"].signed.expires = datetime.now(timezone.utc) - timedelta(days=1)
    repo.publish()
    assert suite.download("file.txt") == 1
    repo.md["A"].signed.expires = SOON
    rightful = repo.signers["A"]
    repo.signers["A"] = [CryptoSigner.generate_ed25519()]
    repo.publish()
    assert suite.download("file.txt") == 1
    repo.signers["A"] = rightful
    repo.publish(bump=("A",))
    assert suite.download("file.txt") == 0


# -- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["file.txt", "path/to/a/file.txt", "with space.txt", "plus+sign.txt"])
def test_a_file_is_downloaded_once(serve: Callable[..., Suite], name: str) -> None:
    suite = serve()
    suite.repo.put(name, b"content")
    suite.repo.publish()
    assert suite.refresh() == 0 and suite.downloaded() == []
    assert suite.download(name) == 0 and suite.downloaded() == [b"content"]
    assert suite.download(name) == 0
    assert not [path for path in suite.repo.asked if path.startswith("targets/")]


def test_a_file_that_changes_takes_the_place_of_the_old_one_and_a_swapped_one_does_not(
    serve: Callable[..., Suite],
) -> None:
    suite = serve()
    for number in range(4):
        content = f"content {number}".encode()
        suite.repo.put("file.txt", content)
        suite.repo.publish()
        assert suite.download("file.txt") == 0 and suite.downloaded() == [content]
    suite.repo.put("other.txt", b"right")
    suite.repo.publish()
    for wrong in (b"wrong", b"righ", b"right more"):
        suite.repo.tamper = lambda path, data, wrong=wrong: wrong if path.startswith("targets/") else data
        assert suite.download("other.txt") == 1
    assert suite.downloaded() == [b"content 3"]


@pytest.mark.parametrize("name", ["../outside.txt", "/etc/outside.txt", "a//b.txt", "./c.txt"])
def test_a_target_whose_path_leads_out_is_refused(serve: Callable[..., Suite], name: str) -> None:
    suite = serve()
    suite.repo.put(name, b"content")
    suite.repo.publish()
    assert suite.download(name) == 1
    assert not [path for path in suite.repo.asked if path.startswith("targets/")]


def test_the_simulator_itself_signs_what_tuf_verifies() -> None:
    repo = fresh()
    root = Metadata[Root].from_bytes(repo.served["metadata/1.root.json"])
    targets = Metadata[Targets].from_bytes(repo.served["metadata/1.targets.json"])
    root.signed.verify_delegate("targets", targets.signed_bytes, targets.signatures)
