"""kill -9 at random points of compiles: nothing finished is lost, nothing half is seen."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from optimizer.inventory import damages, entry_folders
from optimizer.store import Store
from runners.bundle import open_bundle
from tests.tiny_pipelines import tiny_sd
from tests.tracked import ROOT

pytestmark = [
    pytest.mark.faults,
    pytest.mark.skipif(sys.platform == "win32", reason="forks"),
]

POINTS = 200
LIMIT_SECONDS = float(os.environ.get("KILN_FAULT_SECONDS", "3600"))
"""Fewer points are tried where the machine is too slow for all of them."""


class Compiler:
    """Starts compiles, kills them, and says how they ended."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "tests.optimizer.compile_faults"]
        pipe = subprocess.PIPE
        self._child = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=ROOT)
        assert self._line() == "ready"

    def _line(self) -> str:
        assert self._child.stdout is not None
        return self._child.stdout.readline().strip()

    def run(self, *arguments: Any, kill_after: float | None) -> int:
        """The exit code of a compile that is killed after so many seconds, or isn't."""
        assert self._child.stdin is not None
        self._child.stdin.write(json.dumps([kill_after, *arguments]) + "\n")
        self._child.stdin.flush()
        return int(self._line())

    def close(self) -> None:
        self._child.communicate()


@pytest.fixture
def compiler() -> Iterator[Compiler]:
    found = Compiler()
    yield found
    found.close()


def test_a_compile_that_is_killed_anywhere_loses_nothing_and_goes_on(
    compiler: Compiler, tmp_path: Path
) -> None:
    """A random tiny pipeline; killed at a random time again and again until it is done."""
    points, limit = random.Random(POINTS), time.monotonic() + LIMIT_SECONDS
    kills = bundles = 0
    while kills < POINTS and time.monotonic() < limit:
        folder = tmp_path / f"{bundles}"
        backend = points.choice(["eager", "onnxruntime"])
        options = {"backend": backend, "quant": "none", "lora": False}
        model = tiny_sd(folder / "model", seed=points.randrange(1000))
        arguments = (str(model), str(folder / "out"), str(folder / "cache"), options)
        kills += _kill_until_done(compiler, arguments, points, limit)
        assert compiler.run(*arguments, kill_after=None) == 0
        open_bundle(folder / "out")
        bundles += 1
        shutil.rmtree(folder)
    print(f"kill -9 at {kills} points of compiles, {bundles} bundles finished and verified")
    assert kills > 0


def _kill_until_done(
    compiler: Compiler, arguments: tuple[Any, ...], points: random.Random, limit: float
) -> int:
    """How often a compile was killed before it was finished, or time was up.

    It gets more time after each kill that came before a stage was finished, however slow that is.
    """
    store, out, kills, seen, most = Store(arguments[2]), Path(arguments[1]), 0, set[Path](), 1.0
    while time.monotonic() < limit:
        code = compiler.run(*arguments, kill_after=points.uniform(0, most))
        assert list(damages(store, lambda _size: None)) == []
        entries = set(entry_folders(store))
        assert seen <= entries
        most = 1.0 if seen < entries else 1.3 * most
        seen = entries
        if out.exists():
            open_bundle(out)
        if code == 0:
            return kills
        assert code == -signal.SIGKILL
        kills += 1
    return kills
