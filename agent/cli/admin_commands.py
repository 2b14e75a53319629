"""Commands on ``admin.sock`` of the running core: models, store, bench, status, doctor."""

from __future__ import annotations

import argparse
import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from agent.base.config import Paths
from agent.base.errors import AgentError, PeerError, RefusedError
from agent.cli.local_commands import check_model
from agent.cli.terminal import EXIT_FAILED, Progress, megabytes, print_json, print_table, sentence

_Commands = Any  # argparse's subparsers action is generic in a private class


def register(commands: _Commands, common: argparse.ArgumentParser) -> None:
    """Add the commands to the parser."""
    _register_models(commands, common)
    store = _parser(commands, common, "store", "the encrypted store")
    actions = store.add_subparsers(dest="store_command", metavar="COMMAND", required=True)
    for name, text, action in (
        ("verify", "check every blob", _store_verify),
        ("gc", "delete what nothing needs", _store_gc),
        ("stats", "sizes and counts", _store_stats),
        ("rotate-key", "move to the next device secret", _store_rotate),
    ):
        _parser(actions, common, name, text).set_defaults(action=action)
    bench = _parser(commands, common, "bench", "try a model's variants again and choose anew")
    _name_model(bench)
    _take_shapes(bench)
    bench.set_defaults(action=_bench)
    _parser(commands, common, "status", "what the agent is doing").set_defaults(action=_status)
    _parser(commands, common, "doctor", "what is wrong, and how to mend it").set_defaults(action=_doctor)


def _parser(commands: _Commands, common: argparse.ArgumentParser, name: str, text: str) -> argparse.ArgumentParser:
    """A command with the same line in the list of commands and on its own page."""
    made: argparse.ArgumentParser = commands.add_parser(name, parents=[common], help=text, description=sentence(text))
    return made


