"""``edge-agent infer``: one request on ``infer.sock``, from files and to the terminal. What any app could send."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from agent.base.datatypes import ITEM_SIZE, NUMPY_NAME
from agent.base.errors import PeerError
from agent.base.paths import Paths
from agent.cli.commands import Commands, add_command, name_model
from agent.cli.terminal import print_json


def register(commands: Commands, common: argparse.ArgumentParser) -> None:
    """Add the command to the parser."""
    infer = add_command(commands, common, "infer", "ask a model once")
    name_model(infer)
    infer.add_argument(
        "-i",
        "--input",
        action="append",
        required=True,
        metavar="NAME=FILE",
        help="an input from FILE.npy, FILE.json or - (JSON on standard input); once for each input",
    )
    infer.add_argument("--version", dest="model_version", metavar="V", help="another version than the active one")
    infer.set_defaults(action=_infer)


def _infer(arguments: argparse.Namespace, paths: Paths) -> int:
    from agent.client import Client  # noqa: PLC0415 - brings numpy in

    with Client(str(paths.infer_socket)) as client:
        signature = client.metadata(arguments.model, arguments.model_version)["inputs"]
        datatypes = {spec["name"]: spec["datatype"] for spec in signature}
        inputs: dict[str, Any] = {}
        for name, array in (_read_input(text, datatypes) for text in arguments.input):
            if name in inputs:
                raise PeerError(f"cannot read input '{name}': it is given twice")
            inputs[name] = array
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
    except OSError as error:
        raise PeerError(f"cannot read input '{name}' from {file}: {error.strerror or error}") from error
    except json.JSONDecodeError as error:
        raise PeerError(
            f"cannot read input '{name}' from {file}: no JSON: {error}", hint="for a numpy array call the file NAME.npy"
        ) from error
    except ValueError as error:
        raise PeerError(f"cannot read input '{name}' from {file}: {error}") from error
    try:
        array = np.asarray(data)
    except ValueError as error:
        raise PeerError(f"cannot read input '{name}' from {file}: the lists in it are not all of one length") from error
    try:
        return name, _as_declared(array, datatypes.get(name))
    except (TypeError, ValueError, OverflowError) as error:
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
