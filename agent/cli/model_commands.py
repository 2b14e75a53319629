"""``edge-agent models`` and ``bench``: install, list, explain, try, switch and remove, by the running core."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from agent.base.errors import PeerError
from agent.base.paths import Paths
from agent.cli.admin_commands import report_verification
from agent.cli.call import Source, call_core
from agent.cli.commands import Commands, add_command, name_model
from agent.cli.local_commands import check_model
from agent.cli.terminal import megabytes, print_json, print_table


def register(commands: Commands, common: argparse.ArgumentParser) -> None:
    """Add the commands to the parser."""
    models = add_command(commands, common, "models", "install, list, explain, switch and remove models")
    actions = models.add_subparsers(dest="models_command", metavar="COMMAND", required=True)

    def add(name: str, text: str, action: Callable[[argparse.Namespace, Paths], int]) -> argparse.ArgumentParser:
        command = add_command(actions, common, name, text)
        command.set_defaults(action=action)
        return command

    install = add("add", "install a bundle, a bundle directory or a bare model; returns when it answers", _add)
    install.add_argument("file", metavar="FILE", type=Path, help=".edgemodel, folder with model.json, .onnx or .tflite")
    install.add_argument("--name", metavar="N", help="another name than the bundle's or the file's")
    install.add_argument("--accept-slower", action="store_true", help="also where it is slower than what answers now")
    _take_shapes(install)
    add("list", "what is installed", _list)
    name_model(add("show", "one model: versions, inputs, outputs, variants", _show))
    check = add("check", "could it run here, or on a recorded board?", check_model)
    check.add_argument("file", metavar="FILE", type=Path, help=".edgemodel, folder with model.json, .onnx or .tflite")
    check.add_argument("--root", type=Path, metavar="DIR", help="a recorded board's files")
    explain = add("explain", "every variant, each reason, each number", _explain)
    name_model(explain)
    explain.add_argument("--version", dest="model_version", metavar="V", help="another version than the active one")
    activate = add("activate", "let a version answer", _activate)
    name_model(activate)
    activate.add_argument("model_version", metavar="VERSION", help="an installed version")
    name_model(add("rollback", "back to the version before", _rollback))
    remove = add("remove", "delete a model, or one version of it", _remove)
    name_model(remove)
    remove.add_argument("--version", dest="model_version", metavar="V", help="only this version; not the active one")
    name_model(add("verify", "check a model's blobs", _verify))
    bench = add_command(commands, common, "bench", "try a model's variants again and choose anew")
    name_model(bench)
    _take_shapes(bench)
    bench.set_defaults(action=_bench)


def _take_shapes(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--shape",
        action="append",
        default=[],
        metavar="NAME=1,3,224,224",
        help="axes of the made-up input NAME, for a model without a golden set; once for each input",
    )


def _add(arguments: argparse.Namespace, paths: Paths) -> int:
    options: dict[str, Any] = {"file_name": arguments.file.name}
    if arguments.name is not None:
        options["name"] = arguments.name
    if shapes := _shapes(arguments.shape):
        options["shapes"] = shapes
    if arguments.accept_slower:
        options["accept_slower"] = True
    with Source(arguments.file) as source:
        result = call_core(paths, "POST", "/v1/models", options, descriptors=(source.descriptor,), source=source)
    if arguments.json:
        print_json(result)
    else:
        _print_choice(result)
        if result["unchanged"] and shapes:
            print(f"hint: nothing was tried again; edge-agent bench {result['model']} --shape ...", file=sys.stderr)
    return 0


def _print_choice(result: Mapping[str, Any]) -> None:
    explained = (result.get("choice") or {}).get("explain")
    if explained:
        _print_explanation(explained)
    state = "was there already and answers" if result.get("unchanged") else "answers"
    print(f"{result['model']} {result['version']} {state}, by {result['chosen']}")
    if explained and any(_untimed(row) for row in explained["candidates"]):
        print(
            f"hint: its made-up inputs were refused; say their sizes: edge-agent bench {result['model']} "
            "--shape NAME=1,3,224,224",
            file=sys.stderr,
        )


def _untimed(row: Mapping[str, Any]) -> bool:
    """Whether a candidate was chosen that would not run on made-up inputs."""
    return row["outcome"] == "winner" and (row["measured"] or {}).get("p50_ms") is None


def _print_explanation(document: Mapping[str, Any]) -> None:
    from agent.selection.explanation import explain_text  # noqa: PLC0415 - only where it is shown

    print(explain_text(document))


def _list(arguments: argparse.Namespace, paths: Paths) -> int:
    result = call_core(paths, "GET", "/v1/models")
    if arguments.json:
        print_json(result)
        return 0
    rows = [
        (
            row["name"],
            row["version"],
            "active" if row["active"] else "",
            row["chosen"] or "-",
            "-" if row["p50_ms"] is None else f"{row['p50_ms']:.2f} ms",
            megabytes(row["bytes"]),
            "damaged" if row["damaged"] else row["origin"],
        )
        for row in result["models"]
    ]
    if rows:
        print_table(("MODEL", "VERSION", "STATE", "VARIANT", "P50", "STORED", "ORIGIN"), rows, right=(4, 5))
    else:
        print("no models; add one with: edge-agent models add FILE")
    return 0


def _show(arguments: argparse.Namespace, paths: Paths) -> int:
    result = call_core(paths, "GET", _model_path(arguments))
    if arguments.json:
        print_json(result)
        return 0
    previous = f", before it {result['previous']}" if result["previous"] else ""
    print(f"{result['name']}: {result['active'] or 'no version'} answers{previous}")
    if (watched := result["probation"]) is not None:
        print(f"on probation: {watched['version']}, {_seen(watched)}; else {watched['before']} answers again")
    for version in result["versions"].values():
        print()
        _print_version(version)
    return 0


def _seen(watched: Mapping[str, Any]) -> str:
    """What a probation has seen, in words."""
    requests = f"{watched['requests']} of {watched['most_requests']} requests ({watched['failed']} failed)"
    return f"{requests} in {watched['elapsed_s']:.0f} of {watched['most_s']:.0f} s"


def _print_story(version: Mapping[str, Any]) -> None:
    """What came of its probation, of its golden set and of what apps say of its answers."""
    if (record := version["probation"]) is not None:
        said = {"passed": "passed", "rolled_back": "taken back", "kept": "worse, and kept"}[record["state"]]
        print(f"  probation {said} {record['at']}{': ' if record['text'] else ''}{record['text']}")
    if golden := version["quality"]["golden"]:
        last = golden[-1]
        print(f"  golden    {last['metric']} {last['value']:.4g} {'ok' if last['ok'] else 'drifted'} ({last['at']})")
    if feedback := version["quality"]["feedback"]:
        right, wrong = (sum(day[name] for day in feedback.values()) for name in ("correct", "wrong"))
        problem = version["quality"]["problem"]
        print(f"  feedback  {right} of {right + wrong} right in {len(feedback)} days{': ' if problem else ''}{problem}")


def _print_version(version: Mapping[str, Any]) -> None:
    manifest = version["manifest"]
    about = ", ".join(filter(None, (version["origin"], manifest["task"], manifest["license"])))
    print(f"{version['version']}  ({about}; added {version['added_at']}, {megabytes(version['bytes'])} stored)")
    for what in ("inputs", "outputs"):
        tensors = [f"{tensor['name']} {tensor['datatype']} {tensor['shape']}" for tensor in manifest[what]]
        print(f"  {what:<9}{', '.join(tensors)}")
    chosen = (version["chosen"] or "").partition("@")[0]
    for variant in manifest["variants"]:
        mark = "*" if variant["id"] == chosen else " "
        damaged = "  damaged" if variant["file"]["name"] in version["damaged"] else ""
        print(f"  {mark} {variant['id']:<14} {variant['runtime']} {variant['precision']}{damaged}")
    _print_story(version)


def _explain(arguments: argparse.Namespace, paths: Paths) -> int:
    result = call_core(paths, "GET", _model_path(arguments))
    version = arguments.model_version or result["active"] or next(iter(result["versions"]))
    if version not in result["versions"]:
        raise PeerError(
            f"cannot explain '{arguments.model}' {version}: it is not installed", hint="edge-agent models list"
        )
    found = result["versions"][version]
    document, batching, beside = (found.get(part) for part in ("explain", "batching", "beside"))
    if document is None:
        raise PeerError(f"cannot explain '{arguments.model}': nothing was tried yet", hint="edge-agent bench MODEL")
    if arguments.json:
        print_json({**document, "batching": batching, "beside": beside})
    else:
        _print_explanation(document)
        _print_beside(beside)
        _print_batching(batching)
    return 0


def _print_beside(record: Mapping[str, Any] | None) -> None:
    """How it did beside the version that answered when it came."""
    if record is None:
        return
    parts = []
    if (latency := record["latency"]) is not None:
        ratio, times = latency["ratio"], (latency["p50_ms"], latency["active_p50_ms"])
        parts.append(f"p50 {times[0]:.3g} ms, {times[1]:.3g} ms before ({ratio:.2f} x)")
    if None not in (memory := (record["memory"]["peak_mb"], record["memory"]["active_peak_mb"])):
        parts.append(f"{memory[0]:.1f} MB, {memory[1]:.1f} MB before")
    agreement = record["agreement"]
    if agreement["active"] is not None and agreement["new"] is not None:
        parts.append(f"{agreement['metric']} {agreement['new']:.4g}, {agreement['active']:.4g} before")
    if agreement["new_on_active_golden"] is not None:
        parts.append(f"{agreement['new_on_active_golden']:.4g} on the golden set of before")
    print(f"beside {record['version']} ({record['how']}): {'; '.join(parts) or 'nothing to compare'}")


def _print_batching(record: Mapping[str, Any] | None) -> None:
    """What joining requests was measured to gain, where somebody asked for it."""
    if record is None:
        return
    decided = record["decided"]
    rows = ", ".join(f"{rows}: {us:g} us" for rows, us in decided["us_per_row"].items())
    said = decided["reason"] or f"runs of up to {decided['size']} rows"
    print(f"batching: {said}" + (f" (a row in runs of {rows})" if rows else ""))


def _activate(arguments: argparse.Namespace, paths: Paths) -> int:
    body = {"version": arguments.model_version}
    return _change(arguments, paths, "POST", f"{_model_path(arguments)}/activate", body, "{model} {version} answers")


def _rollback(arguments: argparse.Namespace, paths: Paths) -> int:
    return _change(
        arguments, paths, "POST", f"{_model_path(arguments)}/rollback", {}, "{model} {version} answers again"
    )


def _remove(arguments: argparse.Namespace, paths: Paths) -> int:
    query = f"?version={quote(arguments.model_version, safe='')}" if arguments.model_version else ""
    result = call_core(paths, "DELETE", _model_path(arguments) + query)
    if arguments.json:
        print_json(result)
    else:
        which = f" {arguments.model_version}" if arguments.model_version else ""
        print(f"removed {arguments.model}{which}, {megabytes(result['freed_bytes'])} freed")
    return 0


def _verify(arguments: argparse.Namespace, paths: Paths) -> int:
    return report_verification(arguments, call_core(paths, "POST", f"{_model_path(arguments)}/verify", {}))


def _bench(arguments: argparse.Namespace, paths: Paths) -> int:
    shapes = _shapes(arguments.shape)
    result = call_core(paths, "POST", f"{_model_path(arguments)}/try", {"shapes": shapes} if shapes else {})
    if arguments.json:
        print_json(result)
    else:
        _print_choice(result)
    return 0


def _model_path(arguments: argparse.Namespace) -> str:
    return f"/v1/models/{quote(arguments.model, safe='')}"


def _change(
    arguments: argparse.Namespace, paths: Paths, method: str, path: str, body: Mapping[str, Any], text: str
) -> int:
    result = call_core(paths, method, path, body)
    if arguments.json:
        print_json(result)
    else:
        print(text.format(**result))
    return 0


def _shapes(texts: list[str]) -> dict[str, list[int]]:
    shapes = {}
    for text in texts:
        name, equals, axes = text.partition("=")
        try:
            shapes[name] = [int(axis) for axis in axes.replace("x", ",").split(",")]
        except ValueError:
            equals = ""
        if not equals or not name:
            raise PeerError(f"cannot read shape '{text}': write NAME=1,3,224,224")
    return shapes
