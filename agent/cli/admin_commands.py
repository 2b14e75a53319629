"""Commands that talk to the running core: models, store, infer, bench, status, doctor."""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from agent.base.config import Paths
from agent.base.datatypes import ITEM_SIZE, NUMPY_NAME
from agent.base.errors import AgentError, PeerError
from agent.cli.local_commands import check_model
from agent.cli.terminal import EXIT_FAILED, Progress, megabytes, print_json, print_table
from agent.client import AdminClient

_Commands = Any  # argparse's subparsers action is generic in a private class


def register(commands: _Commands, common: argparse.ArgumentParser) -> None:
    """Add the commands to the parser."""
    _register_models(commands, common)
    store = commands.add_parser("store", parents=[common], help="the encrypted store")
    actions = store.add_subparsers(dest="store_command", metavar="COMMAND", required=True)
    for name, text, action in (
        ("verify", "check every blob", _store_verify),
        ("gc", "delete what nothing needs", _store_gc),
        ("stats", "sizes and counts", _store_stats),
        ("rotate-key", "move to the next device secret", _store_rotate),
    ):
        actions.add_parser(name, parents=[common], help=text).set_defaults(action=action)
    infer = commands.add_parser("infer", parents=[common], help="ask a model once")
    infer.add_argument("model")
    infer.add_argument(
        "-i",
        "--input",
        action="append",
        required=True,
        metavar="NAME=FILE",
        help="an input from FILE.npy, FILE.json or - (JSON on standard input); may be repeated",
    )
    infer.add_argument("--version", dest="model_version", metavar="V", help="another version than the active one")
    infer.set_defaults(action=_infer)
    bench = commands.add_parser("bench", parents=[common], help="try a model's variants again and choose anew")
    bench.add_argument("model")
    bench.add_argument("--shape", action="append", default=[], metavar="NAME=1,3,224,224", help="for made-up inputs")
    bench.set_defaults(action=_bench)
    commands.add_parser("status", parents=[common], help="what the agent is doing").set_defaults(action=_status)
    commands.add_parser("doctor", parents=[common], help="what is wrong, and how to mend it").set_defaults(
        action=_doctor
    )


def _register_models(commands: _Commands, common: argparse.ArgumentParser) -> None:
    models = commands.add_parser("models", parents=[common], help="install, list, explain, switch and remove models")
    actions = models.add_subparsers(dest="models_command", metavar="COMMAND", required=True)

    def add(name: str, text: str, action: Callable[[argparse.Namespace, Paths], int]) -> argparse.ArgumentParser:
        command: argparse.ArgumentParser = actions.add_parser(name, parents=[common], help=text)
        command.set_defaults(action=action)
        return command

    install = add("add", "install a bundle, a bundle directory or a bare model; returns when it answers", _add)
    install.add_argument("file", type=Path, help=".edgemodel, directory with model.json, or .onnx")
    install.add_argument("--name", metavar="N", help="another name than the bundle's or the file's")
    install.add_argument("--shape", action="append", default=[], metavar="NAME=1,3,224,224", help="for made-up inputs")
    add("list", "what is installed", _list)
    add("show", "one model with its manifest", _show).add_argument("model")
    check = add("check", "could it run here, or on a recorded board?", check_model)
    check.add_argument("file", type=Path)
    check.add_argument("--root", type=Path, metavar="DIR", help="a recorded board's files")
    add("explain", "every variant, each reason, each number", _explain).add_argument("model")
    activate = add("activate", "let a version answer", _activate)
    activate.add_argument("model")
    activate.add_argument("model_version", metavar="VERSION")
    add("rollback", "back to the version before", _rollback).add_argument("model")
    remove = add("remove", "delete a model, or one version of it", _remove)
    remove.add_argument("model")
    remove.add_argument("--version", dest="model_version", metavar="V")
    add("verify", "check a model's blobs", _verify).add_argument("model")


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
    print_json(_call(paths, "GET", f"/v1/models/{quote(arguments.model, safe='')}"))
    return 0


