"""The pages on manifests and own models are right: their examples parse, their commands run, no field is missing."""

from __future__ import annotations

import json
import re
import shlex
import textwrap
from pathlib import Path

import numpy as np
import pytest
from pydantic import BaseModel

from agent.bundles import manifest as manifest_module
from agent.bundles.manifest import Manifest
from agent.cli.fleet import main

DOCS = Path(__file__).parents[2] / "docs"
DEMO = Path(__file__).parents[2] / "deploy" / "demo"
REFERENCE = (DOCS / "reference" / "manifest.md").read_text(encoding="utf-8")
HOW_TO = (DOCS / "how-to" / "own-model.md").read_text(encoding="utf-8")


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^ *```{language}\n(.*?)^ *```", text, flags=re.MULTILINE | re.DOTALL)


def test_the_reference_lists_every_field() -> None:
    models = [kind for kind in vars(manifest_module).values() if isinstance(kind, type) and issubclass(kind, BaseModel)]
    fields = {name for kind in models for name in kind.model_fields}
    assert len(fields) > 40
    assert [name for name in sorted(fields) if f"`{name}`" not in REFERENCE] == []


def test_the_full_example_is_a_manifest_that_uses_everything() -> None:
    small, full = (json.loads(block) for block in blocks(REFERENCE, "json"))
    manifest = Manifest.model_validate_json(json.dumps(full))
    assert set(full) == set(Manifest.model_fields)
    assert manifest.variants[1].derived_from == "fp32"
    assert "sha256" not in json.dumps(small)


def test_the_commands_of_the_how_to_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    model = (DEMO / "digits.onnx").read_bytes()
    Path("detector.onnx").write_bytes(model)
    with np.load(DEMO / "digits-golden.npz") as data:
        (python,) = blocks(HOW_TO, "python")
        # The page says how many examples are sensible; the test takes fewer of them.
        fewer = textwrap.dedent(python).replace("200", "8").replace("300", "16")
        exec(fewer, {"images": data["image"], "labels": data["label"]})
    for name, made in (("detector", "fp32"), ("quantized", "int8")):
        Path(f"{name}.tflite").write_bytes((DEMO / f"digits-{made}.tflite").read_bytes())
    folder = Path("detector")
    folder.mkdir()
    for name in ("large.onnx", "pruned.onnx"):
        (folder / name).write_bytes(model)
    whole, joining = blocks(HOW_TO, "json")
    manifest = json.loads(whole) | json.loads(f"{{{joining}}}")
    (folder / "model.json").write_text(json.dumps(manifest), encoding="utf-8")
    images = np.zeros((2, 1, 8, 8), "f4")
    np.savez(folder / "golden.npz", **{"input/image": images, "output/scores": np.zeros((2, 10), "f4")})
    commands = [line for block in blocks(HOW_TO, "sh") for line in block.splitlines() if "edge-fleet pack" in line]
    assert len(commands) == 4
    for command in commands:
        assert main(shlex.split(command)[1:]) == 0, command
        assert capsys.readouterr().out.startswith("packed detector 1.0.0")