def _name_model(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", metavar="MODEL", help="its name, as 'edge-agent models list' shows it")


def _take_shapes(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--shape",
        action="append",
        default=[],
        metavar="NAME=1,3,224,224",
        help="axes of the made-up input NAME, for a model without a golden set; once for each input",
    )


def _register_models(commands: _Commands, common: argparse.ArgumentParser) -> None:
    models = _parser(commands, common, "models", "install, list, explain, switch and remove models")
    actions = models.add_subparsers(dest="models_command", metavar="COMMAND", required=True)

    def add(name: str, text: str, action: Callable[[argparse.Namespace, Paths], int]) -> argparse.ArgumentParser:
        command = _parser(actions, common, name, text)
        command.set_defaults(action=action)
        return command

    install = add("add", "install a bundle, a bundle directory or a bare model; returns when it answers", _add)
    install.add_argument("file", metavar="FILE", type=Path, help=".edgemodel, directory with model.json, or .onnx")
    install.add_argument("--name", metavar="N", help="another name than the bundle's or the file's")
    _take_shapes(install)
    add("list", "what is installed", _list)
    _name_model(add("show", "one model: versions, inputs, outputs, variants", _show))
    check = add("check", "could it run here, or on a recorded board?", check_model)
    check.add_argument("file", metavar="FILE", type=Path, help=".edgemodel, directory with model.json, or .onnx")
    check.add_argument("--root", type=Path, metavar="DIR", help="a recorded board's files")
    explain = add("explain", "every variant, each reason, each number", _explain)
    _name_model(explain)
    explain.add_argument("--version", dest="model_version", metavar="V", help="another version than the active one")
    activate = add("activate", "let a version answer", _activate)
    _name_model(activate)
    activate.add_argument("model_version", metavar="VERSION", help="an installed version")
    _name_model(add("rollback", "back to the version before", _rollback))
    remove = add("remove", "delete a model, or one version of it", _remove)
    _name_model(remove)
    remove.add_argument("--version", dest="model_version", metavar="V", help="only this version; not the active one")
    _name_model(add("verify", "check a model's blobs", _verify))


# -- models -----------------------------------------------------------------------------------------------------------


def _add(arguments: argparse.Namespace, paths: Paths) -> int:
    options: dict[str, Any] = {"file_name": arguments.file.name}
    if arguments.name is not None:
        options["name"] = arguments.name
    if shapes := _shapes(arguments.shape):
        options["shapes"] = shapes
    with _Source(arguments.file) as source:
        result = _call(paths, "POST", "/v1/models", options, descriptors=(source.descriptor,), source=source)
    if arguments.json:
        print_json(result)
    else:
        _print_choice(result)
    return 0


class _Source:
    """An open descriptor for core: the file itself, or a pipe into which a thread writes the directory's bundle."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._thread: threading.Thread | None = None
        self.problem: Exception | None = None

    def __enter__(self) -> _Source:
        if not self._path.is_dir():
            self.descriptor = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
            return self
        self.descriptor, writing = os.pipe2(os.O_CLOEXEC)
        self._thread = threading.Thread(target=self._write, args=(writing,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.descriptor)  # ends the writer too, when core no longer reads
        if self._thread is not None:
            self._thread.join()

    def _write(self, writing: int) -> None:
        from agent.bundles.archive import stream_directory  # noqa: PLC0415 - only for directories

        try:
            with os.fdopen(writing, "wb") as stream:
                stream_directory(self._path, stream)
        except BrokenPipeError:
            pass  # core has hung up; its answer says why
        except (AgentError, OSError) as error:
            self.problem = error


def _print_choice(result: Mapping[str, Any]) -> None:
    explained = (result.get("choice") or {}).get("explain")
    if explained:
        _print_explanation(explained)
    state = "was there already and answers" if result.get("unchanged") else "answers"
    print(f"{result['model']} {result['version']} {state}, by {result['chosen']}")


def _print_explanation(document: Mapping[str, Any]) -> None:
    from agent.selection.explanation import explain_text  # noqa: PLC0415 - only where it is shown

    print(explain_text(document))


def _list(arguments: argparse.Namespace, paths: Paths) -> int:
    result = _call(paths, "GET", "/v1/models")
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
    result = _call(paths, "GET", _model_path(arguments))
    if arguments.json:
        print_json(result)
        return 0
    previous = f", before it {result['previous']}" if result["previous"] else ""
    print(f"{result['name']}: {result['active'] or 'no version'} answers{previous}")
    for version in result["versions"].values():
        print()
        _print_version(version)
    return 0


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


def _explain(arguments: argparse.Namespace, paths: Paths) -> int:
    result = _call(paths, "GET", _model_path(arguments))
    version = arguments.model_version or result["active"] or next(iter(result["versions"]))
    if version not in result["versions"]:
        raise PeerError(
            f"cannot explain '{arguments.model}' {version}: it is not installed", hint="edge-agent models list"
        )
    document = result["versions"][version]["explain"]
    if document is None:
        raise PeerError(f"cannot explain '{arguments.model}': nothing was tried yet", hint="edge-agent bench MODEL")
    if arguments.json:
        print_json(document)
    else:
        _print_explanation(document)
    return 0


def _activate(arguments: argparse.Namespace, paths: Paths) -> int:
    body = {"version": arguments.model_version}
    return _change(arguments, paths, "POST", f"{_model_path(arguments)}/activate", body, "{model} {version} answers")


def _rollback(arguments: argparse.Namespace, paths: Paths) -> int:
    return _change(
        arguments, paths, "POST", f"{_model_path(arguments)}/rollback", {}, "{model} {version} answers again"
    )


def _remove(arguments: argparse.Namespace, paths: Paths) -> int:
    query = f"?version={quote(arguments.model_version, safe='')}" if arguments.model_version else ""
    result = _call(paths, "DELETE", _model_path(arguments) + query)
    if arguments.json:
        print_json(result)
    else:
        which = f" {arguments.model_version}" if arguments.model_version else ""
        print(f"removed {arguments.model}{which}, {megabytes(result['freed_bytes'])} freed")
    return 0


def _verify(arguments: argparse.Namespace, paths: Paths) -> int:
    return _report_verification(arguments, _call(paths, "POST", f"{_model_path(arguments)}/verify", {}))


def _bench(arguments: argparse.Namespace, paths: Paths) -> int:
    shapes = _shapes(arguments.shape)
    result = _call(paths, "POST", f"{_model_path(arguments)}/try", {"shapes": shapes} if shapes else {})
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
    result = _call(paths, method, path, body)
    if arguments.json:
        print_json(result)
    else:
        print(text.format(**result))
    return 0


# -- store ------------------------------------------------------------------------------------------------------------


def _store_verify(arguments: argparse.Namespace, paths: Paths) -> int:
    return _report_verification(arguments, _call(paths, "POST", "/v1/store/verify", {}))


def _report_verification(arguments: argparse.Namespace, result: Mapping[str, Any]) -> int:
    if arguments.json:
        print_json(result)
    else:
        count = f"{result['blobs']} blob{'' if result['blobs'] == 1 else 's'}"
        print(f"{count}, {megabytes(result['bytes'])}: " + ("all right" if result["ok"] else "DAMAGED"))
        for blob in result["damaged"]:
            print(f"  {blob['model']} {blob['version']} {blob['part']}: {blob['reason']}")
    return 0 if result["ok"] else EXIT_FAILED


def _store_gc(arguments: argparse.Namespace, paths: Paths) -> int:
    result = _call(paths, "POST", "/v1/store/gc", {})
    if arguments.json:
        print_json(result)
    else:
        print(f"{result['files']} files deleted, {megabytes(result['freed_bytes'])} freed")
    return 0


def _store_stats(arguments: argparse.Namespace, paths: Paths) -> int:
    result = _call(paths, "GET", "/v1/store")
    if arguments.json:
        print_json(result)
    else:
        for key, value in result.items():
            shown = megabytes(value) if key.endswith("_bytes") else value
            print(f"{key.removesuffix('_bytes').replace('_', ' '):<16} {shown}")
    return 0


def _store_rotate(arguments: argparse.Namespace, paths: Paths) -> int:
    result = _call(paths, "POST", "/v1/store/rotate-key", {})
    if arguments.json:
        print_json(result)
    else:
        print(f"key {result['old_key']} -> {result['new_key']}, {result['headers']} headers rewritten")
        if result["action"]:
            print(f"now: {result['action']}")
    return 0


# -- status and doctor ------------------------------------------------------------------------------------------------


def _status(arguments: argparse.Namespace, paths: Paths) -> int:
    result = _call(paths, "GET", "/v1/status")
    if arguments.json:
        print_json(result)
        return 0
    print(f"edge-agent {result['version']}, up {result['uptime_s']:.0f} s: {result['health']}")
    print(f"board      {result['board'] or 'unknown'} (profile {result['profile']})")
    names = {row["name"] for row in result["models"]}
    print(f"models     {len(names)} in {len(result['models'])} versions, {len(result['loaded'])} loaded")
    print(f"memory     {result['memory_budget_mb']} MB for models, {result['threads']} threads a run")
    print(f"store      generation {result['generation']}, key from {result['key_source']}")
    if doing := result["under_way"]:
        print(f"under way  {doing['operation']} for {doing['seconds']:.0f} s")
    rows = [(row["name"], row["version"], row["state"], row["reason"]) for row in result["models"]]
    if rows:
        print()
        print_table(("MODEL", "VERSION", "STATE", "REASON"), rows)
    return 0


def _doctor(arguments: argparse.Namespace, paths: Paths) -> int:
    from agent.cli.diagnosis import diagnose  # noqa: PLC0415 - imports much

    findings = diagnose(paths)
    worst = max((("ok", "note", "warning", "error").index(finding["level"]) for finding in findings), default=0)
    if arguments.json:
        print_json({"verdict": ("healthy", "healthy", "degraded", "failing")[worst], "findings": findings})
        return EXIT_FAILED if worst == 3 else 0
    for finding in findings:
        mark = {"ok": "ok  ", "note": "note", "warning": "WARN", "error": "FAIL"}[finding["level"]]
        print(f"{mark}  {finding['check']:<10} {finding['text']}")
        if finding["mend"]:
            print(f"      {'':<10} -> {finding['mend']}")
    return EXIT_FAILED if worst == 3 else 0


# -- within -----------------------------------------------------------------------------------------------------------


def _call(
    paths: Paths,
    method: str,
    path: str,
    body: Mapping[str, Any] | None = None,
    *,
    descriptors: tuple[int, ...] = (),
    source: _Source | None = None,
) -> dict[str, Any]:
    """One call with its progress on the terminal. What kept a directory from being read explains core's refusal."""
    from agent.client import AdminClient  # noqa: PLC0415 - brings asyncio in, which core's start would pay for

    with Progress() as progress:
        client = AdminClient(str(paths.admin_socket))
        try:
            answer: dict[str, Any] = client.call(method, path, body, descriptors=descriptors, on_event=progress.event)
        except AgentError as error:
            if source is not None and source.problem is not None:
                raise source.problem from error
            if isinstance(error.__cause__, PermissionError):
                # The client's own hint is for apps.
                raise RefusedError(
                    str(error), hint="only root and the agent's own user manage it; apps need infer.sock alone"
                ) from error
            raise
    return answer


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