def _explain(arguments: argparse.Namespace, paths: Paths) -> int:
    result = _call(paths, "GET", f"/v1/models/{quote(arguments.model, safe='')}")
    version = result["active"] or next(iter(result["versions"]))
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
        print(f"removed {arguments.model}, {megabytes(result['freed_bytes'])} freed")
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
        print(f"{result['blobs']} blobs, {megabytes(result['bytes'])}: " + ("all right" if result["ok"] else "DAMAGED"))
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


# -- infer ------------------------------------------------------------------------------------------------------------


def _infer(arguments: argparse.Namespace, paths: Paths) -> int:
    from agent.client import Client  # noqa: PLC0415 - brings numpy in

    with Client(str(paths.infer_socket)) as client:
        signature = client.metadata(arguments.model, arguments.model_version)["inputs"]
        datatypes = {spec["name"]: spec["datatype"] for spec in signature}
        inputs = dict(_read_input(text, datatypes) for text in arguments.input)
        result = client.infer(arguments.model, inputs, version=arguments.model_version)
    if arguments.json:
        outputs = {name: _plain(array) for name, array in result.items()}
        print_json(
            {
                "model": arguments.model,
                "version": result.model_version,
                "outputs": outputs,
                "parameters": dict(result.parameters),
            }
        )
        return 0
    for name, array in result.items():
        print(f"{name}: {array.dtype} {list(array.shape)}")
        print(array)
    said = result.parameters
    print(f"# by {said.get('variant')} on {said.get('backend')}, {said.get('compute_us')} us", file=sys.stderr)
    return 0


def _read_input(text: str, datatypes: Mapping[str, str]) -> tuple[str, Any]:
    """``NAME=FILE`` as a name and an array; JSON numbers take the datatype that the model declares."""
    import numpy as np  # noqa: PLC0415 - only for this command

    name, equals, file = text.partition("=")
    if not equals or not name or not file:
        raise PeerError(f"cannot read input '{text}': write NAME=FILE")
    try:
        if file.endswith(".npy"):
            return name, np.load(file, allow_pickle=False)
        data = json.load(sys.stdin) if file == "-" else json.loads(Path(file).read_text(encoding="utf-8"))
        return name, _as_declared(np.asarray(data), datatypes.get(name))
    except (OSError, ValueError, OverflowError) as error:
        raise PeerError(f"cannot read input '{name}' from {file}: {error}") from error


def _as_declared(array: Any, datatype: str | None) -> Any:
    import numpy as np  # noqa: PLC0415 - as above

    if array.dtype.kind == "U":
        return np.asarray([element.encode() for element in array.reshape(-1)], dtype=object).reshape(array.shape)
    if datatype in ITEM_SIZE and datatype != "BF16" and array.dtype.kind in "biuf":
        return array.astype(NUMPY_NAME[datatype], casting="same_kind" if array.dtype.kind == "f" else "unsafe")
    return array


def _plain(array: Any) -> Any:
    values = array.tolist()
    return json.loads(json.dumps(values, default=lambda element: element.decode(errors="replace")))


# -- status and doctor ------------------------------------------------------------------------------------------------


def _status(arguments: argparse.Namespace, paths: Paths) -> int:
    result = _call(paths, "GET", "/v1/status")
    if arguments.json:
        print_json(result)
        return 0
    print(f"edge-agent {result['version']}, up {result['uptime_s']:.0f} s: {result['health']}")
    print(f"board      {result['board'] or 'unknown'} (profile {result['profile']})")
    print(f"models     {len(result['models'])} installed, {len(result['loaded'])} loaded")
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
    with Progress() as progress:
        client = AdminClient(str(paths.admin_socket))
        try:
            answer: dict[str, Any] = client.call(method, path, body, descriptors=descriptors, on_event=progress.event)
        except AgentError as error:
            if source is not None and source.problem is not None:
                raise source.problem from error
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
