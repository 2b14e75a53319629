"""``edge-agent deliver FOLDER``: what the link would bring, brought from a stick or any other folder.

Nothing in the folder is trusted: core checks the job's signatures and every byte, as if it had come over a network.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote

from agent.base.errors import ConflictError, NotFoundError, PeerError, RefusedError
from agent.base.files import read_bounded
from agent.base.paths import Paths
from agent.cli.commands import Commands, add_command
from agent.cli.terminal import EXIT_FAILED, Progress, bar, megabytes, print_json

if TYPE_CHECKING:
    from agent.client import AdminClient

_JOB_FILE = "job.json"
_MOST_JOB_BYTES = 64 << 10
_PIECE_BYTES = 1 << 20
_POLL_S = 1.0
#: So long nothing is wanted and nothing under way before it is over.
_QUIET_S = 5.0
_ENDED = frozenset(("succeeded", "failed", "rejected", "cancelled"))
_PARTS = ("metadata", "targets")
_ROOT = re.compile(r"metadata/\d+\.root\.json")
#: So long nobody else has brought a byte of what is not here.
_OTHERS_S = 10.0


def register(commands: Commands, common: argparse.ArgumentParser) -> None:
    """Add the command to the parser."""
    made = add_command(commands, common, "deliver", "bring the agent what it wants from a folder, such as a USB stick")
    made.add_argument(
        "folder", type=Path, metavar="FOLDER", help="holds metadata/ and targets/, and job.json where a job comes along"
    )
    made.add_argument(
        "--wait", type=_seconds, default=60.0, metavar="S", help="without job.json: how long something may be wanted"
    )
    made.set_defaults(action=_deliver)


def _seconds(text: str) -> float:
    if not text.isdecimal() or len(text) > 7:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds")
    return float(text)


def _deliver(arguments: argparse.Namespace, paths: Paths) -> int:
    from agent.client import AdminClient  # noqa: PLC0415 - brings asyncio in, which core's start would pay for

    folder: Path = arguments.folder
    if not any((folder / part).is_dir() for part in _PARTS):
        raise PeerError(
            f"cannot deliver {folder}: it holds neither 'metadata' nor 'targets'",
            hint="name the folder that 'edge-fleet publish' wrote to, or a copy of it",
        )
    with Progress() as progress, AdminClient(str(paths.admin_socket)) as core:
        errand = Errand(core, folder, progress, talking=not arguments.json)
        try:
            result = errand.run(arguments.wait)
        except RefusedError as error:
            if isinstance(error.__cause__, PermissionError):
                raise RefusedError(str(error), hint="only root and the agent's own user may deliver") from error
            raise
    if arguments.json:
        print_json(result)
    job = result["job"]
    return EXIT_FAILED if result["refused"] or (job is not None and job["state"] != "succeeded") else 0


class Errand:
    """Serves wants from a folder until the job that came along has ended, or nothing is wanted any more."""

    def __init__(self, core: AdminClient, folder: Path, progress: Progress, *, talking: bool) -> None:
        self._core = core
        self._folder = folder
        self._progress = progress
        self._talking = talking
        self._files: list[str] = []
        self._missing: list[str] = []
        self._refused: list[dict[str, str]] = []
        self._bytes = 0
        self._done: set[str] = set()
        #: Wants for what is not here: since when, and how many bytes core had then.
        self._absent: dict[str, tuple[float, int]] = {}

    def run(self, wait_s: float) -> dict[str, Any]:
        """What was brought, and how the job ended. RefusedError when core does not take the job."""
        job_id = self._hand_in()
        job: dict[str, Any] | None = None
        known, quiet_since = "", time.monotonic()
        patience_s = wait_s if job_id is None else _QUIET_S
        while True:
            listing = self._core.call("GET", f"/v1/link/wants?known={known}&wait_s={_POLL_S:g}")
            known = str(listing["version"])
            open_wants = [want for want in listing["wants"] if want["id"] not in self._done]
            for want in open_wants:
                self._serve(want)
                patience_s = _QUIET_S
            if job_id is not None:
                job = self._core.call("GET", f"/v1/jobs/{quote(job_id, safe='')}")
                self._progress.show(f"{job['op']}: {job['phase'] or job['state']}")
                if job["state"] in _ENDED:
                    break
            if open_wants or job is not None or self._is_busy():
                quiet_since = time.monotonic()
            elif time.monotonic() - quiet_since >= patience_s:
                break
        self._tell_end(job)
        return {
            "job": job,
            "files": self._files,
            "bytes": self._bytes,
            "missing": self._missing,
            "refused": self._refused,
        }

    # -- the job ------------------------------------------------------------------------------------------------------

    def _hand_in(self) -> str | None:
        """Give core the job that came along; its id."""
        path = self._folder / _JOB_FILE
        if not path.exists():
            return None
        data = read_bounded(path, _MOST_JOB_BYTES + 1)
        if len(data) > _MOST_JOB_BYTES:
            raise PeerError(f"cannot deliver {path}: it has more than {_MOST_JOB_BYTES} bytes")
        job_id = _job_of(data, path)
        verdict = self._core.call("POST", "/v1/link/received?topic=dn/job", data)
        if verdict["verdict"] == "refused":
            raise RefusedError(
                f"cannot deliver {path}: the agent refuses the job: {verdict['reason']}",
                hint="docs/spec/link.md 4 tells what the reasons mean",
            )
        self._say(f"job {job_id} is {'accepted' if verdict['verdict'] == 'accepted' else 'known already'}")
        return job_id

    def _is_busy(self) -> bool:
        return any(job["state"] not in _ENDED for job in self._core.call("GET", "/v1/jobs")["jobs"])

    # -- the files ----------------------------------------------------------------------------------------------------

    def _serve(self, want: Mapping[str, Any]) -> None:
        """Bring one file, or say that it is not there. What core says to it is for whoever wants it."""
        path = str(want["path"])
        try:
            file = self._file(path)
            if file is None:
                self._pass_over(want)
                return
            if self._bring(want, file):
                self._done.add(want["id"])
                self._files.append(path)
        except NotFoundError:  # nobody waits for it any more
            self._done.add(want["id"])
        except ConflictError:  # other bytes are waited for: the next list says which
            return
        except RefusedError as error:
            self._done.add(want["id"])
            self._refused.append({"path": path, "reason": str(error)})
            self._say(f"{path} is refused: {error}")

    def _pass_over(self, want: Mapping[str, Any]) -> None:
        """It is not here. Of a root that means that there is no newer one; for anything else the link has its time."""
        here = (time.monotonic(), want["offset"])
        since, offset = self._absent.setdefault(want["id"], here)
        if want["offset"] != offset:
            self._absent[want["id"]] = here  # somebody else is bringing it
        elif _ROOT.fullmatch(want["path"]) or here[0] - since >= _OTHERS_S:
            self._done.add(want["id"])
            self._missing.append(want["path"])
            text = f"it is not in {self._folder}"
            self._core.call("POST", _incoming(want, "/failed"), {"code": "not_found", "text": text})

    def _bring(self, want: Mapping[str, Any], file: Path) -> bool:
        """Whether core has all of it."""
        offset, total = int(want["offset"]), file.stat().st_size
        most = want["most"] + 1 if want["length"] is None else want["length"]
        with file.open("rb") as stream:
            stream.seek(offset)
            while True:
                piece = stream.read(min(_PIECE_BYTES, most - offset))
                last = len(piece) < _PIECE_BYTES or offset + len(piece) >= most
                target = _incoming(want, f"?offset={offset}" + ("&end=1" if last else ""))
                taken = self._core.call("PUT", target, piece)
                self._bytes += len(piece)
                offset = taken["offset"]
                self._progress.show(bar(file.name[-30:] + " ", offset, total))
                if taken["done"]:
                    return True
                if last:
                    self._cut_short(want, file, total)
                    return True

    def _cut_short(self, want: Mapping[str, Any], file: Path, total: int) -> None:
        """The file here has fewer bytes than belong there: somebody else may have them."""
        self._refused.append({"path": want["path"], "reason": f"{file} has {total} of {want['length']} bytes"})
        self._say(f"{file} has {total} of {want['length']} bytes: copy it again")
        text = f"{self._folder} has {total} of {want['length']} bytes"
        self._core.call("POST", _incoming(want, "/failed"), {"code": "not_found", "text": text})

    def _file(self, path: str) -> Path | None:
        parts = unquote(path).split("/")
        if parts[0] not in _PARTS or any(part in ("", ".", "..") for part in parts):
            return None
        file = self._folder.joinpath(*parts)
        return file if file.is_file() else None

    # -- telling ------------------------------------------------------------------------------------------------------

    def _say(self, text: str) -> None:
        self._progress.clear()
        if self._talking:
            print(text, flush=True)

    def _tell_end(self, job: Mapping[str, Any] | None) -> None:
        self._say(f"{len(self._files)} files brought, {megabytes(self._bytes)}")
        if job is not None:
            error = job.get("error")
            why = f": {error['text']} ({error['code']})" if error else ""
            self._say(f"job {job['job_id']}: {job['state']}{why}")


def _incoming(want: Mapping[str, Any], rest: str) -> str:
    return f"/v1/incoming/{quote(str(want['id']), safe='')}{rest}"


def _job_of(data: bytes, path: Path) -> str:
    """The id of the job in an envelope. Signatures are core's to check."""
    from agent.trust.envelope import EnvelopeError, peek_payload  # noqa: PLC0415 - brings cryptography in

    try:
        document = json.loads(peek_payload(data)[1])
        job_id = document["job"]["job_id"]
        if isinstance(job_id, str):
            return job_id
    except (EnvelopeError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise PeerError(f"cannot deliver {path}: it is no signed job") from error
    raise PeerError(f"cannot deliver {path}: its job has no id")
