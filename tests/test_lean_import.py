"""What loads no heavy library, so that `kiln --help` and a no-op compile take no seconds."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.tracked import ROOT

HEAVY = ("diffusers", "onnx", "onnxruntime", "onnxscript", "openvino", "torch", "transformers")

LEAN = ("profiles, runners, optimizer", "runners.cli", "optimizer.source", "optimizer.store")


def run(code: str) -> str:
    child = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert child.returncode == 0, child.stderr
    return child.stdout.strip()


def loaded_by(statement: str) -> str:
    return run(f"import sys; {statement}; print(*sorted(set({HEAVY}) & set(sys.modules)))")


def test_the_check_sees_a_heavy_import() -> None:
    assert loaded_by("import onnx") == "onnx"


@pytest.mark.parametrize("modules", LEAN)
def test_importing_loads_nothing_heavy(modules: str) -> None:
    assert loaded_by(f"import {modules}") == ""


def test_no_command_loads_anything_heavy_before_it_runs() -> None:
    """The modules that the lazy command table names, which `kiln COMMAND --help` imports."""
    code = (
        "from runners.cli import COMMANDS; from importlib import import_module;"
        "[import_module(target.partition(':')[0]) for target in COMMANDS.values()]"
    )
    assert loaded_by(code) == ""
