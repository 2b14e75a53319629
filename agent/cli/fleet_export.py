"""``edge-fleet export``: what a device needs that reaches neither mirror nor broker, on a stick."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from agent.base.errors import NotFoundError
from agent.base.files import write_atomically
from agent.cli.commands import Commands
from agent.cli.fleet_common import manual, opened, say
from agent.cli.terminal import megabytes, print_json

JOB_FILE = "job.json"
_ABOUT = """\
Copies the repository's metadata and the files of one version, or of all, to DIR. A job goes along as job.json: with
--device the one that waits for that device, or what 'edge-fleet job … --to-file DIR/job.json' wrote. On the device
'edge-agent deliver DIR' hands it in and brings what it wants.

Nothing in DIR is secret: models are encrypted, and the job is for that device alone.
"""


def register(commands: Commands, common: argparse.ArgumentParser) -> None:
    """Add the command to the parser."""
    made = manual(
        commands,
        common,
        "export",
        "put what a device needs on a stick",
        about=_ABOUT,
        examples="  edge-fleet export /media/stick --model digits --version 2.0.0 --device door-cam-7\n",
    )
    made.set_defaults(run=_run, doing="export")
    made.add_argument("out", type=Path, metavar="DIR", help="where to; what it has already is not copied again")
    made.add_argument("--model", metavar="NAME", help="the files of this model alone")
    made.add_argument("--version", metavar="VERSION", help="and of this version alone")
    made.add_argument("--device", "-d", metavar="NAME", help="take the job along that waits for this device")


def _run(options: argparse.Namespace) -> int:
    from agent.cli.fleet_repository import require_tuf  # noqa: PLC0415 - only what the repository needs

    require_tuf()
    from agent.fleet.publishing import copy_site  # noqa: PLC0415
    from agent.fleet.repository import locked  # noqa: PLC0415

    with opened(options) as fleet:
        document = None if options.device is None else fleet.books.documents.current(options.device)
        if options.device is not None and document is None:
            raise NotFoundError(
                f"cannot export a job for {options.device}: none waits for it", hint="'edge-fleet job' makes one"
            )
        with locked(fleet.folder):
            copied = copy_site(fleet.folder.site, options.out, _chosen(options.model, options.version))
    job = options.out / JOB_FILE
    if document is not None:
        write_atomically(job, document.envelope, mode=0o644)
    elif job.exists():
        say(f"{job} stays as it is: is it of this errand, from 'edge-fleet job … --to-file', or of an earlier one?")
    size = sum(path.stat().st_size for path in options.out.rglob("*") if path.is_file())
    if options.json:
        print_json({"copied": copied, "bytes": size, "job": document.job_id if document else None})
    else:
        beside = f", job {document.job_id}" if document else ""
        say(f"{options.out}: {copied} files copied, {megabytes(size)} in all{beside}")
    return 0


def _chosen(model: str | None, version: str | None) -> Callable[[str], bool]:
    """Which targets go along. Headers are the operator's own; whatever is no model's goes along always."""

    def wanted(name: str) -> bool:
        parts = name.split("/")
        if parts[0] != "models" or len(parts) < 4:
            return True
        if model is not None and parts[1] != model:
            return False
        return (version is None or parts[2] == version) and parts[3] != "header"

    return wanted
