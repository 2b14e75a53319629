"""tflite-runtime, the only TFLite for 32-bit ARM: in an environment of its own, with numpy 1 and no other runtime."""

from __future__ import annotations

import json
import os
import subprocess

import pytest

from tests.environments import ROOT, environment, requirements

pytestmark = pytest.mark.slow
TFLITE = requirements("tflite")
#: Why numpy 2 is refused: the interpreter raises SystemError when it is made.
NUMPY_2 = [name for name in TFLITE if not name.startswith("numpy")] + ["numpy>=2"]

STATES = """
import json
from agent.infer.runtimes.probe import Runtimes
print(json.dumps({n: [s.usable, s.version, s.reason, s.mend] for n, s in Runtimes().states().items()}))
"""


def run(python, *arguments):
    done = subprocess.run(
        [str(python), *arguments],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdin=subprocess.DEVNULL, capture_output=True, text=True,
        timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-2000:]}"
    return done.stdout


def states(python):
    return json.loads(run(python, "-c", STATES))


def test_every_test_of_the_runtime_passes_with_it():
    python = environment("tflite-runtime", [*TFLITE, "pytest>=8", "hypothesis>=6.100"])
    usable, version, _, _ = states(python)["tflite"]
    assert usable
    assert version.endswith("(tflite-runtime)")
    out = run(python, "-m", "pytest", "-q", "-o", "cache_dir=.cache/pytest-tflite", "tests/infer/test_tflite.py")
    summary = out.strip().splitlines()[-1]
    assert "passed" in summary
    assert "skipped" not in summary


def test_beside_numpy_2_it_is_found_broken_with_the_mend():
    python = environment("tflite-runtime-numpy2", NUMPY_2)
    usable, version, reason, mend = states(python)["tflite"]
    assert not usable
    assert version.startswith("2.")
    assert "it was built for numpy 1, numpy 2." in reason
    assert mend == "pip install 'numpy<2'"


def test_with_no_runtime_each_is_said_to_be_missing():
    python = environment("no-runtime", requirements())
    assert states(python) == {"onnx": [False, "", "not installed", ""], "tflite": [False, "", "not installed", ""]}
