"""``edge-agent-tuf``: this agent's client behind the command line of the public TUF conformance suite.

    python -m tests.trust.tuf_client --metadata-dir DIR init ROOT
    python -m tests.trust.tuf_client --metadata-dir DIR --metadata-url URL refresh
    python -m tests.trust.tuf_client --metadata-dir DIR --metadata-url URL --target-name PATH
        --target-base-url URL --target-dir DIR download

Run the suite with it (theupdateframework/tuf-conformance, CLIENT-CLI.md) by ``--entrypoint``. What core does through
link is done here by plain HTTP; the rest is ``agent.trust.repository``. ``edge-agent/`` below the folder holds the root
that was given and what was believed last, which core keeps elsewhere.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import urllib.error
import urllib.request
from datetime import datetime, timezone
from pathlib import Path
from urllib.parse import quote

from agent.base.clock import SystemClock, TrustedClock
from agent.base.errors import AgentError
from agent.base.files import write_atomically
from agent.trust.repository import Limits, Mark, Repository
from agent.trust.wants import METADATA, TARGETS, DelayError, DeliveryError, Want

_CHUNK = 1 << 16
_OWN = "edge-agent"
_LIMITS = Limits(root_rotations=256, delegations=32)


class Http:
    """Wants by HTTP, each from the base of its kind."""

    def __init__(self, metadata_url: str, target_url: str | None) -> None:
        self._bases = {METADATA: metadata_url, TARGETS: target_url}

    def fetch(self, want: Want) -> bytes:
        """See ``Wants``."""
        kind, _, path = want.path.partition("/")
        found = bytearray()
        try:
            url = f"{(self._bases[kind] or '').rstrip('/')}/{path}"
            with urllib.request.urlopen(url, timeout=want.within_s) as answer:
                while piece := answer.read(_CHUNK):
                    found += piece
                    if len(found) > want.most:
                        raise DeliveryError("too_long", f"{want.path} has more than {want.most} bytes")
        except urllib.error.HTTPError as error:
            code = "not_found" if error.code in (403, 404) else "unreachable"
            raise DelayError(code, f"{url}: {error}") from error
        except (OSError, ValueError) as error:
            raise DelayError("unreachable", f"{url}: {error}") from error
        return bytes(found)


def repository(options: argparse.Namespace) -> Repository:
    """The client on its folder."""
    folder: Path = options.metadata_dir
    marks = folder / _OWN / "marks.json"
    known = {role: Mark(*mark) for role, mark in json.loads(marks.read_text()).items()} if marks.exists() else {}
    clock = TrustedClock(SystemClock(), "always", datetime.fromtimestamp(0, timezone.utc))
    wants = Http(options.metadata_url, options.target_base_url)
    return Repository(folder, (folder / _OWN / "shipped.json").read_bytes(), wants, clock, limits=_LIMITS, marks=known)


def refresh(options: argparse.Namespace) -> Repository:
    """Bring the metadata up to date; what was believed is kept."""
    client = repository(options)
    state = client.refresh()
    kept = {role: [mark.version, mark.keys] for role, mark in state.marks.items()}
    write_atomically(options.metadata_dir / _OWN / "marks.json", json.dumps(kept).encode())
    return client


def download(options: argparse.Namespace) -> None:
    """A target into the folder, unless it is there."""
    client = refresh(options)
    target = client.find(options.target_name)
    place: Path = options.target_dir / quote(options.target_name, safe="")
    if place.exists() and hashlib.new(target.algorithm, place.read_bytes()).hexdigest() == target.digest:
        return
    place.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(place, client.read(options.target_name, target.length))


def main(arguments: list[str] | None = None) -> int:
    """Exit status 0 or 1, as the suite expects."""
    parser = argparse.ArgumentParser(prog="edge-agent-tuf")
    parser.add_argument("--metadata-dir", type=Path, required=True)
    parser.add_argument("--metadata-url", default="")
    parser.add_argument("--target-name")
    parser.add_argument("--target-base-url")
    parser.add_argument("--target-dir", type=Path)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("init").add_argument("root", type=Path)
    commands.add_parser("refresh")
    commands.add_parser("download")
    options = parser.parse_args(arguments)
    try:
        if options.command == "init":
            (options.metadata_dir / _OWN).mkdir(parents=True, exist_ok=True)
            for name in ("root.json", f"{_OWN}/shipped.json"):
                write_atomically(options.metadata_dir / name, options.root.read_bytes())
        elif options.command == "refresh":
            refresh(options)
        else:
            download(options)
    except (AgentError, OSError) as error:
        print(f"error: {getattr(error, 'code', type(error).__name__)}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
