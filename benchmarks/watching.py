"""A command, watched while it runs; what a function finds in a process of its own."""

from __future__ import annotations

import json
import subprocess
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from optimizer.worker import run_stage
from runners.console import Console

__all__ = ["found_apart", "watched"]

_EVERY_SECONDS = 0.1


def watched(command: list[str], environment: Mapping[str, str]) -> tuple[float, int]:
    """Seconds, and the largest resident size of the process and its children together.

    Raises CalledProcessError where it fails.
    """
    import psutil

    start, peak = time.monotonic(), 0
    child = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    process = psutil.Process(child.pid)
    while child.poll() is None:
        try:
            family = [process, *process.children(recursive=True)]
            peak = max(peak, sum(member.memory_info().rss for member in family))
        except psutil.Error:
            pass
        time.sleep(_EVERY_SECONDS)
    if child.returncode:
        raise subprocess.CalledProcessError(child.returncode, command)
    return time.monotonic() - start, peak


def found_apart(
    console: Console, title: str, target: str, arguments: tuple[object, ...]
) -> dict[str, Any]:
    """The JSON that the function `target`, "module:name", writes in a child process into the file
    that it is given last.
    """
    with tempfile.TemporaryDirectory() as private:
        out = Path(private) / "found.json"
        with console.stage(title) as stage:
            run_stage(target, (*arguments, out), progress=stage.progress)
        found: dict[str, Any] = json.loads(out.read_text("utf-8"))
    return found
