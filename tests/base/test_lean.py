"""What the cheaper import of pydantic must not change. Each in a fresh interpreter: this one has everything loaded."""

from __future__ import annotations

import subprocess
import sys


def run(script: str) -> str:
    """What the script prints."""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_building_a_model_reads_no_metadata_of_the_installation():
    seen = run(
        "import agent.base.lean\n"
        "from agent.base.config import Config\n"
        "import sys\n"
        "print(Config().server.deadline_s, 'email' in sys.modules, 'zipfile' in sys.modules)\n"
    )
    assert seen.split() == ["30.0", "False", "False"]


def test_the_real_module_answers_however_it_is_reached():
    seen = run(
        "import agent.base.lean, importlib.metadata, sys\n"
        "from importlib.metadata import PackageNotFoundError, entry_points\n"
        "assert issubclass(PackageNotFoundError, ImportError)\n"
        "assert entry_points(group='console_scripts') is not None\n"
        "print(importlib.metadata.version('pydantic'))\n"
        "print(type(sys.modules['importlib.metadata']).__name__, type(importlib.metadata).__name__)\n"
    )
    version, *kinds = seen.split()
    assert version[0].isdigit()
    assert kinds == ["module", "module"]


def test_a_module_that_is_loaded_already_stays():
    assert run("import importlib.metadata as m, sys, agent.base.lean; print(sys.modules[m.__name__] is m)") == "True\n"
