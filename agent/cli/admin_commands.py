"""``edge-agent store``, ``status`` and ``doctor``: how the running core is, and its store."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from agent.base.errors import NotFoundError
from agent.base.paths import Paths
from agent.cli.call import call_core
from agent.cli.commands import Commands, add_command
from agent.cli.terminal import EXIT_FAILED, EXIT_WARNED, megabytes, print_json, print_table


def register(commands: Commands, common: argparse.ArgumentParser) -> None:
    """Add the commands to the parser."""
    store = add_command(commands, common, "store", "the encrypted store")
    actions = store.add_subparsers(dest="store_command", metavar="COMMAND", required=True)
    for name, text, action in (
        ("verify", "check every blob", _store_verify),
        ("gc", "delete what nothing needs", _store_gc),
        ("stats", "sizes and counts", _store_stats),
        ("rotate-key", "move to the next device secret", _store_rotate),
    ):
        add_command(actions, common, name, text).set_defaults(action=action)
    cache = add_command(commands, common, "cache", "answers that are kept in memory")
    actions = cache.add_subparsers(dest="cache_command", metavar="COMMAND", required=True)
    show = add_command(actions, common, "show", "each model that keeps answers, and what that saves")
    show.add_argument("model", metavar="MODEL", nargs="?", help="this one, with the requests that come most often")
    show.set_defaults(action=_cache_show)
    clear = add_command(actions, common, "clear", "forget kept answers, and inputs kept to compute them again")
    clear.add_argument("model", metavar="MODEL", nargs="?", help="of this one; without it, of all")
    clear.set_defaults(action=_cache_clear)
    add_command(commands, common, "status", "what the agent is doing").set_defaults(action=_status)
    doctor = add_command(commands, common, "doctor", "what is wrong, and how to mend it")
    doctor.add_argument("--strict", action="store_true", help="exit status 3 where the worst is a warning")
    doctor.set_defaults(action=_doctor)


# -- store ------------------------------------------------------------------------------------------------------------


def _store_verify(arguments: argparse.Namespace, paths: Paths) -> int:
    return report_verification(arguments, call_core(paths, "POST", "/v1/store/verify", {}))


def report_verification(arguments: argparse.Namespace, result: Mapping[str, Any]) -> int:
    """Print what a verification found; the exit status."""
    if arguments.json:
        print_json(result)
    else:
        count = f"{result['blobs']} blob{'' if result['blobs'] == 1 else 's'}"
        print(f"{count}, {megabytes(result['bytes'])}: " + ("all right" if result["ok"] else "DAMAGED"))
        for blob in result["damaged"]:
            print(f"  {blob['model']} {blob['version']} {blob['part']}: {blob['reason']}")
    return 0 if result["ok"] else EXIT_FAILED


def _store_gc(arguments: argparse.Namespace, paths: Paths) -> int:
    result = call_core(paths, "POST", "/v1/store/gc", {})
    if arguments.json:
        print_json(result)
    else:
        print(f"{result['files']} files deleted, {megabytes(result['freed_bytes'])} freed")
    return 0


def _store_stats(arguments: argparse.Namespace, paths: Paths) -> int:
    result = call_core(paths, "GET", "/v1/store")
    if arguments.json:
        print_json(result)
    else:
        for key, value in result.items():
            shown = megabytes(value) if key.endswith("_bytes") else value
            print(f"{key.removesuffix('_bytes').replace('_', ' '):<16} {shown}")
    return 0


def _store_rotate(arguments: argparse.Namespace, paths: Paths) -> int:
    result = call_core(paths, "POST", "/v1/store/rotate-key", {})
    if arguments.json:
        print_json(result)
    else:
        print(f"key {result['old_key']} -> {result['new_key']}, {result['headers']} headers rewritten")
        if result["action"]:
            print(f"now: {result['action']}")
    return 0


# -- cache ------------------------------------------------------------------------------------------------------------


def _cache_show(arguments: argparse.Namespace, paths: Paths) -> int:
    rows = call_core(paths, "GET", "/v1/cache")["caches"]
    if arguments.model is not None:
        rows = [row for row in rows if row["model"] == arguments.model]
        if not rows:
            raise NotFoundError(f"model '{arguments.model}' keeps no answers", hint="docs/explanation/cache.md")
    if arguments.json:
        print_json({"caches": rows})
    elif not rows:
        print("no model keeps answers")
    else:
        names = ("MODEL", "STATE", "ANSWERS", "SIZE", "HITS", "MISSES", "BYPASSED", "HIT RATE", "SAVED")
        print_table(names, [_cache_row(row) for row in rows])
        if arguments.model is not None and rows[0]["hottest"]:
            print()
            hottest = [(one["request"], one["uses"], f"{one['compute_us']} us") for one in rows[0]["hottest"]]
            print_table(("REQUEST", "USES", "COMPUTE"), hottest)
    return 0


def _cache_row(row: Mapping[str, Any]) -> tuple[str, ...]:
    found = row["hits"] + row["joined"]
    counts = (row["entries"], megabytes(row["bytes"]), found, row["misses"], row["bypassed"], f"{row['hit_rate']:.0%}")
    return (row["model"], row["state"], *map(str, counts), f"{row['saved_us'] / 1e6:.1f} s")


def _cache_clear(arguments: argparse.Namespace, paths: Paths) -> int:
    result = call_core(paths, "POST", "/v1/cache/clear", {"model": arguments.model})
    if arguments.json:
        print_json(result)
    else:
        print(f"{result['cleared']} answer{'' if result['cleared'] == 1 else 's'} forgotten")
    return 0


# -- status and doctor ------------------------------------------------------------------------------------------------


def _status(arguments: argparse.Namespace, paths: Paths) -> int:
    result = call_core(paths, "GET", "/v1/status")
    if arguments.json:
        print_json(result)
        return 0
    print(f"edge-agent {result['version']}, up {result['uptime_s']:.0f} s: {result['health']}")
    print(f"board      {result['board'] or 'unknown'} (profile {result['profile']})")
    names = {row["name"] for row in result["models"]}
    versions = f"{len(result['models'])} version{'' if len(result['models']) == 1 else 's'}"
    print(f"models     {len(names)} in {versions}, {len(result['loaded'])} loaded")
    print(f"memory     {result['memory_budget_mb']} MB for models, up to {result['threads']} threads a run")
    if caches := result["caches"]:
        entries, size = sum(row["entries"] for row in caches), sum(row["bytes"] for row in caches)
        print(
            f"cache      {entries} answers of {len(caches)} model{'' if len(caches) == 1 else 's'}, {megabytes(size)}"
        )
    sealed = {"tpm2": ", sealed by the TPM", "host": ", sealed by the key of this machine"}
    key = result["key_source"] + sealed.get(result["key_place"], "")
    print(f"store      generation {result['generation']}, key from {key}")
    if doing := result["under_way"]:
        print(f"under way  {doing['operation']} for {doing['seconds']:.0f} s")
    if why := "; ".join(level["why"] for level in result["governor"]["levels"].values() if level["level"]):
        print(f"governor   stepped down: {why}")
    for model, watched in result["probation"].items():
        seen = f"{watched['requests']} of {watched['most_requests']} requests"
        print(f"probation  {model} {watched['version']}: {seen} in {watched['elapsed_s']:.0f} s")
    _print_fleet(result)
    rows = [(row["name"], row["version"], row["state"], row["reason"]) for row in result["models"]]
    if rows:
        print()
        print_table(("MODEL", "VERSION", "STATE", "REASON"), rows)
    return 0


def _print_fleet(result: Mapping[str, Any]) -> None:
    """Whom the device obeys, how the link is, what the fleet's jobs do, and what maintenance found wrong."""
    if fleet := result["fleet"]:
        name = f"{fleet['tenant']}/{fleet['device']}" if fleet["device"] else f"{fleet['tenant']}, not enrolled yet"
        print(f"fleet      {name}, enrolment {fleet['epoch']}, configuration {result['config_state']}")
        if fleet["keyid"]:
            keyid = fleet["keyid"]
            words = " ".join(keyid[start : start + 4] for start in range(0, len(keyid), 4))
            print(f"identity   {words}" + ("" if fleet["device"] else f" ({fleet['identity']})"))
        for lane, job in result["jobs"].items():
            print(f"job        {job['job_id']} ({job['op']}, {lane} lane) for {job['seconds']:.0f} s")
    if last := (result["update"] or {}).get("last"):
        more = last["reason"] or (f"waits for {last['waits_for']}" if last.get("waits_for") else "")
        print(f"update     {last['version']} {last['stage']}{f': {more}' if more else ''}")
    if link := result["link"]:
        print("link       " + ("connected" if link["connected"] else f"not connected: {link.get('reason') or '?'}"))
    if failed := [task["task"] for task in result["maintenance"] if task["ok"] is False]:
        print(f"upkeep     {', '.join(failed)}: see edge-agent maintenance")


def _doctor(arguments: argparse.Namespace, paths: Paths) -> int:
    from agent.cli.diagnosis import diagnose  # noqa: PLC0415 - imports much

    levels = ("ok", "note", "warning", "error")
    # The worst first; what is in order is one short line each.
    findings = sorted(diagnose(paths), key=lambda finding: -levels.index(finding["level"]))
    worst = max((levels.index(finding["level"]) for finding in findings), default=0)
    status = EXIT_FAILED if worst == 3 else EXIT_WARNED if worst == 2 and arguments.strict else 0
    if arguments.json:
        print_json({"verdict": ("healthy", "healthy", "degraded", "failing")[worst], "findings": findings})
        return status
    for finding in findings:
        mark = {"ok": "ok  ", "note": "note", "warning": "WARN", "error": "FAIL"}[finding["level"]]
        print(f"{mark}  {finding['check']:<10} {finding['text']}")
        if finding["mend"]:
            print(f"      {'':<10} -> {finding['mend']}")
    return status
