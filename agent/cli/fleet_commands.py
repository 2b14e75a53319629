"""``edge-agent jobs`` and ``maintenance``: what the fleet asked of this device, and what it does for itself."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

from agent.base.paths import Paths
from agent.cli.call import call_core
from agent.cli.commands import Commands, add_command
from agent.cli.terminal import EXIT_FAILED, print_json, print_table


def register(commands: Commands, common: argparse.ArgumentParser) -> None:
    """Add the commands to the parser."""
    jobs = add_command(commands, common, "jobs", "what the fleet asked of this device")
    actions = jobs.add_subparsers(dest="jobs_command", metavar="COMMAND", required=True)
    add_command(actions, common, "list", "the last jobs, newest first").set_defaults(action=_list)
    show = add_command(actions, common, "show", "one job with its arguments and its result")
    show.add_argument("job", metavar="JOB", help="its id, as 'edge-agent jobs list' shows it")
    show.set_defaults(action=_show)
    reset = add_command(actions, common, "reset", "move a damaged job journal aside and begin a new one")
    reset.set_defaults(action=_reset)
    plan = add_command(commands, common, "maintenance", "recurring tasks: when they ran, and what came of it")
    plan.add_argument("--run", metavar="TASK", nargs="*", help="run these tasks now (without a name: all of them)")
    plan.set_defaults(action=_maintenance)


def _list(arguments: argparse.Namespace, paths: Paths) -> int:
    result = call_core(paths, "GET", "/v1/jobs")
    if arguments.json:
        print_json(result)
        return 0
    rows = [
        (job["job_id"], job["op"], job["state"], job["phase"] or "", job["at"], _why(job)) for job in result["jobs"]
    ]
    if rows:
        print_table(("JOB", "OPERATION", "STATE", "PHASE", "SINCE", "REASON"), rows)
    else:
        print("no jobs yet")
    return 0


def _show(arguments: argparse.Namespace, paths: Paths) -> int:
    job = call_core(paths, "GET", f"/v1/jobs/{quote(arguments.job, safe='')}")
    if arguments.json:
        print_json(job)
        return 0
    for name in ("job_id", "op", "state", "phase", "step", "lane", "priority", "attempt", "rev", "accepted_at", "at"):
        if job.get(name) not in (None, ""):
            print(f"{name.replace('_', ' '):<12} {job[name]}")
    for name in ("args", "result"):
        if job.get(name):
            print(f"{name:<12} {job[name]}")
    if job.get("error"):
        print(f"{'error':<12} {_why(job)}")
        if job["error"].get("hint"):
            print(f"{'hint':<12} {job['error']['hint']}")
    return 0


def _why(job: Mapping[str, Any]) -> str:
    error = job.get("error")
    return f"{error['text']} ({error['code']})" if error else ""


def _reset(arguments: argparse.Namespace, paths: Paths) -> int:
    result = call_core(paths, "POST", "/v1/jobs/reset", {})
    if arguments.json:
        print_json(result)
    else:
        print(f"the damaged journal is now {result['moved_to']}; a new one has begun")
    return 0


def _maintenance(arguments: argparse.Namespace, paths: Paths) -> int:
    if arguments.run is None:
        result = call_core(paths, "GET", "/v1/maintenance")
    else:
        result = call_core(paths, "POST", "/v1/maintenance", {"run": arguments.run})
    if arguments.json:
        print_json(result)
    else:
        rows = [
            (
                task["task"],
                f"{task['every_h']:g} h" if task["every_h"] else "never",
                task["ended_at"] or "not yet",
                {True: "good", False: "BAD", None: ""}[task["ok"]],
                task["text"] or task["what"],
            )
            for task in result["tasks"]
        ]
        print_table(("TASK", "EVERY", "LAST RUN", "RESULT", ""), rows)
    failed = arguments.run is not None and any(task["ok"] is False for task in result["tasks"])
    return EXIT_FAILED if failed else 0
